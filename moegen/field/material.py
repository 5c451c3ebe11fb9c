"""Random weights and tokens in a device's memory: one copy of the weights, of which moegen and all others have views."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config import MoEConfig
from ..errors import MeasureError


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The routed experts of one layer.

    Args:
        blob: uint8, packed as moegen's artifact wants it; the router's and the shared expert's parts are zero.
        gate_up: [E, 2I, H], gate columns first, or [E, I, H] of an ungated layer.
        down: [E, H, I].
        gate_up_bias: [E, 2I] or [E, I] in the layer's type; None without biases.
        down_bias: [E, H] likewise.
    """

    config: MoEConfig
    blob: Any
    gate_up: Any
    down: Any
    gate_up_bias: Any
    down_bias: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """T tokens and their routing.

    Args:
        x: [T, H] in the layer's type.
        ids: int32 [T, K], no expert twice in a row.
        factors: float32 [T, K], rows that sum to 1.
    """

    x: Any
    ids: Any
    factors: Any


def dtype_of(config: MoEConfig) -> Any:
    """The layer's type in torch."""
    return getattr(torch, config.dtype)


def check(config: MoEConfig) -> None:
    """That everybody computes this layer's experts alike.

    Raises:
        MeasureError: capacity, or weights on the input.
    """
    if config.capacity_factor is not None or config.weight_on_input or config.low_bit:
        raise MeasureError(
            "capacity_factor, weight_on_input and weight_dtype are not measured here: the contenders have none of them"
        )


def draw_weights(config: MoEConfig, manifest: Mapping[str, Any], device: str, seed: int) -> Weights:
    """Normal weights with standard deviation 1/sqrt(fan-in), biases with 0.1, where an artifact's manifest puts them.

    Raises:
        MeasureError: the layer is one that others compute otherwise.
    """
    check(config)
    blob = torch.zeros(int(manifest["packed_bytes"]), dtype=torch.uint8, device=device)
    segments = {segment["name"]: segment for segment in manifest["segments"]}
    generator = torch.Generator(device).manual_seed(seed)
    parts, h, i = 2 if config.gated else 1, config.hidden, config.intermediate
    up, down = _segment(blob, segments["up"])[:, :parts, :i, :h], _segment(blob, segments["down"])[:, 0, :h, :i]
    for expert in range(config.experts):  # one at a time: 2**31 elements are more than some kernels count
        up[expert].normal_(0.0, h**-0.5, generator=generator)
        down[expert].normal_(0.0, i**-0.5, generator=generator)
    up_bias = down_bias = None
    if config.expert_bias:
        up_bias, down_bias = _segment(blob, segments["up_bias"])[:, :parts, :i], _segment(blob, segments["down_bias"])[:, 0, :h]
        for bias in (up_bias, down_bias):
            drawn = torch.randn(bias.shape, device=device, generator=generator) * 0.1
            bias.copy_(drawn.to(dtype_of(config)))  # stored wide, but what the type can hold
        up_bias, down_bias = (bias.reshape(config.experts, -1).to(dtype_of(config)).contiguous() for bias in (up_bias, down_bias))
    return Weights(config, blob, up.reshape(config.experts, parts * i, h), down, up_bias, down_bias)


def _segment(blob: Any, segment: Mapping[str, Any]) -> Any:
    begin = int(segment["offset_bytes"])
    shape: Sequence[int] = segment["shape"]
    dtype = getattr(torch, segment["dtype"])
    return blob[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def draw_batches(config: MoEConfig, tokens: int, routing: str, count: int, device: str, seed: int) -> list[Batch]:
    """Batches of random tokens, each with a routing of its own.

    Args:
        routing: `uniform`, or `zipf`: the e-th most popular expert is e times rarer than the first (by Gumbel's trick), and which
            is popular differs from batch to batch, so that small batches do not find their experts in the cache.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def batch() -> Batch:
        x = torch.randn(tokens, config.hidden, device=device, generator=generator).to(dtype_of(config))
        liking = -torch.log(
            -torch.log(torch.rand(tokens, config.experts, device=device, generator=generator).clamp(1e-30, 1 - 1e-7))
        )
        if routing == "zipf":
            liking -= torch.log(1.0 + torch.randperm(config.experts, device=device, generator=generator))
        factors = torch.randn(tokens, config.top_k, device=device, generator=generator).softmax(-1)
        return Batch(x, liking.topk(config.top_k).indices.to(torch.int32).contiguous(), factors.contiguous())

    return [batch() for _ in range(count)]


def work(config: MoEConfig, batches: Sequence[Batch]) -> dict[str, float]:
    """What one call has to do in the mean: `flops`, `bytes` of the visited weights and of rows in and out, `active_experts`."""
    parts = 3 if config.gated else 2
    tokens = len(batches[0].x)
    active = sum(len(torch.unique(batch.ids)) for batch in batches) / len(batches)
    item = dtype_of(config).itemsize
    per_expert = parts * config.hidden * config.intermediate
    return {
        "flops": 2.0 * tokens * config.top_k * per_expert,
        "bytes": item * (active * per_expert + 2.0 * tokens * config.hidden),
        "active_experts": active,
    }
