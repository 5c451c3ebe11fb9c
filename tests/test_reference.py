"""The reference against hand-computed cases and against formulations written another way (loops over tokens, `math`)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moegen import reference as ref
from moegen.config import ACTIVATIONS, GATED_ACTIVATIONS, UNGATED_ACTIVATIONS, MoEConfig
from moegen.errors import ConfigError, InputError, WeightsError
from moegen.quantization import dequantize, quantize

NAN = float("nan")
INF = float("inf")


def config_of(**fields):
    return MoEConfig(**({"experts": 4, "top_k": 2, "hidden": 3, "intermediate": 5} | fields))


def route_logits(config, logits, weights=None):
    logits = np.asarray(logits, np.float64)
    return ref.route(config, weights or {}, np.zeros((len(logits), config.hidden)), logits)


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


# ---------------------------------------------------------------- activations

POINTS = [-30.0, -6.5, -1.0, -0.3, 0.0, 1e-9, 0.7, 2.0, 6.9, 7.1, 25.0]

SCALAR = {
    "relu": lambda x: x if x > 0 else 0.0,
    "relu2": lambda x: x * x if x > 0 else 0.0,
    "silu": lambda x: x / (1.0 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2.0)),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
}
GLU = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


@pytest.mark.parametrize("activation", UNGATED_ACTIVATIONS)
def test_ungated_activation(activation):
    got = ref.activate(config_of(activation=activation), None, POINTS)
    np.testing.assert_allclose(got, [SCALAR[activation](x) for x in POINTS], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("activation", list(GLU))
def test_gated_linear_units(activation):
    gate, up = np.meshgrid(POINTS, [-2.0, 0.0, 3.5])
    expected = [[SCALAR[GLU[activation]](g) * u for g, u in zip(*rows, strict=True)] for rows in zip(gate, up, strict=True)]
    np.testing.assert_allclose(ref.activate(config_of(activation=activation), gate, up), expected, rtol=1e-13, atol=1e-15)


def test_exact_gelu_is_the_erf_form():
    got = ref.activate(config_of(activation="gelu"), None, POINTS)
    np.testing.assert_allclose(got, [0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))) for x in POINTS], atol=1e-14)
    assert ref.activate(config_of(activation="gelu"), None, [-10.0])[0] == pytest.approx(-7.61985302416e-23, rel=1e-9)


@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (0.5, 2.0)])
def test_clamped_swiglu(alpha, limit):
    config = config_of(activation="swiglu_clamped", swiglu_alpha=alpha, swiglu_limit=limit)
    for gate in (-50.0, -8.0, 0.3, 6.0, 8.0):  # the gate is clamped above only
        for up in (-9.0, -1.0, 0.0, 1.5, 9.0):
            g, u = min(gate, limit), max(-limit, min(up, limit))
            assert ref.activate(config, gate, up) == pytest.approx(g * sigmoid(alpha * g) * (u + 1.0), rel=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_propagates_nan(activation):
    config = config_of(activation=activation)
    gate = np.ones(3) if config.gated else None
    np.testing.assert_array_equal(np.isnan(ref.activate(config, gate, [1.0, NAN, -1.0])), [False, True, False])
    if config.gated:
        np.testing.assert_array_equal(np.isnan(ref.activate(config, [1.0, NAN, -1.0], np.ones(3))), [False, True, False])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_finite_for_huge_values_and_empty_arrays(activation):
    config = config_of(activation=activation)
    huge = np.array([-1e30, 1e30])
    assert np.isfinite(ref.activate(config, huge, np.ones(2)) if config.gated else ref.activate(config, None, huge)).all()
    assert ref.activate(config, np.empty((0, 5)), np.empty((0, 5))).shape == (0, 5)


def test_gated_activation_needs_a_gate():
    with pytest.raises(InputError, match=r"swiglu.*gate"):
        ref.activate(config_of(), None, [1.0])


# ---------------------------------------------------------------- gating


@pytest.mark.parametrize("renormalize", [False, True])
def test_softmax_gating(renormalize):
    row = [math.log(1.0), math.log(4.0), math.log(2.0), math.log(3.0)]  # softmax is 0.1, 0.4, 0.2, 0.3
    routing = route_logits(config_of(renormalize=renormalize, routed_scaling=2.0), [row])
    assert routing.ids.dtype == np.int32
    assert routing.weights.dtype == np.float64
    np.testing.assert_array_equal(routing.ids, [[1, 3]])
    expected = [4 / 7, 3 / 7] if renormalize else [0.4, 0.3]
    np.testing.assert_allclose(routing.weights, 2.0 * np.array([expected]), rtol=1e-14)


@pytest.mark.parametrize("renormalize", [False, True])
def test_topk_softmax_gating_ignores_renormalize(renormalize):
    config = config_of(gating="topk_softmax", renormalize=renormalize, routed_scaling=0.5)
    routing = route_logits(config, [[0.0, 2.0, -1.0, 1.0]])
    np.testing.assert_array_equal(routing.ids, [[1, 3]])
    np.testing.assert_allclose(routing.weights, 0.5 * np.array([softmax([2.0, 1.0])]), rtol=1e-14)


@pytest.mark.parametrize("renormalize", [False, True])
def test_sigmoid_gating(renormalize):
    routing = route_logits(config_of(gating="sigmoid", renormalize=renormalize, routed_scaling=2.5), [[0.0, 2.0, -1.0, 1.0]])
    np.testing.assert_array_equal(routing.ids, [[1, 3]])
    scores = np.array([[sigmoid(2.0), sigmoid(1.0)]])
    np.testing.assert_allclose(routing.weights, 2.5 * (scores / scores.sum() if renormalize else scores), rtol=1e-14)


def test_vanishing_sigmoids_renormalize_to_zero_not_nan():
    routing = route_logits(config_of(gating="sigmoid"), [[-1000.0] * 4])
    np.testing.assert_array_equal(routing.weights, [[0.0, 0.0]])


def test_softmax_does_not_overflow():
    routing = route_logits(config_of(renormalize=False), [[1e4, 1e4, -1e4, 0.0]])
    np.testing.assert_array_equal(routing.weights, [[0.5, 0.5]])
    assert routing.z_loss == pytest.approx((1e4 + math.log(2.0)) ** 2)


def test_saturated_sigmoids_are_chosen_by_logit():
    logits = [[40.0, 41.0, 50.0, 45.0]]  # all sigmoids are exactly 1.0
    np.testing.assert_array_equal(route_logits(config_of(gating="sigmoid"), logits).ids, [[2, 3]])
    biased = config_of(gating="sigmoid", correction_bias=True)
    np.testing.assert_array_equal(route_logits(biased, logits, {"router.correction_bias": np.zeros(4)}).ids, [[0, 1]])


def test_logits_from_weights_and_bias():
    config = config_of(router_bias=True)
    rng = np.random.default_rng(1)
    weights, x = ref.random_weights(config, rng), rng.standard_normal((6, 3))
    w, b = weights["router.weight"].astype(float), weights["router.bias"].astype(float)
    logits = [[sum(w[e, h] * x[t, h] for h in range(3)) + b[e] for e in range(4)] for t in range(6)]
    got, expected = ref.route(config, weights, x), ref.route(config, {}, x, logits)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_allclose(got.weights, expected.weights, rtol=1e-13)


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_correction_bias_decides_the_choice_but_not_the_weight(gating):
    config = config_of(gating=gating, correction_bias=True, renormalize=False)
    bias = np.array([0.0, 0.0, 0.0, 2.0])
    row = [1.0, 0.5, 0.0, -1.0]
    routing = route_logits(config, [row], {"router.correction_bias": bias})
    np.testing.assert_array_equal(routing.ids, [[3, 0]])
    scores = softmax(row) if gating == "softmax" else [sigmoid(v) for v in row]
    np.testing.assert_allclose(routing.weights, [[scores[3], scores[0]]], rtol=1e-14)


# ---------------------------------------------------------------- groups


def test_group_limit_by_the_sum_of_the_two_best():
    # Groups (0,1,2), (3,4,5), (6,7,8): the best expert is in group 0, the best pairs are in groups 2 and 1.
    config = config_of(experts=9, top_k=3, gating="sigmoid", n_group=3, topk_group=2, group_score="top2_sum")
    routing = route_logits(config, [[3.0, -5.0, -5.0, 1.0, 1.1, -9.0, 2.0, 1.5, -9.0]])
    np.testing.assert_array_equal(routing.ids, [[6, 7, 4]])


def test_group_limit_by_the_maximum():
    config = config_of(experts=9, top_k=3, n_group=3, topk_group=2, group_score="max")
    routing = route_logits(config, [[3.0, -5.0, -6.0, 1.0, 1.1, -9.0, 2.0, 1.5, -9.0]])
    np.testing.assert_array_equal(routing.ids, [[0, 6, 7]])


def test_group_score_uses_the_correction_bias():
    config = config_of(top_k=1, gating="sigmoid", correction_bias=True, n_group=2, topk_group=1)
    logits = [[2.0, 2.0, 0.0, 0.5]]
    assert route_logits(config, logits, {"router.correction_bias": np.zeros(4)}).ids.tolist() == [[0]]
    routing = route_logits(config, logits, {"router.correction_bias": np.array([0.0, 0.0, 5.0, 5.0])})
    assert routing.ids.tolist() == [[3]]


def test_group_ties_go_to_the_lower_group():
    for score in ("max", "top2_sum"):
        config = config_of(experts=8, top_k=4, gating="sigmoid", n_group=4, topk_group=2, group_score=score)
        assert route_logits(config, [[0.5] * 8]).ids.tolist() == [[0, 1, 2, 3]]
        assert route_logits(config, [[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.7, 0.7]]).ids.tolist() == [[6, 7, 0, 1]]


def test_negative_choice_scores_beat_excluded_experts():
    config = config_of(top_k=2, gating="sigmoid", correction_bias=True, n_group=2, topk_group=1)
    bias = np.array([-9.0, -9.0, -8.0, -9.0])
    assert route_logits(config, [[0.0] * 4], {"router.correction_bias": bias}).ids.tolist() == [[2, 3]]


# ---------------------------------------------------------------- ties and NaN


@pytest.mark.parametrize("gating", ["softmax", "topk_softmax", "sigmoid"])
def test_ties_go_to_the_lower_expert(gating):
    config = config_of(experts=6, top_k=3, gating=gating)
    routing = route_logits(config, [[1.0] * 6, [0.0, 1.0, 0.0, 1.0, 1.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0, 0.0]])
    assert routing.ids.tolist() == [[0, 1, 2], [1, 3, 4], [0, 1, 2]]
    np.testing.assert_allclose(routing.weights, 1 / 3, rtol=1e-14)


@pytest.mark.parametrize("gating", ["softmax", "topk_softmax", "sigmoid"])
def test_nan_logits_come_last_in_the_choice(gating):
    config = config_of(top_k=3, gating=gating)
    routing = route_logits(config, [[NAN, -1.0, NAN, 2.0], [NAN] * 4, [0.0, 1.0, 2.0, 3.0]])
    assert routing.ids.tolist() == [[3, 1, 0], [0, 1, 2], [3, 2, 1]]
    assert np.isnan(routing.weights[:2]).all()
    assert np.isfinite(routing.weights[2]).all()
    assert math.isnan(routing.z_loss)
    assert math.isnan(routing.load_balancing_loss)
    np.testing.assert_array_equal(routing.load, [2, 3, 2, 2])


def test_nan_experts_of_allowed_groups_beat_excluded_groups():
    # The group of 5.0 wins by its maximum; its NaN expert is still chosen before anyone in the excluded group.
    config = config_of(top_k=2, n_group=2, topk_group=1, group_score="max")
    assert route_logits(config, [[5.0, NAN, 1.0, 1.0], [1.0, 1.0, NAN, 5.0]]).ids.tolist() == [[0, 1], [3, 2]]
    both = config_of(top_k=2, gating="sigmoid", n_group=2, topk_group=1)
    assert route_logits(both, [[NAN] * 4]).ids.tolist() == [[0, 1]]


def test_infinite_logits():
    routing = route_logits(config_of(gating="sigmoid", renormalize=False), [[-INF, INF, 0.0, -INF], [-INF] * 4])
    assert routing.ids.tolist() == [[1, 2], [0, 1]]
    assert routing.weights.tolist() == [[1.0, 0.5], [0.0, 0.0]]


def test_nan_token_does_not_touch_other_tokens():
    config = config_of(shared_intermediate=2, shared_gate=True)
    rng = np.random.default_rng(0)
    weights, x = ref.random_weights(config, rng), rng.standard_normal((5, 3))
    clean, _ = ref.moe(config, weights, x)
    x[2, 1] = NAN
    y, routing = ref.moe(config, weights, x)
    assert np.isnan(y[2]).all()
    assert routing.ids[2].tolist() == [0, 1]
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(y[others], clean[others], rtol=1e-12)


# ---------------------------------------------------------------- any routing at all


def naive_route(config, row, scores, bias):
    """Ids and weights of one token, by sorting tuples."""
    choice = list(row) if config.selects_by_logit else [s + b for s, b in zip(scores, bias, strict=True)]
    size = config.group_size

    def group_score(g):
        members = sorted(choice[g * size : (g + 1) * size], reverse=True)
        return members[0] if config.group_score == "max" else members[0] + members[1]

    groups = list(range(config.n_group))
    if config.n_group > 1:
        groups = sorted(groups, key=lambda g: (-group_score(g), g))[: config.topk_group]
    ids = sorted((e for e in range(config.experts) if e // size in groups), key=lambda e: (-choice[e], e))[: config.top_k]
    if config.gating == "topk_softmax":
        weights = softmax([row[e] for e in ids])
    else:
        weights = [scores[e] for e in ids]
        if config.renormalize:
            weights = [w / sum(weights) for w in weights]
    return ids, [w * config.routed_scaling for w in weights]


@st.composite
def routings(draw):
    gating = draw(st.sampled_from(["softmax", "topk_softmax", "sigmoid"]))
    n_group = 1 if gating == "topk_softmax" else draw(st.sampled_from([1, 2, 3]))
    size = draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, n_group))
    config = config_of(
        experts=n_group * size,
        top_k=draw(st.integers(1, topk_group * size)),
        gating=gating,
        n_group=n_group,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
        correction_bias=gating != "topk_softmax" and draw(st.booleans()),
        renormalize=draw(st.booleans()),
        routed_scaling=draw(st.sampled_from([1.0, 2.5])),
        capacity_factor=draw(st.sampled_from([None, 0.25, 1.0, 1.5])),
    )
    # Eighths make ties common, and keep distinct values distinct after a sigmoid or softmax.
    eighth = st.integers(-24, 24).map(lambda v: v / 8)
    rows = draw(st.lists(st.lists(eighth, min_size=config.experts, max_size=config.experts), max_size=6))
    bias = draw(st.lists(eighth, min_size=config.experts, max_size=config.experts))
    return config, rows, bias if config.correction_bias else [0.0] * config.experts


@settings(max_examples=150, deadline=None)
@given(routings())
def test_routing_agrees_with_a_token_at_a_time(case):
    config, rows, bias = case
    logits = np.array(rows, np.float64).reshape(len(rows), config.experts)
    routing = route_logits(config, logits, {"router.correction_bias": np.array(bias)})
    # Scores of the reference itself, so that ties after a bias or a sum are the same ties; compared to `math` below.
    scores = ref._sigmoid(logits) if config.gating == "sigmoid" else ref._softmax(logits)
    taken = [0] * config.experts
    for t, row in enumerate(rows):
        np.testing.assert_allclose(scores[t], [sigmoid(v) for v in row] if config.gating == "sigmoid" else softmax(row), rtol=1e-13)
        ids, weights = naive_route(config, row, scores[t].tolist(), bias)
        assert routing.ids[t].tolist() == ids
        np.testing.assert_allclose(routing.weights[t], weights, rtol=1e-12)
        assert len(set(routing.ids[t].tolist())) == config.top_k
        for k, e in enumerate(routing.ids[t].tolist()):
            assert routing.kept[t, k] == (taken[e] < config.capacity(len(rows)))
            taken[e] += 1
    assert routing.load.tolist() == taken
    assert routing.dropped == np.count_nonzero(~routing.kept)
    assert routing.dropped == sum(max(0, n - config.capacity(len(rows))) for n in taken)


# ---------------------------------------------------------------- capacity


def test_capacity_keeps_the_first_tokens_by_position():
    # Capacity ceil(1.0 * 4 * 2 / 4) = 2: everybody's first choice is expert 0, second choices alternate between 1 and 2.
    config = config_of(capacity_factor=1.0)
    routing = route_logits(config, [[9.0, 5, 0, 0], [9.0, 0, 5, 0], [9.0, 5, 0, 0], [9.0, 5, 0, 0]])
    assert routing.ids.tolist() == [[0, 1], [0, 2], [0, 1], [0, 1]]
    assert routing.kept.tolist() == [[True, True], [True, True], [False, True], [False, False]]
    assert routing.dropped == 3
    assert routing.load.tolist() == [4, 3, 1, 0]
    assert routing.load.dtype == np.int64


def test_position_counts_across_slots():
    # Expert 0 is token 0's second and token 1's first choice; only position decides.
    config = config_of(experts=2, top_k=2, capacity_factor=0.5)
    routing = route_logits(config, [[0.0, 1.0], [1.0, 0.0]])
    assert routing.kept.tolist() == [[True, True], [False, False]]


def test_dropped_choices_contribute_nothing():
    config = config_of(capacity_factor=0.5)
    rng = np.random.default_rng(3)
    weights, x = ref.random_weights(config, rng), rng.standard_normal((8, 3))
    y, routing = ref.moe(config, weights, x)
    assert 0 < routing.dropped < 16
    free = ref.route(dataclasses.replace(config, capacity_factor=None), weights, x)
    np.testing.assert_array_equal(routing.weights, free.weights)  # not redistributed
    np.testing.assert_allclose(y, ref.experts(config, weights, x, free.ids, free.weights * routing.kept), rtol=1e-12)
    np.testing.assert_array_equal(y[~routing.kept.any(axis=1)], 0.0)


def test_without_a_limit_nothing_is_dropped():
    routing = route_logits(config_of(), [[1.0, 0.0, 0.0, 0.0]] * 50)
    assert routing.dropped == 0
    assert routing.kept.all()
    assert routing.kept.dtype == np.bool_


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("gating", ["softmax", "topk_softmax", "sigmoid"])
def test_uniform_routing_has_a_balance_loss_of_top_k(gating):
    config = config_of(gating=gating, top_k=2, balance_coefficient=0.25)
    # Each token leans to two neighbours on a ring of four, so load and mean probability are both uniform.
    routing = route_logits(config, [np.roll([1.0, 0.9, 0.0, 0.0], t) for t in range(4)])
    assert routing.load.tolist() == [2, 2, 2, 2]
    assert routing.load_balancing_loss == pytest.approx(2.0, rel=1e-14)
    assert routing.adaptive_loss == pytest.approx(0.25 * 2.0, rel=1e-14)


def test_collapsed_routing_has_a_balance_loss_of_experts():
    routing = route_logits(config_of(top_k=1, balance_coefficient=0.5), [[1000.0, 0.0, 0.0, 0.0]] * 3)
    assert routing.load_balancing_loss == pytest.approx(4.0)
    assert routing.adaptive_loss == pytest.approx(0.5 * (1.0 + 3 / 16) * 4.0)  # u = (1, 0, 0, 0): variance 3/16


@pytest.mark.parametrize("gating", ["softmax", "topk_softmax", "sigmoid"])
def test_losses_by_loops(gating):
    config = config_of(gating=gating, balance_coefficient=0.1, capacity_factor=0.5)
    logits = np.random.default_rng(7).normal(size=(9, 4))
    routing = route_logits(config, logits)
    f, p, z = [0.0] * 4, [0.0] * 4, 0.0
    for row, ids in zip(logits.tolist(), routing.ids.tolist(), strict=True):
        scores = [sigmoid(v) for v in row] if gating == "sigmoid" else [math.exp(v) for v in row]
        for e in range(4):
            p[e] += scores[e] / sum(scores) / 9
            f[e] += (e in ids) / 9
        z += math.log(sum(math.exp(v) for v in row)) ** 2 / 9
    balance = 4 * sum(a * b for a, b in zip(f, p, strict=True))
    usage = [a / 2 for a in f]
    variance = sum((u - 0.25) ** 2 for u in usage) / 4
    assert routing.load_balancing_loss == pytest.approx(balance, rel=1e-13)
    assert routing.z_loss == pytest.approx(z, rel=1e-13)
    assert routing.adaptive_loss == pytest.approx(0.1 * (1 + variance) * balance, rel=1e-13)


def test_z_loss_by_hand():
    assert route_logits(config_of(), np.zeros((3, 4))).z_loss == pytest.approx(math.log(4.0) ** 2)


# ---------------------------------------------------------------- experts


def naive_ffn(config, weights, part, x, e=None):
    """One token through one FFN: scalar loops over outputs, scalar activations."""

    def linear(name, v):
        w = np.asarray(weights[f"{part}.{name}.weight"], np.float64)
        b = weights.get(f"{part}.{name}.bias")
        w, b = (w, b) if e is None else (w[e], None if b is None else b[e])
        return [sum(a * c for a, c in zip(row, v, strict=True)) + (0.0 if b is None else float(b[j])) for j, row in enumerate(w)]

    up = linear("up", x)
    if not config.gated:
        hidden = [SCALAR[config.activation](u) for u in up]
    elif config.activation == "swiglu_clamped":
        a, m = config.swiglu_alpha, config.swiglu_limit
        pairs = [(min(g, m), max(-m, min(u, m))) for g, u in zip(linear("gate", x), up, strict=True)]
        hidden = [g * sigmoid(a * g) * (u + 1) for g, u in pairs]
    else:
        hidden = [SCALAR[GLU[config.activation]](g) * u for g, u in zip(linear("gate", x), up, strict=True)]
    return np.array(linear("down", hidden))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_layer_agrees_with_scalar_loops(activation, expert_bias, weight_on_input):
    config = config_of(
        activation=activation,
        expert_bias=expert_bias,
        weight_on_input=weight_on_input,
        shared_intermediate=2,
        shared_gate=True,
        capacity_factor=1.0,
        swiglu_limit=0.5,
    )
    rng = np.random.default_rng(5)
    weights, x = ref.random_weights(config, rng), rng.standard_normal((6, 3))
    y, routing = ref.moe(config, weights, x)
    assert y.shape == (6, 3)
    assert y.dtype == np.float64
    for t in range(6):
        gate = sigmoid(float(x[t] @ weights["shared_gate.weight"][0].astype(float)))
        expected = gate * naive_ffn(config, weights, "shared", x[t])
        for e, w, kept in zip(routing.ids[t], routing.weights[t], routing.kept[t], strict=True):
            if kept and weight_on_input:
                expected = expected + naive_ffn(config, weights, "experts", w * x[t], e)
            elif kept:
                expected = expected + w * naive_ffn(config, weights, "experts", x[t], e)
        np.testing.assert_allclose(y[t], expected, rtol=1e-11, atol=1e-14)


def identity_experts(**fields):
    """Expert e multiplies its (positive) input by e + 1."""
    config = config_of(activation="relu", intermediate=3, **fields)
    eye = np.broadcast_to(np.eye(3), (4, 3, 3))
    return config, {"experts.up.weight": eye, "experts.down.weight": eye * np.arange(1.0, 5.0)[:, None, None]}


def test_experts_by_hand():
    config, weights = identity_experts()
    y = ref.experts(config, weights, [[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]], [[3, 0], [1, 2]], [[0.5, 0.25], [1.0, 10.0]])
    np.testing.assert_array_equal(y, [[2.25, 4.5, 9.0], [32.0, 32.0, 32.0]])


def test_kept_mask_decides():
    config, weights = identity_experts()
    kept = [[True, False], [False, False]]
    y = ref.experts(config, weights, [[1.0, 2.0, 4.0], [1.0, 1.0, NAN]], [[3, 0], [1, 2]], [[0.5, 0.25], [1.0, 10.0]], kept)
    np.testing.assert_array_equal(y, [[2.0, 4.0, 8.0], [0.0, 0.0, 0.0]])


def test_weight_on_input_is_inside_the_activation():
    config, weights = identity_experts(weight_on_input=True)
    inside = ref.experts(dataclasses.replace(config, activation="relu2"), weights, np.ones((1, 3)), [[0, 1]], [[3.0, 1.0]])
    np.testing.assert_array_equal(inside, [[9.0 + 2.0] * 3])
    outside = dataclasses.replace(config, activation="relu2", weight_on_input=False)
    np.testing.assert_array_equal(ref.experts(outside, weights, np.ones((1, 3)), [[0, 1]], [[3.0, 1.0]]), [[3.0 + 2.0] * 3])


def test_an_expert_named_twice_counts_twice():
    config, weights = identity_experts()
    np.testing.assert_array_equal(ref.experts(config, weights, np.ones((1, 3)), [[1, 1]], [[0.5, 0.25]]), [[1.5] * 3])


# ---------------------------------------------------------------- shared expert


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_shared_expert_with_and_without_gate(activation):
    gated = config_of(activation=activation, shared_intermediate=4, shared_gate=True)
    plain = dataclasses.replace(gated, shared_gate=False)
    rng = np.random.default_rng(2)
    weights, x = ref.random_weights(gated, rng), rng.standard_normal((5, 3))
    expected = np.array([naive_ffn(plain, weights, "shared", row) for row in x])
    np.testing.assert_allclose(ref.shared(plain, weights, x), expected, rtol=1e-12)
    factor = [[sigmoid(float(row @ weights["shared_gate.weight"][0].astype(float)))] for row in x]
    np.testing.assert_allclose(ref.shared(gated, weights, x), expected * factor, rtol=1e-12)
    y, routing = ref.moe(plain, weights, x)
    np.testing.assert_allclose(y, ref.experts(plain, weights, x, routing.ids, routing.weights) + expected, rtol=1e-12)


def test_no_shared_expert_is_zeros():
    np.testing.assert_array_equal(ref.shared(config_of(), {}, np.ones((2, 3))), np.zeros((2, 3)))


# ---------------------------------------------------------------- no tokens, bad arguments


@pytest.mark.parametrize("fields", [{}, {"gating": "sigmoid", "n_group": 2}, {"gating": "topk_softmax", "capacity_factor": 1.0}])
def test_no_tokens(fields):
    config = config_of(shared_intermediate=2, shared_gate=True, **fields)
    y, routing = ref.moe(config, ref.random_weights(config, np.random.default_rng(0)), np.empty((0, 3)))
    assert y.shape == (0, 3)
    assert y.dtype == np.float64
    assert routing.ids.shape == routing.weights.shape == routing.kept.shape == (0, 2)
    assert routing.ids.dtype == np.int32
    assert routing.load.tolist() == [0] * 4
    assert routing.dropped == 0
    assert (routing.load_balancing_loss, routing.z_loss, routing.adaptive_loss) == (0.0, 0.0, 0.0)


def test_wrong_shapes_are_refused():
    config = config_of()
    weights, x = ref.random_weights(config, np.random.default_rng(0)), np.ones((2, 3))
    with pytest.raises(InputError, match=r"x has shape \(2, 4\), expected \(T, 3\)"):
        ref.moe(config, weights, np.ones((2, 4)))
    with pytest.raises(InputError, match=r"logits has shape \(3, 4\), expected \(2, 4\)"):
        ref.route(config, weights, x, np.ones((3, 4)))
    with pytest.raises(InputError, match=r"ids has shape"):
        ref.experts(config, weights, x, np.zeros((2, 1), int), np.ones((2, 2)))
    with pytest.raises(InputError, match=r"kept has shape"):
        ref.experts(config, weights, x, np.zeros((2, 2), int), np.ones((2, 2)), np.ones(2, bool))
    with pytest.raises(InputError, match=r"ids must be between 0 and 3, got -1 to 4"):
        ref.experts(config, weights, x, [[-1, 0], [0, 4]], np.ones((2, 2)))
    with pytest.raises(WeightsError, match=r"'experts.up.weight' has shape \(4, 3, 5\), expected \(4, 5, 3\)"):
        ref.moe(config, weights | {"experts.up.weight": np.zeros((4, 3, 5))}, x)
    with pytest.raises(WeightsError, match=r"'router.bias' is missing"):
        ref.moe(dataclasses.replace(config, router_bias=True), weights, x)
    with pytest.raises(InputError, match="x is uint16, which may be the bits of bfloat16"):
        ref.moe(config, weights, x.astype(np.uint16))
    with pytest.raises(WeightsError, match=r"'experts.up.weight' is uint16"):
        ref.moe(config, weights | {"experts.up.weight": np.zeros((4, 5, 3), np.uint16)}, x)


# ---------------------------------------------------------------- random weights and rounding


def test_random_weights_have_the_contract_names_and_shapes():
    config = MoEConfig(
        experts=4,
        top_k=2,
        hidden=6,
        intermediate=5,
        gating="sigmoid",
        router_bias=True,
        correction_bias=True,
        expert_bias=True,
        shared_intermediate=3,
        shared_gate=True,
    )
    weights = ref.random_weights(config, np.random.default_rng(0))
    expected = {
        "router.weight": (4, 6),
        "router.bias": (4,),
        "router.correction_bias": (4,),
        "experts.gate.weight": (4, 5, 6),
        "experts.up.weight": (4, 5, 6),
        "experts.down.weight": (4, 6, 5),
        "experts.gate.bias": (4, 5),
        "experts.up.bias": (4, 5),
        "experts.down.bias": (4, 6),
        "shared.gate.weight": (3, 6),
        "shared.up.weight": (3, 6),
        "shared.down.weight": (6, 3),
        "shared_gate.weight": (1, 6),
    }
    assert {name: array.shape for name, array in weights.items()} == expected == ref.weight_shapes(config)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    plain = ref.weight_shapes(config_of(activation="gelu"))
    assert sorted(plain) == ["experts.down.weight", "experts.up.weight", "router.weight"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_weights_are_representable_and_scaled(dtype):
    config = MoEConfig(experts=8, top_k=2, hidden=64, intermediate=128, dtype=dtype, correction_bias=True, expert_bias=True)
    weights = ref.random_weights(config, np.random.default_rng(0))
    again = ref.random_weights(config, np.random.default_rng(0))
    for name, array in weights.items():
        np.testing.assert_array_equal(array, again[name])
        if name != "router.correction_bias":
            np.testing.assert_array_equal(array, ref.round_to_dtype(array, dtype))
    if dtype != "float32":
        bias = weights["router.correction_bias"]
        assert not np.array_equal(bias, ref.round_to_dtype(bias, dtype))
    assert weights["experts.up.weight"].std() == pytest.approx(1 / 8, rel=0.05)
    assert weights["experts.down.weight"].std() == pytest.approx(128**-0.5, rel=0.05)
    assert weights["experts.up.bias"].std() == pytest.approx(0.1, rel=0.1)


def bits(*patterns):
    return np.array(patterns, np.uint32).view(np.float32)


def test_bfloat16_rounds_to_nearest_even():
    values = bits(0x3F800000, 0x3F808000, 0x3F808001, 0x3F818000, 0x3F817FFF, 0xBF818000, 0x7F7FFFFF, 0xFF800000, 0x00008001)
    rounded = bits(0x3F800000, 0x3F800000, 0x3F810000, 0x3F820000, 0x3F810000, 0xBF820000, 0x7F800000, 0xFF800000, 0x00010000)
    got = ref.round_to_dtype(values, "bfloat16")
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), rounded.view(np.uint32))


def test_bfloat16_keeps_nan():
    values = bits(0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001)
    got = ref.round_to_dtype(values, "bfloat16")
    assert np.isnan(got).all()
    assert not np.any(got.view(np.uint32) & 0xFFFF)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(values))


@settings(max_examples=200, deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_bfloat16_is_the_nearest_value(value):
    got = float(ref.round_to_dtype(value, "bfloat16"))
    assert int(np.float32(got).view(np.uint32)) & 0xFFFF == 0
    low = int(np.float32(value).view(np.uint32)) & 0xFFFF0000  # toward zero
    if math.isfinite(value) and low & 0x7F800000 != 0x7F800000 and math.isfinite(got):
        below = float(bits(low)[0])
        assert abs(got - value) <= min(abs(below - value), abs(float(bits(low + 0x10000)[0]) - value))


def test_float16_rounds_and_overflows_to_infinity():
    got = ref.round_to_dtype([1.0 + 2**-11, 1.0 + 3 * 2**-11, 1e6, -1e6, 2**-25, NAN], "float16")
    np.testing.assert_array_equal(got, [1.0, 1.0 + 2**-9, INF, -INF, 0.0, NAN])
    assert got.dtype == np.float32


def test_float32_is_untouched_and_other_dtypes_refused():
    values = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    np.testing.assert_array_equal(ref.round_to_dtype(values, "float32"), values)
    with pytest.raises(ConfigError, match=r"float8.*float32, bfloat16, float16"):
        ref.round_to_dtype(values, "float8")


def test_every_activation_is_gated_or_not():
    assert set(GLU) | {"swiglu_clamped"} == set(GATED_ACTIVATIONS)


# ---------------------------------------------------------------- few bits


FEW_BITS = [
    {"weight_dtype": "int8", "weight_zero_point": True},
    {"weight_dtype": "int4", "weight_group": 32, "scale_dtype": "bfloat16"},
    {"weight_dtype": "mxfp4"},
]


@pytest.mark.parametrize("fields", FEW_BITS, ids=lambda fields: fields["weight_dtype"])
def test_dequantized_rounds_the_projections_and_nothing_else(fields, rng):
    config = MoEConfig(3, 2, 40, 24, shared_intermediate=16, shared_gate=True, expert_bias=True, **fields)
    weights = ref.random_weights(config, rng)
    got = ref.dequantized(config, weights)
    assert got.keys() == weights.keys()
    for name, array in weights.items():
        if not name.startswith(("experts.", "shared.")) or name.endswith("bias"):
            assert got[name] is array
            continue
        assert got[name].dtype == np.float64
        for mine, matrix in zip(got[name].reshape(-1, *array.shape[-2:]), array.reshape(-1, *array.shape[-2:]), strict=True):
            assert np.array_equal(mine, dequantize(quantize(matrix, config), config))
            assert 0 < np.abs(mine - matrix).max() < 0.5 * np.abs(matrix).max()
    some = {name: a for name, a in weights.items() if name != "experts.up.weight"}
    assert ref.dequantized(config, some).keys() == some.keys()
    with pytest.raises(WeightsError, match=r"experts\.up\.weight.*shape"):
        ref.dequantized(config, {"experts.up.weight": weights["experts.up.weight"][:1]})


def test_dequantized_is_the_identity_without_codes(rng):
    config = MoEConfig(3, 2, 8, 4)
    weights = ref.random_weights(config, rng)
    assert ref.dequantized(config, weights) == weights


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_int8_activations_round_the_rows_that_enter_both_products(weight_on_input, rng):
    fields = {"weight_on_input": weight_on_input, "shared_intermediate": 6, "weight_dtype": "int8", "activation": "relu2"}
    exact = MoEConfig(2, 1, 8, 4, **fields)
    config = dataclasses.replace(exact, activation_dtype="int8")
    weights = ref.random_weights(config, rng)
    x = rng.standard_normal((5, 8))
    ids, w = np.zeros((5, 1), int), rng.uniform(0.1, 2, (5, 1))

    def rounded(row):
        scale = np.float32(np.abs(row.astype(np.float32)).max()) / np.float32(127) or np.float32(1)
        return np.array([round(float(np.float32(v) / scale)) * float(scale) for v in row])

    def ffn(row, part, factor=1.0):
        up, down = (weights[f"{part}.{m}.weight"].astype(np.float64) for m in ("up", "down"))
        up, down = (up[0], down[0]) if part == "experts" else (up, down)
        return down @ rounded(np.maximum(up @ (rounded(row) * factor), 0) ** 2)

    routed = [ffn(x[t], "experts", w[t]) if weight_on_input else w[t] * ffn(x[t], "experts") for t in range(5)]
    np.testing.assert_allclose(ref.experts(config, weights, x, ids, w), routed, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ref.shared(config, weights, x), [ffn(row, "shared") for row in x], rtol=1e-9, atol=1e-12)
    assert not np.allclose(ref.experts(exact, weights, x, ids, w), routed, rtol=1e-4)
