"""Weights: every spelling and layout arrives at the same matrices, without copies; everything else is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import struct
import tracemalloc

import checkpoints as pack
import ml_dtypes
import numpy as np
import pytest
from checkpoints import entry, raw, save
from hypothesis import given, settings
from hypothesis import strategies as st

from moegen.arrays import to_float32
from moegen.config import MoEConfig, weight_shapes
from moegen.errors import WeightsError
from moegen.quantization import Quantized, dequantize, quantize
from moegen.reference import dequantized, random_weights
from moegen.safetensors import INDEX_NAME, SafetensorsFile, open_safetensors
from moegen.weights import resolve

BF16 = ml_dtypes.bfloat16
PLAIN = MoEConfig(4, 2, 6, 5)
SHARED = MoEConfig(4, 2, 6, 5, shared_intermediate=3, shared_gate=True)
SIGMOID = MoEConfig(4, 2, 6, 5, gating="sigmoid", correction_bias=True, shared_intermediate=7)
UNGATED = dataclasses.replace(SIGMOID, activation="relu2")
GPT_OSS = MoEConfig(4, 2, 6, 5, activation="swiglu_clamped", gating="topk_softmax", router_bias=True, expert_bias=True)
LLAMA4 = MoEConfig(4, 1, 6, 5, gating="sigmoid", renormalize=False, weight_on_input=True, shared_intermediate=5)
# 2I == H: the shape of a fused projection says nothing about its layout.
AMBIGUOUS = [dataclasses.replace(c, hidden=10) for c in (PLAIN, GPT_OSS, LLAMA4)]


def canonical(config, seed=0):
    return random_weights(config, np.random.default_rng(seed))


def interleave(gate, up, axis):
    return np.stack([gate, up], axis=axis).reshape(*gate.shape[: gate.ndim + axis], -1, *gate.shape[gate.ndim + axis + 1 :])


def hub(config, w, block="mlp.", router="gate", shared="shared_experts", names=("gate_proj", "up_proj", "down_proj")):
    """`w` as a checkpoint with one array per expert spells it."""
    out = {}
    for name, array in w.items():
        part, *rest = name.split(".")
        if part == "router":
            out[f"{block}{router}.{rest[0].replace('correction', 'e_score_correction')}"] = array
        elif part == "shared_gate":
            out[f"{block}shared_expert_gate.weight"] = array
        else:
            matrix = dict(zip(("gate", "up", "down"), names, strict=True))[rest[0]] if part == "experts" else f"{rest[0]}_proj"
            for e in range(config.experts) if part == "experts" else (None,):
                where = f"experts.{e}" if part == "experts" else shared
                out[f"{block}{where}.{matrix}.{rest[1]}"] = array if e is None else array[e]
    return out


def fused(config, w, layout="output_first", gate_up="stacked", router="gate", shared="shared_experts"):
    """`w` as transformers 5's modules hold it."""
    out = {k: v for k, v in hub(config, w, "", router, shared).items() if not k.startswith("experts.")}
    for kind in ("weight", "bias"):
        suffix = "_bias" if kind == "bias" else ""
        axis = -2 if kind == "weight" else -1
        parts = {m: w[f"experts.{m}.{kind}"] for m in ("gate", "up", "down") if f"experts.{m}.{kind}" in w}
        if "gate" in parts:
            both = parts.pop("gate"), parts.pop("up")
            parts["gate_up"] = interleave(*both, axis) if gate_up == "interleaved" else np.concatenate(both, axis)
        for matrix, array in parts.items():
            turned = array.swapaxes(-1, -2) if layout == "input_first" and kind == "weight" else array
            out[f"experts.{matrix}_proj{suffix}"] = np.ascontiguousarray(turned)
    return out


