"""Quantization: codes and scales against a definition in fractions, what is refused, and memory near the result."""

from __future__ import annotations

import tracemalloc
import warnings
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from moegen.arrays import HostArray
from moegen.config import MoEConfig
from moegen.errors import ConfigError, WeightsError
from moegen.quantization import Quantized, check, dequantize, group_of, groups_of, quantize, quantize_rows

E2M1 = [Fraction(v) for v in ("0", "0.5", "1", "1.5", "2", "3", "4", "6")]
SIGNIFICANT = {"float16": (11, -24), "bfloat16": (8, -133), "float32": (24, -149)}  # bits, exponent of the smallest step


def layer(**fields):
    return MoEConfig(experts=2, top_k=1, hidden=8, **fields)


FORMS = [
    layer(weight_dtype="int8"),
    layer(weight_dtype="int8", weight_group=64, scale_dtype="bfloat16"),
    layer(weight_dtype="int8", weight_group=32, weight_zero_point=True),
    layer(weight_dtype="int8", weight_zero_point=True, scale_dtype="float32"),
    layer(weight_dtype="int4"),
    layer(weight_dtype="int4", weight_group=32, scale_dtype="float32"),
    layer(weight_dtype="int4", weight_group=32, weight_zero_point=True, scale_dtype="bfloat16"),
    layer(weight_dtype="mxfp4"),
]


def name_of(config):
    return str(config).partition("weight_dtype=")[2]


# ---------------------------------------------------------------- the definition, number by number


def nearest(value, dtype):
    """A non-negative fraction rounded to a floating type, ties to even."""
    if value == 0:
        return value
    bits, lowest = SIGNIFICANT[dtype]
    exponent = floor_log2(value) - bits + 1
    step = Fraction(2) ** max(exponent, lowest)
    return round(value / step) * step  # Python rounds fractions to even


def floor_log2(value):
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def integers(group, config):
    """(codes, scale, zero) of one group of fractions."""
    bits = 8 if config.weight_dtype == "int8" else 4
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = nearest(exact_scale(group, config), config.scale_dtype) or Fraction(1)
    zero = min(max(round(-min([*group, 0]) / scale) + lowest, lowest), highest) if config.weight_zero_point else 0
    return [min(max(round(v / scale) + zero, lowest), highest) for v in group], scale, zero


def vanishes(w, group, config):
    """Whether the scale of some group that is not all zeros rounds to zero."""
    if config.weight_dtype == "mxfp4":
        return False
    parts = [[Fraction(float(v)) for v in row[g : g + group]] for row in w for g in range(0, w.shape[1], group)]
    return any(any(part) and not nearest(exact_scale(part, config), config.scale_dtype) for part in parts)


def exact_scale(group, config):
    bits = 8 if config.weight_dtype == "int8" else 4
    low, high = min([*group, 0]), max([*group, 0])
    return (high - low) / (2**bits - 1) if config.weight_zero_point else max(high, -low) / Fraction(2 ** (bits - 1) - 1)


def mxfp4(group):
    """(codes, exponent with its bias) of one group of fractions; the sign is left out of the codes."""
    largest = max(abs(v) for v in group)
    exponent = max(floor_log2(largest) - 2, -127) if largest else 0
    codes = []
    for v in group:
        scaled = min(abs(v) / Fraction(2) ** exponent, Fraction(6))
        distance = min(abs(scaled - e) for e in E2M1)
        codes.append(min((c for c, e in enumerate(E2M1) if abs(scaled - e) == distance), key=lambda c: c % 2))
    return codes, exponent + 127


weights = arrays_of.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 150)),
    elements=st.one_of(st.integers(-40, 40).map(lambda i: i / 4), st.floats(-3e4, 3e4, width=32)),
    fill=st.just(0.0),
)


