"""Running a compiled layer on a CUDA device: NVIDIA's driver and tvm-ffi only, neither a compiler nor CUDA's runtime library.

`DeviceModule.bind` packs weights into the device's memory once; the `DeviceLayer` it returns is called.
"""

from __future__ import annotations

import math
import operator
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tvm_ffi

from . import arrays
from .arrays import HostArray
from .artifact import Artifact
from .config import MoEConfig
from .device_arrays import CUDA, Kind, Torch, kind_of, torch_device
from .errors import ArtifactError, InputError
from .moepack import is_moepack, payload_for
from .packing import Packer, readable
from .routing import Routing, routing_of
from .weights import WeightSource, resolve

Array = npt.NDArray[Any]
_FUNCTIONS = (
    "forward", "route", "experts", "workspace_bytes", "pack", "empty", "view", "copy", "clear", "prepare", "device_count", "time",
)  # fmt: skip


class DeviceModule:
    """A loaded layer without weights, for CUDA devices.

    Args:
        device: the device that layers are on.

    Raises:
        ArtifactError: it cannot be loaded, there is no such device or it runs none of the layer's machine code.
    """

    def __init__(self, artifact: Artifact, device: int = 0) -> None:
        self.artifact = artifact
        self.config: MoEConfig = artifact.config
        self.device = device
        try:
            self._library = tvm_ffi.load_module(str(artifact.library.resolve()))
            self.functions: dict[str, Callable[..., Any]] = {name: self._library[f"moe_{name}"] for name in _FUNCTIONS}
        except (RuntimeError, AttributeError, OSError) as error:
            raise ArtifactError(f"{artifact.name}/{artifact.library.name} cannot be loaded: {_first_line(error)}") from error
        count = int(self.functions["device_count"]())
        if not 0 <= device < count:
            has = f"{count} of them" if count else "none, or no NVIDIA driver"
            raise ArtifactError(f"{artifact.name} runs on CUDA device {device}, and this machine has {has}")
        try:
            self.multiprocessors = int(self.functions["prepare"](device))
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"{artifact.name} cannot run on device {device}: {_first_line(error)}") from error

    def bind(
        self,
        weights: Mapping[str, Any] | str | os.PathLike[str],
        *,
        prefix: str = "",
        layout: str | None = None,
        gate_up: str | None = None,
        checkpoint_format: str | None = None,
        verify: bool = False,
    ) -> DeviceLayer:
        """Packs weights into the device's memory, once, or copies what `moegen pack` packed, straight from the map of its file.

        The arguments are those of `Module.bind`, and arrays are in host memory.

        Raises:
            WeightsError: a weight is missing, superfluous, or of the wrong shape or dtype; or the `.moepack` file is damaged or
                was packed for another layer or layout.
        """
        if is_moepack(weights):
            reading = {"prefix": prefix, "layout": layout, "gate_up": gate_up, "checkpoint_format": checkpoint_format}
            return self.layer(self.upload(payload_for(self.artifact, weights, verify, reading), "uint8"))
        source = resolve(self.config, weights, prefix, layout, gate_up, checkpoint_format)
        return self.layer(self.packer().all(source))

    def packer(self, threads: int = 1, blob: Any = None) -> DevicePacker:
        """What packs weights for this module, into a new buffer or into `blob`."""
        return DevicePacker(self, blob)

    def layer(self, packed: Any) -> DeviceLayer:
        """The layer with weights that a packer packed."""
        return DeviceLayer(self, packed)

    @property
    def threads(self) -> int:
        """As of a module for CPUs; a device has its own."""
        return 1

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Uninitialised memory of the device, as a tvm_ffi tensor."""
        return self.functions["empty"](shape, tvm_ffi.dtype(dtype), self.device)

    def view(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        """A contiguous tensor with another shape, sharing its memory."""
        return tensor if tuple(int(extent) for extent in tensor.shape) == shape else self.functions["view"](tensor, shape)

    def upload(self, array: Array, dtype: str) -> Any:
        """A contiguous array of host memory, copied to the device."""
        made = self.empty(array.shape, dtype)
        self.functions["copy"](made, readable(array), self.device)
        return made

    def download(self, tensor: Any, to: Array) -> None:
        """Copies a device's tensor to host memory and waits for it."""
        self.functions["copy"](to, tensor, self.device)

    def __repr__(self) -> str:
        return f"DeviceModule({self.artifact.name}, cuda:{self.device})"


