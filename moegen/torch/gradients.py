"""The backward of a layer in torch: recomputed from what entered the layer and the choices that its router made.

Nothing here chooses: which experts a token visits, and which choices capacity drops, is given, as the forward decided it, and
gradients flow through the weights of the chosen alone (as in every such layer, the choice itself has none). Ties and orders
therefore cannot come out otherwise than they did. The functions work in the type of their tensors, float64 included.

The definitions are those of `moegen.reference`. Weights are mappings from the names of `moegen.config.weight_shapes`. In
formulas, dv is the gradient of the loss by v.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..config import MoEConfig

Weights = Mapping[str, torch.Tensor]
_TINY = 1e-20  # DeepSeek-V3's: sigmoids, unlike a softmax, can all vanish


# ---------------------------------------------------------------- router


def logits(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """[T, E] of x [T, H]."""
    made = x @ weights["router.weight"].T
    return made + weights["router.bias"] if "router.bias" in weights else made


def scores(config: MoEConfig, z: torch.Tensor) -> torch.Tensor:
    """[T, E] of logits [T, E]: probabilities, or for `sigmoid` numbers between 0 and 1."""
    return torch.sigmoid(z) if config.gating == "sigmoid" else torch.softmax(z, dim=-1)


def routing_weights(config: MoEConfig, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[T, K]: the weights of the chosen `ids` [T, K] by the logits `z` [T, E]."""
    if config.gating == "topk_softmax":
        return torch.softmax(z.gather(1, ids), dim=-1) * config.routed_scaling
    weights = scores(config, z).gather(1, ids)
    return (weights / _total(config, weights) if config.renormalize else weights) * config.routed_scaling


