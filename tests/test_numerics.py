"""Compiled layers against the float64 reference: every gating variant and activation, hostile sizes, routings and values."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers import (
    SMALL,
    assert_close,
    bits,
    built_with,
    check_against_reference,
    expected_output,
    forward_poisoned,
    stored,
    tokens,
    values,
    weights_as,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moegen
from moegen import reference
from moegen.config import ACTIVATIONS, DTYPES
from moegen.plan import plan

# ---------------------------------------------------------------- the table

# The gating variants of real models, with the sizes (E, K) that they are tried on.
GATINGS: dict[str, dict[str, Any]] = {
    "mixtral": {"gating": "softmax"},
    "olmoe": {"gating": "softmax", "renormalize": False},
    "gpt_oss": {"gating": "topk_softmax", "router_bias": True},
    "deepseek_v3": {
        "gating": "sigmoid",
        "correction_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling": 2.5,
    },
    "deepseek_v2": {
        "gating": "softmax",
        "renormalize": False,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "max",
        "routed_scaling": 16.0,
    },
    "llama4": {"gating": "sigmoid", "renormalize": False, "weight_on_input": True},
    "sigmoid": {"gating": "sigmoid", "renormalize": False},
    "corrected": {"gating": "softmax", "correction_bias": True, "router_bias": True},
}
EXPERTS = [(8, 2), (1, 1), (4, 4), (5, 2), (48, 16), (257, 8), (7, 3)]
GROUPED_EXPERTS = [(8, 2), (32, 12), (12, 6), (64, 8)]  # 6 of 12 are all experts of two groups
WIDTHS = [(64, 96), (200, 72), (1, 3), (48, 17), (3, 1), (72, 200), (17, 40), (1100, 72), (40, 1100)]
SHARED: list[dict[str, Any]] = [{}, {"shared_intermediate": 24}, {"shared_intermediate": 33, "shared_gate": True}]
CAPACITIES = [None, 1.0, None, 0.5, 1.25]


def _configurations() -> list[dict[str, Any]]:
    """30 configurations instead of the 100,000 of the full product.

    Every activation comes with every dtype (10 x 3), and each of those 30 with another gating variant; the other fields walk
    through their values with periods that share no factor, so that pairs of values meet as often as 30 rows allow:
    `test_the_table_covers` counts them. Two rows are compiled as `moegen build` would, two with more tiles than three; the others,
    with the heights up to 1, 2 or 3 and shorter blocks, which compile faster and take other paths through the host. In a third of
    them, stages check what the host gives them.
    """
    rows = []
    plain, grouped = itertools.cycle(EXPERTS), itertools.cycle(GROUPED_EXPERTS)
    for i in range(30):
        block, gating = i // 10, list(GATINGS)[(i % 10 + 3 * (i // 10)) % 8]
        fields = {"activation": ACTIVATIONS[i % 10], "dtype": DTYPES[block], **GATINGS[gating]}
        e, k = (8, 1) if gating == "llama4" else next(grouped if "n_group" in fields else plain)
        fields |= {"experts": e, "top_k": k}
        fields["hidden"], fields["intermediate"] = WIDTHS[(4 * i) % len(WIDTHS)]
        fields |= SHARED[(i + block) % 3]
        fields["expert_bias"] = (i + block) % 2 == 0 or fields["activation"] == "swiglu_clamped"
        fields["capacity_factor"] = CAPACITIES[(i + block) % 5]
        tiling = None
        if i % 14:
            tiling = {"max_rows": {9: 5, 24: 4}.get(i, 1 + i % 3), "chunk_rows": 5 + i, "k_block": (64, 1024)[i % 2]}
            tiling["checked"] = i % 3 == i // 10
        rows.append(fields | {"id": f"{gating}-{fields['activation']}-{fields['dtype']}", "tiling": tiling})
    return rows


TABLE = _configurations()
TOKENS = (0, 1, 2, 17, 300)


def _config(fields: dict[str, Any]) -> moegen.MoEConfig:
    return moegen.MoEConfig(**{name: value for name, value in fields.items() if name not in ("id", "tiling")})


def _build(row: dict[str, Any], store: pathlib.Path) -> moegen.Artifact:
    config = _config(row)
    return moegen.build(config, out=store, verify=False) if row["tiling"] is None else built_with(store, config, **row["tiling"])


def test_the_table_covers() -> None:
    """The claims that `_configurations` makes."""
    rows = [_config(row) for row in TABLE]
    assert {(r.activation, r.dtype) for r in rows} == {(a, d) for a in ACTIVATIONS for d in DTYPES}
    variant = [row["id"].split("-")[0] for row in TABLE]
    assert {(v, r.dtype) for v, r in zip(variant, rows, strict=True)} == {(v, d) for v in GATINGS for d in DTYPES}
    assert len({(v, r.activation) for v, r in zip(variant, rows, strict=True)}) == 30
    shared = [(r.shared_intermediate > 0, r.shared_gate) for r in rows]
    columns: dict[str, list[Any]] = {
        "variant": variant,
        "activation": [r.activation for r in rows],
        "dtype": [r.dtype for r in rows],
        "shared": shared,
        "expert_bias": [r.expert_bias for r in rows],
        "capacity": [r.capacity_factor for r in rows],
    }
    assert set(columns["shared"]) == {(False, False), (True, False), (True, True)}
    assert set(columns["capacity"]) == set(CAPACITIES)
    assert {(r.experts, r.top_k) for r in rows} >= {*EXPERTS, *GROUPED_EXPERTS}
    assert {(r.hidden, r.intermediate) for r in rows} == set(WIDTHS)
    for a, b in itertools.combinations(("dtype", "shared", "expert_bias", "capacity"), 2):
        pairs = set(zip(columns[a], columns[b], strict=True))
        assert len(pairs) == len(set(columns[a])) * len(set(columns[b])), (a, b, Counter(pairs))


def _cancels(config: moegen.MoEConfig, weights: dict[str, np.ndarray], x: np.ndarray) -> bool:
    """Whether less than half of the terms of the down product is left: in one column, the rest may be rounding."""
    down = weights["experts.down.weight"]
    terms = np.zeros(x.shape)
    for i in range(config.intermediate):
        one = np.zeros_like(down)
        one[..., i] = down[..., i]
        terms += np.abs(reference.moe(config, weights | {"experts.down.weight": one}, x)[0])
    return bool(np.linalg.norm(reference.moe(config, weights, x)[0]) < 0.5 * np.linalg.norm(terms))


@pytest.mark.parametrize("row", TABLE, ids=[row["id"] for row in TABLE])
def test_variant(row: dict[str, Any], store: pathlib.Path, rng: np.random.Generator) -> None:
    """Fresh weights and inputs against the reference; any thread count and any batch give the same bits."""
    config = _config(row)
    module = moegen.load(_build(row, store).path, threads=2)
    weights = reference.random_weights(config, rng)
    while config.hidden == 1 and config.dtype == "bfloat16" and _cancels(config, weights, tokens(config, 100, rng)):
        weights = reference.random_weights(config, rng)
    layer = module.bind(weights_as(config, weights))
    outputs = {}
    for count in TOKENS:
        x = tokens(config, count, rng)
        outputs[count] = x, *check_against_reference(layer, weights, x)
    for threads in (1, 3, 8):
        other = module.bind(weights_as(config, weights), threads=threads)
        for count in (1, 17, 300):
            x, out, _ = outputs[count]
            np.testing.assert_array_equal(bits(forward_poisoned(other, stored(x, config.dtype))), bits(out), f"{threads} threads")
    x, out, routing = outputs[300]
    whole = np.flatnonzero(routing.kept.all(axis=1))  # a dropped choice does depend on the other tokens
    for t in whole[:4]:
        alone = forward_poisoned(layer, stored(x[t : t + 1], config.dtype))
        np.testing.assert_array_equal(bits(alone)[0], bits(out)[t], "a token alone and in a batch of 300")
    if config.capacity_factor is None:
        some = rng.permutation(300)[:23]
        np.testing.assert_array_equal(bits(layer(stored(x[some], config.dtype))), bits(out)[some], "tokens in another order")
    _check_sick_tokens(layer, x)


def _check_sick_tokens(layer: moegen.Layer, x: np.ndarray) -> None:
    """NaN and infinite tokens get valid, distinct experts and leave the routing of all others as it is."""
    config = layer.config
    clean = layer.route(stored(x, config.dtype))
    dirty = x.copy()
    dirty[5:20] = np.nan
    dirty[20:30, 0] = np.inf
    dirty[30:40, 0] = -np.inf
    routing = layer.route(stored(dirty, config.dtype))
    ids = np.sort(routing.ids.data, axis=1)
    assert ((ids >= 0) & (ids < config.experts)).all()
    assert (np.diff(ids, axis=1) > 0).all()
    assert routing.load.sum() == ids.size
    healthy = np.r_[0:5, 40 : len(x)]
    np.testing.assert_array_equal(routing.ids.data[healthy], clean.ids.data[healthy])
    np.testing.assert_array_equal(bits(routing.weights)[healthy], bits(clean.weights)[healthy])
    y = values(layer(stored(dirty, config.dtype)))
    assert np.isfinite(y[healthy]).all()


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_capacity(factor: float, store: pathlib.Path, rng: np.random.Generator) -> None:
    """Everybody wants the same experts: all but ceil(factor * T * K / E) are dropped, by position."""
    config = moegen.MoEConfig(**SMALL, capacity_factor=factor)
    weights = reference.random_weights(config, rng)
    weights["router.weight"][:, 0] = [8, 4, -4, -8]
    layer = moegen.load(built_with(store, config, max_rows=2 if factor == 0.5 else 1).path, threads=2).bind(weights)
    for count in (1, 2, 3, 17, 300):
        x = tokens(config, count, rng)
        x[:, 0] = 4.0
        out, routing = check_against_reference(layer, weights, x)
        capacity = config.capacity(count)
        assert capacity == min(count, int(np.ceil(factor * count * 2 / 4)))
        assert routing.dropped == 2 * (count - capacity)
        assert layer.route(stored(x, "float32")).dropped == routing.dropped
        assert not values(out)[capacity:].any(), "dropped tokens give zero"
        assert values(out)[:capacity].any(axis=1).all()


# ---------------------------------------------------------------- one layer, many hostile inputs


@pytest.fixture(scope="module")
def module(built: Any) -> moegen.Module:
    return moegen.load(built(verify=False, **SMALL).path, threads=2)


@pytest.fixture(scope="module")
def hub(store: pathlib.Path) -> moegen.Module:
    """Many experts, a shared one with a gate, biases and bfloat16."""
    fields = {"experts": 12, "top_k": 3, "hidden": 80, "intermediate": 40, "dtype": "bfloat16", "expert_bias": True}
    config = moegen.MoEConfig(**fields, shared_intermediate=24, shared_gate=True)
    return moegen.load(built_with(store, config, max_rows=3).path, threads=2)


def _bound(module: moegen.Module, rng: np.random.Generator) -> tuple[moegen.Layer, dict[str, np.ndarray]]:
    weights = reference.random_weights(module.config, rng)
    return module.bind(weights), weights


@pytest.mark.parametrize("which", ["module", "hub"])
def test_jitter(which: str, rng: np.random.Generator, request: pytest.FixtureRequest) -> None:
    layer, weights = _bound(request.getfixturevalue(which), rng)
    x = tokens(layer.config, 50, rng)
    jitter = rng.uniform(0.9, 1.1, x.shape).astype(np.float32)
    out, routing = check_against_reference(layer, weights, x, jitter)
    plain, unjittered = check_against_reference(layer, weights, x)
    assert not np.array_equal(routing.weights, unjittered.weights), "the router sees the jitter"
    assert not np.array_equal(bits(out), bits(plain))
    ones = forward_poisoned(layer, stored(x, layer.config.dtype), jitter=np.ones_like(x))
    np.testing.assert_array_equal(bits(ones), bits(plain), "a jitter of one changes nothing")


@pytest.mark.parametrize("which", ["module", "hub"])
def test_ties_go_to_the_lower_index(which: str, rng: np.random.Generator, request: pytest.FixtureRequest) -> None:
    layer, weights = _bound(request.getfixturevalue(which), rng)
    config = layer.config
    weights["router.weight"][...] = weights["router.weight"][0]
    weights["router.weight"][0] = -weights["router.weight"][0]  # expert 0 wins or loses, all others tie
    layer = layer.module.bind(weights)
    x = tokens(config, 300, rng)
    routing = layer.route(stored(x, config.dtype))
    logits, order = _logits(weights, x), np.arange(config.top_k)
    first = np.where(logits[:, :1] > logits[:, 1:2], order, order + 1)
    np.testing.assert_array_equal(routing.ids.data, first)
    zero = layer.route(stored(np.zeros_like(x), config.dtype))
    np.testing.assert_array_equal(zero.ids.data, np.tile(np.arange(config.top_k), (300, 1)))
    np.testing.assert_allclose(zero.weights.data, 1 / config.top_k, rtol=1e-6)


def _logits(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weights["router.weight"].astype(np.float64).T


ROUTINGS = ("uniform", "zipf", "all_to_one", "repeated", "empty", "all_the_same_twice")


def _anybodys_routing(kind: str, config: moegen.MoEConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    e, k = config.experts, config.top_k
    if kind == "uniform":
        return np.argsort(rng.random((count, e)), axis=1)[:, :k]
    if kind == "zipf":
        return np.minimum(rng.zipf(1.3, (count, k)) - 1, e - 1)
    if kind == "all_to_one":
        return np.tile(rng.permutation(e)[:k], (count, 1))
    if kind == "repeated":
        return rng.integers(0, e, (count, k))
    if kind == "empty":
        return rng.integers(e // 2, e, (count, k))
    return np.full((count, k), e - 1)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("which", ["module", "hub"])
def test_experts_with_anybodys_routing(which: str, kind: str, rng: np.random.Generator, request: pytest.FixtureRequest) -> None:
    """`layer.experts` takes any ids, the same one twice in a token too, and any weights, negative and zero too."""
    layer, weights = _bound(request.getfixturevalue(which), rng)
    config = layer.config
    for count in TOKENS:
        ids = _anybodys_routing(kind, config, count, rng)
        factors = rng.standard_normal(ids.shape).astype(np.float32)
        factors[::5] = 0.0
        x = tokens(config, count, rng)
        got = layer.experts(stored(x, config.dtype), ids, factors)
        assert_close(config, values(got), reference.experts(config, weights, x, ids, factors))
        for threads in (1, 3):
            again = layer.module.bind(weights, threads=threads).experts(stored(x, config.dtype), ids.astype(np.uint16), factors)
            np.testing.assert_array_equal(bits(again), bits(got))


def test_experts_with_capacity(store: pathlib.Path, rng: np.random.Generator) -> None:
    config = moegen.MoEConfig(**SMALL, capacity_factor=0.5)
    layer, weights = _bound(moegen.load(built_with(store, config).path, threads=2), rng)
    x, ids = tokens(config, 40, rng), np.argsort(rng.random((40, 4)), axis=1)[:, :2]
    ids[:20] = (1, 3)
    factors = rng.random(ids.shape).astype(np.float32)
    expected = reference.experts(config, weights, x, ids, factors, reference.capacity_mask(config, ids))
    assert_close(config, layer.experts(x, ids, factors).astype(np.float64), expected)


@pytest.mark.parametrize("which", ["module", "hub"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_not_a_number_stays_in_its_token(
    which: str, poison: float, rng: np.random.Generator, request: pytest.FixtureRequest
) -> None:
    """NaN and infinite tokens give valid ids and touch no other row; the router's NaN reaches the output."""
    layer, _ = _bound(request.getfixturevalue(which), rng)
    config = layer.config
    for count in (1, 17, 300):
        x = tokens(config, count, rng)
        clean = layer(stored(x, config.dtype))
        sick = np.zeros(count, bool)
        sick[rng.permutation(count)[: max(1, count // 3)]] = True
        dirty = x.copy()
        dirty[sick, rng.integers(0, config.hidden, sick.sum())] = poison
        if poison == np.inf:
            dirty[np.flatnonzero(sick)[0]] = [np.inf, -np.inf] * (config.hidden // 2)
        out, routing = layer(stored(dirty, config.dtype), return_routing=True)
        np.testing.assert_array_equal(bits(out)[~sick], bits(clean)[~sick])
        if np.isnan(poison):
            assert np.isnan(values(out)[sick]).all()
        ids = np.sort(routing.ids.data, axis=1)
        assert ((ids >= 0) & (ids < config.experts)).all()
        assert (np.diff(ids, axis=1) > 0).all(), "distinct in each token"
        assert routing.load.sum() == count * config.top_k
        assert routing.dropped == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-4, 1e4, 1e12])
def test_magnitudes(scale: float, module: moegen.Module, rng: np.random.Generator) -> None:
    """Tiny and huge inputs: neither the softmax nor the activation overflows."""
    layer, weights = _bound(module, rng)
    x = tokens(layer.config, 40, rng, scale)
    out, settled = check_against_reference(layer, weights, x)
    assert np.isfinite(values(out)).all()
    assert np.allclose(settled.weights.sum(axis=1), 1)


def test_extreme_logits(module: moegen.Module, rng: np.random.Generator) -> None:
    """Logits of +-1e30 and of the largest float: weights stay between 0 and 1."""
    weights = reference.random_weights(module.config, rng)
    weights["router.weight"][...] = 0.0
    weights["router.weight"][:, 0] = [1e30, -1e30, 3e38, -3e38]
    layer = module.bind(weights)
    x = tokens(layer.config, 20, rng)
    x[:, 0] = np.where(np.arange(20) % 2, 1.0, -1.0)
    routing = layer.route(x)
    np.testing.assert_array_equal(routing.ids, np.where((np.arange(20) % 2)[:, None], [2, 0], [3, 1]))
    np.testing.assert_allclose(routing.weights, np.tile(np.float32([1, 0]), (20, 1)), atol=1e-30)


def test_clamped_activation_saturates(store: pathlib.Path, rng: np.random.Generator) -> None:
    """gpt-oss's limit and alpha at values other than the usual ones."""
    config = moegen.MoEConfig(**SMALL, activation="swiglu_clamped", swiglu_alpha=0.7, swiglu_limit=1.5)
    layer, weights = _bound(moegen.load(built_with(store, config, max_rows=1).path, threads=2), rng)
    for scale in (1.0, 30.0, 1e6):
        check_against_reference(layer, weights, tokens(config, 60, rng, scale))


def test_the_same_input_twice(hub: moegen.Module, rng: np.random.Generator) -> None:
    layer, _ = _bound(hub, rng)
    x = stored(tokens(hub.config, 300, rng), "bfloat16")
    first = bits(layer(x))
    for _ in range(20):
        np.testing.assert_array_equal(bits(layer(x)), first)


# ---------------------------------------------------------------- other processors and other tilings


# mcpu -> float32 lanes, terms of a bfloat16 dot product that one instruction takes
PROCESSORS = {
    "x86-64": (4, 1),
    "x86-64-v3": (8, 1),
    "x86-64-v4": (16, 1),
    "cooperlake": (16, 2),
    "znver4": (16, 2),
    "sapphirerapids": (16, 2),
}
OTHER_PROCESSORS = [(mcpu, "bfloat16") for mcpu in PROCESSORS]
OTHER_PROCESSORS += [(mcpu, dtype) for mcpu in ("x86-64", "x86-64-v3") for dtype in ("float32", "float16")]


@pytest.mark.skipif(moegen.target.host_arch() != "x86_64", reason="these are x86-64 processors")
@pytest.mark.parametrize(("mcpu", "dtype"), OTHER_PROCESSORS)
def test_code_for_other_processors(mcpu: str, dtype: str, store: pathlib.Path, rng: np.random.Generator) -> None:
    """Code for older and other processors runs here where this one has what it needs: other vector lengths, other register
    tiles, bfloat16 with and without its instruction. Where it has not, the build says that it was not proved."""
    fields = {"experts": 6, "top_k": 2, "hidden": 72, "intermediate": 40, "dtype": dtype, "shared_intermediate": 24}
    todo = plan(moegen.MoEConfig(**fields), mcpu=mcpu)
    few = dataclasses.replace(todo.geometry.tiling, max_rows=2, chunk_rows=32)
    todo = plan(todo.config, mcpu=mcpu, tiling=few)  # all heights are in `test_kernels`
    artifact = moegen.build(todo, out=store, verify=False)
    lanes, pair = PROCESSORS[mcpu]
    assert artifact.target.lanes == lanes
    assert artifact.manifest["tiling"]["pair"] == (pair if dtype == "bfloat16" else 1)
    if missing := moegen.target.missing_features(artifact.target):
        with pytest.raises(moegen.ArtifactError, match=f"this processor lacks {missing[0]}"):
            moegen.verify(artifact)
        return
    report = moegen.verify(artifact)
    assert report["status"] == "passed", report["failures"]
    layer, weights = _bound(moegen.load(artifact.path, threads=3), rng)
    for count in TOKENS:
        check_against_reference(layer, weights, tokens(layer.config, count, rng))


@st.composite
def _layers(draw: st.DrawFn) -> tuple[moegen.MoEConfig, dict[str, int], int]:
    """Small legal configurations, a legal tiling and a number of tokens."""
    gating = draw(st.sampled_from(["softmax", "topk_softmax", "sigmoid"]))
    n_group = 1 if gating == "topk_softmax" else draw(st.integers(1, 5))
    group_size = draw(st.integers(1, 20 if n_group == 1 else 6))
    group_score = draw(st.sampled_from(["max", "top2_sum"])) if group_size > 1 else "max"
    topk_group = draw(st.integers(1, n_group))
    shared = draw(st.sampled_from([0, 0, 1, 19]))
    config = moegen.MoEConfig(
        experts=n_group * group_size,
        top_k=draw(st.integers(1, min(10, topk_group * group_size))),
        hidden=draw(st.integers(1, 100)),
        intermediate=draw(st.integers(1, 100)),
        dtype=draw(st.sampled_from(DTYPES)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gating=gating,
        renormalize=draw(st.booleans()),
        routed_scaling=draw(st.sampled_from([1.0, 2.5])),
        router_bias=draw(st.booleans()),
        correction_bias=gating != "topk_softmax" and draw(st.booleans()),
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
        weight_on_input=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
        shared_intermediate=shared,
        shared_gate=shared > 0 and draw(st.booleans()),
        capacity_factor=draw(st.sampled_from([None, None, 0.3, 1.0, 2.0])),
    )
    # Few register tiles keep a build at a second or two; the default tiling is what the other tests use.
    max_rows = draw(st.integers(1, 3))
    chunk_rows = max_rows + draw(st.integers(0, 30))
    tiling = {
        "lanes": draw(st.sampled_from([4, 8, 16])),
        "chunk_rows": chunk_rows,
        "k_block": draw(st.sampled_from([64, 96, 1024])),
    }
    if draw(st.booleans()):
        tiling["pair"] = 1  # bfloat16 widened and multiplied as float32, as where there is no instruction for it
    return config, tiling | {"max_rows": max_rows}, draw(st.integers(0, 70))


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck))
@given(layer=_layers(), seed=st.integers(0, 2**31))
def test_any_legal_layer(
    layer: tuple[moegen.MoEConfig, dict[str, int], int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config, tiling, count = layer
    tiling["lanes"] = min(tiling["lanes"], plan(config).target.lanes)
    artifact = built_with(tmp_path_factory.mktemp("any"), config, **tiling)
    rng = np.random.default_rng(seed)
    bound, weights = _bound(moegen.load(artifact.path, threads=2), rng)
    x = tokens(config, count, rng)
    out, settled = check_against_reference(bound, weights, x)
    if config.experts > 1 and count:
        assert_close(config, values(out), expected_output(config, weights, x, settled))