def check(source, w, config):
    """The source gives exactly the canonical weights `w`, expert by expert and stacked."""
    got = source.to_float32()
    assert got.keys() == w.keys()
    for name in w:
        assert np.array_equal(got[name], w[name]), name
    for e in range(config.experts):
        views = source.expert(e)
        expected = {n.split(".", 1)[1].replace(".weight", "").replace(".bias", "_bias"): w[n][e] for n in w if n[:7] == "experts"}
        assert views.keys() == expected.keys()
        assert all(np.array_equal(to_float32(views[n]), expected[n]) for n in expected)
    router = source.router()
    assert np.array_equal(to_float32(router["weight"]), w["router.weight"])
    assert (router["bias"] is not None, router["correction_bias"] is not None) == (config.router_bias, config.correction_bias)
    shared = source.shared()
    assert (shared is not None) == bool(config.shared_intermediate)
    if shared:
        assert set(shared) == {n.removeprefix("shared.").split(".")[0] for n in w if n.startswith("shared")}


CASES = {
    "canonical": (SHARED, lambda c, w: w),
    "canonical ungated": (UNGATED, lambda c, w: w),
    "canonical gpt-oss": (GPT_OSS, lambda c, w: w),
    "mixtral hub": (PLAIN, lambda c, w: hub(c, w, "block_sparse_moe.", names=("w1", "w3", "w2"))),
    "mixtral module": (PLAIN, fused),
    "qwen2 hub": (SHARED, lambda c, w: hub(c, w, shared="shared_expert")),
    "qwen2 module": (SHARED, lambda c, w: fused(c, w, shared="shared_expert")),
    "deepseek hub": (SIGMOID, hub),
    "deepseek module": (SIGMOID, fused),
    "nemotron hub": (UNGATED, lambda c, w: hub(c, w, "mixer.")),
    "nemotron module": (UNGATED, fused),
    "gpt-oss": (GPT_OSS, lambda c, w: fused(c, w, "input_first", "interleaved", "router")),
    "llama4": (LLAMA4, lambda c, w: fused(c, w, "input_first", "stacked", "router", "shared_expert")),
    "plain 2I == H": (AMBIGUOUS[0], fused),
    "gpt-oss 2I == H": (AMBIGUOUS[1], lambda c, w: fused(c, w, "input_first", "interleaved", "router")),
    "llama4 2I == H": (AMBIGUOUS[2], lambda c, w: fused(c, w, "input_first", "stacked", "router", "shared_expert")),
    "gpt-oss one by one": (GPT_OSS, lambda c, w: hub(c, w, router="router")),
}


@pytest.mark.parametrize("prefix", ["", "model.layers.3."])
@pytest.mark.parametrize("case", CASES)
def test_spellings(case, prefix):
    config, spell = CASES[case]
    w = canonical(config)
    names = spell(config, w)
    others = {"model.layers.30.mlp.gate.weight": None, "model.embed_tokens.weight": None} if prefix else {}
    given = {prefix + name: array for name, array in names.items()} | others
    source = resolve(config, given, prefix)
    check(source, w, config)
    check(resolve(config, given, prefix.rstrip(".")), w, config)
    arrays = list(names.values())
    for view in source.expert(1).values():
        assert any(np.shares_memory(view.data, array) for array in arrays)


@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe", "feed_forward", "mixer"])
def test_prefix_may_include_the_block(block):
    w = canonical(PLAIN)
    check(resolve(PLAIN, hub(PLAIN, w, f"a.{block}."), f"a.{block}."), w, PLAIN)


@pytest.mark.parametrize("config", AMBIGUOUS)
@pytest.mark.parametrize("layout", ["output_first", "input_first"])
@pytest.mark.parametrize("gate_up", ["stacked", "interleaved"])
def test_layout_overrides(config, layout, gate_up):
    w = canonical(config)
    check(resolve(config, fused(config, w, layout, gate_up), layout=layout, gate_up=gate_up), w, config)


