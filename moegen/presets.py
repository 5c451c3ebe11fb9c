"""Layers of well-known models by name, and how one is made smaller where it does not fit into memory."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from .config import MoEConfig, weight_shapes
from .display import size
from .errors import ConfigError

PRESETS: dict[str, MoEConfig] = {
    "seed": MoEConfig(experts=8, top_k=2, hidden=512, intermediate=2048, activation="relu"),
    "mixtral": MoEConfig(experts=8, top_k=2, hidden=4096, intermediate=14336, dtype="bfloat16"),
    "qwen3-30b-a3b": MoEConfig(experts=128, top_k=8, hidden=2048, intermediate=768, dtype="bfloat16"),
    "olmoe": MoEConfig(experts=64, top_k=8, hidden=2048, intermediate=1024, dtype="bfloat16", renormalize=False),
    "gpt-oss-20b": MoEConfig(
        experts=32,
        top_k=4,
        hidden=2880,
        intermediate=2880,
        dtype="bfloat16",
        activation="swiglu_clamped",
        gating="topk_softmax",
        router_bias=True,
        expert_bias=True,
    ),
    "deepseek-v3": MoEConfig(
        experts=256,
        top_k=8,
        hidden=7168,
        intermediate=2048,
        dtype="bfloat16",
        gating="sigmoid",
        routed_scaling=2.5,
        correction_bias=True,
        n_group=8,
        topk_group=4,
        shared_intermediate=2048,
    ),
}

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FEWEST_PER_CHOICE = 4  # below four experts per choice, routing is no longer sparse
_NARROWEST = 256


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A layer and what was changed to make it fit.

    Args:
        config: the layer to measure.
        changes: field -> (from, to); empty when the layer fits as it is.
        why: one sentence; empty likewise.
    """

    config: MoEConfig
    changes: dict[str, tuple[int, int]]
    why: str

    def to_dict(self) -> dict[str, Any] | None:
        """Plain JSON values; None when nothing was changed."""
        if not self.changes:
            return None
        return {"changes": {name: list(pair) for name, pair in self.changes.items()}, "why": self.why}


def preset(name: str) -> MoEConfig:
    """The layer that `name` stands for.

    Raises:
        ConfigError: there is no such preset; the message lists those there are, the likeliest first.
    """
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"unknown preset {name!r}: {hint}presets are {', '.join(PRESETS)}")


def weight_bytes(config: MoEConfig) -> int:
    """Bytes of all weights of a layer as they are stored (the correction bias is float32)."""
    return sum(
        math.prod(shape) * (4 if name == "router.correction_bias" else _ITEM_BYTES[config.dtype])
        for name, shape in weight_shapes(config).items()
    )


def fitted(config: MoEConfig, copies: float, budget_bytes: int) -> Fitted:
    """`config`, made smaller until `copies` of its weights fit into `budget_bytes`.

    Experts are halved first, as long as there are four for each choice and the routing groups stay legal; then the
    intermediate and the hidden size in turn. Gating, activation, top-k and the like stay as they are.

    Raises:
        ConfigError: even the smallest layer of this kind does not fit.
    """
    needed = round(weight_bytes(config) * copies)
    small = config
    while weight_bytes(small) * copies > budget_bytes:
        fields = _halved_experts(small) or _narrowed(small)
        if not fields:
            raise ConfigError(
                f"{size(needed)} are needed for {copies:g} copies of the weights, {size(budget_bytes)} are there, and "
                "the layer cannot be made smaller: measure fewer contenders (--against) or allow more memory (--memory-gb)"
            )
        small = dataclasses.replace(small, **fields)
    if small == config:
        return Fitted(config, {}, "")
    names = ("experts", "hidden", "intermediate", "shared_intermediate")
    changes = {name: (getattr(config, name), getattr(small, name)) for name in names}
    return Fitted(
        small,
        {name: pair for name, pair in changes.items() if pair[0] != pair[1]},
        f"{copies:g} copies of the weights (file, packed, contenders) take {size(needed)}, {size(budget_bytes)} may be used",
    )


def _halved_experts(config: MoEConfig) -> dict[str, Any]:
    half = config.experts // 2
    if config.experts % 2 or half < _FEWEST_PER_CHOICE * config.top_k:
        return {}
    try:
        dataclasses.replace(config, experts=half)
    except ConfigError:  # the routing groups do not allow it
        return {}
    return {"experts": half}


def _narrowed(config: MoEConfig) -> dict[str, Any]:
    """The wider of intermediate and hidden size halved; the shared expert keeps its ratio to the routed ones."""
    name = "intermediate" if config.intermediate >= config.hidden else "hidden"
    half = getattr(config, name) // 2
    if half < _NARROWEST:
        return {}
    if name == "intermediate" and config.shared_intermediate:
        return {name: half, "shared_intermediate": max(config.shared_intermediate // 2, 1)}
    return {name: half}
