"""What the outputs should be: some tokens of a batch in float64, by the definition, on the device that has the weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from .material import Batch, Weights
from .torch_experts import activate

CHECKED_TOKENS = 16
# Bounds on the relative L2 error of what is timed, as those of `moegen bench`.
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 5e-3}


def checked(tokens: int) -> list[int]:
    """The tokens of a batch that are compared: spread over it, the first and the last among them."""
    count = min(tokens, CHECKED_TOKENS)
    return sorted({round(t * (tokens - 1) / max(count - 1, 1)) for t in range(count)})


def expected(weights: Weights, batch: Batch, tokens: list[int]) -> Any:
    """float64 [len(tokens), H]."""
    c = weights.config
    x, ids, factors = batch.x[tokens].double(), batch.ids[tokens], batch.factors[tokens].double()
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        h = x[token] @ weights.gate_up[e].double().T
        if weights.gate_up_bias is not None:
            h = h + weights.gate_up_bias[e].double()
        part = activate(c, h) @ weights.down[e].double().T
        if weights.down_bias is not None:
            part = part + weights.down_bias[e].double()
        y.index_add_(0, token, part * factors[token, slot, None])
    return y


def relative_l2(got: Any, wanted: Any) -> float:
    """Error of an output; infinite when it is not finite."""
    error = float(torch.linalg.vector_norm(got.double() - wanted) / torch.linalg.vector_norm(wanted))
    return error if math.isfinite(error) else math.inf
