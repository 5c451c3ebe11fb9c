"""Running a compiled layer: NumPy and tvm-ffi only, neither compiler nor templates.

`load` checks an artifact and maps its library; `Module.bind` packs weights once; the `Layer` it returns is called.
"""

from __future__ import annotations

import functools
import operator
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tvm_ffi

from . import arrays
from .arrays import HostArray
from .artifact import MANIFEST, Artifact, check_loadable, find_artifact, open_artifact
from .calls import Calls
from .config import MoEConfig
from .device import DeviceModule
from .errors import ArtifactError, InputError
from .moepack import is_moepack, payload_for
from .packing import Packer, readable
from .routing import Routing, routing_of
from .target import usable_processors
from .weights import resolve

Array = npt.NDArray[Any]
LOSSLESS = {"float32": ("float16", "bfloat16"), "bfloat16": (), "float16": ()}
_KEPT_WORKSPACES = 4
_KNOWN_SIZES = 256


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    store: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    target: str | None = None,
    device: int = 0,
    **fields: Any,
) -> Module | DeviceModule:
    """Loads a compiled layer.

    Args:
        path: an artifact's folder; when left out, the artifact in the store whose configuration has `fields` is taken.
        store: the store to search (default: the user's).
        threads: threads of its layers, on CPUs; None for all processors that this process may use.
        target: search only what was built for `llvm` or `cuda`; of both, `llvm` is taken.
        device: the CUDA device that its layers are on, for `cuda`.
        **fields: configuration fields, e.g. experts=8, top_k=2, hidden=512.

    Raises:
        ArtifactError: there is none or more than one, it is damaged or made by a newer moegen, or this processor cannot run it.
    """
    if path is not None and not os.path.exists(os.path.join(path, MANIFEST)) and os.path.isdir(path) and store is None:
        path, store = None, path
    if path is None:
        artifact = find_artifact(store, target, **fields)
    elif fields or target:
        raise ArtifactError(
            f"give either a path or fields to search for, not both ({', '.join([*fields, *(['target'] if target else [])])})"
        )
    else:
        artifact = open_artifact(path)
    check_loadable(artifact)
    return module_of(artifact, threads, device)


def module_of(artifact: Artifact, threads: int | None = None, device: int = 0) -> Module | DeviceModule:
    """The module in an artifact that was checked; `threads` and `device` as in `load`.

    Raises:
        ArtifactError: it cannot be loaded, or there is no such device.
    """
    return DeviceModule(artifact, device) if artifact.target.kind == "cuda" else Module(artifact, threads)


