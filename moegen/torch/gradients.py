"""The backward of a layer in torch: recomputed from what entered the layer and the choices that its router made.

Nothing here chooses: which experts a token visits, and which choices capacity drops, is given, as the forward decided it, and
gradients flow through the weights of the chosen alone (as in every such layer, the choice itself has none). Ties and orders
therefore cannot come out otherwise than they did. The functions work in the type of their tensors, float64 included.

The definitions are those of `moegen.reference`, written for torch. Weights are mappings from the names of
`moegen.config.weight_shapes`.
"""

from __future__ import annotations

import math
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
    chosen = ids.to(torch.int64)
    if config.gating == "topk_softmax":
        return torch.softmax(z.gather(1, chosen), dim=-1) * config.routed_scaling
    weights = scores(config, z).gather(1, chosen)
    if config.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + (_TINY if config.gating == "sigmoid" else 0.0))
    return weights * config.routed_scaling


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


def kept(config: MoEConfig, ids: torch.Tensor) -> torch.Tensor:
    """bool [T, K]: which choices are within their expert's capacity, the first by position."""
    tokens = len(ids)
    if config.capacity(tokens) >= tokens:
        return torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    chosen = torch.zeros((tokens, config.experts), dtype=torch.int64, device=ids.device).scatter_(1, ids.to(torch.int64), 1)
    position = chosen.cumsum(dim=0) - 1
    return position.gather(1, ids.to(torch.int64)) < config.capacity(tokens)


# ---------------------------------------------------------------- one expert


def activate(config: MoEConfig, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The activation between an expert's projections."""
    if config.activation == "swiglu_clamped":
        assert gate is not None
        g, u = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
        return g * torch.sigmoid(config.swiglu_alpha * g) * (u + 1.0)
    kind = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}.get(config.activation, config.activation)
    made = _ACTIVATIONS[kind](up if gate is None else gate)
    return made if gate is None else made * up


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


_ACTIVATIONS: dict[str, Any] = {
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": _gelu_tanh,
}


def ffn(config: MoEConfig, weights: Weights, rows: torch.Tensor) -> torch.Tensor:
    """[n, H] of rows [n, H] by one expert, whose weights are named `up.weight`, `up.bias` ..."""
    linear = torch.nn.functional.linear
    gate = linear(rows, weights["gate.weight"], weights.get("gate.bias")) if config.gated else None
    hidden = activate(config, gate, linear(rows, weights["up.weight"], weights.get("up.bias")))
    return linear(hidden, weights["down.weight"], weights.get("down.bias"))


