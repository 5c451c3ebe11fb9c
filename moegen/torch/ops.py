"""Compiled layers as operators of torch, so that torch.compile and torch.export pass through them.

`layer` is the number of a layer (`moegen.torch.handles`). x, router_x and y are [T, H] or [batch, sequence, H] of the layer's dtype
on the layer's device, ids int32 [T, K], weights float32 [T, K], load int32 [E], stats float64 [4]: dropped choices, then the
load-balancing, adaptive and z losses. `experts` takes ids of any integers and weights of any floats. Results are contiguous.

Their shapes follow from the arguments alone: tracing looks no layer up, and works where there is none. There is no backward, and an
attempt at one says so. On a device nothing waits for it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ..config import DTYPES
from ..device import DeviceLayer
from ..errors import InputError
from ..runtime import Layer
from .handles import layer_of

_DEVICES = ("cpu", "cuda")
_DTYPES = {name: getattr(torch, name) for name in DTYPES}
_ALIGNMENT = 64
_INT32_MAX = 2**31 - 1
_STATS = 4

NO_BACKWARD = (
    "a compiled layer has no backward: call it under torch.no_grad() or torch.inference_mode(), detach its input, "
    "or train with moegen.torch.TrainableMoELayer"
)


# ---------------------------------------------------------------- operators


@torch.library.custom_op(
    "moegen::forward", mutates_args=(), device_types=_DEVICES,
    schema="(Tensor x, SymInt layer, Tensor? router_x=None) -> Tensor",
)  # fmt: skip
def forward(x: torch.Tensor, layer: int, router_x: torch.Tensor | None = None) -> torch.Tensor:
    """The whole layer; `router_x`, of x's shape, is what the router sees instead of x."""
    bound = layer_of(layer)
    rows = _rows(bound, x, "x")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        _run(bound, "forward", rows, (rows, _router_rows(bound, x, router_x), _flat(y)), (None,) * 4)
    return y