class Module:
    """A loaded layer without weights."""

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        self.artifact = artifact
        self.config: MoEConfig = artifact.config
        self.threads = _threads(threads)
        try:
            self._library = tvm_ffi.load_module(str(artifact.library.resolve()))
            self.functions = {name: self._library[f"moe_{name}"] for name in _FUNCTIONS}
            self._calls = Calls()
            self.functions |= {name: self._calls.counted(self.functions[name]) for name in _COUNTED}
        except (RuntimeError, AttributeError, OSError) as error:
            raise ArtifactError(f"{artifact.name}/{artifact.library.name} cannot be loaded: {_first_line(error)}") from error
        self._pools: dict[int, int] = {}
        self._lock = threading.Lock()

    def bind(
        self,
        weights: Mapping[str, Any] | str | os.PathLike[str],
        *,
        prefix: str = "",
        layout: str | None = None,
        gate_up: str | None = None,
        checkpoint_format: str | None = None,
        threads: int | None = None,
        verify: bool = False,
        copy: bool = False,
    ) -> Layer:
        """Packs weights into the layer's own layout, once, or maps what `moegen pack` packed.

        Args:
            weights: names to arrays (NumPy, torch, DLPack), or a .safetensors file, its index, or a folder with either. The
                canonical names and those of the model types that `MoEConfig.from_hf` knows are understood. Weights of another
                float type are rounded to the layer's, to nearest even; the correction bias stays float32. A layer in few bits takes
                its own codes too, as `moegen.quantization.Quantized` or as checkpoints hold them (`moegen.weights`).
                A `.moepack` file is mapped into memory, read-only, and shared with other processes that map it.
            prefix, layout, gate_up, checkpoint_format: as in `moegen.weights.resolve`.
            threads: threads of this layer; None for the module's.
            verify: read all of a `.moepack` file and compare it with its checksums first.
            copy: read a `.moepack` file into memory of the layer's own, on huge pages, rather than map it.

        Raises:
            WeightsError: a weight is missing, superfluous, or of the wrong shape or dtype; or the `.moepack` file is damaged or
                was packed for another layer or layout.
        """
        if is_moepack(weights):
            reading = {"prefix": prefix, "layout": layout, "gate_up": gate_up, "checkpoint_format": checkpoint_format}
            packed = payload_for(self.artifact, weights, verify, reading)
            if copy:
                mapped, packed = packed, arrays.empty_aligned(packed.nbytes, np.uint8)
                packed[...] = mapped
            return Layer(self, packed, self.threads if threads is None else _threads(threads))
        source = resolve(self.config, weights, prefix, layout, gate_up, checkpoint_format)
        count = self.threads if threads is None else _threads(threads)
        return Layer(self, self.packer(count).all(source), count)

    def packer(self, threads: int, blob: Array | None = None) -> Packer:
        """What packs weights for this module."""
        return Packer(self.artifact.manifest, self.functions["pack"], self.pool(threads), blob, self)

    def layer(self, packed: Array) -> Layer:
        """The layer with weights that a packer packed."""
        return Layer(self, packed, self.threads)

    def pool(self, threads: int) -> int:
        """The library's pool of so many threads, made when first asked for and shared by the module's layers."""
        with self._lock:
            if threads not in self._pools:
                self._pools[threads] = handle = self.functions["pool"](threads)
                weakref.finalize(self, self.functions["pool_free"], handle)
                weakref.finalize(self, self._calls.close)  # finalizers run last first: no call outlives a pool
            return self._pools[threads]

    def __repr__(self) -> str:
        return f"Module({self.artifact.name})"


_FUNCTIONS = ("forward", "profile", "route", "experts", "workspace_bytes", "pack", "pool", "pool_free")
_COUNTED = ("forward", "profile", "route", "experts", "workspace_bytes", "pack")


