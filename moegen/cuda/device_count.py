"""How many CUDA devices this machine has, by NVIDIA's driver itself."""

from __future__ import annotations

import ctypes


def devices() -> int:
    """0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
