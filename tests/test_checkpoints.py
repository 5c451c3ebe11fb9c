"""Checkpoints in few bits: every format is read back exactly, and what is misshapen, truncated or at odds is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tracemalloc

import checkpoints as pack
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moegen.checkpoints import checkpoint_format_beside, from_quantized, open_matrix
from moegen.config import MoEConfig
from moegen.errors import WeightsError
from moegen.quantization import CODE_RANGES, Quantized, groups_of

BITS = {"int8": 8, "int4": 4}


def layer(weight_dtype, group=32, zeros=False, scale_dtype="float16"):
    return MoEConfig(2, 1, 8, weight_dtype=weight_dtype, weight_group=group, weight_zero_point=zeros, scale_dtype=scale_dtype)


def made_up(config, n, k, seed=0):
    """Any codes, scales and zero points of a layer's form; no zero point is the lowest, which GPTQ cannot store."""
    rng = np.random.default_rng(seed)
    low, high = CODE_RANGES[config.weight_dtype]
    count = groups_of(config, k)
    if config.weight_dtype == "mxfp4":
        return Quantized(rng.integers(0, 16, (n, k)).astype(np.uint8), rng.integers(0, 255, (n, count)).astype(np.uint8))
    zeros = rng.integers(low + 1, high + 1, (n, count)).astype(np.int8) if config.weight_zero_point else None
    scales = rng.uniform(0.01, 3, (n, count)).astype(ml_dtypes.bfloat16 if config.scale_dtype == "bfloat16" else np.float16)
    return Quantized(rng.integers(low, high + 1, (n, k)).astype(np.int8), scales.astype(np.float32), zeros)


def same(got, expected):
    assert got.codes.dtype == expected.codes.dtype
    assert np.array_equal(got.codes, expected.codes)
    assert np.array_equal(got.scales, expected.scales)
    assert (got.zeros is None) == (expected.zeros is None)
    assert got.zeros is None or np.array_equal(got.zeros, expected.zeros)


FORMATS = {
    "gptq": lambda q, c: pack.gptq(q, BITS[c.weight_dtype], c.weight_group),
    "gptq_v2": lambda q, c: pack.gptq(q, BITS[c.weight_dtype], c.weight_group, "gptq_v2"),
    "awq": lambda q, c: pack.awq(q),
    "pack-quantized": lambda q, c: pack.pack_quantized(q, BITS[c.weight_dtype]),
    "int-quantized": lambda q, c: pack.int_quantized(q),
    "mxfp4": lambda q, c: pack.mxfp4(q),
}
COMBINATIONS = [
    (name, layer(dtype, group, zeros))
    for name in FORMATS
    for dtype in (("mxfp4",) if name == "mxfp4" else ("int4",) if name == "awq" else ("int4", "int8"))
    for group in ((32,) if dtype == "mxfp4" else (0, 64) if dtype == "int8" else (32, 128))
    for zeros in ((False,) if dtype == "mxfp4" else (False, True))
]