@pytest.mark.parametrize("config", FORMS, ids=name_of)
@given(weights)
@settings(max_examples=25, deadline=None)
def test_codes_are_those_of_the_definition(config, w):
    n, k = w.shape
    group, count = config.weight_group or k, groups_of(config, k)
    assert count == -(-k // group)
    assert group == group_of(config, k)
    if vanishes(w, group, config):
        with pytest.raises(WeightsError, match="cannot hold"):
            quantize(w, config)
        return
    q = quantize(w, config)
    check(q, config, n, k, "w")
    meant = dequantize(q, config)
    for i in range(n):
        for g in range(count):
            here = slice(g * group, min((g + 1) * group, k))
            values = [Fraction(float(v)) for v in w[i, here]]
            if config.weight_dtype == "mxfp4":
                codes, exponent = mxfp4(values)
                assert [c & 7 for c in q.codes[i, here].tolist()] == codes
                assert all(c < 8 or v <= 0 for c, v in zip(q.codes[i, here], values, strict=True))
                assert int(q.scales[i, g]) == exponent
                signed = [
                    E2M1[c] * (-1 if v < 0 else 1) * Fraction(2) ** (exponent - 127) for c, v in zip(codes, values, strict=True)
                ]
            else:
                codes, scale, zero = integers(values, config)
                assert q.codes[i, here].tolist() == codes
                assert Fraction(float(q.scales[i, g])) == scale
                assert zero == (0 if q.zeros is None else int(q.zeros[i, g]))
                signed = [scale * (c - zero) for c in codes]
            assert [Fraction(float(v)) for v in meant[i, here]] == signed


@pytest.mark.parametrize("config", FORMS, ids=name_of)
def test_many_rows_are_each_rounded_by_themselves(config, rng):
    w = rng.standard_normal((900, 100), dtype=np.float32)  # more than are worked on at a time
    whole = quantize(w, config)
    for i in (0, 654, 655, 656, 899):
        one = quantize(w[i : i + 1], config)
        assert np.array_equal(whole.codes[i : i + 1], one.codes)
        assert np.array_equal(whole.scales[i : i + 1], one.scales)
        assert whole.zeros is None or np.array_equal(whole.zeros[i : i + 1], one.zeros)
    assert np.array_equal(dequantize(whole, config)[::7], dequantize(whole.rows(slice(None, None, 7)), config))
    assert np.array_equal(dequantize(whole, config, np.float32), dequantize(whole, config).astype(np.float32))
    assert whole.nbytes == whole.codes.nbytes + whole.scales.nbytes + (0 if whole.zeros is None else 900 * whole.scales.shape[1])


def test_any_float_type_and_strides(rng):
    config = layer(weight_dtype="int8")
    w = rng.standard_normal((5, 6)).astype(ml_dtypes.bfloat16)
    expected = quantize(w.astype(np.float32), config)
    for given_as in (w, HostArray(w.view(np.uint16), "bfloat16"), w.astype(np.float64), np.asfortranarray(w.astype(np.float32))):
        assert np.array_equal(quantize(given_as, config).codes, expected.codes)
    assert np.array_equal(quantize(w.astype(np.float32)[::-1], config).codes, expected.codes[::-1])


def test_subnormal_mxfp4_and_its_extremes():
    config = layer(weight_dtype="mxfp4")
    for value, exponent in ((2.0**127 * 1.9, 252), (2.0**-149, 0), (2.0**-120, 5), (0.0, 127)):
        q = quantize(np.array([[value, 0.0]], np.float32), config)
        assert q.scales.tolist() == [[exponent]]
        assert np.isfinite(dequantize(q, config)).all()
    assert quantize(np.array([[7.9, 5.0, 2.5, -0.75]]), config).codes.tolist() == [[7, 6, 4, 8 + 2]]


def test_neighbours_of_ties_are_not_ties():
    config = layer(weight_dtype="int8", scale_dtype="float32")
    half = np.float32(0.5)
    values = [
        127,
        half,
        np.nextafter(half, np.float32(0)),
        np.nextafter(half, np.float32(1)),
        1.5,
        2.5,
        np.float32(126.499992),
        -half,
    ]
    assert quantize(np.array([values]), config).codes.tolist() == [[127, 0, 0, 1, 2, 2, 126, 0]]
    scaled = np.array([values], np.float32) * np.float32(1 / 3)
    codes, scale, _ = integers([Fraction(float(v)) for v in scaled[0]], config)
    q = quantize(scaled, config)
    assert (q.codes[0].tolist(), Fraction(float(q.scales[0, 0]))) == (codes, scale)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "w", "words"),
    [
        (FORMS[0], [[1.0, np.nan]], ["not finite", "int8"]),
        (FORMS[7], [[1.0, -np.inf]], ["not finite", "mxfp4"]),
        (FORMS[0], [[1e39, 1.0]], ["not finite"]),
        (FORMS[0], [[1e7]], ["78740.2", "scale_dtype='float16'", "set scale_dtype='float32'"]),
        (FORMS[2], [[1e8]], ["set scale_dtype='float32'"]),
        (FORMS[0], [[1e-7]], ["scale_dtype='float16'", "set scale_dtype='float32'"]),
        (FORMS[3], [[1e-44]], ["scale_dtype='float32'", "larger, or zero"]),
        (FORMS[0], [1.0], ["(1,)"]),
        (FORMS[0], np.zeros((0, 3)), ["(0, 3)"]),
        (FORMS[0], np.zeros((2, 3), np.int8), ["int8", "float32"]),
        (FORMS[0], "w", ["str"]),
    ],
)
def test_weights_that_cannot_be_quantized(config, w, words):
    with pytest.raises(WeightsError) as caught:
        quantize(np.array(w) if isinstance(w, list) else w, config, "this one")
    assert all(word in str(caught.value) for word in ["this one", *words]), str(caught.value)


