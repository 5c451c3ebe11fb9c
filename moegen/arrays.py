"""Host arrays of any origin: NumPy, torch and DLPack in and out without copies, storage types, aligned memory.

bfloat16 has no NumPy dtype of its own, so its bits travel in uint16 arrays and the dtype's name travels beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import mmap
import sys
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .errors import InputError, MoegenError

Array = npt.NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}
FLOATS = ("float64", "float32", "bfloat16", "float16")

_NUMBER_KINDS = "fiub"
_MAX_FLOAT_BYTES = 8  # float128 has no kernel and no exact way down
_CPU_DEVICES = (1, 3, 11)  # DLPack's kDLCPU, kDLCUDAHost, kDLROCMHost: memory that the CPU may read
_DEVICE_NAMES = {2: "cuda", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm", 13: "cuda_managed", 14: "oneapi"}
_HUGE_BYTES = 4 << 20
_HUGE_PAGE = 2 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class HostArray:
    """A strided view of host memory and the name of its dtype ("bfloat16" is carried as uint16 bits)."""

    data: Array
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


# ---------------------------------------------------------------- in


def as_host_array(obj: Any, name: str, error: type[MoegenError] = InputError) -> HostArray:
    """`obj` as a `HostArray`, sharing its memory and keeping its strides.

    Args:
        obj: a NumPy array or scalar (ml_dtypes' bfloat16 included), a torch tensor on the CPU (gradients are ignored), or
            anything with `__dlpack__` on the CPU. Only big-endian arrays are copied.
        name: what the messages call it.
        error: the exception to raise.

    Raises:
        error: not an array, not of real numbers, or not in host memory.
    """
    if isinstance(obj, HostArray):
        return obj
    if isinstance(obj, np.ndarray | np.generic):
        return _from_numpy(obj, name, error)
    if _is_torch_tensor(obj):
        return _from_torch(obj, name, error)
    if hasattr(obj, "__dlpack__") and hasattr(obj, "__dlpack_device__"):
        return _from_dlpack(obj, name, error)
    raise error(f"{name} must be a NumPy array, a torch tensor or another DLPack array, not {_type_name(obj)}")


def _from_numpy(obj: Any, name: str, error: type[MoegenError]) -> HostArray:
    if type(obj).__module__.startswith("numpy.ma"):  # not np.ma, which would import it
        raise error(f"{name} is a masked array, and a mask cannot be honoured: fill it first")
    array = np.asarray(obj)
    dtype = array.dtype
    kind = _name_of(dtype)
    if kind == "bfloat16" and dtype.itemsize == 2:  # ml_dtypes', recognised without importing it
        return HostArray(array.view(np.uint16), "bfloat16")
    if dtype.kind not in _NUMBER_KINDS or (dtype.kind == "f" and dtype.itemsize > _MAX_FLOAT_BYTES):
        raise error(f"{name} has dtype {kind}, expected one of {', '.join(FLOATS)}")
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    return HostArray(array, kind)


@functools.lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[Any]) -> str:
    """`dtype.name`, which NumPy puts together anew each time, in microseconds."""
    name: str = dtype.name
    return name


def _is_torch_tensor(obj: Any) -> bool:
    return any(c.__name__ == "Tensor" and c.__module__.split(".")[0] == "torch" for c in type(obj).__mro__)


def _from_torch(tensor: Any, name: str, error: type[MoegenError]) -> HostArray:
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise error(f"{name} is on device {str(tensor.device)!r}; move it to the CPU first (.cpu())")
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        tensor = tensor.detach()
        if dtype == "bfloat16":
            return HostArray(tensor.view(torch.int16).numpy().view(np.uint16), dtype)
        return _from_numpy(tensor.numpy(), name, error)
    except (TypeError, RuntimeError) as reason:  # sparse, quantized, float8, a subclass without storage ...
        raise error(f"{name} is a torch tensor ({dtype}, {tensor.layout}) without a NumPy view: {_line(reason)}") from reason


def _from_dlpack(obj: Any, name: str, error: type[MoegenError]) -> HostArray:
    try:
        kind, index = (int(part) for part in obj.__dlpack_device__())
    except Exception as reason:  # foreign code may raise anything
        _refuse(obj, name, error, reason)
    if kind not in _CPU_DEVICES:
        device = f"{_DEVICE_NAMES.get(kind, f'DLPack device type {kind}')}:{index}"
        raise error(f"{name} is on device {device!r}; move it to the CPU first")
    try:
        return _from_numpy(np.from_dlpack(obj), name, error)
    except error:
        raise
    except Exception as reason:  # NumPy refuses bfloat16 with an error that depends on its version
        return _from_dlpack_bits(obj, name, error, reason)


def _from_dlpack_bits(obj: Any, name: str, error: type[MoegenError], reason: Exception) -> HostArray:
    """A bfloat16 DLPack array, whose dtype NumPy does not know, as uint16 bits."""
    try:
        # tvm_ffi takes tens of milliseconds to import, which callers who only hold NumPy arrays should not pay.
        import tvm_ffi

        tensor = obj if isinstance(obj, tvm_ffi.Tensor) else tvm_ffi.from_dlpack(obj)
        dtype, shape, strides = str(tensor.dtype), tuple(tensor.shape), tuple(tensor.strides)
    except Exception as second:
        _refuse(obj, name, error, second)
    if dtype != "bfloat16":
        _refuse(obj, name, error, reason)
    if 0 in shape:
        return HostArray(np.empty(shape, np.uint16), dtype)
    return HostArray(np.asarray(_Exported(tensor, tensor.data_ptr(), shape, strides)), dtype)


class _Exported:
    """uint16 elements at an address, in NumPy's array interface; the array that NumPy makes of it keeps the owner alive."""

    def __init__(self, owner: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "<u2" if sys.byteorder == "little" else ">u2",
            "shape": shape,
            "strides": tuple(2 * stride for stride in strides),
            "data": (address, False),
        }


def _refuse(obj: Any, name: str, error: type[MoegenError], reason: Exception) -> NoReturn:
    raise error(f"{name} is a {_type_name(obj)} that cannot be read as an array: {_line(reason)}") from reason


def _type_name(obj: Any) -> str:
    kind = type(obj)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _line(reason: Exception) -> str:
    return " ".join(str(reason).split()) or type(reason).__name__


# ---------------------------------------------------------------- between types


def to_float32(array: HostArray) -> npt.NDArray[np.float32]:
    """The values as float32, exact for bfloat16 and float16; the array itself if it is float32 already.

    Raises:
        InputError: the array does not hold floating-point numbers.
    """
    _check_float(array)
    if array.dtype == "bfloat16":
        return np.asarray(array.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if array.dtype == "float32":
        return array.data
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(array.data.astype(np.float32, copy=False))


def to_storage(array: HostArray, dtype: str) -> Array:
    """The values rounded to `dtype`, to nearest and ties to even; the array itself if it is of that type already.

    NaN stays NaN, and what is too large for `dtype` becomes infinite (above 65504 for float16).

    Returns:
        float32, float16, or for bfloat16 uint16 bits.

    Raises:
        InputError: the array does not hold floating-point numbers, or `dtype` is not a storage type.
    """
    _check_float(array)
    if dtype not in STORAGE:
        raise InputError(f"dtype={dtype!r} must be one of {', '.join(STORAGE)}")
    if array.dtype == dtype:
        return array.data
    if dtype == "float32":
        return to_float32(array)
    if dtype == "bfloat16":
        odd = _round_to_odd(array.data) if array.dtype == "float64" else to_float32(array)
        return _bfloat16_bits(odd)
    source = array.data if array.dtype == "float64" else to_float32(array)
    with np.errstate(over="ignore", invalid="ignore"):
        return source.astype(np.float16)


def _check_float(array: HostArray) -> None:
    if array.dtype not in FLOATS:
        raise InputError(f"an array of {array.dtype} does not hold floating-point numbers ({', '.join(FLOATS)})")


def _bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    # The carry could turn a NaN into an infinity; keep its upper half and set the quiet bit instead.
    rounded = np.where(np.isnan(values), bits | np.uint32(0x00400000), rounded)
    return np.asarray(rounded >> np.uint32(16)).astype(np.uint16)


def _round_to_odd(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """float64 to float32, inexact values to the neighbour with an odd last bit: rounding again to bfloat16 is then exact."""
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = np.ascontiguousarray(values, np.float32).reshape(values.shape)
        bits = nearest.view(np.uint32)
        back = nearest.astype(np.float64)
        inexact = (back != values) & ~np.isnan(values)
        outward = np.abs(back) > np.abs(values)
    toward_zero = bits - (inexact & outward).astype(np.uint32)
    return np.asarray(np.where(inexact, toward_zero | np.uint32(1), bits)).view(np.float32)


# ---------------------------------------------------------------- out


def like_input(result: Array, dtype: str, original: Any) -> Any:
    """`result` as the kind of array that `original` came in, sharing its memory.

    Args:
        result: an array of type `dtype`, bfloat16 as uint16 bits.
        original: what the caller passed. torch tensors give torch tensors, NumPy arrays NumPy arrays (of ml_dtypes' bfloat16
            where the original is; without one to borrow, bfloat16 stays uint16 bits), other DLPack arrays a tvm_ffi tensor
            (for bfloat16, which NumPy cannot hand over, uint16 bits in NumPy).
    """
    if isinstance(original, np.ndarray | np.generic):
        if dtype == "bfloat16" and _name_of(original.dtype) == "bfloat16":
            return result.view(original.dtype)
        return result
    if isinstance(original, HostArray):
        return HostArray(result, dtype)
    if _is_torch_tensor(original):
        torch = sys.modules["torch"]
        if dtype == "bfloat16":
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(result)
    if dtype == "bfloat16":
        return result
    # Only callers who brought a DLPack array of another library pay for this import.
    import tvm_ffi

    return tvm_ffi.from_dlpack(result)


# ---------------------------------------------------------------- memory


def empty_aligned(shape: int | tuple[int, ...], dtype: npt.DTypeLike, alignment: int = 64) -> Array:
    """An uninitialised C-contiguous array that starts at a multiple of `alignment` bytes.

    From 4 MiB on it lies in its own anonymous mapping, aligned to and advised for huge pages.

    Args:
        dtype: a NumPy dtype or the name of a storage type ("bfloat16" gives uint16).
        alignment: a power of two.
    """
    if alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"alignment={alignment} must be a power of two")
    kind: np.dtype[Any] = STORAGE[dtype] if isinstance(dtype, str) and dtype in STORAGE else np.dtype(dtype)
    dims = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = math.prod(dims) * kind.itemsize
    huge = nbytes >= _HUGE_BYTES
    if huge:
        alignment = max(alignment, _HUGE_PAGE)
    raw = _anonymous(nbytes + alignment) if huge else np.empty(nbytes + alignment, np.uint8)
    address: int = raw.__array_interface__["data"][0]
    start = -address % alignment
    array: Array = np.ndarray(dims, kind, buffer=raw, offset=start)  # a slice would lose its address when empty
    return array


def _anonymous(nbytes: int) -> npt.NDArray[np.uint8]:
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.empty(nbytes, np.uint8)
    # Private: the default, a shared mapping, is shared memory to the kernel and gets no transparent huge pages.
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages; the memory is as good
            region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, np.uint8)


def is_aligned(array: Array, alignment: int = 64) -> bool:
    """Whether the array's first element is at a multiple of `alignment` bytes."""
    address: int = array.__array_interface__["data"][0]
    return address % alignment == 0