def routing_backward(config: MoEConfig, z: torch.Tensor, ids: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """dz [T, E] for the gradient [T, K] of `routing_weights`."""
    grad = grad * config.routed_scaling
    if config.gating == "topk_softmax":
        return torch.zeros_like(z).scatter_(1, ids, _through_softmax(torch.softmax(z.gather(1, ids), dim=-1), grad))
    scored = scores(config, z)
    chosen = scored.gather(1, ids)
    if config.renormalize:  # w = s / total: ds = (dw - sum(dw * w)) / total
        total = _total(config, chosen)
        grad = (grad - (grad * chosen / total).sum(dim=-1, keepdim=True)) / total
    of_scores = torch.zeros_like(z).scatter_(1, ids, grad)
    return of_scores * scored * (1.0 - scored) if config.gating == "sigmoid" else _through_softmax(scored, of_scores)


def losses(config: MoEConfig, z: torch.Tensor, load: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(load-balancing, adaptive, z loss) of logits `z` [T, E] and `load` [E], which is counted and has no gradient; 0 for T=0."""
    tokens = max(z.shape[0], 1)
    probabilities = scores(config, z)
    if config.gating == "sigmoid":
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    usage = load.to(z.dtype) / (tokens * config.top_k)
    balance = config.experts * config.top_k * (usage * probabilities.sum(dim=0) / tokens).sum()
    z_loss = torch.logsumexp(z, dim=-1).square().sum() / tokens
    return balance, config.balance_coefficient * (1.0 + usage.var(correction=0)) * balance, z_loss


def _total(config: MoEConfig, chosen: torch.Tensor) -> torch.Tensor:
    return chosen.sum(dim=-1, keepdim=True) + (_TINY if config.gating == "sigmoid" else 0.0)


def _through_softmax(p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """dz for p = softmax(z): p * (dp - sum(dp * p))."""
    return p * (grad - (grad * p).sum(dim=-1, keepdim=True))


def kept(config: MoEConfig, ids: torch.Tensor) -> torch.Tensor:
    """bool [T, K]: which choices are within their expert's capacity, the first by position."""
    tokens = len(ids)
    if config.capacity(tokens) >= tokens:
        return torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    chosen = torch.zeros((tokens, config.experts), dtype=torch.int64, device=ids.device).scatter_(1, ids, 1)
    return (chosen.cumsum(dim=0) - 1).gather(1, ids) < config.capacity(tokens)


# ---------------------------------------------------------------- one expert


def activate(config: MoEConfig, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The activation between an expert's projections."""
    if config.activation == "swiglu_clamped":
        assert gate is not None
        g, u = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
        return g * torch.sigmoid(config.swiglu_alpha * g) * (u + 1.0)
    function = _ACTIVATIONS[_kind(config)][0]
    made: torch.Tensor = function(up if gate is None else gate)
    return made if gate is None else made * up


def activate_backward(
    config: MoEConfig, gate: torch.Tensor | None, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(dgate or None, dup) for the gradient of `activate`."""
    if config.activation == "swiglu_clamped":
        assert gate is not None
        return _clamped_backward(config, gate, up, grad)
    function, backward = _ACTIVATIONS[_kind(config)]
    if gate is None:
        return None, backward(grad, up)
    return backward(grad * up, gate), grad * function(gate)


def _clamped_backward(
    config: MoEConfig, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    limit, alpha = config.swiglu_limit, config.swiglu_alpha
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = torch.sigmoid(alpha * g)
    of_gate = grad * (u + 1.0) * s * (1.0 + alpha * g * (1.0 - s))
    return of_gate * (gate <= limit), grad * g * s * (up.abs() <= limit)


def _kind(config: MoEConfig) -> str:
    gated = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
    return gated.get(config.activation, config.activation)


_aten = torch.ops.aten
# Name -> (function of x, gradient of x by that of the function and x).
_ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "silu": (torch.nn.functional.silu, _aten.silu_backward),
    "relu": (torch.relu, lambda grad, x: grad * (x > 0)),
    "relu2": (lambda x: torch.relu(x).square(), lambda grad, x: 2.0 * grad * torch.relu(x)),
    "gelu": (torch.nn.functional.gelu, _aten.gelu_backward),
    "gelu_tanh": (
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}


def ffn_backward(
    config: MoEConfig, weights: Weights, rows: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(drows [n, H], dscale [n, 1], gradients of the weights) of scale * FFN(rows), or of FFN(scale * rows) with `weight_on_input`.

    Args:
        weights: one expert's, named `up.weight`, `up.bias` ...
        scale: [n, 1].
        grad: [n, H].
    """
    linear = torch.nn.functional.linear
    entered = rows * scale if config.weight_on_input else rows
    gate = linear(entered, weights["gate.weight"], weights.get("gate.bias")) if config.gated else None
    up = linear(entered, weights["up.weight"], weights.get("up.bias"))
    hidden = activate(config, gate, up)
    of_hidden = grad @ weights["down.weight"]
    if config.weight_on_input:
        of_scale, of_down = scale, grad
    else:  # the product with the output, without the output: (W h + b) dy = h (W' dy) + b dy
        of_scale = (hidden * of_hidden).sum(dim=-1, keepdim=True)
        if "down.bias" in weights:
            of_scale = of_scale + grad @ weights["down.bias"].unsqueeze(1)
        of_hidden, of_down = of_hidden * scale, grad * scale
    of_gate, of_up = activate_backward(config, gate, up, of_hidden)
    found = {"down.weight": of_down.T @ hidden, "down.bias": of_down.sum(dim=0)}
    of_entered = of_up @ weights["up.weight"]
    found |= {"up.weight": of_up.T @ entered, "up.bias": of_up.sum(dim=0)}
    if of_gate is not None:
        of_entered = of_entered + of_gate @ weights["gate.weight"]
        found |= {"gate.weight": of_gate.T @ entered, "gate.bias": of_gate.sum(dim=0)}
    found = {name: g for name, g in found.items() if name in weights}
    if config.weight_on_input:
        return of_entered * scale, (of_entered * rows).sum(dim=-1, keepdim=True), found
    return of_entered, of_scale, found


# ---------------------------------------------------------------- the whole layer


class Gradients:
    """Gradients of one call, summed part by part.

    Args:
        config: the layer.
        weights: those of `weight_shapes`, of any float types.
        x: [T, H] of the type to compute in.
        wanted: names of the weights whose gradients are wanted.
        rounded: the type that the forward rounded the weights to; None if it took them as they are.

    Attributes:
        x: gradient of x [T, H].
        weights: name -> gradient, of the shape and type of the weight.
    """

    def __init__(
        self, config: MoEConfig, weights: Weights, x: torch.Tensor, wanted: frozenset[str], rounded: torch.dtype | None
    ) -> None:
        self.config, self.given, self.rows, self.rounded = config, weights, x, rounded
        self.x = torch.zeros_like(x)
        self.weights = {name: torch.zeros_like(weights[name]) for name in weights if name in wanted}

    def experts(self, grad_y: torch.Tensor, ids: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Adds what the routed experts contribute for grad_y [T, H]; returns the gradient of their `factors` [T, K]."""
        grad_factors = torch.zeros_like(factors)
        within = kept(self.config, ids)
        names = [name.removeprefix("experts.") for name in self.given if name.startswith("experts.")]
        for e in torch.unique(ids[within]).tolist():
            tokens, slots = torch.nonzero((ids == e) & within, as_tuple=True)
            scale = factors[tokens, slots].unsqueeze(1)
            mine = {name: self._as_used(self.given[f"experts.{name}"][e]) for name in names}
            of_rows, of_scale, found = ffn_backward(self.config, mine, self.rows[tokens], scale, grad_y[tokens])
            self.x.index_add_(0, tokens, of_rows)
            grad_factors[tokens, slots] = of_scale.squeeze(1)
            for name, grad in found.items():
                if f"experts.{name}" in self.weights:
                    self.weights[f"experts.{name}"][e] = grad
        return grad_factors

    def shared(self, grad_y: torch.Tensor) -> None:
        """Adds what the shared expert contributes; its gate is a scale like a routing weight, but always on the output."""
        config = dataclasses.replace(self.config, weight_on_input=False)
        mine = {n.removeprefix("shared."): self._as_used(w) for n, w in self.given.items() if n.startswith("shared.")}
        scale = self.rows.new_ones((len(self.rows), 1))
        if self.config.shared_gate:
            gate = self._as_used(self.given["shared_gate.weight"])
            scale = torch.sigmoid(self.rows @ gate.T)
        of_rows, of_scale, found = ffn_backward(config, mine, self.rows, scale, grad_y)
        self.x += of_rows
        self._add({f"shared.{name}": grad for name, grad in found.items()})
        if self.config.shared_gate:
            of_logit = of_scale * scale * (1.0 - scale)
            self.x += of_logit @ gate
            self._add({"shared_gate.weight": of_logit.T @ self.rows})

    def router_weights(self) -> dict[str, torch.Tensor]:
        """What logits are computed with."""
        return {n: self._as_used(self.given[n]) for n in ("router.weight", "router.bias") if n in self.given}

    def router(self, router_x: torch.Tensor, of_logits: torch.Tensor) -> torch.Tensor:
        """Adds what the router contributes for the gradient of its logits [T, E]; returns that of its input [T, H]."""
        self._add({"router.weight": of_logits.T @ router_x, "router.bias": of_logits.sum(dim=0)})
        return of_logits @ self.router_weights()["router.weight"]

    def _as_used(self, weight: torch.Tensor) -> torch.Tensor:
        return (weight if self.rounded is None else weight.to(self.rounded)).to(self.rows.dtype)

    def _add(self, grads: Mapping[str, torch.Tensor]) -> None:
        for name in grads.keys() & self.weights.keys():
            self.weights[name] += grads[name]


def layer_gradients(
    config: MoEConfig,
    weights: Weights,
    x: torch.Tensor,
    ids: torch.Tensor,
    grad_y: torch.Tensor,
    grad_weights: torch.Tensor | None = None,
    router_x: torch.Tensor | None = None,
    wanted: frozenset[str] = frozenset(),
    rounded: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """The backward of a layer: gradients of x, of router_x, and of the weights that are `wanted`.

    Args:
        config: the layer, whose projections are not in few bits.
        weights: those of `weight_shapes`, of any float types; the correction bias is not read.
        x: [T, H] of the type to compute in, as are `grad_y`, `grad_weights` and `router_x`.
        ids: integers [T, K], the router's choices.
        grad_y: [T, H], gradient of the output.
        grad_weights: [T, K], gradient of the routing weights, where they were used for something else, too.
        router_x: [T, H], what the router saw, if it was not x.
        wanted: names of the weights whose gradients are wanted.
        rounded: the type that the forward rounded the weights to; None if it took them as they are.

    Returns:
        (gradient of x [T, H], that of router_x or None, name -> gradient of the weight's type).
    """
    found = Gradients(config, weights, x, wanted, rounded)
    chosen = ids.to(torch.int64)
    seen = x if router_x is None else router_x
    z = logits(found.router_weights(), seen)
    grad_factors = found.experts(grad_y, chosen, routing_weights(config, z, chosen))
    if config.shared_intermediate:
        found.shared(grad_y)
    if grad_weights is not None:
        grad_factors = grad_factors + grad_weights
    of_seen = found.router(seen, routing_backward(config, z, chosen, grad_factors))
    return (found.x + of_seen, None, found.weights) if router_x is None else (found.x, of_seen, found.weights)