class Layer:
    """A compiled layer with its weights; safe to call from several threads at once.

    Inputs are [T, H] or [batch, sequence, H] of the layer's dtype, as NumPy arrays, torch tensors or anything with DLPack in
    CPU memory; a float16 or bfloat16 input of a float32 layer is widened. Results come as the kind of array that came in.
    The same input gives bitwise the same output, whatever the number of threads and whatever the other tokens of the batch.
    A NaN in a token makes that token's output NaN and touches no other.
    """

    def __init__(self, module: Module, packed: Array, threads: int) -> None:
        self.module = module
        self.config = module.config
        self.threads = threads
        self.packed = packed
        self._blob = readable(packed)
        self._functions = module.functions
        self._pool = module.pool(threads)
        self._workspaces: list[Array] = []
        self._max_tokens = int(module.artifact.manifest["max_tokens"])
        self._workspace_bytes = functools.lru_cache(_KNOWN_SIZES)(module.functions["workspace_bytes"])

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self.packed.nbytes)

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
        return int(self._workspace_bytes(tokens))

    def __call__(self, x: Any, *, return_routing: bool = False, jitter: Any = None) -> Any:
        """The layer's output, of x's shape.

        Args:
            x: [T, H] or [batch, sequence, H].
            return_routing: return (output, `Routing`).
            jitter: factors of x's shape that multiply the router's input only (Switch's jitter, drawn by the caller).

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        rows = self._rows(x, "x")
        out = arrays.empty_aligned(rows.data.shape, self.config.dtype)
        routing = self._forward(rows, out, self._jittered(rows, jitter), return_routing)
        y = arrays.like_input(out.reshape(rows.shape), self.config.dtype, x)
        return (y, _as_input(routing, x)) if routing is not None else y

    def forward_into(self, x: Any, out: Any, *, jitter: Any = None) -> None:
        """Writes the layer's output for `x` into `out`, which has x's shape and the layer's dtype.

        Raises:
            InputError: the wrong shape, dtype or device, or `out` is read-only.
        """
        rows = self._rows(x, "x")
        to = arrays.as_host_array(out, "out")
        if to.dtype != self.config.dtype:
            raise InputError(f"out has dtype {to.dtype}, the layer writes {self.config.dtype}")
        if to.shape != rows.shape:
            raise InputError(f"out has shape {list(to.shape)}, x has {list(rows.shape)}")
        if not to.data.flags.writeable:
            raise InputError("out is read-only")
        if isinstance(out, np.ndarray) and not out.dtype.isnative:
            raise InputError(f"out has dtype {out.dtype.str!r}, whose byte order is not this machine's")
        flat = rows.data.shape
        usable = to.data.flags.c_contiguous and arrays.is_aligned(to.data) and not np.may_share_memory(to.data, rows.data)
        target = to.data.reshape(flat) if usable else arrays.empty_aligned(flat, self.config.dtype)
        self._forward(rows, target, self._jittered(rows, jitter), False)
        if not usable:
            to.data[...] = target.reshape(rows.shape)

    def profile(self, x: Any) -> dict[str, float]:
        """Seconds that one call with `x` spends in each part of the layer, in the order in which they first run.

        The shared expert counts as gather, up and down; what is missing from the time of the call is Python's.

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        rows = self._rows(x, "x")
        out = arrays.empty_aligned(rows.data.shape, self.config.dtype)
        parts = self.module.artifact.manifest["parts"]
        seconds = arrays.empty_aligned(len(parts), np.float64)
        self.run("profile", len(rows.data), (readable(rows.data), out), (seconds,))
        return dict(zip(parts, seconds.tolist(), strict=True))

    def route(self, x: Any, *, jitter: Any = None) -> Routing:
        """The router alone.

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        rows = self._rows(x, "x")
        jittered = self._jittered(rows, jitter)
        made = self._empty_routing(len(rows.data))
        source = rows.data if jittered is None else jittered
        self.run("route", len(rows.data), (readable(source),), made)
        return _as_input(routing_of(*made), x)

    def experts(self, x: Any, ids: Any, weights: Any) -> Any:
        """The routed experts alone, with anybody's routing; capacity applies, the shared expert does not.

        Args:
            x: [T, H] or [batch, sequence, H].
            ids: integers [T, K] in [0, E).
            weights: floats [T, K].

        Raises:
            InputError: the wrong shape, dtype or device, or an id out of range.
        """
        rows = self._rows(x, "x")
        tokens = len(rows.data)
        chosen = self._ids(ids, tokens)
        factors = _ready(arrays.to_float32(self._shaped(weights, "weights", tokens)))
        out = arrays.empty_aligned(rows.data.shape, self.config.dtype)
        self.run("experts", tokens, (readable(rows.data), readable(chosen), readable(factors), out))
        return arrays.like_input(out.reshape(rows.shape), self.config.dtype, x)

    def run(self, name: str, tokens: int, given: tuple[Any, ...], made: tuple[Any, ...] = ()) -> None:
        """One call of the library's `moe_<name>`, for callers who checked and made everything themselves.

        Args:
            name: `forward`, `route`, `experts` or `profile`.
            tokens: T, at least 1.
            given: the arguments before the packed weights, as `moegen inspect` shows them: what tvm-ffi takes as tensors,
                contiguous, at multiples of 64 bytes, of the layer's dtype.
            made: those after the pool, likewise.

        Raises:
            InputError: an id is out of range.
        """
        workspace = self._take(tokens)
        try:
            self._functions[name](*given, self._blob, workspace, self._pool, *made)
        except ValueError as reason:  # an id out of range
            raise InputError(_first_line(reason)) from None
        self._give(workspace)

    # ---------------------------------------------------------------- inside

    def _forward(self, rows: _Rows, out: Array, jittered: Array | None, with_routing: bool) -> Routing | None:
        made = self._empty_routing(len(rows.data)) if with_routing else (None, None, None, None)
        router_input = None if jittered is None else readable(jittered)
        self.run("forward", len(rows.data), (readable(rows.data), router_input, out), made)
        return routing_of(*made) if with_routing else None

    def _rows(self, x: Any, name: str) -> _Rows:
        """`x` as aligned rows [T, H] of the layer's dtype, copied only where it has to be."""
        given = arrays.as_host_array(x, name)
        hidden, dtype = self.config.hidden, self.config.dtype
        if len(given.shape) not in (2, 3) or given.shape[-1] != hidden:
            raise InputError(f"{name} has shape {list(given.shape)}, expected [T, {hidden}] or [batch, sequence, {hidden}]")
        tokens = given.data.size // hidden
        if tokens > self._max_tokens:
            raise InputError(f"{name} has {tokens} tokens; this layer takes at most {self._max_tokens}")
        if given.dtype != dtype and given.dtype not in LOSSLESS[dtype]:
            raise InputError(f"{name} has dtype {given.dtype}, this layer takes {dtype}: convert it first")
        data = arrays.to_storage(given, dtype)
        return _Rows(_ready(data).reshape(tokens, hidden), given.shape)

    def _jittered(self, rows: _Rows, jitter: Any) -> Array | None:
        if jitter is None:
            return None
        given = arrays.as_host_array(jitter, "jitter")
        if given.shape != rows.shape:
            raise InputError(f"jitter has shape {list(given.shape)}, x has {list(rows.shape)}")
        x = arrays.to_float32(HostArray(rows.data, self.config.dtype))
        product = x * arrays.to_float32(given).reshape(x.shape)
        return _ready(arrays.to_storage(HostArray(product, "float32"), self.config.dtype))

    def _shaped(self, value: Any, name: str, tokens: int) -> HostArray:
        given = arrays.as_host_array(value, name)
        if given.shape != (tokens, self.config.top_k):
            raise InputError(f"{name} has shape {list(given.shape)}, expected [{tokens}, {self.config.top_k}]")
        return given

    def _ids(self, ids: Any, tokens: int) -> Array:
        given = self._shaped(ids, "ids", tokens)
        if given.data.dtype.kind not in "iu" or given.dtype == "bfloat16":
            raise InputError(f"ids must be integers, not {given.dtype}")
        if given.dtype == "int32":  # which the compiled function checks
            return _ready(given.data)
        outside = (given.data < 0) | (given.data >= self.config.experts)
        if outside.any():
            t, k = (int(i) for i in np.argwhere(outside)[0])
            raise InputError(f"ids[{t}, {k}]={int(given.data[t, k])} must be between 0 and {self.config.experts - 1}")
        return _ready(given.data.astype(np.int32, copy=False))

    def _empty_routing(self, tokens: int) -> tuple[Array, Array, Array, Array]:
        shape = (tokens, self.config.top_k)
        return (
            arrays.empty_aligned(shape, np.int32),
            arrays.empty_aligned(shape, np.float32),
            arrays.empty_aligned(self.config.experts, np.int32),
            arrays.empty_aligned(4, np.float64),
        )

    def _take(self, tokens: int) -> Array:
        """A workspace that no other call uses."""
        needed = self._workspace_bytes(tokens)
        try:
            kept = self._workspaces.pop()
        except IndexError:
            kept = None
        return kept if kept is not None and kept.nbytes >= needed else arrays.empty_aligned(needed, np.uint8)

    def _give(self, workspace: Array) -> None:
        if len(self._workspaces) < _KEPT_WORKSPACES:
            self._workspaces.append(workspace)

    def __repr__(self) -> str:
        return f"Layer({self.module.artifact.name}, threads={self.threads})"


class _Rows(NamedTuple):
    """Rows [T, H] and the shape that they came in."""

    data: Array
    shape: tuple[int, ...]


def _ready(data: Array) -> Array:
    """`data` itself when it is contiguous and aligned, an aligned copy otherwise."""
    if data.flags.c_contiguous and (arrays.is_aligned(data) or data.size == 0):
        return data
    copy = arrays.empty_aligned(data.shape, data.dtype)
    copy[...] = data
    return copy


def _as_input(routing: Routing, x: Any) -> Routing:
    """The routing with ids and weights as the kind of array that `x` is."""
    ids = arrays.like_input(routing.ids, "int32", x)
    return routing._replace(ids=ids, weights=arrays.like_input(routing.weights, "float32", x))


def _threads(threads: int | None) -> int:
    if threads is None:
        return min(usable_processors(), 1024)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise InputError(f"threads={threads!r} must be an integer between 1 and 1024")
    return threads


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


__all__ = ["Layer", "Module", "Routing", "load"]
