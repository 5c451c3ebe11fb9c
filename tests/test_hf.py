"""Hugging Face configurations: defaults, router semantics, and refusals that name the field."""

from __future__ import annotations

import json

import pytest

from moegen.config import MoEConfig
from moegen.errors import ConfigError
from moegen.hf import MODEL_TYPES, fields_from_hf

MINIMAL = {
    name: {"model_type": name, "num_experts_per_tok": 2} | ({"text_config": {}} if name == "llama4" else {}) for name in MODEL_TYPES
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_defaults_make_a_valid_config(model_type):
    config = MoEConfig.from_hf(MINIMAL[model_type])
    assert config.dtype == "float32"
    assert MoEConfig.from_dict(config.to_dict()) == config


def test_mixtral():
    raw = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, "torch_dtype": "bfloat16"}
    config = MoEConfig.from_hf({**raw, "router_jitter_noise": 0.1, "router_aux_loss_coef": 0.5, "vocab_size": "anything"})
    assert config == MoEConfig(4, 2, 64, 96, "bfloat16")


def test_qwen2_moe_has_a_gated_shared_expert():
    config = MoEConfig.from_hf({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48, "norm_topk_prob": True})
    assert (config.shared_intermediate, config.shared_gate, config.renormalize) == (48, True, True)


def test_deepseek_v2_groups_only_with_the_group_limited_method():
    raw = {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    assert MoEConfig.from_hf(raw).n_group == 1
    config = MoEConfig.from_hf({**raw, "topk_method": "group_limited_greedy", "scoring_func": "softmax", "norm_topk_prob": False})
    assert (config.n_group, config.topk_group, config.group_score, config.routed_scaling) == (8, 3, "max", 16.0)
    assert (config.gating, config.renormalize, config.shared_intermediate) == ("softmax", False, 2 * 1407)


def test_deepseek_v3():
    config = MoEConfig.from_hf({"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    assert (config.experts, config.top_k, config.hidden, config.intermediate) == (256, 8, 7168, 2048)
    assert (config.gating, config.correction_bias, config.group_score) == ("sigmoid", True, "top2_sum")
    assert (config.n_group, config.topk_group, config.routed_scaling, config.shared_intermediate) == (8, 4, 2.5, 2048)


def test_gpt_oss():
    config = MoEConfig.from_hf({"model_type": "gpt_oss", "swiglu_limit": 5})
    assert (config.activation, config.swiglu_limit, config.swiglu_alpha) == ("swiglu_clamped", 5.0, 1.702)
    assert (config.gating, config.router_bias, config.expert_bias) == ("topk_softmax", True, True)


def test_llama4_reads_its_text_config():
    text = {"model_type": "llama4_text", "hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4}
    config = MoEConfig.from_hf({"model_type": "llama4", "dtype": "float16", "hidden_size": 1, "text_config": text})
    assert config == MoEConfig.from_hf({**text, "dtype": "float16"})
    assert (config.weight_on_input, config.gating, config.shared_intermediate, config.top_k) == (True, "sigmoid", 48, 1)
    with pytest.raises(ConfigError, match="text_config"):
        MoEConfig.from_hf({"model_type": "llama4", "hidden_size": 32})


def test_nemotron_h():
    config = MoEConfig.from_hf({"model_type": "nemotron_h", "moe_shared_expert_intermediate_size": 24, "n_groups": 8})
    assert (config.activation, config.gated, config.shared_intermediate, config.n_group) == ("relu2", False, 24, 1)
    # NemotronHMLP writes `intermediate_size or config.intermediate_size`.
    fallen_back = {"model_type": "nemotron_h", "moe_shared_expert_intermediate_size": 0, "intermediate_size": 40}
    assert MoEConfig.from_hf(fallen_back).shared_intermediate == 40


@pytest.mark.parametrize(
    ("act", "activation"),
    [("silu", "swiglu"), ("gelu", "geglu"), ("gelu_pytorch_tanh", "geglu_tanh"), ("relu", "reglu"), ("swish", "swiglu")],
)
def test_gated_activations(act, activation):
    assert MoEConfig.from_hf({"model_type": "mixtral", "hidden_act": act}).activation == activation


INT4 = {"weight_dtype": "int4", "weight_group": 128, "weight_zero_point": False, "scale_dtype": "float16"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(weights, activations=None, **more):
    group = {"weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], **group}}, **more}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, {"weight_dtype": "mxfp4", "weight_group": 32}),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "dynamic": {"-:.*gate": {}}}, INT4),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "pack_dtype": "int32"}, INT4),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False},
            INT4 | {"weight_group": 64, "weight_zero_point": True},
        ),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": True},  # one group has no order
            INT4 | {"weight_dtype": "int8", "weight_group": 0},
        ),
        ({"quant_method": "awq"}, INT4 | {"weight_zero_point": True}),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM"},
            INT4 | {"weight_group": 32, "weight_zero_point": True},
        ),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False}, INT4 | {"weight_group": 64}),
        (compressed({"strategy": "group", "group_size": 128}, format="pack-quantized"), INT4 | {"scale_dtype": "bfloat16"}),
        (
            compressed({"group_size": 32, "symmetric": False, "actorder": "static"}, ignore=["lm_head", "re:.*mlp.gate$"]),
            INT4 | {"scale_dtype": "bfloat16", "weight_group": 32, "weight_zero_point": True},
        ),
        (
            compressed({"num_bits": 8, "strategy": "channel"}, TOKENS, format="int-quantized", sparsity_config={}),
            {"weight_dtype": "int8", "weight_group": 0, "scale_dtype": "bfloat16", "activation_dtype": "int8"},
        ),
    ],
)
def test_low_bit_checkpoints(quantization, expected):
    plain = {"model_type": "mixtral", "dtype": "bfloat16"}
    config = MoEConfig.from_hf(plain | {"quantization_config": quantization})
    assert config == MoEConfig(**(fields_from_hf(plain) | expected))
    assert config.low_bit
    assert MoEConfig.from_hf(plain | {"quantization_config": None}).weight_dtype == "same"