def test_canonical_fused_names_are_output_first_whatever_the_model():
    w = canonical(GPT_OSS)
    given = {name: array for name, array in w.items() if "gate" not in name and "up" not in name}
    for kind, axis in (("weight", 1), ("bias", 1)):
        given[f"experts.gate_up.{kind}"] = np.concatenate([w[f"experts.gate.{kind}"], w[f"experts.up.{kind}"]], axis)
    check(resolve(GPT_OSS, given), w, GPT_OSS)
    one_by_one = {k: v for k, v in given.items() if "gate_up" not in k}
    for e in range(4):
        one_by_one |= {f"experts.{e}.gate_up_proj.{kind}": given[f"experts.gate_up.{kind}"][e] for kind in ("weight", "bias")}
    check(resolve(GPT_OSS, one_by_one), w, GPT_OSS)


def test_any_float_dtype():
    w = canonical(PLAIN)
    mixed = w | {"experts.up.weight": w["experts.up.weight"].astype(BF16), "router.weight": w["router.weight"].astype(np.float64)}
    source = resolve(PLAIN, mixed)
    assert source.expert(0)["up"].dtype == "bfloat16"
    assert source.router()["weight"].dtype == "float64"


def drop(names, key):
    return {k: v for k, v in names.items() if k != key}


W = canonical(PLAIN)
HUB = hub(PLAIN, W)
PARAMETERS = fused(PLAIN, W)


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        (PLAIN, drop(W, "router.weight"), ["router.weight", "missing", "gate.weight"]),
        (PLAIN, drop(W, "experts.up.weight"), ["experts.up.weight", "missing", "experts.gate_up_proj", "experts.<e>.w3.weight"]),
        (PLAIN, drop(HUB, "mlp.experts.3.up_proj.weight"), ["mlp.experts.3.up_proj.weight", "missing", "experts=4"]),
        (PLAIN, HUB | {"mlp.experts.4.up_proj.weight": HUB["mlp.experts.3.up_proj.weight"]}, ["experts.4.up_proj", "experts=4"]),
        (PLAIN, W | {"experts.down.weight": W["experts.down.weight"][:3]}, ["experts.down.weight", "(3, 6, 5)", "(4, 6, 5)"]),
        (PLAIN, W | {"router.weight": W["router.weight"].T}, ["router.weight", "(6, 4)", "(4, 6)"]),
        (PLAIN, W | {"router.weight": np.ones((4, 6), np.int8)}, ["router.weight", "int8", "float32"]),
        (PLAIN, W | {"router.weight": np.ones((4, 6), complex)}, ["router.weight", "complex128"]),
        (PLAIN, W | {"router.weight": [[0.0] * 6] * 4}, ["router.weight", "list"]),
        (PLAIN, W | {"router.weight": None}, ["router.weight", "NoneType"]),
        (PLAIN, W | {"router.bias": np.zeros(4)}, ["router.bias", "router_bias=True"]),
        (PLAIN, W | {"mlp.gate.e_score_correction_bias": np.zeros(4)}, ["e_score_correction_bias", "correction_bias=True"]),
        (PLAIN, W | {"experts.up.bias": np.zeros((4, 5))}, ["experts.up.bias", "expert_bias=True"]),
        (PLAIN, W | {"shared_experts.up_proj.weight": np.zeros((5, 6))}, ["shared_experts.up_proj", "shared_intermediate"]),
        (SIGMOID, canonical(SIGMOID) | {"shared_expert_gate.weight": np.zeros((1, 6))}, ["shared_expert_gate", "shared_gate=True"]),
        (UNGATED, canonical(SIGMOID), ["experts.gate.weight", "relu2", "swiglu"]),
        (PLAIN, W | {"something.else": 1, "another": 2}, ["something.else", "another"]),
        (PLAIN, W | {"mlp.experts.gate_up_proj_blocks": 1}, ["gate_up_proj_blocks", "dequantize"]),
        (PLAIN, {f"model.layers.{i}.{k}": v for i in range(5) for k, v in HUB.items()}, ["prefix='model.layers.0.mlp.'"]),
        (PLAIN, W | {"mlp.gate.weight": W["router.weight"]}, ["router.weight", "mlp.gate.weight", "both"]),
        (PLAIN, W | PARAMETERS, ["both"]),
        (PLAIN, drop(PARAMETERS, "x") | {"experts.gate.weight": W["experts.gate.weight"]}, ["more than one form"]),
        (PLAIN, W | {"experts.0.up.weight": W["experts.up.weight"][0]}, ["more than one form", "experts.0.up.weight"]),
        (PLAIN, PARAMETERS | {"experts.down_proj": W["experts.down.weight"].swapaxes(1, 2)}, ["experts.down_proj", "input_first"]),
        (PLAIN, W | {3: 1}, ["3", "string"]),
        (PLAIN, {}, ["no weights"]),
        (PLAIN, 7, ["int", "mapping"]),
        (PLAIN, "no/such/file.safetensors", ["no/such/file.safetensors"]),
        (PLAIN, "weights.bin", ["weights.bin", "safetensors"]),
        (PLAIN, W | {"experts." + "9" * 5000 + ".up.weight": 1}, ["unknown"]),
    ],
)
def test_refusals(config, weights, words):
    with pytest.raises(WeightsError) as caught:
        resolve(config, weights)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_prefix_refusals():
    layer = {f"model.layers.0.{k}": v for k, v in HUB.items()}
    with pytest.raises(WeightsError, match=r"prefix='model\.layers\.0\.mlp\.'"):
        resolve(PLAIN, layer, "model.layers.1.mlp.")
    with pytest.raises(WeightsError, match=r"self_attn.*prefix='model\.layers\.0\.mlp\.'"):
        resolve(PLAIN, layer | {"model.layers.0.self_attn.q_proj.weight": 0}, "model.layers.0.")
    with pytest.raises(WeightsError, match="prefix=3"):
        resolve(PLAIN, layer, 3)
    with pytest.raises(WeightsError, match="layout='sideways'"):
        resolve(PLAIN, W, layout="sideways")
    with pytest.raises(WeightsError, match="gate_up='x'"):
        resolve(PLAIN, W, gate_up="x")
    with pytest.raises(WeightsError, match="expert 4"):
        resolve(PLAIN, W).expert(4)


