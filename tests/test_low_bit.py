"""Layers in few bits: numbers against the reference on what the codes mean, packing, machine code, other processors."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from helpers import bits, built_with, check_against_reference, stored, tokens, values
from listings import kernel

import moegen
from moegen import compiler, reference
from moegen.pack import pack
from moegen.packing import byte_offsets
from moegen.plan import plan
from moegen.quantization import Quantized, quantize
from moegen.verification import verify

SIZES: dict[str, Any] = {"experts": 5, "top_k": 2, "hidden": 72, "intermediate": 100}

# Every way of storing, multiplied as bfloat16 pairs, as float32 and as bytes; no size is a multiple of a group.
LAYERS: dict[str, dict[str, Any]] = {
    "int8": {"dtype": "bfloat16", "weight_dtype": "int8", "expert_bias": True},
    "int8-groups-float32": {
        "weight_dtype": "int8",
        "weight_group": 64,
        "weight_zero_point": True,
        "activation": "relu2",
        "scale_dtype": "float32",
    },
    "int4": {"dtype": "bfloat16", "weight_dtype": "int4", "shared_intermediate": 40, "shared_gate": True},
    "int4-zero-points": {"dtype": "bfloat16", "weight_dtype": "int4", "weight_group": 32, "weight_zero_point": True, "hidden": 200},
    "int4-float16": {
        "dtype": "float16",
        "weight_dtype": "int4",
        "weight_group": 64,
        "scale_dtype": "bfloat16",
        "expert_bias": True,
    },
    "mxfp4": {
        "dtype": "bfloat16",
        "weight_dtype": "mxfp4",
        "activation": "swiglu_clamped",
        "gating": "topk_softmax",
        "router_bias": True,
        "expert_bias": True,
    },
    "mxfp4-float32": {"weight_dtype": "mxfp4", "activation": "gelu"},
    "bytes": {"dtype": "bfloat16", "weight_dtype": "int8", "activation_dtype": "int8", "shared_intermediate": 24, "hidden": 2100},
    "bytes-groups-float32": {
        "weight_dtype": "int8",
        "weight_group": 32,
        "weight_zero_point": True,
        "activation_dtype": "int8",
        "weight_on_input": True,
        "expert_bias": True,
    },
}
# Of one height only: the same codes as others, multiplied as float32. Their stages check what the host gives them.
LOW_TILES = ("int8-groups-float32", "int4-float16", "mxfp4-float32")


def _config(name: str) -> moegen.MoEConfig:
    return moegen.MoEConfig.from_dict({**SIZES, **LAYERS[name]})


@pytest.fixture(scope="module")
def modules(store: pathlib.Path) -> dict[str, moegen.Module]:
    """The layers that were asked for so far."""

    class Built(dict[str, moegen.Module]):
        def __missing__(self, name: str) -> moegen.Module:
            most = 1 if name in LOW_TILES else 2
            self[name] = moegen.load(built_with(store, _config(name), max_rows=most, checked=name in LOW_TILES).path)
            return self[name]

    return Built()


@pytest.mark.parametrize("name", LAYERS)
def test_numbers(name: str, modules: dict[str, moegen.Module], rng: np.random.Generator, tmp_path: pathlib.Path) -> None:
    """Tiles of both heights, ragged tails, a batch that fills several passes; a token's result does not depend on its company.

    Nor on whether the weights were packed into a file before.
    """
    module = modules[name]
    weights = reference.random_weights(module.config, rng)
    layer = module.bind(weights)
    for count in (1, 3, 90):
        x = tokens(module.config, count, rng)
        out, _ = check_against_reference(layer, weights, x)
    alone = layer(stored(x[:1], module.config.dtype))
    np.testing.assert_array_equal(bits(alone), bits(out)[:1])
    mapped = module.bind(pack(weights, tmp_path / "layer.moepack", module.artifact).path, verify=True)
    np.testing.assert_array_equal(bits(mapped(stored(x, module.config.dtype))), bits(out))


@pytest.mark.parametrize("name", ["int4-zero-points", "bytes"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_sick_token_stays_alone(name: str, poison: float, modules: dict[str, moegen.Module], rng: np.random.Generator) -> None:
    config = modules[name].config
    layer = modules[name].bind(reference.random_weights(config, rng))
    x = tokens(config, 9, rng)
    clean = layer(stored(x, config.dtype))
    x[4, 7] = poison
    out = layer(stored(x, config.dtype))
    well = np.arange(9) != 4
    np.testing.assert_array_equal(bits(out)[well], bits(clean)[well])
    assert np.isnan(values(out)[4]).all()


def test_rows_of_zeros(modules: dict[str, moegen.Module], rng: np.random.Generator) -> None:
    """Whose scale would be 0, in a layer whose biases are all that is left."""
    module = modules["bytes-groups-float32"]
    weights = reference.random_weights(module.config, rng)
    x = np.zeros((4, module.config.hidden), np.float32)
    out = module.bind(weights).experts(x, np.tile(np.int32([0, 1]), (4, 1)), np.full((4, 2), 0.5))
    expected = reference.experts(
        module.config, reference.dequantized(module.config, weights), x, np.tile([0, 1], (4, 1)), np.full((4, 2), 0.5)
    )
    np.testing.assert_allclose(out, expected, rtol=2e-2, atol=1e-3 * np.abs(expected).max())
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize("name", ["int8", "int4-zero-points", "mxfp4", "bytes-groups-float32"])
def test_codes_are_packed_as_they_are(name: str, modules: dict[str, moegen.Module], rng: np.random.Generator) -> None:
    """Weights rounded by the caller give the same layer as weights rounded on packing; so do weights of the values themselves."""
    module = modules[name]
    config = module.config
    weights = reference.random_weights(config, rng)
    own: dict[str, Any] = {}
    for key, value in weights.items():
        part, _, matrix = key.partition(".")
        if part == "experts" and key.endswith(".weight"):
            own |= {f"experts.{e}.{matrix}": quantize(value[e], config) for e in range(config.experts)}
        else:
            own[key] = value
    x = stored(tokens(config, 20, rng), config.dtype)
    np.testing.assert_array_equal(bits(module.bind(own)(x)), bits(module.bind(weights)(x)))


def test_what_the_offset_of_bytes_adds(rng: np.random.Generator) -> None:
    """sum (code(x) + 128) * w - offset = sum code(x) * w, block by block, padding included."""
    codes = rng.integers(-128, 128, (6, 100), np.int8)
    zeros = rng.integers(-128, 128, (6, 4), np.int8)
    x = rng.integers(-127, 128, 100)
    padded_x, padded = np.pad(x, (0, 28)).astype(np.int64), np.pad(codes, ((0, 0), (0, 28))).astype(np.int64)
    without, grouped = (byte_offsets(Quantized(codes, np.ones((6, n), np.float32), z), 4, 32) for n, z in ((1, None), (4, zeros)))
    for block in range(4):
        part = slice(32 * block, 32 * block + 32)
        wanted = padded[:, part] @ padded_x[part]
        np.testing.assert_array_equal(padded[:, part] @ (padded_x[part] + 128) - without[:, block], wanted)
        centred = padded[:, part] - zeros[:, block : block + 1]
        np.testing.assert_array_equal(centred @ (padded_x[part] + 128) - grouped[:, block], centred @ padded_x[part])


@pytest.mark.parametrize(
    ("name", "mcpu"), [("int4-zero-points", "x86-64-v3"), ("bytes-groups-float32", "x86-64-v3"), ("mxfp4-float32", "x86-64")]
)
def test_code_for_other_processors(name: str, mcpu: str, store: pathlib.Path) -> None:
    """Without the instructions that the fast kernels are made of; proven by the build."""
    config = _config(name)
    tiling = plan(config, mcpu=mcpu).geometry.tiling
    made = moegen.build(plan(config, mcpu=mcpu, tiling=dataclasses.replace(tiling, max_rows=1, chunk_rows=16)), out=store)
    assert made.verification()["status"] == "passed"


def test_the_report_says_what_few_bits_change(modules: dict[str, moegen.Module]) -> None:
    """Random weights lose about what uniform rounding takes: 4 bits far more than 8, and rows of bytes something too."""
    rounding = {}
    for name in ("int4", "bytes"):
        report = verify(modules[name].artifact)
        assert report["status"] == "passed", report["failures"]
        rounding[name] = report["rounding"]
    assert 0.05 < rounding["int4"]["weights_relative_l2"] < 0.3
    assert rounding["int4"]["rows_relative_l2"] == 0
    assert 0.002 < rounding["bytes"]["weights_relative_l2"] < 0.05
    assert 0.002 < rounding["bytes"]["rows_relative_l2"] < 0.1


CODES = {
    "vdpbf16ps": {"dtype": "bfloat16", "weight_dtype": "int8"},
    "vdpbf16ps int4": {"dtype": "bfloat16", "weight_dtype": "int4"},
    "vdpbf16ps mxfp4": {"dtype": "bfloat16", "weight_dtype": "mxfp4"},
    "vpdpbusd": {"dtype": "bfloat16", "weight_dtype": "int8", "activation_dtype": "int8", "weight_group": 128},
}


@pytest.mark.parametrize("name", CODES)
def test_products_stay_in_registers(name: str) -> None:
    """The largest tile of Zen 5 and the smallest: sums are never stored between multiply-adds, at most a constant comes from the
    stack, and codes of four bits are looked up where rows are pairs."""
    add, _, stored_as = name.partition(" ")
    config = moegen.MoEConfig(**{**SIZES, "hidden": 1024, "intermediate": 512, **CODES[name]})
    todo = plan(config, mcpu="znver5")
    most = todo.geometry.tiling.max_rows
    text = compiler.assembly(todo.te_source, [f"expert_up_{rows}" for rows in (1, most)], todo.geometry, todo.target, todo.knobs)
    for rows in (1, most):
        blocks = re.split(r"^\S+:.*$", "\n".join(kernel(text, f"expert_up_{rows}")), flags=re.MULTILINE)
        innermost = max(blocks, key=lambda block: block.count(add)).splitlines()
        adds = [i for i, line in enumerate(innermost) if add in line]
        assert len(adds) >= 2 * rows
        between = innermost[adds[0] : adds[-1]]
        assert not [line for line in between if re.search(r"vmov\S+\s+%zmm\d+, \S*\(", line)]
        assert sum("zmm" in line and "(%rsp)" in line for line in between) <= 1
        assert any("vpermw" in line for line in between) == (stored_as in ("int4", "mxfp4"))


def test_packed_bytes() -> None:
    """What few bits are for: bytes of the packed weights, scales included, against bfloat16."""
    sizes = {"experts": 8, "top_k": 2, "hidden": 1024, "intermediate": 1024, "dtype": "bfloat16"}
    whole = plan(moegen.MoEConfig(**sizes)).geometry.packed_bytes
    for fields, most in (
        ({"weight_dtype": "int8"}, 0.51),
        ({"weight_dtype": "int8", "weight_group": 128}, 0.52),
        ({"weight_dtype": "int4"}, 0.265),
        ({"weight_dtype": "int4", "weight_group": 32}, 0.29),
        ({"weight_dtype": "mxfp4"}, 0.27),
    ):
        assert plan(moegen.MoEConfig(**sizes, **fields)).geometry.packed_bytes < most * whole
