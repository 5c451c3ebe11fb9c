"""The reference agrees with transformers' own MoE blocks, from their configuration and their state dict."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from moegen.arrays import as_host_array, like_input, to_float32
from moegen.config import MoEConfig
from moegen.errors import WeightsError
from moegen.hf import MODEL_TYPES
from moegen.reference import moe
from moegen.weights import resolve

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = 24
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 3}
WIDE = {"moe_intermediate_size": 20, "intermediate_size": 24}
DEEPSEEK = {**WIDE, "n_routed_experts": 8, "n_shared_experts": 2, "routed_scaling_factor": 1.7}
GROUPS = {"n_group": 4, "topk_group": 2}

# case -> (model type, block class, configuration)
CASES = {
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", {"num_local_experts": 8, "intermediate_size": 20}),
    "mixtral gelu": ("mixtral", "MixtralSparseMoeBlock", {"intermediate_size": 16, "hidden_act": "gelu"}),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeSparseMoeBlock", {**WIDE, "num_experts": 8, "shared_expert_intermediate_size": 28}),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", {**WIDE, "num_experts": 8, "norm_topk_prob": True}),
    "olmoe": ("olmoe", "OlmoeSparseMoeBlock", {"num_experts": 8, "intermediate_size": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2Moe", DEEPSEEK),
    "deepseek_v2 groups": ("deepseek_v2", "DeepseekV2Moe", {**DEEPSEEK, **GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3MoE", {**DEEPSEEK, **GROUPS}),
    "deepseek_v3 raw": ("deepseek_v3", "DeepseekV3MoE", {**DEEPSEEK, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "gpt_oss": ("gpt_oss", "GptOssMLP", {"num_local_experts": 8, "intermediate_size": 20, "swiglu_limit": 1.5}),
    "gpt_oss 2I == H": ("gpt_oss", "GptOssMLP", {"num_local_experts": 8, "intermediate_size": 16}),
    "llama4_text": ("llama4_text", "Llama4TextMoe", {"num_local_experts": 8, "intermediate_size": 20}),
    "llama4_text 2I == H": ("llama4_text", "Llama4TextMoe", {"num_local_experts": 8, "intermediate_size": 16}),
    "glm4_moe": ("glm4_moe", "Glm4MoeMoE", {**DEEPSEEK, **GROUPS}),
    "nemotron_h": (
        "nemotron_h",
        "NemotronHMoE",
        {**WIDE, "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 28, "routed_scaling_factor": 2.5},
    ),
}


def make_block(case, seed=0, dtype=None):
    """A small MoE block of transformers with random weights.

    Args:
        case: a key of `CASES`, e.g. a model type.

    Returns:
        (configuration, block in evaluation mode, x [TOKENS, H] torch tensor), in `dtype` (float32 when left out).
    """
    model_type, block_name, fields = CASES[case]
    dtype = dtype or torch.float32
    kind = type(transformers.AutoConfig.for_model(model_type))
    config = kind(**{**SIZES, **fields}, dtype=str(dtype).removeprefix("torch."))
    config._experts_implementation = "eager"
    package = model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    block = getattr(module, block_name)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            scale = 0.3 if tensor.ndim == 1 or (tensor.shape[0] == 8 and tensor.ndim == 2) else 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    x = torch.randn(TOKENS, SIZES["hidden_size"], generator=generator)
    # The blocks keep their correction bias in float32, as the models do.
    biases = {name: b.clone() for name, b in block.named_buffers()}
    block = block.to(dtype)
    for name, bias in biases.items():
        block.get_buffer(name).data = bias
    return config, block, x.to(dtype)


def block_output(block, x):
    """The block's output for x [T, H] as float32 NumPy [T, H]."""
    with torch.no_grad():
        out = block(x[None])
    out = out[0] if isinstance(out, tuple) else out
    return to_float32(as_host_array(out.reshape(x.shape), "output"))


def expected(hf_config, weights, x, **resolve_arguments):
    """(configuration, what the reference makes of a state dict and x)."""
    config = MoEConfig.from_hf(hf_config.to_dict())
    w = resolve(config, weights, **resolve_arguments).to_float32()
    return config, moe(config, w, to_float32(as_host_array(x, "x")))[0]