# ---------------------------------------------------------------- few bits


def low_bit(**fields):
    return MoEConfig(3, 2, 16, 8, weight_group=32, shared_intermediate=24, **fields)


INT4 = low_bit(weight_dtype="int4", weight_zero_point=True)
INT8 = low_bit(weight_dtype="int8", scale_dtype="float32")
MXFP4 = MoEConfig(
    3, 2, 48, 20, weight_dtype="mxfp4", activation="swiglu_clamped", gating="topk_softmax", router_bias=True, expert_bias=True
)
MATRICES = ("gate", "up", "down")


def quantized(config):
    """(matrices of each expert, of the shared expert, the other weights of `canonical`)."""
    w = canonical(config)
    experts = [{m: codes(w[f"experts.{m}.weight"][e], config) for m in MATRICES} for e in range(config.experts)]
    shared = {m: codes(w[f"shared.{m}.weight"], config) for m in MATRICES} if config.shared_intermediate else {}
    return experts, shared, {name: a for name, a in w.items() if name.startswith("router") or name.endswith("bias")}


def codes(matrix, config):
    q = quantize(matrix, config)
    return q if q.zeros is None else dataclasses.replace(q, zeros=np.maximum(q.zeros, -7))  # GPTQ cannot store the lowest


def named(arrays, module):
    return {f"{module}.{part}": array for part, array in arrays.items()}


def spelled(config, arrays_of, names=("gate_proj", "up_proj", "down_proj"), shared="shared_expert"):
    """A checkpoint: every matrix as `arrays_of` has it, under the hub's names."""
    experts, of_shared, others = quantized(config)
    out = {f"mlp.{name.replace('router', 'gate')}": array for name, array in others.items()}
    for matrix, name in zip(MATRICES, names, strict=True):
        for e, expert in enumerate(experts):
            out |= named(arrays_of(expert[matrix]), f"mlp.experts.{e}.{name}")
        if of_shared:
            out |= named(arrays_of(of_shared[matrix]), f"mlp.{shared}.{matrix}_proj")
    return out


