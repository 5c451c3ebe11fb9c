"""Layers whose calls count: they are what they were, and tell a load what their router decided.

A layer that nobody watches has no part in this. Watching one asks the compiled library for its routing in every call, which it
works out anyway.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..config import MoEConfig
from ..device import DeviceLayer
from ..device_arrays import Torch
from ..errors import InputError
from ..routing import Routing
from ..runtime import Layer


class Load(Protocol):
    """What the layers tell."""

    def update(self, routing: Any, *, layer: object, experts: int | None = None, capacity: int | None = None) -> None:
        """A call, as of `ExpertLoad.update`."""


def watched(layer: Layer | DeviceLayer, load: Load, label: str) -> Layer | DeviceLayer:
    """A layer with the same weights whose calls count.

    Raises:
        InputError: it is no layer.
    """
    if isinstance(layer, DeviceLayer):
        return WatchedDeviceLayer(layer, load, label)
    if isinstance(layer, Layer):
        return WatchedLayer(layer, load, label)
    raise InputError(f"only what `bind` returned can be watched, not {type(layer).__name__}")


class WatchedLayer(Layer):
    """A layer on a CPU."""

    def __init__(self, layer: Layer, load: Load, label: str) -> None:
        super().__init__(layer.module, layer.packed, layer.threads)
        self._load, self._label = load, label

    def _forward(self, rows: Any, out: Any, jittered: Any, with_routing: bool) -> Routing | None:
        routing = super()._forward(rows, out, jittered, True)
        self._load.update(routing, layer=self._label)
        return routing if with_routing else None

    def experts(self, x: Any, ids: Any, weights: Any) -> Any:
        y = super().experts(x, ids, weights)
        _count_given(self._load, self._label, self.config, ids)
        return y


class WatchedDeviceLayer(DeviceLayer):
    """A layer on a CUDA device. Calls with torch tensors of the device are counted there and wait for nothing."""

    def __init__(self, layer: DeviceLayer, load: Load, label: str) -> None:
        super().__init__(layer.module, layer.packed)
        self._load, self._label = load, label

    def _forward(self, rows: Any, out: Any, jittered: Any, made: tuple[Any, ...]) -> None:
        on_device = isinstance(rows.kind, Torch)
        if made[0] is None:
            made = self._of_torch(rows) if on_device else self._empty_routing(rows)
        super()._forward(rows, out, jittered, made)
        if on_device:
            _count_given(self._load, self._label, self.config, made[0])
        else:
            self._load.update(self._routing(rows, made), layer=self._label)

    def _of_torch(self, rows: Any) -> tuple[Any, ...]:
        """Memory for a routing, all of it from torch's allocator, which knows the stream that it is used on."""
        shape, empty = (int(rows.data.shape[0]), self.config.top_k), rows.kind.empty
        experts = (self.config.experts,)
        return empty(shape, "int32"), empty(shape, "float32"), empty(experts, "int32"), empty((4,), "float64")

    def experts(self, x: Any, ids: Any, weights: Any) -> Any:
        y = super().experts(x, ids, weights)
        _count_given(self._load, self._label, self.config, ids)
        return y


def _count_given(load: Load, label: str, config: MoEConfig, ids: Any) -> None:
    """A call of which only the choices are known: what is over capacity follows from them."""
    capacity = None if config.capacity_factor is None else config.capacity(int(ids.shape[0]))
    load.update(ids, layer=label, experts=config.experts, capacity=capacity)
