"""The reference and the compiled layer agree with transformers' own MoE blocks, from their configuration and state dict."""

from __future__ import annotations

import fcntl
import importlib
import json
import sys

import numpy as np
import pytest
from helpers import run_python

import moegen
from moegen.arrays import as_host_array, like_input, to_float32
from moegen.config import MoEConfig
from moegen.errors import WeightsError
from moegen.hf import MODEL_TYPES
from moegen.reference import margins, moe
from moegen.verification import ELEMENTWISE, RELATIVE_L2
from moegen.weights import resolve

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402

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


def test_mxfp4_blocks_are_what_transformers_makes_of_them(rng):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    fields = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 96}
    hf_config = transformers.GptOssConfig(**fields, quantization_config={"quant_method": "mxfp4"}).to_dict()
    config = MoEConfig.from_hf(hf_config)
    assert (config.weight_dtype, config.weight_group) == ("mxfp4", 32)
    state = {"router.weight": torch.zeros(4, 64), "router.bias": torch.zeros(4)}
    dense = dict(state)
    for name, rows, columns in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
        packed = torch.from_numpy(rng.integers(0, 256, (4, rows, columns // 32, 16), np.uint8))
        scales = torch.from_numpy(rng.integers(100, 140, (4, rows, columns // 32), np.uint8))
        state |= {f"experts.{name}_blocks": packed, f"experts.{name}_scales": scales}
        dense[f"experts.{name}"] = convert_moe_packed_tensors(packed, scales, dtype=torch.float32)
        state[f"experts.{name}_bias"] = dense[f"experts.{name}_bias"] = torch.zeros(4, rows)
    plain = MoEConfig.from_hf(hf_config | {"quantization_config": None})
    mine, theirs = resolve(config, state).to_float32(), resolve(plain, dense).to_float32()
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


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


# ---------------------------------------------------------------- the compiled layer

COMPILED = [
    *(case for case in CASES if case not in ("mixtral gelu", "deepseek_v3 raw", "gpt_oss 2I == H", "llama4_text 2I == H")),
    *(f"{case} bfloat16" for case in ("mixtral", "gpt_oss")),
]
SURE = 1e-5  # float32 rounding moves these small blocks' choice scores by less

# A compiler's LLVM has clashed with torch's in one process (apache/tvm#18653), and users do not have them in one either.
BUILD_SCRIPT = """
import json, sys
from helpers import few_tiles
from moegen import MoEConfig
from moegen.batch import build_many

given = json.load(sys.stdin)
configs = [MoEConfig.from_dict(fields) for fields in given["configs"]]
layers = [config if config in configs[:2] else few_tiles(config) for config in sorted(set(configs), key=str)]
outcomes = list(build_many(layers, out=given["store"], jobs=2, verify=False))
failures = [f"{outcome.config}: {outcome.error}" for outcome in outcomes if outcome.error]
if failures:
    sys.exit("\\n".join(failures))
paths = {outcome.config: str(outcome.artifact.path) for outcome in outcomes}
print(json.dumps([paths[config] for config in configs]))
"""


@pytest.fixture(scope="module")
def paths(store):
    """{case of COMPILED: artifact's folder}: built by a process of their own, once for all workers of pytest-xdist.

    The first two are compiled as `moegen build` would, the others with few register tiles, in a third of the time.
    """
    own = store.parent / "transformers"
    own.mkdir(parents=True, exist_ok=True)
    known = own / "paths.json"
    with open(own / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not known.exists():
            configs = [MoEConfig.from_hf(compiled_block(case)[0].to_dict()).to_dict() for case in COMPILED]
            given = json.dumps({"configs": configs, "store": str(own / "store")})
            done = run_python(BUILD_SCRIPT, given=given, timeout=600)
            assert done.returncode == 0, done.stderr
            known.write_text(json.dumps(dict(zip(COMPILED, json.loads(done.stdout), strict=True))))
    return json.loads(known.read_text())


def compiled_block(case, seed=0):
    """`make_block` for a case of COMPILED."""
    name = case.removesuffix(" bfloat16")
    return make_block(name, seed, torch.float32 if name == case else torch.bfloat16)


def decided_block(case, rng):
    """A fresh `compiled_block` where no token's routing hangs on rounding, and its configuration: (config, block, x)."""
    for _ in range(100):
        hf_config, block, x = compiled_block(case, int(rng.integers(2**31)))
        config = MoEConfig.from_hf(hf_config.to_dict())
        weights = resolve(config, block.state_dict()).to_float32()
        if margins(config, weights, to_float32(as_host_array(x, "x"))).min() > SURE:
            return config, block, x
    raise AssertionError(f"{case}: every block has near ties")


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_layer_agrees(paths, rng, case):
    config, block, x = decided_block(case, rng)
    compiler_was_there = "tvm" in sys.modules
    layer = moegen.load(paths[case]).bind(block.state_dict())
    assert layer.config == config
    y = layer(x)
    assert ("tvm" in sys.modules) == compiler_was_there
    assert isinstance(y, torch.Tensor)
    assert (y.dtype, y.shape, y.device, y.requires_grad) == (x.dtype, x.shape, x.device, False)
    # transformers' own bfloat16 block rounds its intermediates: the same rounded weights in float32 are the stricter check.
    want = block_output(block.float(), x.float()).astype(np.float64)
    error = to_float32(as_host_array(y, "y")) - want
    relative_l2 = np.linalg.norm(error) / np.linalg.norm(want)
    elementwise = (np.abs(error) / (np.abs(want) + np.sqrt(np.mean(want**2, axis=1, keepdims=True)))).max()
    print(f"relative L2 {relative_l2:.2e}, elementwise {elementwise:.2e}")
    assert relative_l2 <= RELATIVE_L2[config.dtype]
    assert elementwise <= ELEMENTWISE[config.dtype]


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_compiled_router_agrees(paths, rng, case):
    _, block, x = decided_block(case, rng)
    with torch.no_grad():
        _, weights, ids = getattr(block, "router" if case == "gpt_oss" else "gate")(x)
    _, routing = moegen.load(paths[case]).bind(block.state_dict())(x, return_routing=True)
    assert routing.ids.dtype == torch.int32
    assert torch.equal(routing.ids.long(), ids)
    torch.testing.assert_close(routing.weights, weights, rtol=1e-5, atol=1e-6)
    assert routing.load.tolist() == torch.bincount(ids.ravel(), minlength=8).tolist()


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v2"])
def test_load_balancing_loss_agrees(paths, rng, case):
    config, block, x = decided_block(case, rng)
    logits = x @ block.state_dict()["gate.weight"].T
    want = load_balancing_loss_func((logits,), config.experts, config.top_k)
    routing = moegen.load(paths[case]).bind(block.state_dict()).route(x)
    assert routing.load_balancing_loss == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "gpt_oss bfloat16"])
def test_torch_batches_without_copies(paths, rng, monkeypatch, case):
    """[batch, sequence, H] in and out; the module reads the given tensor's memory and writes the returned tensor's."""
    _, block, x = decided_block(case, rng)
    module = moegen.load(paths[case])
    layer = module.bind(block.state_dict())
    forward, seen = module.functions["forward"], []

    def spy(*arguments):
        seen.append((arguments[0].ctypes.data, arguments[2].ctypes.data))
        forward(*arguments)

    monkeypatch.setitem(module.functions, "forward", spy)
    batch = x.reshape(2, TOKENS // 2, -1)
    y = layer(batch)
    out = torch.full_like(batch, torch.nan)
    layer.forward_into(batch, out)
    assert seen == [(x.data_ptr(), y.data_ptr()), (x.data_ptr(), out.data_ptr())]
    assert y.shape == batch.shape
    assert torch.equal(y, layer(x).reshape(batch.shape))
    assert torch.equal(y, out)


@pytest.mark.parametrize("case", COMPILED)
def test_bound_from_a_file(paths, tmp_path, rng, case):
    """A .safetensors file of two layers and a prefix give bitwise the layer that the state dict gives."""
    _, block, x = decided_block(case, rng)
    other = compiled_block(case, int(rng.integers(2**31)))[1]
    file = tmp_path / "model.safetensors"
    layers = {"model.layers.0.mlp": other.state_dict(), "model.layers.1.mlp": block.state_dict()}
    save_file({f"{prefix}.{name}": t.contiguous() for prefix, state in layers.items() for name, t in state.items()}, file)
    module = moegen.load(paths[case])
    want = module.bind(block.state_dict())(x)
    assert torch.equal(module.bind(file, prefix="model.layers.1.mlp.")(x), want)
    assert not torch.equal(module.bind(file, prefix="model.layers.0.mlp")(x), want)


@pytest.mark.parametrize("way", ["grouped_mm", "eager"])
@pytest.mark.parametrize("fields", [{}, {"activation": "swiglu_clamped", "expert_bias": True}])
def test_expert_modules_as_contenders_on_a_device(way, fields):
    """What `moegen.field` measures beside moegen computes the same, here on the processor."""
    from contending import error_of

    from moegen.field.hf_experts import Transformers

    assert error_of(lambda weights: Transformers(weights, way), fields, 9, "zipf") < 2e-6