def blocks(config):
    """As gpt-oss has them: all experts in one array, gate and up rows interleaved."""
    experts, _, others = quantized(config)
    out = {name: a for name, a in others.items() if name.startswith("router")}
    both = [
        pack.mxfp4(Quantized(*(interleave(getattr(e["gate"], a), getattr(e["up"], a), -2) for a in ("codes", "scales"))))
        for e in experts
    ]
    for name, matrices in (("gate_up_proj", both), ("down_proj", [pack.mxfp4(e["down"]) for e in experts])):
        out |= {f"experts.{name}_{part}": np.stack([m[part] for m in matrices]) for part in ("blocks", "scales")}
    out["experts.gate_up_proj_bias"] = interleave(others["experts.gate.bias"], others["experts.up.bias"], -1)
    return out | {"experts.down_proj_bias": others["experts.down.bias"]}


def fused_packed(config):
    """One compressed-tensors matrix for gate and up of each expert, gate rows first."""
    experts, _, _ = quantized(config)
    w = spelled(config, lambda q: pack.pack_quantized(q, 8))
    w = {name: a for name, a in w.items() if "shared" in name or not re.search("(gate|up)_proj", name)}
    for e, expert in enumerate(experts):
        parts = (np.concatenate([getattr(expert[m], a) for m in ("gate", "up")]) for a in ("codes", "scales"))
        w |= named(pack.pack_quantized(Quantized(*parts), 8), f"mlp.experts.{e}.gate_up_proj")
    return w


LOW_BIT = {
    "gptq": (INT4, lambda c: spelled(c, lambda q: pack.gptq(q, 4, 32), ("w1", "w3", "w2"))),
    "awq": (INT4, lambda c: spelled(c, pack.awq)),
    "pack-quantized": (INT8, lambda c: spelled(c, lambda q: pack.pack_quantized(q, 8), shared="shared_experts")),
    "int-quantized": (INT8, lambda c: spelled(c, pack.int_quantized)),
    "gate and up in one": (INT8, fused_packed),
    "gpt-oss": (MXFP4, blocks),
    "canonical": (
        INT8,
        lambda c: (
            quantized(c)[2]
            | {f"experts.{e}.{m}.weight": expert[m] for e, expert in enumerate(quantized(c)[0]) for m in MATRICES}
            | {f"shared.{m}.weight": q for m, q in quantized(c)[1].items()}
        ),
    ),
}


@pytest.mark.parametrize("case", LOW_BIT)
def test_few_bits(case):
    config, spell = LOW_BIT[case]
    experts, shared, others = quantized(config)
    source = resolve(config, {f"layers.1.{name}": array for name, array in spell(config).items()}, "layers.1")
    values = source.to_float32()
    assert values.keys() == weight_shapes(config).keys()
    for e, expert in enumerate(experts):
        views = source.expert(e)
        for matrix, q in expert.items():
            same_codes(views[matrix], q)
            assert np.array_equal(values[f"experts.{matrix}.weight"][e], dequantize(q, config, np.float32))
        if config.expert_bias:
            assert np.array_equal(views["up_bias"].data, others["experts.up.bias"][e])
    for matrix, q in shared.items():
        same_codes(source.shared()[matrix], q)
        assert np.array_equal(values[f"shared.{matrix}.weight"], dequantize(q, config, np.float32))
    assert np.array_equal(values["router.weight"], others["router.weight"])
    assert np.array_equal(source.router()["weight"].data, others["router.weight"])


def same_codes(got, expected):
    assert isinstance(got, Quantized)
    assert np.array_equal(got.codes, expected.codes)
    assert np.array_equal(got.scales, expected.scales)
    assert (got.zeros is None) == (expected.zeros is None)
    assert got.zeros is None or np.array_equal(got.zeros, expected.zeros)


