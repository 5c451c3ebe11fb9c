"""Packing: weights of any origin into the one buffer whose layout the artifact's manifest gives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from . import arrays
from .arrays import HostArray
from .config import MoEConfig
from .quantization import Quantized, quantize
from .weights import WeightSource

Array = npt.NDArray[Any]
ROW_OFFSET = 128  # what rows of bytes add to their codes


class Packer:
    """Writes weights into the segments of a packed buffer, through the library's own `moe_pack`.

    Args:
        manifest: the artifact's manifest, which has the segments.
        function: the library's `moe_pack`.
        pool: the library's thread pool to pack with.
        blob: an existing buffer to write to; None makes one.
        owner: of the pool, which goes when it goes; kept as long as this.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        function: Callable[..., Any],
        pool: int,
        blob: Array | None = None,
        owner: object = None,
    ) -> None:
        self.config = MoEConfig.from_dict(manifest["config"])
        self.function, self.pool, self.owner = function, pool, owner
        self.blob = arrays.empty_aligned(int(manifest["packed_bytes"]), np.uint8) if blob is None else blob
        self.segments = {segment["name"]: (index, segment) for index, segment in enumerate(manifest["segments"])}

    def all(self, source: WeightSource) -> Array:
        """Every weight of the layer; returns the buffer."""
        self.router(source)
        self.experts(source, range(self.config.experts))
        self.shared(source)
        return self.blob

    def router(self, source: WeightSource) -> None:
        """The router, with the shared expert's gate as one more column."""
        router, config = source.router(), self.config
        weight = self._rounded(_present(router["weight"]))
        if config.shared_gate:
            gate = self._rounded((source.shared() or {})["shared_gate"])
            weight = np.concatenate([weight, gate])
        self._write("router", 0, HostArray(weight, "float32"))
        if config.router_bias:
            bias = self._rounded(_present(router["bias"]))
            self._write("router_bias", 0, HostArray(np.pad(bias, (0, int(config.shared_gate))), "float32"))
        if config.correction_bias:
            self._copy("correction_bias", arrays.to_float32(_present(router["correction_bias"])))

    def experts(self, source: WeightSource, experts: Iterable[int]) -> None:
        """Some of the routed experts."""
        for e in experts:
            expert = source.expert(e)
            self._projections("", e, expert)
            if self.config.expert_bias:
                biases = {name: HostArray(self._rounded(b), "float32") for name, b in expert.items() if name.endswith("bias")}
                self._write("up_bias", e, biases.get("gate_bias"), biases["up_bias"])
                self._write("down_bias", e, biases["down_bias"])

    def shared(self, source: WeightSource) -> None:
        """The shared expert, when there is one."""
        if shared := source.shared():
            self._projections("shared_", 0, shared)

    def _projections(self, prefix: str, expert: int, given: Mapping[str, HostArray | Quantized]) -> None:
        """Gate, up and down of one expert; where the layer stores codes, weights of floats are rounded to them."""
        for name, parts in ((f"{prefix}up", (given.get("gate"), given["up"])), (f"{prefix}down", (given["down"],))):
            if not self.config.low_bit:
                self._write(name, expert, *parts)
                continue
            codes = [p if isinstance(p, Quantized) else quantize(p, self.config, name) for p in parts if p is not None]
            self._write(name, expert, *(HostArray(q.codes.view(np.uint8), "uint8") for q in codes))
            self._write(f"{name}_scale", expert, *(HostArray(q.scales, str(q.scales.dtype)) for q in codes))
            if self.config.weight_zero_point:
                self._write(f"{name}_zero", expert, *(HostArray(_zeros(q), "int8") for q in codes))
            if f"{name}_offset" in self.segments:
                blocks = self.segments[f"{name}_offset"][1]["shape"][2]
                length = self._terms(name) // blocks
                self._write(f"{name}_offset", expert, *(HostArray(byte_offsets(q, blocks, length), "int32") for q in codes))

    def _terms(self, name: str) -> int:
        """Stored length of the dot products of `name`."""
        *_, words, _, _, together = self.segments[name][1]["shape"]
        return int(words * together)

    def _rounded(self, array: HostArray) -> Array:
        """float32 values of the layer's type: router and biases are stored wide, but hold what the type can."""
        return arrays.to_float32(HostArray(arrays.to_storage(array, self.config.dtype), self.config.dtype))

    def _write(self, name: str, expert: int, *parts: HostArray | None) -> None:
        index, segment = self.segments[name]
        stored = [readable(_as_stored(part, segment["dtype"])) for part in parts if part is not None]
        self.function(self.blob, index, expert, stored[0], stored[1] if len(stored) > 1 else None, self.pool)

    def _copy(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """A segment that is stored as it is."""
        offset = int(self.segments[name][1]["offset_bytes"])
        self.blob[offset : offset + values.nbytes].view(np.float32)[...] = values


class RowLayout:
    """What a CUDA artifact's `moe_pack` does, in host memory: weights [n, k] as they are, zero-padded. Takes the same arguments.

    Args:
        manifest: the artifact's manifest, which has the segments.
    """

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        self._segments = manifest["segments"]

    def __call__(self, blob: Array, index: int, expert: int, first: Array, second: Array | None, pool: int) -> None:
        """Puts the matrices [n, k], or vectors [n], of one expert into a buffer that is zero where nothing was written."""
        segment = self._segments[index]
        begin, size = int(segment["offset_bytes"]), int(segment["size_bytes"])
        dtype = arrays.STORAGE[segment["dtype"]]
        whole = blob[begin : begin + size].view(dtype).reshape(segment["shape"])  # [count, parts, n_padded(, k_padded)]
        for part, given in enumerate((first, second)):
            if given is not None:
                whole[expert, part][tuple(slice(extent) for extent in given.shape)] = given


def part_of(segment: str) -> str:
    """What packs a segment of this name: `router`, `experts` or `shared`, the methods of `Packer`."""
    if segment.startswith(("router", "correction_bias")):
        return "router"
    return "shared" if segment.startswith("shared_") else "experts"


def layout_key(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides the bytes of packed weights: artifacts with the same key take the same buffer.

    Fields of the configuration that have their default are left out, so that fields that are new change no key.
    """
    config = MoEConfig.from_dict(manifest["config"])
    decisive = {
        "packing": manifest.get("packing", 1),  # a manifest has to say so when what `moe_pack` writes ever changes
        "target": manifest["target"]["kind"],
        "config": {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default},
        "segments": [[s["name"], s["dtype"], list(s["shape"]), s["offset_bytes"]] for s in manifest["segments"]],
        "packed_bytes": manifest["packed_bytes"],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def byte_offsets(quantized: Quantized, blocks: int, length: int) -> Array:
    """int32 [n, blocks]: what the offset of 128 in rows of bytes adds to the sum over each block of `length` terms.

    The terms that padding adds are there too: their code is 0, but the zero point is not.
    """
    n, k = quantized.shape
    codes = np.zeros((n, blocks * length), np.int32)
    codes[:, :k] = quantized.codes
    sums = codes.reshape(n, blocks, length).sum(axis=-1, dtype=np.int32)
    if quantized.zeros is not None:
        sums -= length * quantized.zeros.astype(np.int32)
    return np.asarray(sums * ROW_OFFSET, np.int32)


def _zeros(quantized: Quantized) -> Array:
    assert quantized.zeros is not None
    return quantized.zeros


def _as_stored(part: HostArray, dtype: str) -> Array:
    """Codes as they are, floats rounded to the type of the segment."""
    return arrays.to_storage(part, dtype) if dtype in arrays.STORAGE else part.data


def _present(array: HostArray | None) -> HostArray:
    assert array is not None
    return array


class _Alias:
    """The memory of a read-only array, to pass on to code that only reads it; DLPack refuses read-only arrays."""

    def __init__(self, array: Array) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.owner = array


def readable(array: Array) -> Array:
    """`array`, or for a read-only one an alias that a compiled function takes; it must only be read."""
    return array if array.flags.writeable else np.asarray(_Alias(array))
