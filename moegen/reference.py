"""What a Mixture-of-Experts layer computes, in float64 NumPy: the only definition of "correct".

Written from the definitions, not for speed: nothing is fused, and nothing is rounded on the way.
Sizes follow one alphabet: T tokens, E experts, K top-k, H hidden, I intermediate (Is for the shared expert).

Weights are a mapping from the names of `weight_shapes` to arrays of any floating type. A function reads the names it needs,
ignores the others, and widens to float64 one expert at a time. Infinities and NaN propagate as in IEEE 754, without warnings.

A layer in few bits computes with what its codes stand for: `dequantized` gives these weights where the layer rounds them itself,
`moegen.weights.WeightSource.to_float32` where codes were given. Of `config`'s fields for it only `activation_dtype` matters here:
with "int8" the rows that enter a projection of an expert are rounded first (`moegen.quantization.quantize_rows`), in float32
as a kernel does it. A kernel's rows differ from these by their own rounding, so that a value near a tie may take the next code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import DTYPES, MoEConfig, weight_shapes
from .errors import ConfigError, InputError, MoegenError, WeightsError
from .quantization import dequantize, quantize, quantize_rows

Floats = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Weights = Mapping[str, npt.NDArray[Any]]

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """Where the router sends T tokens, and how evenly.

    Attributes:
        ids: int32 [T, K], the chosen experts by descending choice score; distinct in each row.
        weights: float64 [T, K], the routing weights, also of the choices that capacity drops.
        load: int64 [E], tokens that chose each expert, before capacity.
        dropped: how many of the T*K choices are over their expert's capacity.
        kept: bool [T, K], False for the dropped choices.
        load_balancing_loss: E * sum_e f_e * P_e (Switch, arXiv:2101.03961, eq. 4), K when the routing is uniform.
        z_loss: mean squared log-sum-exp of the logits (ST-MoE, arXiv:2202.08906, eq. 5).
        adaptive_loss: load_balancing_loss times a coefficient that grows with the variance of expert usage.
    """

    ids: Ints
    weights: Floats
    load: npt.NDArray[np.int64]
    dropped: int
    kept: Mask
    load_balancing_loss: float
    z_loss: float
    adaptive_loss: float


# ---------------------------------------------------------------- activations


def activate(config: MoEConfig, gate: npt.ArrayLike | None, up: npt.ArrayLike) -> Floats:
    """The activation between an expert's projections, elementwise in float64.

    Gated linear units are act(gate) * up (Shazeer, arXiv:2002.05202) with silu for `swiglu`, relu for `reglu` and gelu for
    `geglu`. silu(x) = x * sigmoid(x) (arXiv:1702.03118); gelu(x) = x * Phi(x), with Phi the normal distribution function
    or its tanh approximation (arXiv:1606.08415); relu2(x) = max(x, 0)^2 (Primer, arXiv:2109.08668). `swiglu_clamped`
    is that of gpt-oss: g * sigmoid(alpha * g) * (u + 1) with g = min(gate, limit) and u = clip(up, -limit, limit).

    Args:
        gate: the gate projection, of up's shape; None (and ignored) for ungated activations.
        up: the up projection, which ungated activations act on.

    Raises:
        InputError: a gated activation was given no gate.
    """
    kind = config.activation
    with np.errstate(invalid="ignore", over="ignore"):
        u = np.asarray(up, np.float64)
        if not config.gated:
            return _ungated(kind, u)
        if gate is None:
            raise InputError(f"activation={kind!r} needs a gate projection, got None")
        g = np.asarray(gate, np.float64)
        if kind == "swiglu_clamped":
            limit = config.swiglu_limit
            g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
            return np.asarray(g * _sigmoid(config.swiglu_alpha * g) * (u + 1.0))
        return _ungated({"swiglu": "silu", "reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}[kind], g) * u


def _ungated(kind: str, x: Floats) -> Floats:
    if kind == "relu":
        return np.maximum(x, 0.0)
    if kind == "relu2":
        return np.square(np.maximum(x, 0.0))
    if kind == "silu":
        return x * _sigmoid(x)
    if kind == "gelu":
        # Phi(x) = erfc(-x / sqrt 2) / 2 = (1 + erf(x / sqrt 2)) / 2, without the cancellation in the negative tail.
        return x * 0.5 * np.asarray(_erfc(-x / math.sqrt(2.0)), np.float64)
    if kind == "gelu_tanh":
        # (1 + tanh a) / 2 = sigmoid(2 a), likewise.
        return x * _sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
    raise ConfigError(f"activation={kind!r} has no reference")


def _sigmoid(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))  # never overflows
    return np.where(x < 0, small, 1.0) / (1.0 + small)


def _softmax(x: Floats) -> Floats:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


# ---------------------------------------------------------------- router


def route(config: MoEConfig, weights: Weights, x: npt.ArrayLike, logits: npt.ArrayLike | None = None) -> Routing:
    """Choose K experts for each token, weigh them, apply capacity and measure the balance.

    1. logits = x @ router.weight.T + router.bias.
    2. scores: softmax or sigmoid of the logits over all E experts.
    3. choice scores: the logits where `config.selects_by_logit`, else scores + correction_bias (DeepSeek-V3, arXiv:2412.19437,
       eq. 16). The K best of the allowed groups are chosen; ties go to the lower index, NaN counts as minus infinity.
    4. weights: the scores of the chosen, or for `topk_softmax` the softmax over their logits; then divided by their sum
       if `renormalize`, then times `routed_scaling`.
    5. capacity: an expert keeps the first `config.capacity(T)` of its tokens by position (GShard, arXiv:2006.16668, alg. 1);
       the weights of the rest are not redistributed.
    6. losses, before capacity; see `Routing`. All are 0 for T=0.

    Args:
        weights: `router.*` in the names of `weight_shapes`; not read when `logits` are given, but for the correction bias.
        x: [T, H].
        logits: [T, E] to route by instead of step 1, e.g. those that a compiled router computed.

    Raises:
        InputError: x or logits have the wrong shape.
        WeightsError: a weight is missing or has the wrong shape.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        x64 = _matrix("x", x, config.hidden)
        z = _logits(config, weights, x64) if logits is None else _matrix("logits", logits, config.experts, len(x64))
        scores = _sigmoid(z) if config.gating == "sigmoid" else _softmax(z)
        choice = _choice_scores(config, weights, z, scores)
        ids = _best(choice, config.top_k, excluded=_excluded(config, choice))
        routing_weights = _routing_weights(config, z, scores, ids)
        kept = capacity_mask(config, ids)
        load = np.bincount(ids.ravel(), minlength=config.experts).astype(np.int64)
        balance, z_loss, adaptive = _losses(config, z, scores, load)
    return Routing(
        ids=ids.astype(np.int32),
        weights=routing_weights,
        load=load,
        dropped=int(kept.size - kept.sum()),
        kept=kept,
        load_balancing_loss=balance,
        z_loss=z_loss,
        adaptive_loss=adaptive,
    )