@pytest.mark.parametrize("config", [INT4, INT8, MXFP4], ids=lambda c: c.weight_dtype)
def test_floats_for_a_layer_in_few_bits(config):
    w = canonical(config)
    for spelling in (w, hub(config, w, router="router")):
        source = resolve(config, spelling)
        assert source.expert(1)["up"].dtype == "float32"
        values, expected = source.to_float32(), dequantized(config, w)
        assert all(np.array_equal(values[name], expected[name].astype(np.float32)) for name in expected)


def test_float_experts_beside_a_quantized_shared_expert():
    w = canonical(INT8)
    mixed = {name: a for name, a in spelled(INT8, pack.int_quantized).items() if "experts." not in name}
    source = resolve(INT8, mixed | {f"experts.{m}.weight": w[f"experts.{m}.weight"] for m in MATRICES})
    assert source.expert(0)["gate"].dtype == "float32"
    assert isinstance(source.shared()["gate"], Quantized)


def test_gate_and_up_in_one_quantized_matrix():
    experts, _, others = quantized(MXFP4)
    both = [Quantized(*(np.concatenate([getattr(e[m], a) for m in ("gate", "up")]) for a in ("codes", "scales"))) for e in experts]
    w = others | {f"experts.{e}.gate_up.weight": q for e, q in enumerate(both)}
    w |= {f"experts.{e}.down.weight": expert["down"] for e, expert in enumerate(experts)}
    for gate_up in (None, "interleaved"):
        first = resolve(MXFP4, w, gate_up=gate_up).expert(1)["gate"]
        same_codes(first, experts[1]["gate"] if gate_up is None else both[1].rows(slice(0, None, 2)))


def test_memory_stays_near_one_expert():
    config = MoEConfig(32, 2, 512, 512, weight_dtype="mxfp4", activation="swiglu_clamped", expert_bias=True)
    shapes = {"gate_up_proj": (32, 1024, 16), "down_proj": (32, 512, 16)}
    w = {"router.weight": np.zeros((32, 512), np.float32)}
    for name, shape in shapes.items():
        w |= {f"experts.{name}_blocks": np.zeros((*shape, 16), np.uint8), f"experts.{name}_scales": np.zeros(shape, np.uint8)}
        w[f"experts.{name}_bias"] = np.zeros(shape[:2], np.float32)
    tracemalloc.start()
    try:
        source = resolve(config, w)
        for e in (0, 31):
            source.expert(e)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * 3 * 512 * 512


def test_zero_biases_of_autogptq_are_left_out():
    w = LOW_BIT["gptq"][1](INT4)
    zeros = {f"mlp.experts.{e}.w1.bias": np.zeros(8, np.float16) for e in range(3)} | {
        "mlp.shared_expert.up_proj.bias": np.zeros(24)
    }
    assert resolve(INT4, w | zeros).to_float32().keys() == weight_shapes(INT4).keys()
    with pytest.raises(WeightsError, match=r"experts\.2\.w1\.bias.*expert_bias"):
        resolve(INT4, w | {"mlp.experts.2.w1.bias": np.ones(8)})


def test_the_version_of_gptq(tmp_path):
    w = spelled(INT4, lambda q: pack.gptq(q, 4, 32, "gptq_v2"))
    expected = dequantize(quantized(INT4)[0][2]["down"], INT4)
    assert np.array_equal(resolve(INT4, w, checkpoint_format="gptq_v2").to_float32()["experts.down.weight"][2], expected)
    save(tmp_path / "model.safetensors", w)
    assert not np.array_equal(resolve(INT4, tmp_path).to_float32()["experts.down.weight"][2], expected)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"checkpoint_format": "gptq_v2"}}))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert np.array_equal(resolve(INT4, path).to_float32()["experts.down.weight"][2], expected)


