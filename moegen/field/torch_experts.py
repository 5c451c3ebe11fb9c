"""The routed experts in torch: sorted and multiplied group by group, and as a loop of cuBLAS products, expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..bench.contenders.family import GATES
from ..config import MoEConfig
from ..errors import MeasureError
from .material import Batch, Weights

Call = Callable[[], Any]  # returns [T, H]

_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activate(config: MoEConfig, h: Any) -> Any:
    """[rows, I] from the first products [rows, 2I], gate columns first, or [rows, I] of an ungated layer."""
    if not config.gated:
        return _FUNCTIONS[config.activation](h)
    gate, up = h.chunk(2, -1)
    if config.activation == "swiglu_clamped":
        gate, up = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
        return gate * torch.sigmoid(gate * config.swiglu_alpha) * (up + 1)
    return _FUNCTIONS[GATES[config.activation]](gate) * up


class Sorted:
    """Choices sorted by expert: where rows come from and go to. Nothing here waits for the device."""

    def __init__(self, config: MoEConfig, batch: Batch) -> None:
        self.chosen, self.order = batch.ids.reshape(-1).sort(stable=True)
        self.rows = batch.x[self.order // config.top_k]
        self.factors = batch.factors.reshape(-1)[self.order, None].to(batch.x.dtype)
        self.top_k = config.top_k

    def combined(self, y: Any) -> Any:
        """[T, H] from the sorted choices' outputs [T*K, H]."""
        back = torch.empty_like(y)
        back[self.order] = y * self.factors
        return back.view(-1, self.top_k, y.shape[1]).sum(1)


class Grouped:
    """sort, gather, grouped product, activation, grouped product, weights, scatter, sum: what torch itself offers.

    Raises:
        MeasureError: this torch has no grouped products.
    """

    name = "torch-grouped"

    def __init__(self, weights: Weights) -> None:
        self.weights, self.config = weights, weights.config
        self.experts = torch.arange(weights.config.experts, device=weights.blob.device, dtype=torch.int32)
        found = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if found is None:
            raise MeasureError(f"torch {torch.__version__} has neither torch.nn.functional.grouped_mm nor torch._grouped_mm")
        self.product: Callable[..., Any] = found

    def prepare(self, batch: Batch) -> Call:
        """What computes a batch."""
        w, c = self.weights, self.config

        def call() -> Any:
            choices = Sorted(c, batch)
            ends = torch.searchsorted(choices.chosen, self.experts, right=True, out_int32=True)
            h = self.product(choices.rows, w.gate_up.transpose(1, 2), offs=ends)
            if w.gate_up_bias is not None:
                h = h + w.gate_up_bias[choices.chosen]
            y = self.product(activate(c, h), w.down.transpose(1, 2), offs=ends)
            return choices.combined(y if w.down_bias is None else y + w.down_bias[choices.chosen])

        return call


class Loop:
    """Two cuBLAS products for every expert with rows. The counts are known to it beforehand, for nothing, so that it need not wait
    for the device to learn them: in truth it would have to."""

    name = "cublas-loop"

    def __init__(self, weights: Weights) -> None:
        self.weights, self.config = weights, weights.config

    def prepare(self, batch: Batch) -> Call:
        """What computes a batch."""
        w, c = self.weights, self.config
        ends = torch.bincount(batch.ids.reshape(-1), minlength=c.experts).cumsum(0).tolist()
        spans = [(e, begin, end) for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > begin]

        def call() -> Any:
            choices = Sorted(c, batch)
            y = torch.empty_like(choices.rows)
            for e, begin, end in spans:
                biases = (None, None) if w.down_bias is None else (w.gate_up_bias[e], w.down_bias[e])
                h = F.linear(choices.rows[begin:end], w.gate_up[e], biases[0])
                y[begin:end] = F.linear(activate(c, h), w.down[e], biases[1])
            return choices.combined(y)

        return call
