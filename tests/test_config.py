"""MoEConfig: defaults, every validation error, round trips, and the derived properties."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moegen import config as config_module
from moegen.config import (
    ACTIVATION_DTYPES,
    ACTIVATIONS,
    DTYPES,
    GATED_ACTIVATIONS,
    GATINGS,
    SCALE_DTYPES,
    WEIGHT_DTYPES,
    WEIGHT_GROUPS,
    MoEConfig,
    config_key,
)
from moegen.errors import ConfigError, MoegenError

BASE = {"experts": 8, "top_k": 2, "hidden": 16}
INTS = ("experts", "top_k", "hidden", "intermediate", "n_group", "topk_group", "shared_intermediate", "weight_group")
BOOLS = ("renormalize", "router_bias", "correction_bias", "weight_on_input", "expert_bias", "shared_gate", "weight_zero_point")
FLOATS = ("routed_scaling", "capacity_factor", "swiglu_alpha", "swiglu_limit", "balance_coefficient")
STRINGS = ("dtype", "activation", "gating", "group_score", "weight_dtype", "scale_dtype", "activation_dtype")


def make(**fields):
    return MoEConfig(**(BASE | fields))


def test_field_lists_are_complete():
    assert set(INTS + BOOLS + FLOATS + STRINGS) == {f.name for f in dataclasses.fields(MoEConfig)}


def test_defaults():
    assert make().to_dict() == {
        "experts": 8,
        "top_k": 2,
        "hidden": 16,
        "intermediate": 64,
        "dtype": "float32",
        "activation": "swiglu",
        "gating": "softmax",
        "renormalize": True,
        "routed_scaling": 1.0,
        "router_bias": False,
        "correction_bias": False,
        "n_group": 1,
        "topk_group": 1,
        "group_score": "top2_sum",
        "weight_on_input": False,
        "expert_bias": False,
        "shared_intermediate": 0,
        "shared_gate": False,
        "capacity_factor": None,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "balance_coefficient": 0.01,
        "weight_dtype": "same",
        "weight_group": 0,
        "weight_zero_point": False,
        "scale_dtype": "float16",
        "activation_dtype": "same",
    }
    assert make(intermediate=7).intermediate == 7


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 0}, "experts=0 must be between 1 and 4096"),
        ({"experts": 4097}, "experts=4097 must be between 1 and 4096"),
        ({"top_k": 0}, "top_k=0 must be between 1 and 8 (the number of experts)"),
        ({"top_k": 9}, "top_k=9 must be between 1 and 8 (the number of experts)"),
        ({"experts": 256, "top_k": 65}, "top_k=65 must be between 1 and 64"),
        ({"hidden": 0}, "hidden=0 must be between 1 and 1048576"),
        ({"hidden": -3}, "hidden=-3 must be between 1 and 1048576"),
        ({"hidden": 2**20 + 1}, "hidden=1048577 must be between 1 and 1048576"),
        ({"intermediate": -1}, "intermediate=-1 must be between 1 and 1048576"),
        ({"intermediate": 2**20 + 1}, "intermediate=1048577 must be between 1 and 1048576"),
        ({"hidden": 2**19}, "intermediate=2097152 must be between 1 and 1048576"),  # the default of 4*H is checked too
        ({"shared_intermediate": -1}, "shared_intermediate=-1 must be between 0 and 1048576"),
        ({"shared_intermediate": 2**20 + 1}, "shared_intermediate=1048577 must be between 0 and 1048576"),
        ({"dtype": "float64"}, "dtype='float64' must be one of float32, bfloat16, float16"),
        ({"activation": "swish"}, "activation='swish' must be one of swiglu, reglu, geglu, geglu_tanh, swiglu_clamped, relu, "),
        ({"gating": "top1"}, "gating='top1' must be one of softmax, topk_softmax, sigmoid"),
        ({"group_score": "mean"}, "group_score='mean' must be one of top2_sum, max"),
        ({"n_group": 0}, "n_group=0 must be between 1 and 8 (the number of experts)"),
        ({"n_group": 9}, "n_group=9 must be between 1 and 8 (the number of experts)"),
        ({"n_group": 3}, "n_group=3 must divide experts=8 into equal groups"),
        ({"n_group": 2, "topk_group": 0}, "topk_group=0 must be between 1 and 2 (n_group)"),
        ({"n_group": 2, "topk_group": 3}, "topk_group=3 must be between 1 and 2 (n_group)"),
        ({"topk_group": 2}, "topk_group=2 must be between 1 and 1 (n_group)"),
        ({"top_k": 5, "n_group": 4, "topk_group": 2}, "top_k=5 is more than the 4 experts in topk_group=2 groups of 2"),
        ({"n_group": 8, "topk_group": 8}, "group_score='top2_sum' needs groups of at least 2 experts; n_group=8 leaves 1"),
        (
            {"n_group": 4, "gating": "topk_softmax"},
            "n_group=4 goes with gating 'softmax' or 'sigmoid', not 'topk_softmax'",
        ),
        (
            {"correction_bias": True, "gating": "topk_softmax"},
            "correction_bias=True goes with gating 'softmax' or 'sigmoid', not 'topk_softmax'",
        ),
        ({"shared_gate": True}, "shared_gate=True needs a shared expert: set shared_intermediate above 0 (it is 0)"),
        ({"weight_dtype": "int2"}, "weight_dtype='int2' must be one of same, int8, int4, mxfp4"),
        ({"scale_dtype": "float64"}, "scale_dtype='float64' must be one of float16, bfloat16, float32"),
        ({"activation_dtype": "int4"}, "activation_dtype='int4' must be one of same, int8"),
        ({"weight_dtype": "int8", "weight_group": 16}, "weight_group=16 must be one of 0, 32, 64, 128"),
        ({"weight_dtype": "mxfp4", "weight_group": 64}, "weight_group=64 must be 32 with weight_dtype='mxfp4'"),
        ({"weight_group": 64}, "weight_group=64 goes with weight_dtype 'int8', 'int4' or 'mxfp4', not 'same'"),
        ({"weight_zero_point": True}, "weight_zero_point=True goes with weight_dtype 'int8' or 'int4', not 'same'"),
        ({"weight_dtype": "mxfp4", "weight_zero_point": True}, "weight_zero_point=True goes with weight_dtype 'int8' or 'int4'"),
        ({"activation_dtype": "int8"}, "activation_dtype='int8' goes with weight_dtype 'int8', not 'same'"),
        ({"weight_dtype": "int4", "activation_dtype": "int8"}, "activation_dtype='int8' goes with weight_dtype 'int8', not 'int4'"),
    ],
    ids=str,
)
def test_impossible_values(fields, message):
    with pytest.raises(ConfigError) as caught:
        make(**fields)
    assert message in str(caught.value)
    assert isinstance(caught.value, MoegenError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, -math.inf, math.nan])
def test_impossible_scales(name, value):
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert str(caught.value) == f"{name}={value} must be between 1e-06 and 1e+06"


@pytest.mark.parametrize(
    "fields",
    [
        {"experts": 1, "top_k": 1},
        {"experts": 4096, "top_k": 64},
        {"top_k": 8},
        {"hidden": 1},
        {"hidden": 2**20, "intermediate": 2**20},
        {"shared_intermediate": 1, "shared_gate": True},
        {"n_group": 8, "topk_group": 8, "group_score": "max"},
        {"n_group": 4, "topk_group": 1},
        {"correction_bias": True},
        {
            "weight_dtype": "int8",
            "weight_group": 0,
            "weight_zero_point": True,
            "scale_dtype": "float32",
            "activation_dtype": "int8",
        },
        {"weight_dtype": "int4", "weight_group": 32, "weight_zero_point": True, "scale_dtype": "bfloat16"},
        {"weight_dtype": "mxfp4", "weight_group": 32},
    ],
    ids=str,
)
def test_values_at_the_limits(fields):
    config = make(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


# ---------------------------------------------------------------- types


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("value", [2.0, "2", None, True, np.float32(2), np.True_])
def test_integers_only(name, value):
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert str(caught.value) == f"{name}={value!r} must be of type int, not {type(value).__name__}"


@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize("value", [1, 0, "yes", None, 1.0])
def test_booleans_only(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.* must be of type bool, not"):
        make(**{name: value})


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["1.0", True, [1.0]])
def test_numbers_only(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.* must be of type float"):
        make(**{name: value})


@pytest.mark.parametrize("name", ["routed_scaling", "swiglu_alpha", "swiglu_limit", "balance_coefficient"])
def test_only_capacity_may_be_none(name):
    with pytest.raises(ConfigError, match=f"{name}=None must be of type float, not NoneType"):
        make(**{name: None})
    assert make(capacity_factor=None).capacity_factor is None


@pytest.mark.parametrize("name", STRINGS)
@pytest.mark.parametrize("value", [0, None, b"float32"])
def test_strings_only(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.* must be of type str, not"):
        make(**{name: value})


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int32, np.int64])
def test_numpy_integers_become_plain(kind):
    config = MoEConfig(experts=kind(8), top_k=kind(2), hidden=kind(16))
    assert config == make()
    assert hash(config) == hash(make())
    assert {type(getattr(config, name)) for name in INTS} == {int}
    json.dumps(config.to_dict())


def test_other_numpy_scalars_become_plain():
    config = make(routed_scaling=np.float32(2.5), capacity_factor=np.float64(1.25), renormalize=np.False_, swiglu_limit=3)
    assert config == make(routed_scaling=2.5, capacity_factor=1.25, renormalize=False, swiglu_limit=3.0)
    assert type(config.routed_scaling) is type(config.capacity_factor) is type(config.swiglu_limit) is float
    assert config.renormalize is False


# ---------------------------------------------------------------- value semantics


def test_frozen_hashable_replaceable():
    config = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.experts = 4
    assert {config: "layer"}[make()] == "layer"
    assert config != make(top_k=1)
    assert dataclasses.replace(config, top_k=1) == make(top_k=1)
    with pytest.raises(ConfigError, match="top_k=9"):
        dataclasses.replace(config, top_k=9)


@st.composite
def configs(draw):
    gating = draw(st.sampled_from(GATINGS))
    free = gating != "topk_softmax"
    n_group = draw(st.sampled_from([1, 2, 4])) if free else 1
    topk_group = draw(st.integers(1, n_group))
    size = draw(st.integers(2, 16))
    positive = st.floats(1e-3, 1e3)
    shared = draw(st.sampled_from([0, 1, 96]))
    weight_dtype = draw(st.sampled_from(WEIGHT_DTYPES))
    integers = weight_dtype in ("int8", "int4")
    return MoEConfig(
        experts=n_group * size,
        top_k=draw(st.integers(1, min(64, topk_group * size))),
        hidden=draw(st.integers(1, 9999)),
        intermediate=draw(st.integers(0, 9999)),
        dtype=draw(st.sampled_from(DTYPES)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gating=gating,
        renormalize=draw(st.booleans()),
        routed_scaling=draw(positive),
        router_bias=draw(st.booleans()),
        correction_bias=free and draw(st.booleans()),
        n_group=n_group,
        topk_group=topk_group,
        group_score=draw(st.sampled_from(["top2_sum", "max"])),
        weight_on_input=draw(st.booleans()),
        expert_bias=draw(st.booleans()),
        shared_intermediate=shared,
        shared_gate=shared > 0 and draw(st.booleans()),
        capacity_factor=draw(st.none() | positive),
        swiglu_alpha=draw(positive),
        swiglu_limit=draw(positive),
        balance_coefficient=draw(positive),
        weight_dtype=weight_dtype,
        weight_group=draw(st.sampled_from(WEIGHT_GROUPS)) if integers else 0,
        weight_zero_point=integers and draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(SCALE_DTYPES)),
        activation_dtype=draw(st.sampled_from(ACTIVATION_DTYPES)) if weight_dtype == "int8" else "same",
    )


@given(configs())
def test_round_trips(config):
    assert MoEConfig.from_dict(config.to_dict()) == config
    assert MoEConfig.from_dict(json.loads(config_key(config))) == config
    assert eval(str(config), {"MoEConfig": MoEConfig}) == config


def test_from_dict_fills_defaults_and_does_not_keep_the_dict():
    fields = dict(BASE)
    assert MoEConfig.from_dict(fields) == make()
    assert fields == BASE


@pytest.mark.parametrize("name", list(BASE))
def test_from_dict_names_the_missing_field(name):
    with pytest.raises(ConfigError, match=f"'{name}' is required"):
        MoEConfig.from_dict({k: v for k, v in BASE.items() if k != name})


def test_from_dict_names_the_unknown_field():
    with pytest.raises(ConfigError, match=r"unknown configuration field 'num_experts'; known: activation, .*weight_on_input"):
        MoEConfig.from_dict(BASE | {"num_experts": 8})
    with pytest.raises(ConfigError, match="top_k=9"):
        MoEConfig.from_dict(BASE | {"top_k": 9})


def test_str_shows_what_differs_from_the_defaults():
    assert str(make()) == "MoEConfig(experts=8, top_k=2, hidden=16, intermediate=64)"
    shown = str(make(gating="sigmoid", correction_bias=True, capacity_factor=1.25))
    assert shown == (
        "MoEConfig(experts=8, top_k=2, hidden=16, intermediate=64, gating='sigmoid', correction_bias=True, capacity_factor=1.25)"
    )


def test_config_key_is_canonical():
    shuffled = MoEConfig.from_dict(dict(reversed(make().to_dict().items())))
    assert config_key(shuffled) == config_key(make()) != config_key(make(top_k=1))


# ---------------------------------------------------------------- derived


def test_gated():
    assert {a for a in ACTIVATIONS if make(activation=a).gated} == set(GATED_ACTIVATIONS)


def test_low_bit_and_its_groups():
    assert {w for w in WEIGHT_DTYPES if make(weight_dtype=w).low_bit} == {"int8", "int4", "mxfp4"}
    assert [make(weight_dtype=w).weight_group for w in WEIGHT_DTYPES] == [0, 0, 128, 32]


def test_group_size():
    assert make().group_size == 8
    assert make(n_group=4).group_size == 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"gating": "sigmoid"}, True),
        ({"gating": "topk_softmax"}, True),
        ({"correction_bias": True}, False),
        ({"n_group": 2, "group_score": "max"}, True),
        ({"n_group": 2, "group_score": "top2_sum"}, False),  # a sum of scores is not monotone in the sum of logits
        ({"n_group": 2, "group_score": "max", "correction_bias": True}, False),
    ],
    ids=str,
)
def test_selects_by_logit(fields, expected):
    assert make(**fields).selects_by_logit is expected


@pytest.mark.parametrize(
    ("factor", "tokens", "expected"),
    [
        (None, 100, 100),
        (1.0, 100, 25),
        (1.25, 100, 32),  # ceil(31.25)
        (1.0, 1, 1),
        (1.0, 5, 2),  # ceil(1.25)
        (0.001, 7, 1),
        (4.0, 100, 100),
        (100.0, 3, 3),  # never more than T: an expert takes a token once
        (1.0, 0, 0),
        (None, 0, 0),
    ],
)
def test_capacity(factor, tokens, expected):
    assert make(capacity_factor=factor).capacity(tokens) == expected


@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 8))
def test_capacity_is_the_exact_ceiling(tokens, eighths, top_k):
    exact = math.ceil(Fraction(eighths, 8) * tokens * top_k / 8)
    assert make(top_k=top_k, capacity_factor=eighths / 8).capacity(tokens) == min(tokens, exact)


@given(st.integers(1, 10**6), st.floats(1.0, 100.0))
def test_capacity_of_at_least_one_can_hold_all_choices(tokens, factor):
    config = make(capacity_factor=factor)
    assert config.experts * config.capacity(tokens) >= tokens * config.top_k


def test_limits_are_the_documented_ones():
    assert (config_module.MAX_EXPERTS, config_module.MAX_TOP_K, config_module.MAX_WIDTH) == (4096, 64, 1 << 20)