def test_every_model_type_is_covered():
    assert {case[0] for case in CASES.values()} | {"llama4"} == set(MODEL_TYPES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_reference_agrees(case, seed):
    hf_config, block, x = make_block(case, seed)
    _, want = expected(hf_config, block.state_dict(), x)
    got = block_output(block, x)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("model_type", sorted({case[0] for case in CASES.values()}))
def test_class_defaults(model_type):
    """A field left out of the dict means what the configuration class makes of it."""
    given = {"num_experts_per_tok": 2}
    spelled_out = type(transformers.AutoConfig.for_model(model_type))(**given).to_dict()
    assert MoEConfig.from_hf(spelled_out) == MoEConfig.from_hf({"model_type": model_type} | given)


def test_llama4_nests_its_text_config():
    hf_config, _, _ = make_block("llama4_text")
    nested = transformers.Llama4Config(text_config=hf_config.to_dict()).to_dict()
    assert MoEConfig.from_hf(nested) == MoEConfig.from_hf(hf_config.to_dict())


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "llama4_text", "nemotron_h", "qwen2_moe"])
def test_bfloat16_views(case):
    hf_config, block, x = make_block(case, dtype=torch.bfloat16)
    state = block.state_dict()
    source = resolve(MoEConfig.from_hf(hf_config.to_dict()), state)
    assert source.config.dtype == "bfloat16"
    addresses = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in state.values()]
    for view in source.expert(3).values():
        assert view.dtype == "bfloat16"
        assert any(low <= view.data.ctypes.data < high for low, high in addresses)
    want = expected(hf_config, state, x)[1]
    assert np.abs(block_output(block, x) - want).max() < 0.05 * np.abs(want).max()


MLA = dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
MLA["first_k_dense_replace"] = 0


@pytest.mark.parametrize(
    ("architecture", "case", "live_prefix", "saved_prefix", "more"),
    [
        ("MixtralForCausalLM", "mixtral", "model.layers.1.mlp.", "model.layers.1.block_sparse_moe.", {}),
        ("Qwen2MoeForCausalLM", "qwen2_moe", "model.layers.1.mlp.", "model.layers.1.mlp.", {}),
        ("Qwen3MoeForCausalLM", "qwen3_moe", "model.layers.1.mlp.", "model.layers.1.mlp.", {}),
        ("OlmoeForCausalLM", "olmoe", "model.layers.1.mlp.", "model.layers.1.mlp.", {}),
        ("DeepseekV2ForCausalLM", "deepseek_v2", "model.layers.1.mlp.", "model.layers.1.mlp.", MLA),
        ("DeepseekV3ForCausalLM", "deepseek_v3", "model.layers.1.mlp.", "model.layers.1.mlp.", MLA),
        ("GptOssForCausalLM", "gpt_oss", "model.layers.1.mlp.", "model.layers.1.mlp.", {}),
        ("Glm4MoeForCausalLM", "glm4_moe", "model.layers.1.mlp.", "model.layers.1.mlp.", {}),
        ("Llama4ForCausalLM", "llama4_text", "model.layers.1.feed_forward.", "model.layers.1.feed_forward.", {}),
        (
            "NemotronHForCausalLM",
            "nemotron_h",
            "model.layers.1.mixer.",
            "backbone.layers.1.mixer.",
            {"layers_block_type": ["full_attention", "moe"]},
        ),
    ],
)
def test_saved_checkpoints(tmp_path, architecture, case, live_prefix, saved_prefix, more):
    """config.json and shards as save_pretrained writes them, with the hub's names, against the model in memory."""
    model_type, _, fields = CASES[case]
    kind = type(transformers.AutoConfig.for_model(model_type))
    hf_config = kind(**{**SIZES, **fields, "num_hidden_layers": 2, "vocab_size": 16, "head_dim": 8, "pad_token_id": 0, **more})
    model = getattr(transformers, architecture)(hf_config).eval()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    config = MoEConfig.from_hf(tmp_path)
    saved = resolve(config, tmp_path, saved_prefix).to_float32()
    live = resolve(config, model.state_dict(), live_prefix).to_float32()
    assert all(np.array_equal(saved[name], live[name]) for name in live)


# ---------------------------------------------------------------- torch tensors


def test_torch_tensors_are_viewed():
    for tensor in (torch.ones(3, 4).T, torch.ones(4, dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(2)), torch.tensor(1.5)):
        host = as_host_array(tensor, "x")
        assert host.dtype == str(tensor.dtype).removeprefix("torch.")
        assert host.data.ctypes.data == tensor.data_ptr()
        assert tuple(s // host.data.itemsize for s in host.data.strides) == tensor.stride()
        back = like_input(host.data, host.dtype, tensor)
        assert torch.equal(back, tensor.detach())
        assert back.dtype == tensor.dtype
        assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (lambda: torch.ones(2, device="meta"), "meta"),
        (lambda: torch.ones(2, dtype=torch.complex64), "complex64"),
        (lambda: torch.ones(2, 2).to_sparse(), "sparse"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), "float8"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quint8"),
    ],
)
def test_other_torch_tensors_are_refused(tensor, word):
    with pytest.raises(WeightsError, match=rf"the_weight.*{word}"):
        as_host_array(tensor(), "the_weight", WeightsError)