@torch.library.custom_op(
    "moegen::forward_routed", mutates_args=(), device_types=_DEVICES,
    schema=(
        "(Tensor x, SymInt layer, SymInt experts, SymInt top_k, Tensor? router_x=None)"
        " -> (Tensor y, Tensor ids, Tensor weights, Tensor load, Tensor stats)"
    ),
)  # fmt: skip
def forward_routed(
    x: torch.Tensor, layer: int, experts: int, top_k: int, router_x: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole layer and what its router decided."""
    return routed(layer_of(layer), x, experts, top_k, router_x)


@torch.library.custom_op(
    "moegen::route", mutates_args=(), device_types=_DEVICES,
    schema="(Tensor x, SymInt layer, SymInt experts, SymInt top_k) -> (Tensor ids, Tensor weights, Tensor load, Tensor stats)",
)  # fmt: skip
def route(x: torch.Tensor, layer: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The router alone."""
    bound = layer_of(layer)
    rows = _rows(bound, x, "x")
    made = _empty_routing(bound, x, experts, top_k)
    if rows.numel():
        _run(bound, "route", rows, (rows,), made)
    return made


@torch.library.custom_op(
    "moegen::experts", mutates_args=(), device_types=_DEVICES,
    schema="(Tensor x, Tensor ids, Tensor weights, SymInt layer) -> Tensor",
)  # fmt: skip
def experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
    """The routed experts with anybody's routing; capacity applies, the shared expert does not."""
    bound = layer_of(layer)
    rows = _rows(bound, x, "x")
    chosen, factors = _ids(bound, ids, rows), _factors(bound, weights, rows)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        _run(bound, "experts", rows, (rows, chosen, factors, _flat(y)))
    return y


# ---------------------------------------------------------------- shapes


@forward.register_fake
def _fake_forward(x: torch.Tensor, layer: int, router_x: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty(x.shape)


@forward_routed.register_fake
def _fake_forward_routed(
    x: torch.Tensor, layer: int, experts: int, top_k: int, router_x: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    return x.new_empty(x.shape), *routing_like(x, experts, top_k)


@route.register_fake
def _fake_route(x: torch.Tensor, layer: int, experts: int, top_k: int) -> tuple[torch.Tensor, ...]:
    return routing_like(x, experts, top_k)


@experts.register_fake
def _fake_experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def routing_like(x: torch.Tensor, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised ids, weights, load and stats of a call with `x`."""
    tokens = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    return (
        torch.empty((tokens, top_k), dtype=torch.int32, device=x.device),
        torch.empty((tokens, top_k), dtype=torch.float32, device=x.device),
        torch.empty((experts,), dtype=torch.int32, device=x.device),
        torch.empty((_STATS,), dtype=torch.float64, device=x.device),
    )


# ---------------------------------------------------------------- no backward


def _no_backward(*_: Any) -> NoReturn:
    raise InputError(NO_BACKWARD)


for _operator in (forward, forward_routed, route, experts):
    _operator.register_autograd(_no_backward)


# ---------------------------------------------------------------- inside


def routed(
    layer: Layer | DeviceLayer, x: torch.Tensor, experts: int, top_k: int, router_x: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`forward_routed` of a layer itself."""
    rows = _rows(layer, x, "x")
    made = _empty_routing(layer, x, experts, top_k)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        _run(layer, "forward", rows, (rows, _router_rows(layer, x, router_x), _flat(y)), made)
    return y, *made


def place_of(layer: Layer | DeviceLayer) -> torch.device:
    """The device that a layer's tensors are on."""
    return torch.device("cuda", layer.device) if isinstance(layer, DeviceLayer) else torch.device("cpu")


def _rows(layer: Layer | DeviceLayer, x: torch.Tensor, name: str) -> torch.Tensor:
    """`x` as contiguous rows [T, H] that a compiled function takes.

    Raises:
        InputError: the wrong shape, dtype or device, or too many tokens.
    """
    config = layer.config
    _check_place(layer, x, name)
    if x.dim() not in (2, 3) or x.shape[-1] != config.hidden:
        raise InputError(f"{name} has shape {list(x.shape)}, expected [T, {config.hidden}] or [batch, sequence, {config.hidden}]")
    if x.dtype is not _DTYPES[config.dtype]:
        raise InputError(
            f"{name} has dtype {str(x.dtype).removeprefix('torch.')}, this layer takes {config.dtype}: convert it first"
        )
    rows, most = _flat(x), layer.module.artifact.manifest["max_tokens"]
    if rows.shape[0] > most:
        raise InputError(f"{name} has {rows.shape[0]} tokens; this layer takes at most {most}")
    return _ready(rows)


def _router_rows(layer: Layer | DeviceLayer, x: torch.Tensor, router_x: torch.Tensor | None) -> torch.Tensor | None:
    if router_x is None:
        return None
    if router_x.shape != x.shape:
        raise InputError(f"router_x has shape {list(router_x.shape)}, x has {list(x.shape)}")
    return _rows(layer, router_x, "router_x")


def _ids(layer: Layer | DeviceLayer, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """int32 [T, K]; whether they are experts the compiled function looks at, on a device by a NaN."""
    _check_table(layer, ids, "ids", rows)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise InputError(f"ids must be integers, not {str(ids.dtype).removeprefix('torch.')}")
    if ids.dtype != torch.int32:  # what does not fit must not come back as another expert
        ids = ids.to(torch.int64).clamp(-1, _INT32_MAX).to(torch.int32)
    return _ready(ids)


def _factors(layer: Layer | DeviceLayer, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    _check_table(layer, weights, "weights", rows)
    if not weights.dtype.is_floating_point:
        raise InputError(f"weights must be floating-point numbers, not {str(weights.dtype).removeprefix('torch.')}")
    return _ready(weights.to(torch.float32))


def _check_table(layer: Layer | DeviceLayer, table: torch.Tensor, name: str, rows: torch.Tensor) -> None:
    expected = (rows.shape[0], layer.config.top_k)
    _check_place(layer, table, name)
    if table.shape != expected:
        raise InputError(f"{name} has shape {list(table.shape)}, expected {list(expected)}")


def _check_place(layer: Layer | DeviceLayer, x: torch.Tensor, name: str) -> None:
    if x.is_cpu and isinstance(layer, Layer):
        return
    if not isinstance(layer, Layer | DeviceLayer):
        raise InputError("the number is that of a TrainableMoELayer, whose operator is moegen::trained")
    place = place_of(layer)
    if x.device != place:
        raise InputError(f"{name} is on device '{x.device}', the layer is on '{place}': move it with .to('{place}')")


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))


def _ready(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where a compiled function can read it, a copy otherwise."""
    if x.requires_grad:  # which DLPack refuses
        x = x.detach()
    if x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _empty_routing(
    layer: Layer | DeviceLayer, x: torch.Tensor, experts: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    config = layer.config
    if (experts, top_k) != (config.experts, config.top_k):
        raise InputError(f"experts={experts}, top_k={top_k} are not those of the layer ({config.experts}, {config.top_k})")
    made = routing_like(x, experts, top_k)
    if not x.numel():
        for table in made:
            table.zero_()
    return made


def _run(
    layer: Layer | DeviceLayer,
    name: str,
    rows: torch.Tensor,
    given: tuple[torch.Tensor | None, ...],
    made: tuple[torch.Tensor | None, ...] = (),
) -> None:
    tokens = rows.shape[0]
    if isinstance(layer, Layer):
        layer.run(name, tokens, given, made)
    else:  # torch's allocator knows which stream uses what
        workspace = torch.empty((layer.workspace_bytes(tokens),), dtype=torch.uint8, device=rows.device)
        layer.run(name, workspace, given, made)