@pytest.mark.parametrize(("name", "config"), COMBINATIONS, ids=lambda v: v if isinstance(v, str) else str(v).partition("bit")[2])
@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=8, deadline=None)
def test_every_format_is_read_back(name, config, eighths_n, eighths_k, seed):
    # GPTQ and AWQ need whole words along what they pack; the others take any sizes.
    n, k = (8 * eighths_n, 8 * eighths_k) if name in ("gptq", "gptq_v2", "awq") else (8 * eighths_n - 3, 8 * eighths_k - 5)
    q = made_up(config, n, k, seed)
    arrays = FORMATS[name](q, config)
    stored = open_matrix(arrays, config, n, k, "w", name if name.startswith("gptq") else None)
    same(stored.read(), q)
    for picked in (slice(0, None, 2), slice(1, None, 2), slice(n // 2, n)):
        if len(range(n)[picked]):
            same(stored.rows(picked).read(), q.rows(picked))
    assert stored.read().codes.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["int4", "int8"])
def test_symmetric_gptq_says_its_own_version(dtype):
    config = layer(dtype)
    q = made_up(config, 8, 64)
    for version in ("gptq", "gptq_v2"):
        arrays = pack.gptq(q, BITS[dtype], 32, version)
        same(open_matrix(arrays, config, 8, 64, "w").read(), q)
        same(open_matrix(arrays, config, 8, 64, "w", version).read(), q)
        other = "gptq" if version == "gptq_v2" else "gptq_v2"
        with pytest.raises(WeightsError, match="set weight_zero_point=True"):
            open_matrix(arrays, config, 8, 64, "w", other).read()


def test_zero_points_of_gptq_are_stored_minus_one_unless_said_otherwise():
    config = layer("int4", zeros=True)
    q = made_up(config, 8, 64)
    arrays = pack.gptq(q, 4, 32)
    same(open_matrix(arrays, config, 8, 64, "w").read(), q)
    moved = open_matrix(arrays, config, 8, 64, "w", "gptq_v2").read()
    assert np.array_equal(moved.zeros, q.zeros - 1)
    lowest = dataclasses.replace(q, zeros=np.full_like(q.zeros, -8))
    same(open_matrix(pack.gptq(lowest, 4, 32, "gptq_v2"), config, 8, 64, "w", "gptq_v2").read(), lowest)
    overflown = arrays | {"qzeros": np.full_like(arrays["qzeros"], -1)}
    with pytest.raises(WeightsError, match=r"stored as 15.*gptq_v2"):
        open_matrix(overflown, config, 8, 64, "w").read()
    with pytest.raises(WeightsError, match="checkpoint_format='marlin'"):
        open_matrix(arrays, config, 8, 64, "w", "marlin")


def test_scales_of_other_types():
    config = layer("int4", scale_dtype="bfloat16")
    q = made_up(config, 8, 64)
    for scales in (ml_dtypes.bfloat16, np.float32):
        same(open_matrix(pack.pack_quantized(q, 4, scales), config, 8, 64, "w").read(), q)
        same(open_matrix(pack.gptq(q, 4, 32, scales=scales), config, 8, 64, "w").read(), q)
    wide = pack.pack_quantized(q, 4) | {"weight_scale": np.full((8, 2), 0.1, np.float32)}
    with pytest.raises(WeightsError, match="set scale_dtype='float32'"):
        open_matrix(wide, config, 8, 64, "w").read()


def test_zero_points_that_are_zero_may_be_there_or_not():
    for q, arrays in ((made_up(INT4, 8, 64), PACKED), (made_up(INT8, 8, 64), PLAIN)):
        config = layer("int4" if arrays is PACKED else "int8", zeros=True)
        zeros = np.zeros((8, 2), np.int8)
        filled = dataclasses.replace(q, zeros=zeros)
        same(open_matrix(arrays, config, 8, 64, "w").rows(slice(1, None, 2)).read(), filled.rows(slice(1, None, 2)))
        explicit = pack.pack_quantized(filled, 4) if arrays is PACKED else pack.int_quantized(filled)
        same(open_matrix(explicit, dataclasses.replace(config, weight_zero_point=False), 8, 64, "w").read(), q)


def test_group_indices():
    config = layer("int4")
    q = made_up(config, 8, 64)
    for arrays, name in ((pack.gptq(q, 4, 32), "g_idx"), (pack.pack_quantized(q, 4), "weight_g_idx")):
        order = np.arange(64) // 32
        for indices in (order, order.astype(np.int32)):
            same(open_matrix(arrays | {name: indices}, config, 8, 64, "w").read(), q)
        with pytest.raises(WeightsError, match="act-order"):
            open_matrix(arrays | {name: order[::-1]}, config, 8, 64, "w")
        with pytest.raises(WeightsError, match=name):
            open_matrix(arrays | {name: order[:-1]}, config, 8, 64, "w")
    same(open_matrix(arrays | {"weight_g_idx": np.full(64, -1)}, config, 8, 64, "w").read(), q)
    del arrays["weight_shape"]
    same(open_matrix(arrays, config, 8, 64, "w").read(), q)


INT4, INT8, MXFP4 = layer("int4"), layer("int8"), layer("mxfp4")
GPTQ, AWQ = pack.gptq(made_up(INT4, 8, 64), 4, 32), pack.awq(made_up(INT4, 8, 64))
PACKED, PLAIN, BLOCKS = (
    pack.pack_quantized(made_up(INT4, 8, 64), 4),
    pack.int_quantized(made_up(INT8, 8, 64)),
    pack.mxfp4(made_up(MXFP4, 8, 64)),
)


def without(arrays, name):
    return {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("config", "arrays", "words"),
    [
        (layer("int4", 128), GPTQ, ["weight_group=32", "weight_group=128", "scales"]),
        (layer("int4", 64), PACKED, ["weight_group=32", "weight_group=64", "weight_scale"]),
        (layer("int8", 0), PLAIN, ["weight_group=32", "weight_group=0"]),
        (INT8, GPTQ, ["weight_dtype='int4'", "weight_dtype='int8'"]),
        (INT4, pack.gptq(made_up(INT8, 8, 64), 8, 32), ["weight_dtype='int8'", "weight_dtype='int4'"]),
        (INT8, AWQ, ["weight_dtype='int4'", "weight_dtype='int8'"]),
        (INT8, PACKED, ["weight_dtype='int4'", "weight_dtype='int8'"]),
        (INT4, PLAIN, ["between -8 and 7"]),
        (INT4, BLOCKS, ["weight_dtype='mxfp4'", "weight_dtype='int4'"]),
        (MXFP4, GPTQ, ["weight_dtype='mxfp4'", "weight_dtype='int4'"]),
        (MXFP4, PLAIN, ["weight_dtype='mxfp4'", "'int8'"]),
        (INT4, pack.awq(made_up(layer("int4", zeros=True), 8, 64)), ["zero points other than", "weight_zero_point=True"]),
        (INT4, pack.gptq(made_up(layer("int4", zeros=True), 8, 64), 4, 32), ["zero points other than", "weight_zero_point=True"]),
        (INT4, pack.pack_quantized(made_up(layer("int4", zeros=True), 8, 64), 4), ["weight_zero_point=True"]),
        (INT4, without(GPTQ, "scales"), ["scales is missing", "GPTQ"]),
        (INT4, without(AWQ, "qzeros"), ["qzeros is missing", "AWQ"]),
        (INT4, without(PACKED, "weight_scale"), ["weight_scale is missing"]),
        (INT8, without(PLAIN, "weight"), ["weight is missing"]),
        (MXFP4, without(BLOCKS, "scales"), ["scales is missing", "MXFP4"]),
        (INT4, AWQ | {"g_idx": GPTQ["g_idx"]}, ["g_idx does not belong to AWQ"]),
        (INT4, GPTQ | {"weight_scale": PACKED["weight_scale"]}, ["weight_scale does not belong to GPTQ"]),
        (MXFP4, BLOCKS | {"weight": PLAIN["weight"]}, ["weight does not belong to MXFP4"]),
        (INT4, GPTQ | {"qweight": GPTQ["qweight"][:-1]}, ["qweight", "(7, 8)", "(8, 8)", "(64, 1)", "64 inputs"]),
        (INT4, GPTQ | {"qweight": GPTQ["qweight"].astype(np.int64)}, ["qweight", "int64", "int32"]),
        (INT4, GPTQ | {"qweight": GPTQ["qweight"][None]}, ["qweight", "(1, 8, 8)"]),
        (INT4, GPTQ | {"qzeros": GPTQ["qzeros"][:1]}, ["qzeros", "(1, 1)", "(2, 1)"]),
        (INT4, GPTQ | {"scales": GPTQ["scales"][:, 1:]}, ["scales", "(2, 7)", "(2, 8)"]),
        (INT4, GPTQ | {"scales": GPTQ["scales"].astype(np.float64)}, ["scales", "float64"]),
        (INT4, GPTQ | {"scales": np.full((2, 8), np.nan, np.float16)}, ["not finite"]),
        (INT4, PACKED | {"weight_packed": PACKED["weight_packed"][:, 1:]}, ["weight_packed", "(8, 7)", "(8, 8)"]),
        (INT4, PACKED | {"weight_shape": np.array([8, 60])}, ["weight_shape", "(8, 60)", "(8, 64)"]),
        (INT4, PACKED | {"weight_shape": np.array([8.0, 64.0])}, ["weight_shape", "float64"]),
        (INT8, PLAIN | {"weight": PLAIN["weight"].astype(np.float32)}, ["weight", "float32", "int8"]),
        (INT8, PLAIN | {"weight_zero_point": np.ones((8, 2), np.int8)}, ["weight_zero_point=True"]),
        (MXFP4, BLOCKS | {"blocks": BLOCKS["blocks"][:, :1]}, ["blocks", "(8, 1, 16)", "(8, 2, 16)"]),
        (MXFP4, BLOCKS | {"scales": np.full((8, 2), 255, np.uint8)}, ["255", "NaN"]),
        (MXFP4, BLOCKS | {"scales": "x"}, ["scales", "str"]),
    ],
)
def test_refusals(config, arrays, words):
    with pytest.raises(WeightsError) as caught:
        open_matrix(arrays, config, 8, 64, "weight 'w'").read()
    assert all(word in str(caught.value) for word in ["weight 'w'", *words]), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("n", "k", "words"), [(8, 60, "does not divide 60"), (9, 64, "does not divide 9"), (4, 4, "4")])
