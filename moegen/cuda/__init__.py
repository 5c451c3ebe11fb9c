"""The CUDA target: NVIDIA's architectures, finding and driving NVIDIA's compilers, and what is in the machine code they make."""