def test_low_bit_of_an_inner_configuration():
    inner = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    for raw in ({"text_config": inner}, {"text_config": {}, **inner}):
        assert MoEConfig.from_hf({"model_type": "llama4", **raw}).weight_dtype == "int4"


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            ["quant_method='fp8'", "compressed-tensors", "weight_dtype='int8'"],
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes", "dequantize"]),
        ({}, ["quant_method=None"]),
        ({"quant_method": ["gptq"]}, ["quant_method=['gptq']"]),
        ("gptq", ["quantization_config='gptq'", "object"]),
        ({"quant_method": "gptq"}, ["'bits'", "required"]),
        (GPTQ | {"bits": 3}, ["bits=3", "4, 8"]),
        (GPTQ | {"bits": "4"}, ["bits='4'"]),
        (GPTQ | {"group_size": 1024}, ["group_size=1024", "32, 64, 128"]),
        (GPTQ | {"group_size": -1}, ["group_size -1", "4 bits"]),
        (GPTQ | {"desc_act": True}, ["desc_act=True", "act-order"]),
        (GPTQ | {"checkpoint_format": "marlin"}, ["checkpoint_format='marlin'", "gptq_v2"]),
        (GPTQ | {"format": "bitblas"}, ["format='bitblas'"]),
        (GPTQ | {"is_marlin_format": True}, ["is_marlin_format=True"]),
        (GPTQ | {"pack_dtype": "int16"}, ["pack_dtype='int16'"]),
        (GPTQ | {"dynamic": {"+:.*down_proj": {"bits": 8}}}, ["dynamic", "one form"]),
        (GPTQ | {"dynamic": 3}, ["dynamic=3"]),
        ({"quant_method": "awq", "bits": 8}, ["bits=8", "4"]),
        ({"quant_method": "awq", "version": "gemv"}, ["version='gemv'", "gemm"]),
        ({"quant_method": "awq", "backend": "llm-awq"}, ["backend='llm-awq'"]),
        (compressed({"type": "float", "num_bits": 8}), ["config_groups.group_0.weights", "type='float'"]),
        (compressed({"group_size": 128, "actorder": "group"}), ["actorder='group'"]),
        (compressed({"strategy": "channel"}), ["4 bits"]),
        (compressed({}), ["strategy='tensor'", "channel"]),
        (compressed({"strategy": "group", "group_size": None}), ["'group_size'", "required"]),
        (compressed({"strategy": "block", "num_bits": 8}), ["strategy='block'"]),
        (compressed({"num_bits": 8, "strategy": "channel"}, TOKENS | {"dynamic": False}), ["dynamic=False", "each token"]),
        (compressed({"num_bits": 8, "strategy": "channel"}, TOKENS | {"type": "float"}), ["input_activations", "type='float'"]),
        (compressed({"num_bits": 8, "strategy": "channel"}, [1]), ["input_activations=[1]"]),
        (compressed({"group_size": 128}, TOKENS), ["num_bits=4", "8"]),
        (compressed({"group_size": 128}, format="marlin-24"), ["format='marlin-24'", "pack-quantized"]),
        (compressed({"group_size": 128}, quantization_status="frozen"), ["quantization_status='frozen'"]),
        (compressed({"group_size": 128}, sparsity_config={"format": "sparse-24-bitmask"}), ["sparsity_config"]),
        (compressed({"group_size": 128}, ignore=["re:.*mlp.experts.0.*"]), ["ignore", "experts"]),
        (compressed({"group_size": 128}, config_groups={}), ["config_groups"]),
        (compressed({"group_size": 128}, config_groups={"a": None}), ["config_groups.a", "weights=None"]),
        (
            {"quant_method": "compressed-tensors"}
            | {
                "config_groups": {
                    bits: compressed({"num_bits": bits, "group_size": 64})["config_groups"]["group_0"] for bits in (4, 8)
                }
            },
            ["config_groups", "one form"],
        ),
    ],
)
def test_low_bit_refusals_name_the_field(quantization, words):
    with pytest.raises(ConfigError) as caught:
        MoEConfig.from_hf({"model_type": "mixtral", "quantization_config": quantization})
    assert all(word in str(caught.value) for word in ["mixtral", "quantization_config", *words]), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["num_local_experts", "num_experts"])
