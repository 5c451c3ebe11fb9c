"""A compiled layer with its weights as torch meets it: calls that are operators of torch, which compile and export see through."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.forward_ad import unpack_dual

from ..device import DeviceLayer
from ..errors import InputError
from ..runtime import LOSSLESS, Layer
from . import ops
from .handles import name_of, named, number_of
from .opening import from_packed_state, packed_state

_WIDENED = {getattr(torch, dtype): tuple(getattr(torch, narrow) for narrow in narrower) for dtype, narrower in LOSSLESS.items()}


class Routing(NamedTuple):
    """What the router decided for T tokens, as tensors on the layer's device; nothing waited for it.

    ids int32 [T, K], weights float32 [T, K], load int32 [E] (tokens that chose each expert, before capacity), dropped int64 []
    (choices over capacity), and the losses of `moegen.reference.Routing`, float64 [].
    """

    ids: torch.Tensor
    weights: torch.Tensor
    load: torch.Tensor
    dropped: torch.Tensor
    load_balancing_loss: torch.Tensor
    adaptive_loss: torch.Tensor
    z_loss: torch.Tensor


class BoundLayer:
    """A layer, its number, and what tracing has to know of it. Copies are the same layer: its weights never change.

    Args:
        layer: what `Module.bind` returned; it lives as long as this does.
        name: with one, a program that was exported with this layer finds it again in another process (see `handles.number_of`).

    Raises:
        InputError: another living layer of this configuration has the name.
    """

    def __init__(self, layer: Layer | DeviceLayer, name: str | None = None) -> None:
        self.layer = layer
        self.number = number_of(layer, name)
        self.name = name_of(self.number)
        self.experts_count = layer.config.experts
        self.top_k = layer.config.top_k
        self.dtype: torch.dtype = getattr(torch, layer.config.dtype)
        self.device = ops.place_of(layer)

    def forward(self, x: torch.Tensor, jitter: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output, of x's shape and the layer's dtype.

        Args:
            x: [T, H] or [batch, sequence, H] on the layer's device, of the layer's dtype. A float32 layer widens float16 and
                bfloat16; under torch.autocast any float type is converted.
            jitter: factors of x's shape that multiply the router's input only.

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        x = entering(x, self.dtype)
        return torch.ops.moegen.forward(x, self.number, None if jitter is None else jittered(x, jitter))

    def forward_routed(self, x: torch.Tensor, jitter: torch.Tensor | None = None) -> tuple[torch.Tensor, Routing]:
        """The same, and what the router decided."""
        x = entering(x, self.dtype)
        router_x = None if jitter is None else jittered(x, jitter)
        y, *made = torch.ops.moegen.forward_routed(x, self.number, self.experts_count, self.top_k, router_x)
        return y, _routing(*made)

    def route(self, x: torch.Tensor, jitter: torch.Tensor | None = None) -> Routing:
        """The router alone."""
        x = entering(x, self.dtype)
        source = x if jitter is None else jittered(x, jitter)
        return _routing(*torch.ops.moegen.route(source, self.number, self.experts_count, self.top_k))

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts alone, with anybody's routing; capacity applies, the shared expert does not.

        Args:
            x: as in `forward`.
            ids: integers [T, K] in [0, E). On a device a token with another id comes out as NaN.
            weights: floats [T, K].

        Raises:
            InputError: the wrong shape, dtype or device, or an id out of range.
        """
        if isinstance(weights, torch.Tensor):  # else torch says so
            refuse_tangents(weights)
        return torch.ops.moegen.experts(entering(x, self.dtype), ids, weights, self.number)

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundLayer:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (packed_state(self.layer), self.name)

    def __repr__(self) -> str:
        return f"BoundLayer({self.layer!r}, name={self.name!r})"


def forward(layer: Layer | DeviceLayer | BoundLayer, x: torch.Tensor, jitter: torch.Tensor | None = None) -> torch.Tensor:
    """`BoundLayer.forward` of a layer, or of one that is bound already, which tracing needs."""
    return bound(layer).forward(x, jitter)


def route(layer: Layer | DeviceLayer | BoundLayer, x: torch.Tensor, jitter: torch.Tensor | None = None) -> Routing:
    """`BoundLayer.route`, likewise."""
    return bound(layer).route(x, jitter)


def experts(layer: Layer | DeviceLayer | BoundLayer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`BoundLayer.experts`, likewise."""
    return bound(layer).experts(x, ids, weights)


def bound(layer: Layer | DeviceLayer | BoundLayer) -> BoundLayer:
    """`layer` itself when it is bound, otherwise a `BoundLayer` of it, with the same number every time."""
    if isinstance(layer, BoundLayer):
        return layer
    if not isinstance(layer, Layer | DeviceLayer):
        raise InputError(f"layer must be what Module.bind returns, not {type(layer).__name__}")
    return BoundLayer(layer)


def _unpickled(state: tuple[Any, ...], name: str | None) -> BoundLayer:
    """What a pickle holds; the living layer of that name, if there is one and it is the same."""
    layer = from_packed_state(*state)
    living = named(layer, name) if name is not None else None
    if living is not None and np.array_equal(packed_state(living)[-1], state[-1]):
        layer = living
    return BoundLayer(layer, name)


def entering(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in a layer's `dtype` where that loses nothing, or under torch.autocast; otherwise as it is.

    Raises:
        InputError: it is no tensor, or forward-mode differentiation asks for its derivative.
    """
    if not isinstance(x, torch.Tensor):
        raise InputError(f"x must be a torch tensor, not {type(x).__name__}: Module.bind gives layers for other arrays")
    refuse_tangents(x)
    if x.dtype is dtype or not x.dtype.is_floating_point:
        return x
    return x.to(dtype) if x.dtype in _WIDENED[dtype] or torch.is_autocast_enabled(x.device.type) else x


def refuse_tangents(*tensors: torch.Tensor) -> None:
    """Refuses forward-mode differentiation, under which torch runs an operator that has none as if its result were a constant.

    Raises:
        InputError: a tensor carries a tangent (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad).
    """
    if torch.compiler.is_compiling():  # no tensor has one yet
        return
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise InputError(
            "a compiled layer has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, forward_ad): use reverse mode, "
            "torch.autograd.grad or .backward(), with moegen.torch.TrainableMoELayer"
        )


def jittered(x: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
    """x times jitter, rounded once to x's dtype."""
    if not isinstance(jitter, torch.Tensor):
        raise InputError(f"jitter must be a torch tensor of x's shape, not {type(jitter).__name__}")
    refuse_tangents(jitter)
    if jitter.shape != x.shape:
        raise InputError(f"jitter has shape {list(jitter.shape)}, x has {list(x.shape)}")
    return (x.to(torch.float32) * jitter.to(torch.float32)).to(x.dtype)


def _routing(ids: torch.Tensor, weights: torch.Tensor, load: torch.Tensor, stats: torch.Tensor) -> Routing:
    return Routing(ids, weights, load, stats[0].to(torch.int64), stats[1], stats[2], stats[3])