class DevicePacker(Packer):
    """Writes weights into the segments of a buffer in device memory, expert by expert.

    Args:
        module: the module that the weights are for.
        blob: an existing buffer to write to; None makes one, all zeros.
    """

    def __init__(self, module: DeviceModule, blob: Any = None) -> None:
        manifest = module.artifact.manifest
        made = module.empty((int(manifest["packed_bytes"]),), "uint8") if blob is None else blob
        super().__init__(manifest, module.functions["pack"], 0, made)
        if blob is None:
            module.functions["clear"](made, module.device)

    def all(self, source: WeightSource) -> Any:
        """Every weight of the layer; returns the buffer."""
        return super().all(source)

    def _write(self, name: str, expert: int, *parts: HostArray | None) -> None:
        index, segment = self.segments[name]
        stored = [np.ascontiguousarray(arrays.to_storage(part, segment["dtype"])) for part in parts if part is not None]
        first, second = (*map(readable, stored), None)[:2]
        self.function(self.blob, index, expert, first, second, self.pool)

    def _copy(self, name: str, values: npt.NDArray[np.float32]) -> None:
        index, _ = self.segments[name]
        self.function(self.blob, index, 0, readable(np.ascontiguousarray(values)), None, self.pool)


class _Rows(NamedTuple):
    """Rows [T, H] in device memory, the shape they came in, and how results are made of the same kind."""

    data: Any
    shape: tuple[int, ...]
    kind: Kind


