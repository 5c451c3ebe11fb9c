"""What is measured and proven, and in which order: a run that ends early has the most important cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..config import MoEConfig
from ..errors import MeasureError
from ..presets import PRESETS
from .targets import TOKENS

LAYERS = ("qwen3-30b-a3b", "mixtral", "gpt-oss-20b", "olmoe", "deepseek-v3")
ROUTINGS = ("uniform", "zipf")
FIRST_TOKENS = (1, 64, 4096)  # latency, memory, arithmetic

# Small layers for the proof on the device: between them every kernel, tail and option.
_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"experts": 8, "top_k": 2, "hidden": 256, "intermediate": 512, "activation": "relu", "dtype": "float16"},
    "tails": {"experts": 13, "top_k": 3, "hidden": 200, "intermediate": 136, "dtype": "bfloat16"},
    "float32": {"experts": 8, "top_k": 2, "hidden": 128, "intermediate": 192, "activation": "geglu"},
    "gpt-oss-like": {
        "experts": 32, "top_k": 4, "hidden": 192, "intermediate": 320, "activation": "swiglu_clamped", "gating": "topk_softmax",
        "router_bias": True, "expert_bias": True, "dtype": "bfloat16",
    },
    "deepseek-like": {
        "experts": 64, "top_k": 8, "hidden": 256, "intermediate": 128, "gating": "sigmoid", "routed_scaling": 2.5,
        "correction_bias": True, "n_group": 8, "topk_group": 4, "shared_intermediate": 256, "dtype": "bfloat16",
    },
    "capacity": {"experts": 16, "top_k": 2, "hidden": 128, "intermediate": 256, "capacity_factor": 1.0, "dtype": "bfloat16"},
    "many experts": {"experts": 512, "top_k": 10, "hidden": 128, "intermediate": 64, "dtype": "bfloat16"},
}  # fmt: skip
VARIANTS = {name: MoEConfig(**fields) for name, fields in _VARIANTS.items()}
# For the tests of sizes beyond 32 bits only: over 2**31 weights, of which tests choose the tokens.
WIDE = MoEConfig(experts=64, top_k=8, hidden=4096, intermediate=4160, dtype="bfloat16")
CHECKED = "gpt-oss-like"  # what NVIDIA's checker looks at: biases, tails and all


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the table: a layer, T tokens, a routing."""

    layer: str
    tokens: int
    routing: str

    def __str__(self) -> str:
        return f"{self.layer}, T={self.tokens}, {self.routing}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def cells(layers: Sequence[str] = LAYERS, tokens: Sequence[int] = TOKENS, routings: Sequence[str] = ROUTINGS) -> list[Cell]:
    """All combinations: first latency, memory and arithmetic of every layer with uniform routing, then the rest.

    Raises:
        MeasureError: no such preset or routing.
    """
    for name, known in ((layers, PRESETS), (routings, ROUTINGS)):
        for one in name:
            if one not in known:
                raise MeasureError(f"{one!r} must be one of {', '.join(known)}")
    every = [Cell(layer, t, routing) for layer in layers for t in tokens for routing in routings]
    return sorted(every, key=lambda cell: (ROUTINGS.index(cell.routing), cell.tokens not in FIRST_TOKENS))