def scaled_ffn(config: MoEConfig, weights: Weights, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What an expert adds to the output of its tokens: `ffn` with the routing weights `scale` [n, 1] on its input or output."""
    return ffn(config, weights, rows * scale) if config.weight_on_input else ffn(config, weights, rows) * scale


def shared(config: MoEConfig, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """[T, H]: what the shared expert adds."""
    y = ffn(config, part_of(weights, "shared"), x)
    return y * torch.sigmoid(x @ weights["shared_gate.weight"].T) if config.shared_gate else y


def part_of(weights: Weights, part: str, expert: int | None = None) -> dict[str, torch.Tensor]:
    """The weights named `<part>.`, without that, or one expert's of them."""
    found = {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}
    return found if expert is None else {name: w[expert] for name, w in found.items()}


# ---------------------------------------------------------------- the whole layer


class Gradients:
    """Gradients of one call, summed part by part.

    Args:
        config: the layer.
        weights: those of `weight_shapes`, of any float types.
        x: [T, H] of the type to compute in, to which weights are rounded; the router computes in float32 at least.
        wanted: names of the weights whose gradients are wanted.

    Attributes:
        x: gradient of x [T, H], float32 at least.
        weights: name -> gradient, of the shape and type of the weight.
    """

    def __init__(self, config: MoEConfig, weights: Weights, x: torch.Tensor, wanted: frozenset[str]) -> None:
        self.config, self.given, self.rows, self.wanted = config, weights, x, wanted
        self.wide = torch.promote_types(x.dtype, torch.float32)
        self.x = torch.zeros_like(x, dtype=self.wide)
        self.weights = {name: torch.zeros_like(weights[name]) for name in weights if name in wanted}

    def experts(self, grad_y: torch.Tensor, ids: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Adds what the routed experts contribute for grad_y [T, H]; returns the gradient of their `factors` [T, K]."""
        grad_factors = torch.zeros_like(factors)
        within = kept(self.config, ids)
        for e in torch.unique(ids[within]).tolist():
            tokens, slots = torch.nonzero((ids == e) & within, as_tuple=True)
            scale = factors[tokens, slots].unsqueeze(1).to(self.rows.dtype)
            mine = {name: w.to(self.rows.dtype) for name, w in part_of(self.given, "experts", e).items()}
            grads = _vjp(lambda w, r, s: scaled_ffn(self.config, w, r, s), mine, (self.rows[tokens], scale), grad_y[tokens])
            self.x.index_add_(0, tokens, grads[0].to(self.wide))
            grad_factors[tokens, slots] = grads[1].squeeze(1).to(factors.dtype)
            for name, grad in grads[2].items():
                if f"experts.{name}" in self.wanted:
                    self.weights[f"experts.{name}"][e] = grad
        return grad_factors

    def shared(self, grad_y: torch.Tensor) -> None:
        """Adds what the shared expert contributes."""
        mine = {name: w.to(self.rows.dtype) for name, w in self.given.items() if name.startswith("shared")}
        grads = _vjp(lambda w, r: shared(self.config, w, r), mine, (self.rows,), grad_y)
        self.x += grads[0]
        self._take(grads[1])

    def router_weights(self) -> dict[str, torch.Tensor]:
        """What logits are computed with."""
        return {n: self.given[n].to(self.rows.dtype).to(self.wide) for n in ("router.weight", "router.bias") if n in self.given}

    def router(self, router_x: torch.Tensor, ids: torch.Tensor, grad_factors: torch.Tensor) -> torch.Tensor:
        """Adds what the router contributes for the gradient of its weights [T, K]; returns the gradient of its input [T, H]."""

        def weigh(weights: Weights, x: torch.Tensor) -> torch.Tensor:
            return routing_weights(self.config, logits(weights, x), ids)

        made: torch.Tensor
        made, grads = _vjp(weigh, self.router_weights(), (router_x,), grad_factors)
        self._take(grads)
        return made

    def _take(self, grads: Mapping[str, torch.Tensor]) -> None:
        for name in grads.keys() & self.wanted:
            self.weights[name] += grads[name]


def _vjp(function: Any, weights: Weights, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor) -> tuple[Any, ...]:
    """Gradients of `function(weights, *inputs)`: those of the inputs, then those of the weights by name."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (*inputs, *weights.values())]
        made = function(dict(zip(weights, leaves[len(inputs) :], strict=True)), *leaves[: len(inputs)])
    found = torch.autograd.grad(made, leaves, grad.to(made.dtype), materialize_grads=True)
    return *found[: len(inputs)], dict(zip(weights, found[len(inputs) :], strict=True))


def layer_gradients(
    config: MoEConfig,
    weights: Weights,
    x: torch.Tensor,
    ids: torch.Tensor,
    grad_y: torch.Tensor,
    grad_weights: torch.Tensor | None = None,
    router_x: torch.Tensor | None = None,
    wanted: frozenset[str] = frozenset(),
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """The backward of a layer: gradients of x, of router_x, and of the weights that are `wanted`.

    Args:
        config: the layer, whose projections are not in few bits.
        weights: those of `weight_shapes`, of any float types; they are rounded to x's, and the correction bias is not read.
        x: [T, H].
        ids: integers [T, K], the router's choices.
        grad_y: [T, H], gradient of the output.
        grad_weights: [T, K], gradient of the routing weights, where they were used for something else, too.
        router_x: [T, H], what the router saw, if it was not x.

    Returns:
        (gradient of x [T, H], that of router_x or None, name -> gradient), of the types of what they are gradients of.
    """
    found = Gradients(config, weights, x, wanted)
    seen = (x if router_x is None else router_x).to(found.wide)
    factors = routing_weights(config, logits(found.router_weights(), seen), ids)
    grad_factors = found.experts(grad_y, ids, factors)
    if config.shared_intermediate:
        found.shared(grad_y)
    if grad_weights is not None:
        grad_factors = grad_factors + grad_weights
    grad_seen = found.router(seen, ids, grad_factors)
    if router_x is not None:
        return found.x.to(x.dtype), grad_seen.to(router_x.dtype), found.weights
    return (found.x + grad_seen).to(x.dtype), None, found.weights
