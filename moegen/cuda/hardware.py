"""A CUDA device of this machine as NVIDIA's driver describes it; nothing is made on it for asking."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

_NAME_BYTES = 256
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_ATTRIBUTES = {"l2_bytes": 38, "multiprocessors": 16, "clock_khz": 13, "memory_clock_khz": 36}  # the same enumeration's numbers


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as far as measurements depend on it.

    Args:
        name: `NVIDIA H200`.
        capability: compute capability, (major, minor).
        l2_bytes: size of the second-level cache.
        memory_bytes: all memory.
        multiprocessors: how many.
        clock_khz: the highest of the multiprocessors.
        memory_clock_khz: the highest of the memory.
        driver: version of CUDA that the driver has, 13000 for 13.0.
    """

    name: str
    capability: tuple[int, int]
    l2_bytes: int
    memory_bytes: int
    multiprocessors: int = 0
    clock_khz: int = 0
    memory_clock_khz: int = 0
    driver: int = 0


def device(ordinal: int = 0) -> Device | None:
    """One of this machine's devices; None where there is none, or no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, text, memory = ctypes.c_int(0), ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t(0)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), ordinal):
        return None
    if driver.cuDeviceGetName(text, _NAME_BYTES, handle) or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle):
        return None
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    major, minor = (_attribute(driver, which, handle) for which in (_MAJOR, _MINOR))
    numbers = {name: _attribute(driver, which, handle) for name, which in _ATTRIBUTES.items()}
    name = text.value.decode(errors="replace")
    return Device(name, (major, minor), memory_bytes=memory.value, driver=version.value, **numbers)


def name() -> str:
    """Of the first device; empty where there is none."""
    found = device()
    return found.name if found else ""


def _attribute(driver: Any, which: int, handle: Any) -> int:
    value = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
    return value.value
