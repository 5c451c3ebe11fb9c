"""Everything that is run once a GPU is at hand, in one go: `python -m moegen.field --out FOLDER`.

The proof on the device, the GPU tests, NVIDIA's checker, and the expert path measured against what others compute it with. Nothing
here makes up a number: without a device there are none. Modules that import torch are loaded by the measuring process only.
"""
