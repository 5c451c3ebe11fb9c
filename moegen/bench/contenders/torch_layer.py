"""The layer in torch: its own products, grouped products, and compiled; in the layer's type, the router in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ...arrays import HostArray, empty_aligned, to_float32
from .family import GATES, Call, Family, Settings, copied

Experts = Callable[[Any, Any, Any], Any]


class TorchBase(Family):
    """Router, activation and shared expert; `gate_up` [E, 2I, H] (`up` alone without a gate) and `down` [E, H, I] are one each."""

    def __init__(self, settings: Settings, names: tuple[str, ...]) -> None:
        super().__init__(settings)
        torch.set_num_threads(settings.threads)
        if self.config.capacity_factor is not None:
            self.obstacles = dict.fromkeys(names, "has no expert capacity")
            return
        self.given = self.weights()
        self.router = {
            name.removeprefix("router."): torch.from_numpy(to_float32(array).copy())
            for name, array in self.given.items()
            if name.startswith("router.")
        }
        self.shared = {name: self.wrap(copied(array)) for name, array in self.given.items() if name.startswith("shared")}

    def wrap(self, array: HostArray) -> Any:
        if array.dtype == "bfloat16":
            return torch.from_numpy(array.data.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array.data)

    def called(self, experts: Experts) -> Call:
        """The whole layer around what computes the routed experts: (x, ids [T, K], weights [T, K]) -> [T, H]."""

        def call(x: Any, out: Any) -> None:
            with torch.inference_mode():
                ids, weights = self.route(x)
                y = experts(x, ids, weights)
                out.copy_(y + self.shared_expert(x) if self.shared else y)

        return call

    # ---------------------------------------------------------------- router

    def route(self, x: Any) -> tuple[Any, Any]:
        """ids [T, K] and routing weights [T, K] in the layer's type."""
        c = self.config
        logits = F.linear(x.float(), self.router["weight"], self.router.get("bias"))
        scores = logits.sigmoid() if c.gating == "sigmoid" else logits.softmax(-1)
        choice = logits if c.selects_by_logit else scores
        if c.correction_bias:
            choice = choice + self.router["correction_bias"]
        best, ids = self.in_groups(choice).topk(c.top_k)
        if c.gating == "topk_softmax":
            weights = best.softmax(-1)
        else:
            weights = scores.gather(1, ids)
            if c.renormalize:
                weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return ids, (weights * c.routed_scaling).to(x.dtype)

    def in_groups(self, choice: Any) -> Any:
        """The choice scores, minus infinity outside the best groups."""
        c = self.config
        if c.n_group == c.topk_group:
            return choice
        grouped = choice.view(len(choice), c.n_group, -1)
        best = grouped.amax(2) if c.group_score == "max" else grouped.topk(2, 2).values.sum(2)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(c.topk_group).indices, True)
        return grouped.masked_fill(~allowed[:, :, None], -torch.inf).view_as(choice)

    def by_expert(self, x: Any, ids: Any, weights: Any) -> tuple[Any, Any, Any, Any]:
        """Rows of x sorted by expert, where they go back to, their weights, and the last row of each expert, plus one."""
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        factors = weights.reshape(-1)[order, None]
        rows = x[order // self.config.top_k]
        ends = torch.bincount(flat, minlength=self.config.experts).cumsum(0)
        return (rows * factors if self.config.weight_on_input else rows), order, factors, ends

    def combined(self, y: Any, order: Any, factors: Any) -> Any:
        """[T, H] from the sorted experts' outputs."""
        if not self.config.weight_on_input:
            y = y * factors
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return y[back].view(-1, self.config.top_k, y.shape[1]).sum(1)

    # ---------------------------------------------------------------- networks

    def activate(self, h: Any) -> Any:
        """[rows, I] from the first products [rows, 2I], gate columns first, or [rows, I] of an ungated layer."""
        c = self.config
        if not c.gated:
            return _ACTIVATIONS[c.activation](h)
        gate, up = h.chunk(2, -1)
        if c.activation == "swiglu_clamped":
            gate, up = gate.clamp(max=c.swiglu_limit), up.clamp(-c.swiglu_limit, c.swiglu_limit)
            return gate * torch.sigmoid(gate * c.swiglu_alpha) * (up + 1)
        return _ACTIVATIONS[GATES[c.activation]](gate) * up

    def shared_expert(self, x: Any) -> Any:
        up = F.linear(x, self.shared["shared.up.weight"])
        h = torch.cat((F.linear(x, self.shared["shared.gate.weight"]), up), -1) if self.config.gated else up
        y = F.linear(self.activate(h), self.shared["shared.down.weight"])
        return y * torch.sigmoid(F.linear(x, self.shared["shared_gate.weight"])) if self.config.shared_gate else y

    def fused(self, kind: str) -> Any:
        """`experts.gate` and `experts.up` in one: weight [E, 2I, H] or bias [E, 2I]; only up where there is no gate."""
        parts = [self.given[f"experts.{part}.{kind}"] for part in ("gate", "up") if self.config.gated or part == "up"]
        shape = list(parts[0].shape)
        whole = HostArray(empty_aligned((shape[0], shape[1] * len(parts), *shape[2:]), parts[0].data.dtype), parts[0].dtype)
        for index, part in enumerate(parts):
            whole.data[:, index * shape[1] : (index + 1) * shape[1]] = part.data
        return self.wrap(whole)

    def biases(self) -> tuple[Any, Any]:
        """[E, 2I] and [E, H], or None twice."""
        if not self.config.expert_bias:
            return None, None
        return self.fused("bias"), self.wrap(copied(self.given["experts.down.bias"]))


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class TorchLayer(TorchBase):
    """Three ways to run the routed experts on one copy of the weights."""

    def __init__(self, settings: Settings) -> None:
        ways = {"torch-loop": self.loop, "torch-grouped": self.grouped, "torch-compiled": self.compiled}
        super().__init__(settings, tuple(ways))
        if self.obstacles:
            return
        self.gate_up, self.down = self.fused("weight"), self.wrap(copied(self.given["experts.down.weight"]))
        self.gate_up_bias, self.down_bias = self.biases()
        self.compiled_network = torch.compile(self.network, dynamic=True)
        self.calls = {name: self.called(way) for name, way in ways.items()}
        if not hasattr(F, "grouped_mm"):
            self.calls.pop("torch-grouped")
            self.obstacles["torch-grouped"] = f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"

    def network(self, rows: Any, gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any) -> Any:
        """One expert on its rows."""
        return F.linear(self.activate(F.linear(rows, gate_up, gate_up_bias)), down, down_bias)

    def of(self, e: int) -> tuple[Any, Any, Any, Any]:
        """One expert's weights."""
        bias = (None, None) if self.down_bias is None else (self.gate_up_bias[e], self.down_bias[e])
        return self.gate_up[e], bias[0], self.down[e], bias[1]

    def loop(self, x: Any, ids: Any, weights: Any) -> Any:
        y = torch.zeros_like(x)
        for e in ids.unique().tolist():
            tokens, slots = torch.where(ids == e)
            factors = weights[tokens, slots, None]
            rows = x[tokens] * factors if self.config.weight_on_input else x[tokens]
            part = self.network(rows, *self.of(e))
            y.index_add_(0, tokens, part if self.config.weight_on_input else part * factors)
        return y

    def grouped(self, x: Any, ids: Any, weights: Any) -> Any:
        rows, order, factors, ends = self.by_expert(x, ids, weights)
        ends = ends.to(torch.int32)
        h = F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends)
        if self.gate_up_bias is not None:
            h = h + self.gate_up_bias[ids.reshape(-1)[order]]
        y = F.grouped_mm(self.activate(h), self.down.transpose(1, 2), offs=ends)
        if self.down_bias is not None:
            y = y + self.down_bias[ids.reshape(-1)[order]]
        return self.combined(y, order, factors)

    def compiled(self, x: Any, ids: Any, weights: Any) -> Any:
        rows, order, factors, ends = self.by_expert(x, ids, weights)
        y, start = torch.empty_like(rows), 0
        for e, end in enumerate(ends.tolist()):
            if end > start:
                y[start:end] = self.compiled_network(rows[start:end], *self.of(e))
                start = end
        return self.combined(y, order, factors)


def open_family(settings: Settings) -> Family:
    """torch with the weights in its own memory."""
    return TorchLayer(settings)