GPTQ, OF_BLOCKS, OF_INT8 = (LOW_BIT[name][1](LOW_BIT[name][0]) for name in ("gptq", "gpt-oss", "int-quantized"))
ONE = quantized(INT8)[0][0]["up"]


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        (
            dataclasses.replace(INT4, weight_dtype="same", weight_group=0, weight_zero_point=False),
            GPTQ,
            ["weight_dtype", "from_hf", "dequantize"],
        ),
        (
            PLAIN,
            {f"experts.{e}.up.weight": ONE for e in range(4)} | drop(W, "experts.up.weight"),
            ["experts.0.up", "weight_dtype='same'"],
        ),
        (dataclasses.replace(INT4, intermediate=40), GPTQ, ["w1", "qweight has shape (2, 8)", "(2, 40)", "(16, 5)"]),
        (INT4, drop(GPTQ, "mlp.experts.1.w3.scales"), ["mlp.experts.1.w3", "scales is missing"]),
        (INT4, {k: v for k, v in GPTQ.items() if "experts.1.w3" not in k}, ["experts.1.w3.qweight", "missing"]),
        (INT4, {k: v for k, v in GPTQ.items() if "w3" not in k}, ["experts.up.weight", "missing", "codes and scales"]),
        (INT4, GPTQ | {"mlp.experts.0.w1.weight": W["experts.up.weight"][0]}, ["experts.0.w1", "weight does not belong to GPTQ"]),
        (INT4, GPTQ | {"mlp.experts.0.gate_proj.qweight": 0}, ["w1.qweight", "gate_proj.qweight", "both"]),
        (INT4, drop(GPTQ, "mlp.gate.weight") | {"mlp.gate.qweight": 0}, ["mlp.gate.qweight", "projections", "dequantize"]),
        (INT4, GPTQ | {"mlp.gate.weight_scale_inv": 0}, ["weight_scale_inv", "not understood", "dequantize"]),
        (INT4, {k.replace("experts.0.", "experts.7."): v for k, v in GPTQ.items()}, ["experts.7.w1", "experts=3"]),
        (INT8, OF_INT8 | {"experts.up.qweight": 0, "experts.up.scales": 0}, ["more than one form"]),
        (
            INT8,
            {k: v for k, v in OF_INT8.items() if "experts" not in k} | {"experts.gate.qweight": 0},
            ["experts.gate.qweight", "each expert"],
        ),
        (INT8, OF_INT8 | {"mlp.experts.0.up_proj.weight_packed": 0}, ["weight_packed"]),
        (INT8, OF_INT8 | {"mlp.experts.0.up_proj.weight": ONE}, ["Quantized", "weight_scale"]),
        (
            MXFP4,
            OF_BLOCKS | {"experts.down_proj_blocks": OF_BLOCKS["experts.down_proj_blocks"][:2]},
            ["down_proj_blocks", "experts=3"],
        ),
        (
            MXFP4,
            OF_BLOCKS | {"experts.down_proj_scales": OF_BLOCKS["experts.down_proj_scales"][:, :-1]},
            ["down_proj", "scales", "(47, 1)"],
        ),
        (MXFP4, OF_BLOCKS | {"experts.down_proj": np.zeros((3, 48, 20))}, ["down_proj", "weight does not belong to MXFP4"]),
        (dataclasses.replace(MXFP4, weight_dtype="int4"), OF_BLOCKS, ["weight_dtype='mxfp4'", "weight_dtype='int4'"]),
    ],
)
def test_refusals_of_few_bits(config, weights, words):
    with pytest.raises(WeightsError) as caught:
        resolve(config, weights).to_float32()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_cannot_be_turned():
    with pytest.raises(WeightsError, match="layout='input_first'"):
        resolve(INT4, GPTQ, layout="input_first")


# ---------------------------------------------------------------- safetensors


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16, np.float64])
def test_safetensors(tmp_path, dtype):
    w = {name: array.astype(dtype) for name, array in W.items()}
    save(tmp_path / "model.safetensors", {f"layers.1.{k}": v for k, v in hub(PLAIN, w).items()} | {"step": np.zeros((), np.int64)})
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        source = resolve(PLAIN, path, "layers.1.")
        check(source, {name: array.astype(np.float32) for name, array in w.items()}, PLAIN)
        assert not source.expert(0)["up"].data.flags.owndata


