"""Arrays of any origin as tensors of a CUDA device, and results as arrays of that origin: torch, DLPack and host memory."""

from __future__ import annotations

import abc
import sys
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tvm_ffi

from . import arrays
from .arrays import HostArray
from .config import MoEConfig
from .errors import InputError

CUDA = 2  # DLPack's kDLCUDA
_NUMPY_OF = {"int32": np.int32, "float32": np.float32, "float64": np.float64}

Array = npt.NDArray[Any]


class Memory(Protocol):
    """The memory of a device, as a loaded module has it."""

    config: MoEConfig
    device: int

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Uninitialised memory, as a tvm_ffi tensor."""

    def view(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        """A contiguous tensor with another shape, sharing its memory."""

    def upload(self, array: Array, dtype: str) -> Any:
        """A contiguous array of host memory, copied to the device."""

    def download(self, tensor: Any, to: Array) -> None:
        """Copies a device's tensor to host memory and waits for it."""


class Kind(abc.ABC):
    """How arrays of one origin become tensors of the device, and results arrays of that origin."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @abc.abstractmethod
    def rows(self, x: Any, name: str, dtype: str, writing: bool) -> tuple[Any, tuple[int, ...]]:
        """(contiguous data on the device, shape)."""

    @abc.abstractmethod
    def flat(self, data: Any, tokens: int, hidden: int) -> Any:
        """The same data as [tokens, hidden]."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Uninitialised memory of the device."""
        return self.memory.empty(shape, dtype)

    @abc.abstractmethod
    def result(self, made: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """What the caller gets."""

    @abc.abstractmethod
    def written(self, data: Any, out: Any, dtype: str) -> None:
        """After `data`, the rows of `out`, were written."""

    @abc.abstractmethod
    def table(self, value: Any, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        """`value` as a table [T, K] on the device."""


class Torch(Kind):
    """torch tensors on the device."""

    def rows(self, x: Any, name: str, dtype: str, writing: bool) -> tuple[Any, tuple[int, ...]]:
        given = str(x.dtype).removeprefix("torch.")
        if given != dtype:
            raise InputError(f"{name} has dtype {given}, this layer takes {dtype}: convert it first")
        if writing and not x.is_contiguous():
            raise InputError(f"{name} must be contiguous")
        return x.detach().contiguous(), tuple(x.shape)

    def flat(self, data: Any, tokens: int, hidden: int) -> Any:
        return data.view(tokens, hidden)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=f"cuda:{self.memory.device}")

    def result(self, made: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return made.view(shape)

    def written(self, data: Any, out: Any, dtype: str) -> None:
        """It is the caller's own memory."""

    def table(self, value: Any, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        torch = sys.modules["torch"]
        if torch_device(value) is None:
            raise InputError(f"{name} must be a torch tensor, as x is")
        if tuple(value.shape) != shape:
            raise InputError(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
        if dtype == "int32" and (value.dtype.is_floating_point or value.dtype == torch.bool):
            raise InputError(f"{name} must be integers, not {str(value.dtype).removeprefix('torch.')}")
        if dtype == "int32" and value.dtype == torch.int64:  # what does not fit must not come back as another expert
            value = value.clamp(-1, 2**31 - 1)
        return value.detach().to(device=f"cuda:{self.memory.device}", dtype=getattr(torch, dtype)).contiguous()


class Foreign(Kind):
    """Other DLPack arrays on the device; results are of the library that x came from, if it has a `from_dlpack`."""

    def __init__(self, memory: Memory, library: str) -> None:
        super().__init__(memory)
        self.library = library

    def rows(self, x: Any, name: str, dtype: str, writing: bool) -> tuple[Any, tuple[int, ...]]:
        tensor = self._tensor(x, name)
        if str(tensor.dtype) != dtype:
            raise InputError(f"{name} has dtype {tensor.dtype}, this layer takes {dtype}: convert it first")
        return tensor, tuple(int(extent) for extent in tensor.shape)

    def _tensor(self, x: Any, name: str) -> Any:
        tensor = x if isinstance(x, tvm_ffi.Tensor) else tvm_ffi.from_dlpack(x)
        if not tensor.is_contiguous():
            raise InputError(f"{name} must be contiguous")
        return tensor

    def flat(self, data: Any, tokens: int, hidden: int) -> Any:
        return self.memory.view(data, (tokens, hidden))

    def result(self, made: Any, shape: tuple[int, ...], dtype: str) -> Any:
        tensor = self.memory.view(made, shape)
        convert = getattr(sys.modules.get(self.library), "from_dlpack", None)
        return tensor if convert is None or self.library == "tvm_ffi" else convert(tensor)

    def written(self, data: Any, out: Any, dtype: str) -> None:
        """It is the caller's own memory."""

    def table(self, value: Any, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        tensor = self._tensor(value, name)
        if str(tensor.dtype) != dtype or tuple(int(extent) for extent in tensor.shape) != shape:
            raise InputError(f"{name} must be {dtype} {list(shape)}")
        return tensor


class Host(Kind):
    """Arrays in host memory, copied to the device and back."""

    def __init__(self, memory: Memory, original: Any) -> None:
        super().__init__(memory)
        self.original = original

    def rows(self, x: Any, name: str, dtype: str, writing: bool) -> tuple[Any, tuple[int, ...]]:
        given = arrays.as_host_array(x, name)
        if given.dtype != dtype and (writing or not (dtype == "float32" and given.dtype in ("float16", "bfloat16"))):
            raise InputError(f"{name} has dtype {given.dtype}, this layer takes {dtype}: convert it first")
        if writing and not given.data.flags.writeable:
            raise InputError(f"{name} is read-only")
        return np.ascontiguousarray(arrays.to_storage(given, dtype)).reshape(given.shape), given.shape

    def flat(self, data: Any, tokens: int, hidden: int) -> Any:
        return self.memory.upload(data.reshape(tokens, hidden), self.memory.config.dtype)

    def result(self, made: Any, shape: tuple[int, ...], dtype: str) -> Any:
        host = arrays.empty_aligned(shape, dtype if dtype in arrays.STORAGE else np.dtype(_NUMPY_OF[dtype]))
        self.memory.download(made, host)
        return arrays.like_input(host, dtype, self.original)

    def written(self, data: Any, out: Any, dtype: str) -> None:
        to = arrays.as_host_array(out, "out")
        host = arrays.empty_aligned(to.shape, dtype)
        self.memory.download(data, host)
        to.data[...] = host

    def table(self, value: Any, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        given = arrays.as_host_array(value, name)
        if given.shape != shape:
            raise InputError(f"{name} has shape {list(given.shape)}, expected {list(shape)}")
        if dtype == "float32":
            return self.memory.upload(np.ascontiguousarray(arrays.to_float32(given)), dtype)
        if given.data.dtype.kind not in "iu" or given.dtype == "bfloat16":
            raise InputError(f"{name} must be integers, not {given.dtype}")
        experts = self.memory.config.experts
        outside = (given.data < 0) | (given.data >= experts)
        if outside.any():
            t, k = (int(i) for i in np.argwhere(outside)[0])
            raise InputError(f"{name}[{t}, {k}]={int(given.data[t, k])} must be between 0 and {experts - 1}")
        return self.memory.upload(np.ascontiguousarray(given.data.astype(np.int32, copy=False)), dtype)


def kind_of(x: Any, name: str, memory: Memory) -> Kind:
    """Raises an InputError for what is on another device."""
    place = torch_device(x)
    if place is not None and place.type == "cuda":
        if place.index != memory.device:
            raise InputError(f"{name} is on device {str(place)!r}, the layer is on 'cuda:{memory.device}'")
        return Torch(memory)
    if place is None and not isinstance(x, np.ndarray | np.generic | HostArray) and hasattr(x, "__dlpack_device__"):
        kind, index = (int(part) for part in x.__dlpack_device__())
        if kind == CUDA:
            if index != memory.device:
                raise InputError(f"{name} is on device 'cuda:{index}', the layer is on 'cuda:{memory.device}'")
            return Foreign(memory, type(x).__module__.split(".")[0])
    return Host(memory, x)


def torch_device(x: Any) -> Any:
    """The device of a torch tensor; None of what is no torch tensor."""
    torch = sys.modules.get("torch")
    return x.device if torch is not None and isinstance(x, torch.Tensor) else None
