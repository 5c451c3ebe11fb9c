"""The CUDA source of kernels, run on the processor thread by thread: what they do is proven without a device.

The source is rewritten (`translation`, `ptx`) and compiled together with a runtime (templates/cuda/emulator) in which every device
thread is a fiber. Shared memory and what asynchronous copies have not delivered yet hold NaN, so that a missing wait or barrier
shows; accesses outside of memory, divergent warps, deadlocks and misaligned copies end the launch with a message.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import EmulationError
from .architectures import parse
from .native import library

ORDERS = ("ascending", "descending", "shuffled")
_MESSAGE_BYTES = 4096
_TENSOR_MAP_BYTES = 128
_TENSOR_TYPES = {1: 0, 2: 1, 4: 2, 8: 4}  # unsigned integers of so many bytes: copies do not look at what they copy
_SWIZZLES = (0, 32, 64, 128)


@dataclass(frozen=True)
class Kernel:
    """A kernel of an emulated source.

    Args:
        name: as the source has it.
        parameters: of each its kind (`p` pointer, `i` integer, `f` floating point, `s` structure) and its bytes.
        max_threads: the first number of `__launch_bounds__`, 0 without.
        static_shared_bytes: of its own `__shared__` variables.
    """

    name: str
    parameters: tuple[tuple[str, int], ...]
    max_threads: int
    static_shared_bytes: int


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("parameters", ctypes.c_int),
        ("max_threads", ctypes.c_int),
        ("static_shared", ctypes.c_int),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("threads", ctypes.c_uint),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    ]


class Emulated:
    """A CUDA source compiled for this processor.

    Args:
        source: CUDA C with `extern "C" __global__` kernels, as nvcc takes it.
        folder: where the library and its parts are made; what is there already is not made again.
        arch: what `__CUDA_ARCH__` says, for example `sm_80` or `sm_90a`.

    Attributes:
        path: the library; in `$MOEGEN_EMULATED_KERNELS` of the emulated driver.
        kernels: by name.

    Raises:
        EmulationError: the source uses what is not emulated, or does not compile.
        BuildError: there is no C++ compiler.
        TargetError: the architecture is not known.
    """

    def __init__(self, source: str, folder: str | os.PathLike[str], *, arch: str = "sm_90") -> None:
        self._shared_limit = parse([arch])[0].max_shared_bytes_per_block
        self.path = library(source, pathlib.Path(folder), arch)
        self._library = ctypes.CDLL(str(self.path))
        self.kernels = {kernel.name: kernel for kernel in self._found()}

    def _found(self) -> list[Kernel]:
        found: list[Kernel] = []
        at = _Kernel()
        while self._library.moegen_emulator_kernel(len(found), ctypes.byref(at)):
            kinds = []
            for i in range(at.parameters):
                kind = ctypes.c_char()
                size = self._library.moegen_emulator_parameter(at.name, i, ctypes.byref(kind))
                kinds.append((kind.value.decode(), size))
            found.append(Kernel(at.name.decode(), tuple(kinds), at.max_threads, at.static_shared))
        return found

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        *,
        order: Literal["ascending", "descending", "shuffled"] = "ascending",
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        """Runs a kernel to its end.

        Args:
            grid, block: sizes, x first; missing ones are 1.
            args: one for each parameter: NumPy arrays (C-contiguous; changed in place) or addresses for pointers, None for a null
                pointer, numbers, and bytes or arrays for structures.
            shared_bytes: of dynamic shared memory.
            order: in which threads and blocks run when several could. `shuffled` finds missing barriers that a fixed order hides.
            seed: of `shuffled`.
            threads: of this processor, which run blocks at the same time.

        Raises:
            EmulationError: there is no such kernel, the arguments do not fit it, or it did what a device would refuse.
        """
        kernel = self.kernels.get(name)
        if kernel is None:
            raise EmulationError(f"there is no kernel {name}, there are {', '.join(sorted(self.kernels)) or 'none'}")
        if len(args) != len(kernel.parameters):
            raise EmulationError(f"kernel {name} has {len(kernel.parameters)} parameters, {len(args)} arguments were given")
        if kernel.static_shared_bytes + shared_bytes > self._shared_limit:
            needed = kernel.static_shared_bytes + shared_bytes
            raise EmulationError(f"kernel {name}: a block's shared memory in bytes is {needed}, the limit is {self._shared_limit}")
        held = [_passed(kernel, i, arg) for i, arg in enumerate(args)]
        addresses = (ctypes.c_void_p * max(len(held), 1))(*(ctypes.addressof(value) for value in held))
        request = _Launch(name.encode(), _three(grid), _three(block), shared_bytes, threads, ORDERS.index(order), seed, addresses)
        message, fault = ctypes.create_string_buffer(_MESSAGE_BYTES), ctypes.c_void_p()
        if self._library.moegen_emulator_launch(ctypes.byref(request), message, _MESSAGE_BYTES, ctypes.byref(fault)):
            raise EmulationError(message.value.decode(errors="replace") + _nearest(fault.value, args))

    def bank_conflicts(self) -> int:
        """Rows that `ldmatrix` and `stmatrix` took later than others, whose banks they share, since this was last asked."""
        count = self._library.moegen_emulator_conflicts
        count.restype = ctypes.c_int64
        return int(count())

    def tensor_map(self, array: np.ndarray[Any, np.dtype[Any]], box: Sequence[int], swizzle_bytes: int = 0) -> bytes:
        """A `CUtensorMap` argument, as cuTensorMapEncodeTiled makes it.

        Args:
            array: C-contiguous, of up to five dimensions; it has to stay where it is.
            box: elements that one copy takes along each dimension, in the array's order (the innermost last).
            swizzle_bytes: 0, 32, 64 or 128.

        Raises:
            EmulationError: the driver would refuse it.
        """
        made, message = ctypes.create_string_buffer(_TENSOR_MAP_BYTES), ctypes.create_string_buffer(_MESSAGE_BYTES)
        rank = array.ndim
        dims = (ctypes.c_uint64 * rank)(*reversed(array.shape))
        strides = (ctypes.c_uint64 * rank)(*reversed(array.strides[:-1]))
        sizes = (ctypes.c_uint32 * rank)(*reversed(box))
        kind, swizzle = _TENSOR_TYPES[array.dtype.itemsize], _SWIZZLES.index(swizzle_bytes)
        refused = self._library.moegen_emulator_tensor_map(
            made, kind, rank, ctypes.c_uint64(array.ctypes.data), dims, strides, sizes, swizzle, message, _MESSAGE_BYTES
        )
        if refused:
            raise EmulationError(message.value.decode())
        return made.raw


def _three(size: int | Sequence[int]) -> Any:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


def _passed(kernel: Kernel, index: int, arg: Any) -> Any:
    """An argument as bytes in memory of the parameter's size."""
    kind, size = kernel.parameters[index]
    where = f"kernel {kernel.name}, argument {index}"
    if kind == "p":
        if isinstance(arg, np.ndarray):
            if not arg.flags.c_contiguous:
                raise EmulationError(f"{where}: the array of strides {arg.strides} is not contiguous")
            return ctypes.c_void_p(arg.ctypes.data)
        if arg is None or isinstance(arg, int | np.integer):
            return ctypes.c_void_p(None if arg is None else int(arg))
        raise EmulationError(f"{where} is a pointer, {type(arg).__name__} was given")
    if kind == "s":
        content = arg.tobytes() if isinstance(arg, np.ndarray) else bytes(arg)
    elif kind == "f":
        content = np.array(arg, dtype=f"f{size}").tobytes()
    else:
        content = (int(arg) & (1 << 8 * size) - 1).to_bytes(size, "little")
    if len(content) != size:
        raise EmulationError(f"{where} has {size} bytes, {len(content)} were given")
    return (ctypes.c_char * size).from_buffer_copy(content)


def _nearest(fault: int | None, args: Sequence[Any]) -> str:
    """Which array an address lies beside, for the message."""
    if not fault:
        return ""
    best: tuple[int, str] | None = None
    for i, arg in enumerate(args):
        if not isinstance(arg, np.ndarray):
            continue
        begin, end = arg.ctypes.data, arg.ctypes.data + arg.nbytes
        away, side = (fault - end, "after the end") if fault >= end else (begin - fault, "before the beginning")
        if away >= 0 and (best is None or away < best[0]):
            best = away, f": {away} bytes {side} of argument {i}, {arg.dtype}{list(arg.shape)}"
    return best[1] if best is not None and best[0] < 1 << 24 else ""