def test_a_layer_without_codes_has_nothing_to_round_to():
    with pytest.raises(ConfigError, match="weight_dtype='same'"):
        quantize(np.zeros((2, 2)), layer())


def good(config, n=3, k=40):
    return quantize(np.linspace(-3, 5, n * k).reshape(n, k), config)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (FORMS[0], {"codes": np.zeros((3, 41), np.int8)}, ["codes", "(3, 41)", "(3, 40)"]),
        (FORMS[0], {"codes": np.zeros((3, 40), np.uint8)}, ["codes", "int8", "uint8"]),
        (FORMS[0], {"codes": [[0] * 40] * 3}, ["codes", "list"]),
        (FORMS[7], {"codes": np.full((3, 40), 16, np.uint8)}, ["between 0 and 15", "16"]),
        (FORMS[5], {"codes": np.full((3, 40), 8, np.int8)}, ["between -8 and 7", "8"]),
        (FORMS[5], {"scales": np.ones((3, 1), np.float32)}, ["scales", "(3, 1)", "(3, 2)", "weight_group=32"]),
        (FORMS[5], {"scales": np.ones((3, 2), np.float16)}, ["scales", "float32", "float16"]),
        (FORMS[5], {"scales": np.full((3, 2), np.inf, np.float32)}, ["not finite"]),
        (FORMS[0], {"scales": np.full((3, 1), 0.1, np.float32)}, ["scale_dtype='float16'", "set scale_dtype='float32'"]),
        (FORMS[0], {"scales": np.full((3, 1), 2.0**-40, np.float32)}, ["scale_dtype='float16'", "set scale_dtype='bfloat16'"]),
        (FORMS[1], {"scales": np.full((3, 1), 1 + 2.0**-9, np.float32)}, ["scale_dtype='bfloat16'", "set scale_dtype='float16'"]),
        (FORMS[7], {"scales": np.full((3, 2), 255, np.uint8)}, ["255", "NaN"]),
        (FORMS[2], {"zeros": None}, ["no zero points", "set weight_zero_point=False"]),
        (FORMS[0], {"zeros": np.zeros((3, 1), np.int8)}, ["set weight_zero_point=True"]),
        (FORMS[2], {"zeros": np.zeros((3, 3), np.int8)}, ["zeros", "(3, 3)", "(3, 2)"]),
        (FORMS[6], {"zeros": np.full((3, 2), -9, np.int8)}, ["zeros", "between -8 and 7", "-9"]),
    ],
)
def test_malformed_codes_are_named(config, change, words):
    q = good(config)
    check(q, config, 3, 40, "it")
    bad = Quantized(**{"codes": q.codes, "scales": q.scales, "zeros": q.zeros} | change)
    with pytest.raises(WeightsError) as caught:
        check(bad, config, 3, 40, "it")
    assert all(word in str(caught.value) for word in ["it", *words]), str(caught.value)


# ---------------------------------------------------------------- rows


@given(
    arrays_of.arrays(
        np.float32,
        st.tuples(st.integers(0, 4), st.integers(1, 20)),
        elements=st.one_of(st.integers(-127, 127).map(float), st.floats(width=32, allow_nan=False, allow_infinity=False)),
    )
)
@settings(max_examples=200, deadline=None)
def test_rows_are_those_of_float32_arithmetic(x):
    codes, scales = quantize_rows(x)
    assert (codes.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (len(x), 1))
    for row, ints, scale in zip(x, codes, scales[:, 0], strict=True):
        largest = max(abs(float(v)) for v in row)
        expected = np.float32(np.float32(largest) / np.float32(127)) or np.float32(1)
        assert scale == expected
        for v, code in zip(row, ints, strict=True):
            assert int(code) == min(max(round(float(np.float32(v / scale))), -127), 127)


def test_rows_that_are_not_finite_give_products_that_are_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NaN made an integer is a warning, and some number
        codes, scales = quantize_rows([[1.0, np.inf], [np.nan, 2.0], [0.0, 0.0], [3e38, -3e38]])
    assert codes.tolist() == [[0, 0], [0, 0], [0, 0], [127, -127]]
    with np.errstate(invalid="ignore"):
        assert np.isnan(codes[:2] * scales[:2]).all()
    assert scales[2:].tolist() == [[1.0], [float(np.float32(3e38) / np.float32(127))]]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("config", [FORMS[6], FORMS[7]], ids=name_of)
def test_memory_stays_near_the_result(config, rng):
    w = rng.standard_normal((1024, 2048), dtype=np.float32).astype(np.float16)
    tracemalloc.start()
    try:
        q = quantize(w, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < q.nbytes + (6 << 20)