def _logits(config: MoEConfig, weights: Weights, x: Floats) -> Floats:
    logits: Floats = x @ _weight(config, weights, "router.weight").T
    return logits + _weight(config, weights, "router.bias") if config.router_bias else logits


def margins(config: MoEConfig, weights: Weights, x: npt.ArrayLike) -> Floats:
    """[T]: how much a token's choice scores (or group scores) may change before its ids or their order could.

    A kernel whose logits are rounded to float32 may decide differently where the margin is below its rounding error.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        z = _logits(config, weights, _matrix("x", x, config.hidden))
        scores = _sigmoid(z) if config.gating == "sigmoid" else _softmax(z)
        choice = _choice_scores(config, weights, z, scores)
        excluded = _excluded(config, choice)
        allowed = -np.sort(-np.where(excluded, -np.inf, choice), axis=1)[:, : config.top_k + 1]
        margin = _smallest_step(allowed)
        if config.n_group > config.topk_group:
            groups = -np.sort(-_group_scores(config, choice), axis=1)[:, config.topk_group - 1 : config.topk_group + 1]
            margin = np.minimum(margin, _smallest_step(groups))
    return margin


def _smallest_step(descending: Floats) -> Floats:
    """[T]: the smallest difference between neighbours of each row; infinite where there are none."""
    steps: Floats = np.min(-np.diff(descending, axis=1), axis=1, initial=np.inf)
    return steps


def _choice_scores(config: MoEConfig, weights: Weights, logits: Floats, scores: Floats) -> Floats:
    """[T, E] that experts are chosen by; free of NaN, so that every choice is well defined."""
    choice = logits if config.selects_by_logit else scores
    if config.correction_bias:
        choice = choice + _weight(config, weights, "router.correction_bias")
    return np.where(np.isnan(choice), -np.inf, choice)


def _excluded(config: MoEConfig, choice: Floats) -> Mask:
    """[T, E]: the experts outside each token's `topk_group` best groups (DeepSeek-V2, arXiv:2405.04434, section 2.2.2)."""
    tokens = len(choice)
    excluded = np.zeros(choice.shape, np.bool_)
    if config.n_group == 1:
        return excluded
    worst = _best(_group_scores(config, choice), config.n_group)[:, config.topk_group :]
    np.put_along_axis(excluded.reshape(tokens, config.n_group, config.group_size), worst[:, :, None], True, axis=1)
    return excluded