def test_the_real_writer(tmp_path):
    numpy_writer = pytest.importorskip("safetensors.numpy")
    numpy_writer.save_file(W | {"e": np.zeros((0, 3), np.float32)}, tmp_path / "a.safetensors", {"format": "pt"})
    tensors = open_safetensors(tmp_path)
    assert tensors.keys() == W.keys() | {"e"}
    assert tensors["e"].shape == (0, 3)
    check(resolve(PLAIN, {k: tensors[k] for k in W}), W, PLAIN)


def test_shards(tmp_path):
    names = {f"layers.0.{k}": v for k, v in HUB.items()}
    parts = [dict(list(names.items())[::2]), dict(list(names.items())[1::2])]
    for i, part in enumerate(parts):
        save(tmp_path / f"{i}.safetensors", part)
    weight_map = {k: f"{i}.safetensors" for i, part in enumerate(parts) for k in part} | {"elsewhere": "absent.safetensors"}
    index = tmp_path / INDEX_NAME
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, index):
        check(resolve(PLAIN, path, "layers.0."), W, PLAIN)
    with pytest.raises(WeightsError, match=r"absent\.safetensors"):
        open_safetensors(tmp_path)["elsewhere"]
    index.write_text(json.dumps({"weight_map": weight_map | {"layers.0.mlp.gate.weight": "1.safetensors"}}))
    with pytest.raises(WeightsError, match=r"gate\.weight.*not there"):
        resolve(PLAIN, tmp_path, "layers.0.")
    for bad in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(bad)
        with pytest.raises(WeightsError, match="index"):
            open_safetensors(tmp_path)
    index.unlink()
    with pytest.raises(WeightsError, match="2 other"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "8"),
        (b"\0" * 7, "8"),
        (struct.pack("<Q", 1 << 63), "limit"),
        (struct.pack("<Q", 50) + b"{}", "only 2 bytes"),
        (raw(b"{"), "JSON"),
        (raw(b"\xff"), "JSON"),
        (raw(b"[]"), "object"),
        (raw(b"[" * 200_000), "JSON"),
        (raw(b'{"a": 1, "a": 2}'), "twice"),
        (raw({"a": 3}), "lacks"),
        (raw({"a": {"dtype": "F32"}}), "lacks"),
        (raw({"a": entry(0, 8)}) + b"\0" * 4, "8"),
        (raw({"a": entry(0, 8), "b": entry(4, 12)}) + b"\0" * 12, "overlaps"),
        (raw({"a": entry(0, 8), "b": entry(12, 16)}) + b"\0" * 16, "gap"),
        (raw({"a": entry(0, 8)}) + b"\0" * 12, "belong to none"),
        (raw({"a": entry(8, 4, shape=[1])}) + b"\0" * 8, "offsets"),
        (raw({"a": entry(0, 8, shape=[3])}) + b"\0" * 8, "cannot take"),
        (raw({"a": entry(0, 8, shape=[-2])}) + b"\0" * 8, "shape"),
        (raw({"a": entry(0, 8, shape="2")}) + b"\0" * 8, "shape"),
        (raw({"a": entry(0, 8, shape=[2.0])}) + b"\0" * 8, "shape"),
        (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}) + b"\0" * 8, "data_offsets"),
        (raw({"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}}) + b"\0" * 8, "dtype"),
        (raw({"a": entry(0, 8, "F8_E4M3", [8])}) + b"\0" * 8, "F8_E4M3"),
        (raw({"a": entry(0, 0, shape=[0, 10**30])}), "impossible shape"),
        (raw({"a": entry(0, 4, shape=[1] * 100)}) + b"\0" * 4, "impossible shape"),
    ],
)
def test_malformed_files(tmp_path, content, word):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=word) as caught:
        SafetensorsFile(path)["a"]
    assert "bad.safetensors" in str(caught.value)


@given(st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_one_wrong_byte_never_crashes(tmp_path_factory, position, value):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzzed.safetensors"
    save(path, W)
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    with contextlib.suppress(WeightsError):
        resolve(PLAIN, path).to_float32()