class DeviceLayer:
    """A compiled layer with its weights in a CUDA device's memory.

    Inputs are [T, H] or [batch, sequence, H] of the layer's dtype. torch tensors and other DLPack arrays on the layer's device go
    in and come out without copies, on the caller's current stream (torch's own; for others the one of `tvm_ffi.use_raw_stream`),
    and nothing waits for the device: such calls can be captured in a CUDA graph after a first one. Arrays in host memory are
    copied there and back. The same input gives bitwise the same output with the same number of tokens.
    """

    def __init__(self, module: DeviceModule, packed: Any) -> None:
        self.module = module
        self.config = module.config
        self.packed = packed
        self.device = module.device
        self._functions = module.functions
        self._max_tokens = int(module.artifact.manifest["max_tokens"])
        self._workspaces: dict[int, Any] = {}
        self._lock = threading.Lock()

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self.packed.shape[0])

    def workspace_bytes(self, tokens: int) -> int:
        """Bytes of scratch memory that a call with T=`tokens` uses.

        Raises:
            InputError: more tokens than the layer takes, or fewer than none.
        """
        try:
            tokens = operator.index(tokens)
        except TypeError:
            raise InputError(f"tokens={tokens!r} must be an integer") from None
        if not 0 <= tokens <= self._max_tokens:
            raise InputError(f"tokens={tokens} must be between 0 and {self._max_tokens}")
        return int(self._functions["workspace_bytes"](tokens))

    def __call__(self, x: Any, *, return_routing: bool = False, jitter: Any = None) -> Any:
        """The layer's output, of x's shape and on x's device.

        Args:
            x: [T, H] or [batch, sequence, H].
            return_routing: return (output, `Routing`); this waits for the device.
            jitter: factors of x's shape that multiply the router's input only; host arrays and torch tensors.

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        rows = self._rows(x, "x")
        out = rows.kind.empty(tuple(rows.data.shape), self.config.dtype)
        jittered = None if jitter is None else self._jittered(x, jitter)
        if not return_routing:
            self._forward(rows, out, jittered, (None, None, None, None))
            return rows.kind.result(out, rows.shape, self.config.dtype)
        made = self._empty_routing(rows)
        self._forward(rows, out, jittered, made)
        return rows.kind.result(out, rows.shape, self.config.dtype), self._routing(rows, made)

    def forward_into(self, x: Any, out: Any, *, jitter: Any = None) -> None:
        """Writes the layer's output for `x` into `out`, which has x's shape, the layer's dtype, and is where x is.

        Raises:
            InputError: the wrong shape, dtype or device, or `out` is read-only.
        """
        rows = self._rows(x, "x")
        to = self._rows(out, "out", writing=True)
        if to.shape != rows.shape:
            raise InputError(f"out has shape {list(to.shape)}, x has {list(rows.shape)}")
        self._forward(rows, to.data, None if jitter is None else self._jittered(x, jitter), (None, None, None, None))
        to.kind.written(to.data, out, self.config.dtype)

    def route(self, x: Any, *, jitter: Any = None) -> Routing:
        """The router alone; this waits for the device.

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        rows = self._rows(x, "x")
        made = self._empty_routing(rows)
        source = rows.data if jitter is None else self._jittered(x, jitter)
        self._run("route", rows, (source,), made)
        return self._routing(rows, made)

    def experts(self, x: Any, ids: Any, weights: Any) -> Any:
        """The routed experts alone, with anybody's routing; capacity applies, the shared expert does not.

        A token one of whose ids is not in [0, E) comes out as NaN: nothing waits for the device to say so.

        Args:
            x: [T, H] or [batch, sequence, H].
            ids: integers [T, K] in [0, E); on the device, int32.
            weights: floats [T, K]; on the device, float32.

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        rows = self._rows(x, "x")
        tokens = int(rows.data.shape[0])
        chosen = rows.kind.table(ids, "ids", "int32", (tokens, self.config.top_k))
        factors = rows.kind.table(weights, "weights", "float32", (tokens, self.config.top_k))
        out = rows.kind.empty(tuple(rows.data.shape), self.config.dtype)
        self._run("experts", rows, (rows.data, chosen, factors, out))
        return rows.kind.result(out, rows.shape, self.config.dtype)

    def run(self, name: str, workspace: Any, given: tuple[Any, ...], made: tuple[Any, ...] = ()) -> None:
        """One call of the library's `moe_<name>`, for callers who checked and made everything themselves.

        Args:
            name: `forward`, `route` or `experts`.
            workspace: at least `workspace_bytes(tokens)` bytes of the device's memory that nothing else uses meanwhile.
            given: the arguments before the packed weights, as `moegen inspect` shows them: what tvm-ffi takes as tensors,
                contiguous, on the layer's device and of its dtype.
            made: those after the pool, likewise.
        """
        self._functions[name](*given, self.packed, workspace, 0, *made)

    # ---------------------------------------------------------------- inside

    def _forward(self, rows: _Rows, out: Any, jittered: Any, made: tuple[Any, ...]) -> None:
        self._run("forward", rows, (rows.data, jittered, out), made)

    def _run(self, name: str, rows: _Rows, given: tuple[Any, ...], made: tuple[Any, ...] = ()) -> None:
        with _Workspace(self, rows) as workspace:
            self.run(name, workspace, given, made)

    def _rows(self, x: Any, name: str, writing: bool = False) -> _Rows:
        kind = kind_of(x, name, self.module)
        hidden = self.config.hidden
        data, shape = kind.rows(x, name, self.config.dtype, writing)
        if len(shape) not in (2, 3) or shape[-1] != hidden:
            raise InputError(f"{name} has shape {list(shape)}, expected [T, {hidden}] or [batch, sequence, {hidden}]")
        tokens = math.prod(shape[:-1])
        if tokens > self._max_tokens:
            raise InputError(f"{name} has {tokens} tokens; this layer takes at most {self._max_tokens}")
        return _Rows(kind.flat(data, tokens, hidden), shape, kind)

    def _jittered(self, x: Any, jitter: Any) -> Any:
        """x times jitter, rounded to the layer's dtype."""
        if tuple(jitter.shape) != tuple(x.shape):
            raise InputError(f"jitter has shape {list(jitter.shape)}, x has {list(x.shape)}")
        if torch_device(x) is not None:
            return self._rows((x.detach().float() * jitter.detach().float()).to(x.dtype), "x * jitter").data
        given, factors = arrays.as_host_array(x, "x"), arrays.as_host_array(jitter, "jitter")
        product = arrays.to_float32(given) * arrays.to_float32(factors)
        rounded = arrays.to_storage(HostArray(product, "float32"), self.config.dtype)
        return self._rows(HostArray(rounded, self.config.dtype), "x * jitter").data

    def _empty_routing(self, rows: _Rows) -> tuple[Any, Any, Any, Any]:
        shape = (int(rows.data.shape[0]), self.config.top_k)
        empty = rows.kind.empty
        return (
            empty(shape, "int32"),
            empty(shape, "float32"),
            self.module.empty((self.config.experts,), "int32"),
            self.module.empty((4,), "float64"),
        )

    def _routing(self, rows: _Rows, made: tuple[Any, Any, Any, Any]) -> Routing:
        ids, weights, load, stats = made
        shape = (int(rows.data.shape[0]), self.config.top_k)
        counted, numbers = np.empty(self.config.experts, np.int32), np.empty(4, np.float64)
        self.module.download(load, counted)
        self.module.download(stats, numbers)
        return routing_of(rows.kind.result(ids, shape, "int32"), rows.kind.result(weights, shape, "float32"), counted, numbers)

    def __repr__(self) -> str:
        return f"DeviceLayer({self.module.artifact.name}, cuda:{self.device})"


class _Workspace:
    """Scratch memory of one call. torch's allocator knows which stream uses what; otherwise each stream has its own."""

    def __init__(self, layer: DeviceLayer, rows: _Rows) -> None:
        self._layer, self._rows = layer, rows

    def __enter__(self) -> Any:
        layer, needed = self._layer, int(self._layer._functions["workspace_bytes"](int(self._rows.data.shape[0])))
        if isinstance(self._rows.kind, Torch):
            return self._rows.kind.empty((needed,), "uint8")
        stream = int(tvm_ffi.core._env_get_current_stream(CUDA, layer.device))
        with layer._lock:
            kept = layer._workspaces.get(stream)
            if kept is None or int(kept.shape[0]) < needed:
                kept = layer._workspaces[stream] = layer.module.empty((needed,), "uint8")
        return kept

    def __exit__(self, *error: object) -> None:
        pass


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


__all__ = ["DeviceLayer", "DeviceModule", "DevicePacker"]