def test_aliases(name):
    assert fields_from_hf({"model_type": "qwen3_moe", name: 16})["experts"] == 16
    assert fields_from_hf({"model_type": "olmoe", name: 16})["experts"] == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, ["model_type='bert'", "mixtral", "nemotron_h"]),
        ({"model_type": None}, ["model_type", "mixtral"]),
        ({"model_type": ["mixtral"]}, ["model_type"]),
        ({"hidden_act": "quick_gelu"}, ["hidden_act='quick_gelu'", "silu"]),
        ({"hidden_act": None}, ["hidden_act=None"]),
        ({"hidden_act": ["silu"]}, ["hidden_act"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8", "bfloat16"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype='float8_e4m3fn'", "bfloat16"]),
        ({"torch_dtype": "float64"}, ["torch_dtype='float64'"]),
        ({"hidden_size": "64"}, ["hidden_size='64'", "whole number"]),
        ({"hidden_size": None}, ["hidden_size=None"]),
        ({"num_local_experts": True}, ["num_local_experts=True"]),
        ({"num_local_experts": 4, "num_experts": 8}, ["num_local_experts=4", "num_experts=8"]),
        ({"model_type": "qwen3_moe", "norm_topk_prob": "yes"}, ["norm_topk_prob='yes'"]),
        ({"model_type": "deepseek_v2"}, ["num_experts_per_tok", "required"]),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": None}, ["num_experts_per_tok", "required"]),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, ["topk_method='noaux_tc'", "greedy"]),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "group_limited_greedy"}, ["n_group", "required"]),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, ["norm_topk_prob=True", "False"]),
        ({"model_type": "deepseek_v2", "mlp_bias": True}, ["mlp_bias=True"]),
        ({"model_type": "deepseek_v3", "topk_method": "greedy"}, ["topk_method='greedy'", "noaux_tc"]),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, ["scoring_func='softmax'", "sigmoid"]),
        ({"model_type": "deepseek_v3", "n_group": None}, ["n_group=None"]),
        ({"model_type": "deepseek_v3", "routed_scaling_factor": "2"}, ["routed_scaling_factor='2'"]),
        ({"model_type": "nemotron_h", "moe_latent_size": 16}, ["moe_latent_size=16", "null"]),
        ({"model_type": "nemotron_h", "mlp_hidden_act": "sigmoid"}, ["mlp_hidden_act='sigmoid'", "relu2"]),
        ({"model_type": "nemotron_h", "mlp_bias": True}, ["mlp_bias=True"]),
        ({"model_type": "nemotron_h", "n_shared_experts": 2}, ["n_shared_experts=2"]),
        ({"model_type": "gpt_oss", "hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"model_type": "llama4", "text_config": {"quantization_config": {}}}, ["quantization_config"]),
        ({"model_type": "llama4", "text_config": {}, "quantization_config": {}}, ["quantization_config"]),
    ],
)
def test_refusals_name_the_field(change, words):
    with pytest.raises(ConfigError) as caught:
        MoEConfig.from_hf({"model_type": "mixtral"} | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths(tmp_path):
    expected = MoEConfig.from_hf(MINIMAL["mixtral"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MINIMAL["mixtral"]))
    assert MoEConfig.from_hf(file) == MoEConfig.from_hf(str(tmp_path)) == expected


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 100_000, b'"mixtral"'])
def test_bad_files(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        fields_from_hf(file)


@pytest.mark.parametrize("source", ["no/such/folder", "a\0b", 3, None, ["x"]])
def test_bad_sources(source):
    with pytest.raises(ConfigError):
        fields_from_hf(source)