def _group_scores(config: MoEConfig, choice: Floats) -> Floats:
    """[T, n_group]: the largest choice score of a group, or the sum of its two largest."""
    grouped = choice.reshape(len(choice), config.n_group, config.group_size)
    scored: Floats = grouped.max(axis=2) if config.group_score == "max" else np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    return scored


def _best(scores: Floats, count: int, excluded: Mask | None = None) -> npt.NDArray[np.intp]:
    """[T, count]: the columns of the largest scores, descending; ties by the lower column, excluded columns last of all."""
    keys = (-scores,) if excluded is None else (-scores, excluded)  # lexsort is stable and sorts by its last key first
    return np.lexsort(keys, axis=1)[:, :count]


def _routing_weights(config: MoEConfig, logits: Floats, scores: Floats, ids: npt.NDArray[np.intp]) -> Floats:
    if config.gating == "topk_softmax":
        weights = _softmax(np.take_along_axis(logits, ids, axis=1))
    else:
        weights = np.take_along_axis(scores, ids, axis=1)
        if config.renormalize:
            # The 1e-20 is DeepSeek-V3's: sigmoids, unlike a softmax, can all vanish.
            weights = weights / (weights.sum(axis=1, keepdims=True) + (1e-20 if config.gating == "sigmoid" else 0.0))
    return weights * config.routed_scaling


def capacity_mask(config: MoEConfig, ids: npt.NDArray[np.intp]) -> Mask:
    chosen = np.zeros((len(ids), config.experts), np.int64)
    np.put_along_axis(chosen, ids, 1, axis=1)
    position = np.cumsum(chosen, axis=0) - 1  # of the token in the expert's queue
    return np.asarray(np.take_along_axis(position, ids, axis=1) < config.capacity(len(ids)))


