"""What an experts module of transformers computes between its two products, found out by asking it.

Models bring gating functions of their own under one method's name, so a name says too little. The module's own function is
called with sample values instead, and has to agree with one of the activations that moegen has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from ..config import ACTIVATIONS, MoEConfig
from ..errors import ConfigError
from ..orientation import GATE_UPS

_ROWS = 8
_SPREAD = 4.0  # standard deviation of the samples: a limit of 7, as gpt-oss has, is met often
_TOLERANCE = 1e-4  # float32 rounding is 1e-6 of the samples' size, and activations differ by more than 1e-3


@dataclasses.dataclass(frozen=True)
class Gating:
    """An activation of moegen and how its inputs lie.

    Args:
        fields: `activation` of `MoEConfig`, with `swiglu_alpha` and `swiglu_limit` where they matter.
        gate_up: "stacked" or "interleaved", as in `moegen.weights.resolve`.
    """

    fields: dict[str, Any]
    gate_up: str


def gating_of(module: Any, width: int) -> Gating:
    """What `module` does with the result of its first product.

    Args:
        module: an experts module of transformers, whose class `use_experts_implementation` decorates.
        width: I, the width inside an expert.

    Raises:
        ConfigError: moegen has no such activation.
    """
    sample = _sample(width * (2 if module.has_gate else 1))
    with torch.no_grad():
        theirs = (module._apply_gate if module.has_gate else module.act_fn)(sample)
    for gating, ours in _known(module, sample):
        if theirs.shape == ours.shape and torch.allclose(theirs.float(), ours, rtol=_TOLERANCE, atol=_TOLERANCE):
            return gating
    name = getattr(getattr(module, "config", None), "hidden_act", None) or type(getattr(module, "act_fn", None)).__name__
    raise ConfigError(
        f"activation: what {type(module).__name__} computes between its products (hidden_act={name!r}) is none of "
        f"{', '.join(ACTIVATIONS)}: use another experts implementation for this model, e.g. 'grouped_mm'"
    )


def _sample(columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_ROWS, columns, generator=generator, device="cpu", dtype=torch.float32) * _SPREAD


def _known(module: Any, sample: torch.Tensor) -> Iterator[tuple[Gating, torch.Tensor]]:
    """Every activation that may be the module's, with its values for the sample."""
    if not module.has_gate:
        for name, function in _UNGATED.items():
            yield Gating({"activation": name}, GATE_UPS[0]), function(sample)
        return
    pairs = {"stacked": sample.chunk(2, dim=-1), "interleaved": (sample[..., ::2], sample[..., 1::2])}
    for gate_up in GATE_UPS:
        gate, up = pairs[gate_up]
        for name, function in _GATED.items():
            yield Gating({"activation": name}, gate_up), function(gate) * up
        for alpha, limit in _clamps(module):
            fields = {"activation": "swiglu_clamped", "swiglu_alpha": alpha, "swiglu_limit": limit}
            yield Gating(fields, gate_up), _swiglu_clamped(gate, up, alpha, limit)


def _clamps(module: Any) -> list[tuple[float, float]]:
    """Constants that a clamped SwiGLU of this module may have: its own, its configuration's, gpt-oss'."""
    default = MoEConfig(experts=1, top_k=1, hidden=1)
    config = getattr(module, "config", None)
    places = [
        (getattr(module, "alpha", None), getattr(module, "limit", None)),
        (getattr(config, "swiglu_alpha", None), getattr(config, "swiglu_limit", None)),
        (default.swiglu_alpha, default.swiglu_limit),
    ]
    return [(float(a), float(b)) for a, b in places if isinstance(a, int | float) and isinstance(b, int | float)]


def _swiglu_clamped(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return functional.relu(x).square()


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


_Function = Callable[[torch.Tensor], torch.Tensor]
_GATED: dict[str, _Function] = {
    "swiglu": functional.silu,
    "reglu": functional.relu,
    "geglu": functional.gelu,
    "geglu_tanh": _gelu_tanh,
}
_UNGATED: dict[str, _Function] = {
    "relu": functional.relu,
    "relu2": _relu2,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": functional.silu,
}
