"""Packing: weights of any origin into the one buffer whose layout the artifact's manifest gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from . import arrays
from .arrays import HostArray
from .config import MoEConfig
from .weights import WeightSource

Array = npt.NDArray[Any]


class Packer:
    """Writes weights into the segments of a packed buffer, through the library's own `moe_pack`.

    Args:
        manifest: the artifact's manifest, which has the segments.
        function: the library's `moe_pack`.
        pool: the library's thread pool to pack with.
        blob: an existing buffer to write to; None makes one.
    """

    def __init__(self, manifest: Mapping[str, Any], function: Callable[..., Any], pool: int, blob: Array | None = None) -> None:
        self.config = MoEConfig.from_dict(manifest["config"])
        self.function, self.pool = function, pool
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
            self._write("up", e, expert.get("gate"), expert["up"])
            self._write("down", e, expert["down"])
            if self.config.expert_bias:
                biases = {name: HostArray(self._rounded(b), "float32") for name, b in expert.items() if name.endswith("bias")}
                self._write("up_bias", e, biases.get("gate_bias"), biases["up_bias"])
                self._write("down_bias", e, biases["down_bias"])

    def shared(self, source: WeightSource) -> None:
        """The shared expert, when there is one."""
        if shared := source.shared():
            self._write("shared_up", 0, shared.get("gate"), shared["up"])
            self._write("shared_down", 0, shared["down"])

    def _rounded(self, array: HostArray) -> Array:
        """float32 values of the layer's type: router and biases are stored wide, but hold what the type can."""
        return arrays.to_float32(HostArray(arrays.to_storage(array, self.config.dtype), self.config.dtype))

    def _write(self, name: str, expert: int, *parts: HostArray | None) -> None:
        index, segment = self.segments[name]
        stored = [readable(arrays.to_storage(part, segment["dtype"])) for part in parts if part is not None]
        self.function(self.blob, index, expert, stored[0], stored[1] if len(stored) > 1 else None, self.pool)

    def _copy(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """A segment that is stored as it is."""
        offset = int(self.segments[name][1]["offset_bytes"])
        self.blob[offset : offset + values.nbytes].view(np.float32)[...] = values


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