def _losses(config: MoEConfig, logits: Floats, scores: Floats, load: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """(load_balancing_loss, z_loss, adaptive_loss).

    f_e = load_e / T sums to K. P_e is the mean router probability: the softmax over all E for both softmax gatings, the
    sigmoid scores over their sum for `sigmoid` (arXiv:2412.19437, eq. 19 and 20). With u_e = load_e / (T*K) the adaptive
    loss is balance_coefficient * (1 + Var(u)) * load_balancing_loss, Var over the E experts (population).
    """
    tokens = len(logits)
    if tokens == 0:
        return 0.0, 0.0, 0.0
    probabilities = scores / scores.sum(axis=1, keepdims=True) if config.gating == "sigmoid" else scores
    balance = float(config.experts * np.sum(load / tokens * probabilities.mean(axis=0)))
    z_loss = float(np.mean(np.square(np.logaddexp.reduce(logits, axis=1))))
    usage = load / (tokens * config.top_k)
    return balance, z_loss, float(config.balance_coefficient * (1.0 + np.var(usage)) * balance)


# ---------------------------------------------------------------- experts


def experts(
    config: MoEConfig,
    weights: Weights,
    x: npt.ArrayLike,
    ids: npt.ArrayLike,
    routing_weights: npt.ArrayLike,
    kept: npt.ArrayLike | None = None,
) -> Floats:
    """The routed experts: y[t] = sum_k w[t,k] * FFN_{ids[t,k]}(x[t]), or FFN(w * x) with `weight_on_input`.

    FFN(x) = activate(x @ gate.T + b, x @ up.T + b) @ down.T + b. Capacity is not applied here: `kept` decides. With
    `activation_dtype="int8"` both products take rows rounded to int8, of x (which w multiplies afterwards with
    `weight_on_input`) and of the activation's output.

    Args:
        weights: `experts.*` in the names of `weight_shapes`.
        x: [T, H].
        ids: integers [T, K] in [0, E).
        routing_weights: [T, K].
        kept: bool [T, K], False for choices that contribute nothing; None keeps all.

    Returns:
        float64 [T, H].

    Raises:
        InputError: an argument has the wrong shape, or an id is out of range.
        WeightsError: a weight is missing or has the wrong shape.
    """
    x64 = _matrix("x", x, config.hidden)
    w = _matrix("routing_weights", routing_weights, config.top_k, len(x64))
    chosen = np.asarray(ids)
    keep = np.ones(w.shape, np.bool_) if kept is None else np.asarray(kept, np.bool_)
    for name, array in (("ids", chosen), ("kept", keep)):
        if array.shape != w.shape:
            raise InputError(f"{name} has shape {array.shape}, expected {w.shape}")
    if np.any((chosen < 0) | (chosen >= config.experts)):
        raise InputError(f"ids must be between 0 and {config.experts - 1}, got {chosen.min()} to {chosen.max()}")

    y = np.zeros_like(x64)
    with np.errstate(invalid="ignore", over="ignore"):
        for e in np.unique(chosen[keep]):
            tokens, slots = np.nonzero((chosen == e) & keep)
            scale = w[tokens, slots, None]
            ffn = _ffn_weights(config, weights, "experts", int(e))
            rows = _ffn(config, ffn, x64[tokens], scale) if config.weight_on_input else scale * _ffn(config, ffn, x64[tokens])
            np.add.at(y, tokens, rows)  # not +=, which would lose an expert that given ids name twice for a token
    return y


def shared(config: MoEConfig, weights: Weights, x: npt.ArrayLike) -> Floats:
    """The shared expert, float64 [T, H]: FFN(x), times sigmoid(x @ shared_gate.T) with `shared_gate`; zeros without one.

    Args:
        weights: `shared.*` and `shared_gate.weight` in the names of `weight_shapes`.
        x: [T, H].
    """
    x64 = _matrix("x", x, config.hidden)
    if not config.shared_intermediate:
        return np.zeros_like(x64)
    with np.errstate(invalid="ignore", over="ignore"):
        y = _ffn(config, _ffn_weights(config, weights, "shared"), x64)
        return y * _sigmoid(x64 @ _weight(config, weights, "shared_gate.weight").T) if config.shared_gate else y


def moe(config: MoEConfig, weights: Weights, x: npt.ArrayLike) -> tuple[Floats, Routing]:
    """The whole layer: routed experts within capacity plus the shared expert, float64 [T, H], and the routing behind it."""
    routing = route(config, weights, x)
    y = experts(config, weights, x, routing.ids, routing.weights, routing.kept) + shared(config, weights, x)
    return y, routing


def _ffn(config: MoEConfig, weights: Mapping[str, Floats], x: Floats, scale: Floats | float = 1.0) -> Floats:
    rows = _entering(config, x) * scale
    gate = _linear(weights, "gate", rows) if config.gated else None
    return _linear(weights, "down", _entering(config, activate(config, gate, _linear(weights, "up", rows))))


def _entering(config: MoEConfig, rows: Floats) -> Floats:
    """The rows that a projection multiplies with: as they are, or as int8 codes stand for them."""
    if config.activation_dtype == "same":
        return rows
    codes, scales = quantize_rows(rows)
    meant: Floats = codes.astype(np.float64) * scales
    return meant


def _linear(weights: Mapping[str, Floats], name: str, x: Floats) -> Floats:
    y: Floats = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def _ffn_weights(config: MoEConfig, weights: Weights, part: str, expert: int | None = None) -> dict[str, Floats]:
    """The weights of one FFN, float64, named without their `part` ("experts" or "shared")."""
    names = [name for name in weight_shapes(config) if name.startswith(f"{part}.")]
    return {name.removeprefix(f"{part}."): _weight(config, weights, name, expert) for name in names}


# ---------------------------------------------------------------- few bits


def dequantized(config: MoEConfig, weights: Weights) -> dict[str, npt.NDArray[Any]]:
    """The weights that a layer in few bits computes with, when it rounds float weights itself.

    Every projection of the experts and of the shared expert is rounded to codes (`moegen.quantization.quantize`) and comes back
    as float64 values; the other weights are the same arrays, as are all of them with weight_dtype "same". Rounding twice is not
    rounding once: weights that a checkpoint had in few bits come from `moegen.weights.WeightSource.to_float32` instead.

    Args:
        weights: float arrays by the names of `weight_shapes`, or some of them.

    Raises:
        WeightsError: a projection has the wrong shape, or cannot be stored (see `quantize`).
    """
    found: dict[str, npt.NDArray[Any]] = dict(weights)
    if not config.low_bit:
        return found
    for name, shape in weight_shapes(config).items():
        if name not in weights or not name.startswith(("experts.", "shared.")) or not name.endswith(".weight"):
            continue
        values = np.empty(shape, np.float64)
        experts = range(config.experts) if len(shape) == 3 else (None,)
        for e in experts:
            matrix = _weight(config, weights, name, e)
            values[e if e is not None else ...] = dequantize(quantize(matrix, config, name), config)
        found[name] = values
    return found


# ---------------------------------------------------------------- arguments


def _weight(config: MoEConfig, weights: Weights, name: str, expert: int | None = None) -> Floats:
    """`weights[name]`, or one expert's part of it, in float64."""
    if name not in weights:
        raise WeightsError(f"weight {name!r} is missing")
    array, expected = np.asarray(weights[name]), weight_shapes(config)[name]
    if array.shape != expected:
        raise WeightsError(f"weight {name!r} has shape {array.shape}, expected {expected}")
    return _float64(f"weight {name!r}", array if expert is None else array[expert], WeightsError)


def _matrix(name: str, value: npt.ArrayLike, columns: int, rows: int | None = None) -> Floats:
    array = _float64(name, value, InputError)
    if array.ndim != 2 or array.shape[1] != columns or rows not in (None, len(array)):
        raise InputError(f"{name} has shape {array.shape}, expected ({'T' if rows is None else rows}, {columns})")
    return array


def _float64(name: str, value: npt.ArrayLike, error: type[MoegenError]) -> Floats:
    array = np.asarray(value)
    if array.dtype == np.uint16:  # how bfloat16 travels elsewhere: read as integers, its bits would give plausible nonsense
        raise error(f"{name} is uint16, which may be the bits of bfloat16: widen it to float32 first")
    return array.astype(np.float64, copy=False)


# ---------------------------------------------------------------- made-up weights


def random_weights(config: MoEConfig, rng: np.random.Generator, dtype: str | None = None) -> dict[str, Float32s]:
    """All weights of `weight_shapes`, normal with standard deviation 1/sqrt(fan-in) (biases 0.1), so that x ~ N(0, 1) gives
    logits and hidden values of order one.

    The arrays are float32 and hold values that `dtype` (`config.dtype` when left out) represents exactly, but for the
    correction bias, which models keep in float32.
    """
    weights = {}
    for name, shape in weight_shapes(config).items():
        scale = np.float32(1.0 / math.sqrt(shape[-1]) if name.endswith(".weight") else 0.1)
        kind = "float32" if name == "router.correction_bias" else dtype or config.dtype
        values = np.empty(shape, np.float32)
        for block in values if len(shape) == 3 else (values,):  # an expert at a time keeps the temporaries in cache
            block[...] = round_to_dtype(rng.standard_normal(block.shape, dtype=np.float32) * scale, kind)
        weights[name] = values
    return weights


def round_to_dtype(array: npt.ArrayLike, dtype: str) -> Float32s:
    """`array` as float32, rounded to the nearest value of `dtype`, ties to even; NaN stays NaN, too large becomes infinite.

    Raises:
        ConfigError: dtype is none of float32, bfloat16, float16.
    """
    values = np.asarray(array, np.float32)
    if dtype == "float32":
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "float16":
            return values.astype(np.float16).astype(np.float32)
        if dtype == "bfloat16":
            bits = values.view(np.uint32)
            rounded = (bits + ((bits >> 16 & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
            # Rounding may carry a NaN's payload out; keep its upper half and set the quiet bit.
            quiet = bits & np.uint32(0xFFFF0000) | np.uint32(0x00400000)
            return np.asarray(np.where(np.isnan(values), quiet, rounded).view(np.float32))
    raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