def test_sizes_that_words_do_not_divide(n, k, words):
    q = made_up(INT4, n, k)
    with pytest.raises(WeightsError, match=words):
        open_matrix(pack.gptq(q, 4, 32) | {"qweight": np.zeros((k // 8, n), np.int32)}, INT4, n, k, "w")


PARTS = sorted({*GPTQ, *AWQ, *PACKED, *PLAIN, *BLOCKS, "weight_zero_point", "weight_g_idx"})
SHAPES = st.lists(st.sampled_from([0, 1, 2, 8, 16, 64]), max_size=3).map(tuple)
DTYPES = st.sampled_from(["int32", "int8", "uint8", "float16", "float32", "int64", "bool"])


@given(
    st.sampled_from([INT4, INT8, MXFP4, layer("int4", zeros=True)]),
    st.sampled_from([GPTQ, AWQ, PACKED, PLAIN, BLOCKS]),
    st.dictionaries(st.sampled_from(PARTS), st.tuples(SHAPES, DTYPES), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_nothing_but_complaints_about_hostile_arrays(config, good, changes):
    bad = good | {part: np.ones(shape, dtype) for part, (shape, dtype) in changes.items()}
    with contextlib.suppress(WeightsError):
        q = open_matrix(bad, config, 8, 64, "w").read()
        assert q.codes.shape == (8, 64)


def test_quantized_by_the_caller():
    q = made_up(INT4, 8, 64)
    assert from_quantized(q, INT4, 8, 64, "w").rows(slice(4, 8)).read().codes.base is not None
    with pytest.raises(WeightsError, match=r"\(8, 64\), expected \(8, 65\)"):
        from_quantized(q, INT4, 8, 65, "w")
    with pytest.raises(WeightsError, match="codes must be an array of int8, not list"):
        from_quantized(Quantized(q.codes.tolist(), q.scales), INT4, 8, 64, "w").read()
    with pytest.raises(WeightsError, match="uint8"):
        from_quantized(q, MXFP4, 8, 64, "w").read()


def test_memory_stays_near_what_is_read():
    n = k = 1024
    codes = np.zeros((n, k // 2), np.uint8)
    arrays = {"blocks": codes.reshape(n, -1, 16), "scales": np.zeros((n, k // 32), np.uint8)}
    words = {
        "qweight": np.zeros((k // 8, n), np.int32),
        "qzeros": np.full((k // 32, n // 8), 0x77777777, np.int32),
        "scales": np.ones((k // 32, n), np.float16),
    }
    awq = {**words, "qweight": np.zeros((k, n // 8), np.int32), "qzeros": words["qzeros"] + 0x11111111}
    for config, given_arrays in ((MXFP4, arrays), (INT4, words), (INT4, awq)):
        tracemalloc.start()
        try:
            stored = open_matrix(given_arrays, config, n, k, "w")
            _, opening = tracemalloc.get_traced_memory()
            stored.read()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert opening < 1 << 16
        assert peak < 3.5 * n * k


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"config.json": {"model_type": "mixtral"}}, None),
        ({"config.json": {"quantization_config": {"checkpoint_format": "gptq_v2"}}}, "gptq_v2"),
        ({"config.json": {"quantization_config": {"format": "gptq"}}}, "gptq"),
        ({"config.json": {"quantization_config": {"format": "pack-quantized"}}}, None),
        ({"config.json": {"quantization_config": {"checkpoint_format": ["gptq"]}}}, None),
        ({"config.json": {"quantization_config": 3}, "quantize_config.json": {"checkpoint_format": "gptq_v2"}}, "gptq_v2"),
        ({"config.json": [1]}, None),
    ],
)
def test_the_format_beside_the_weights(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert checkpoint_format_beside(tmp_path) == checkpoint_format_beside(tmp_path / "model.safetensors") == expected
    (tmp_path / "config.json").write_text("{")
    assert checkpoint_format_beside(tmp_path) == ("gptq_v2" if "quantize_config.json" in files else None)
