"""Arrays that stand in for device memory: what comes after their last byte cannot be touched."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

_PROT_NONE, _PROT_READ_WRITE, _MAP_NORESERVE = 0, mmap.PROT_READ | mmap.PROT_WRITE, 0x4000
_GUARD_BYTES = 16 << 20  # inaccessible on each side: address space, no memory
_POISON = 0xFF  # NaN as any floating-point number, -1 as any integer


def device_array(shape: int | Sequence[int], dtype: Any, align: int = 16) -> np.ndarray[Any, np.dtype[Any]]:
    """An array of poison whose end touches an inaccessible page; so does its beginning's page.

    Args:
        align: a power of two, of its address. Up to `align - 1` bytes after the end are still accessible; they are poison too.

    Raises:
        MemoryError: there is none.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    kind = np.dtype(dtype)
    count = int(np.prod(sizes, dtype=np.int64)) * kind.itemsize
    room = -(-max(count, 1) // align) * align
    inner = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE
    libc = _libc()
    outer = inner + 2 * _GUARD_BYTES
    base = libc.mmap(None, outer, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"no memory for {outer} bytes")
    libc.mprotect(base + _GUARD_BYTES, inner, _PROT_READ_WRITE)
    buffer = (ctypes.c_ubyte * room).from_address(base + _GUARD_BYTES + inner - room)
    weakref.finalize(buffer, libc.munmap, base, outer)
    content = np.frombuffer(buffer, dtype=np.uint8)
    content[:] = _POISON
    made: np.ndarray[Any, np.dtype[Any]] = content[:count].view(kind).reshape(sizes)
    return made


def on_device(array: np.ndarray[Any, np.dtype[Any]], align: int = 16) -> np.ndarray[Any, np.dtype[Any]]:
    """A copy of an array in guarded memory."""
    made = device_array(array.shape, array.dtype, align)
    made[...] = array
    return made


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
