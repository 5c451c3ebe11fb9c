"""The CUDA target: from a configuration to machine code of NVIDIA devices, without one."""
