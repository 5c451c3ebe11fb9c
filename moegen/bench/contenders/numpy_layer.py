"""The layer in NumPy as people write it, in float32: BLAS computes the products."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...arrays import HostArray, empty_aligned, to_float32, to_storage
from .family import GATES, Family, Settings

Floats = Any  # float32 arrays: NumPy's stubs know no more of a product's type


class NumpyLayer(Family):
    """float32 weights, widened in advance; inputs are widened and outputs rounded in every call."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        calls = {"numpy-naive": self._naive, "numpy-grouped": self._grouped}
        if self.config.capacity_factor is not None:
            self.obstacles = dict.fromkeys(calls, "has no expert capacity")
            return
        self.w = {name: _widened(array) for name, array in self.weights().items()}
        self.calls = {name: self._called(experts) for name, experts in calls.items()}

    def _called(self, experts: Any) -> Any:
        def call(x: HostArray, out: HostArray) -> None:
            with np.errstate(over="ignore"):
                rows = to_float32(x)
                y = self._shared(rows)
                experts(rows, *self.route(rows), y)
                out.data[...] = to_storage(HostArray(y, "float32"), out.dtype)

        return call

    # ---------------------------------------------------------------- router

    def route(self, x: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
        """ids [T, K] and routing weights [T, K]."""
        c = self.config
        logits = x @ self.w["router.weight"].T
        if c.router_bias:
            logits += self.w["router.bias"]
        scores = _sigmoid(logits) if c.gating == "sigmoid" else _softmax(logits)
        choice = logits if c.selects_by_logit else scores
        if c.correction_bias:
            choice = choice + self.w["router.correction_bias"]
        ids = _largest(self._in_groups(choice), c.top_k)
        if c.gating == "topk_softmax":
            weights = _softmax(np.take_along_axis(logits, ids, 1))
        else:
            weights = np.take_along_axis(scores, ids, 1)
            if c.renormalize:
                weights = weights / (weights.sum(1, keepdims=True) + np.float32(1e-20))
        return ids, weights * np.float32(c.routed_scaling)

    def _in_groups(self, choice: Floats) -> Floats:
        """The choice scores, minus infinity outside the best groups."""
        c = self.config
        if c.n_group == c.topk_group:
            return choice
        grouped = choice.reshape(len(choice), c.n_group, -1)
        best = grouped.max(2) if c.group_score == "max" else np.sort(grouped, 2)[:, :, -2:].sum(2)
        allowed = np.zeros(best.shape, bool)
        np.put_along_axis(allowed, _largest(best, c.topk_group), True, 1)
        return np.where(allowed[:, :, None], grouped, np.float32(-np.inf)).reshape(choice.shape)

    # ---------------------------------------------------------------- experts

    def _naive(self, x: Floats, ids: npt.NDArray[np.intp], weights: Floats, y: Floats) -> None:
        for t in range(len(x)):
            for k, e in enumerate(ids[t]):
                y[t] += self._expert(int(e), x[t], weights[t, k])

    def _grouped(self, x: Floats, ids: npt.NDArray[np.intp], weights: Floats, y: Floats) -> None:
        flat = ids.ravel()
        order = np.argsort(flat, kind="stable")
        tokens, factors = order // ids.shape[1], weights.ravel()[order, None]
        ends = np.cumsum(np.bincount(flat, minlength=self.config.experts))
        start = 0
        for e, end in enumerate(ends):
            if end > start:
                own = tokens[start:end]  # an expert meets a token once
                y[own] += self._expert(e, x[own], factors[start:end])
                start = end

    def _expert(self, e: int, x: Floats, factor: Any) -> Floats:
        if self.config.weight_on_input:
            return self._network("experts", x * factor, e)
        return self._network("experts", x, e) * factor

    def _shared(self, x: Floats) -> Floats:
        if not self.config.shared_intermediate:
            return np.zeros_like(x)
        y = self._network("shared", x, None)
        return y * _sigmoid(x @ self.w["shared_gate.weight"].T) if self.config.shared_gate else y

    def _network(self, part: str, x: Floats, e: int | None) -> Floats:
        def linear(name: str, rows: Floats) -> Floats:
            weight, bias = self.w[f"{part}.{name}.weight"], self.w.get(f"{part}.{name}.bias")
            y: Floats = rows @ (weight if e is None else weight[e]).T
            return y if bias is None else y + bias[e]

        gate = linear("gate", x) if self.config.gated else None
        return linear("down", self._activate(gate, linear("up", x)))

    def _activate(self, gate: Floats | None, up: Floats) -> Floats:
        c = self.config
        if gate is None:
            return _ACTIVATIONS[c.activation](up)
        if c.activation == "swiglu_clamped":
            limit = np.float32(c.swiglu_limit)
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            return gate * _sigmoid(np.float32(c.swiglu_alpha) * gate) * (up + np.float32(1))
        return _ACTIVATIONS[GATES[c.activation]](gate) * up


def _sigmoid(x: Floats) -> Floats:
    one = np.float32(1)
    return one / (one + np.exp(-x))


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(1, keepdims=True))
    scaled: Floats = e / e.sum(1, keepdims=True)
    return scaled


def _gelu_tanh(x: Floats) -> Floats:
    return np.float32(0.5) * x * (np.float32(1) + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)))


def _gelu(x: Floats) -> Floats:
    """NumPy has no erf: Abramowitz and Stegun 7.1.26, within 1.5e-7."""
    z = np.abs(x) * np.float32(0.7071067811865476)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * z)
    tail = (
        t * np.exp(-z * z) * np.polyval(np.array([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592], x.dtype), t)
    )
    return np.float32(0.5) * x * (np.float32(1) + np.sign(x) * (np.float32(1) - tail))


_ACTIVATIONS: dict[str, Any] = {
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "relu2": lambda x: np.maximum(x, np.float32(0)) ** 2,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


def _largest(scores: Floats, count: int) -> npt.NDArray[np.intp]:
    """[T, count]: columns of the largest scores."""
    return np.argpartition(-scores, count - 1, axis=1)[:, :count]


def _widened(array: HostArray) -> Floats:
    own: Floats = empty_aligned(array.shape, "float32")
    for first in range(len(own)):  # an expert, or a row, at a time
        own[first : first + 1] = to_float32(HostArray(array.data[first : first + 1], array.dtype))
    return own


def open_family(settings: Settings) -> Family:
    """NumPy with its weights widened to float32."""
    return NumpyLayer(settings)
