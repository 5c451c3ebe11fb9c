"""Tiny models of transformers with random weights, whose experts have few shapes among them, and artifacts for those."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
import transformers
from helpers import run_python

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 32, 16
VOCABULARY = 64
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WIDE = {"moe_intermediate_size": INTERMEDIATE, "intermediate_size": 24}
GROUPED = {**WIDE, "n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    "qwen3_moe": {**WIDE, "num_experts": EXPERTS, "norm_topk_prob": True, "head_dim": 8},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    "deepseek_v3": {**GROUPED, **MLA, "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 0},
    "gpt_oss": {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "head_dim": 8, "swiglu_limit": 1.5},
    "glm4_moe": {**GROUPED, "head_dim": 8, "first_k_dense_replace": 1},
}

# A compiler's LLVM has clashed with torch's in one process (apache/tvm#18653), and users do not have them in one either.
_BUILD = """
import json, sys
from helpers import few_tiles
from moegen import MoEConfig
from moegen.batch import build_many

given = json.load(sys.stdin)
layers = [few_tiles(MoEConfig.from_dict(fields)) for fields in given["layers"]]
failures = [str(outcome.error) for outcome in build_many(layers, out=given["store"], jobs=2, verify=False) if outcome.error]
sys.exit("\\n".join(failures) or None)
"""


def build_artifacts(store: pathlib.Path, layers: list[dict[str, Any]]) -> None:
    """Builds the experts of these layers into `store`, with few tiles, in a process of its own."""
    sizes = {"experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
    given = json.dumps({"store": str(store), "layers": [sizes | layer for layer in layers]})
    done = run_python(_BUILD, given=given, timeout=600)
    assert done.returncode == 0, done.stderr


def make_config(model_type: str, **fields: Any) -> Any:
    return transformers.AutoConfig.for_model(model_type, **{**SIZES, **MODELS[model_type], **fields})


def make_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A causal language model in evaluation mode that runs its experts eagerly; its weights are large enough to matter."""
    config = make_config(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager", dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model


def prompt(seed: int = 0, rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(ids).logits
    return out
