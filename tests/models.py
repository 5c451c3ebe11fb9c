"""Tiny models of transformers with random weights, whose experts have few shapes among them, and artifacts for those."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import torch
import transformers
from helpers import SMALL, run_python

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = SMALL.values()
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
# What other tests build too is built as they do it, to be found by whoever comes second.
_BUILD = """
import fcntl, json, sys
import moegen
from helpers import SMALL, few_tiles

given = json.load(sys.stdin)
with open(given["store"] + "/.lock-models", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    for fields in given["layers"]:
        config = moegen.MoEConfig(**SMALL | fields)
        shared = not fields or fields == {"dtype": "bfloat16"}
        print(moegen.build(config if shared else few_tiles(config), out=given["store"], verify=False).path)
"""


def build_artifacts(session: pathlib.Path, own: pathlib.Path, layers: list[dict[str, Any]]) -> None:
    """Layers of `SMALL` with these fields changed: built into the session's store in a process of its own, and copied to `own`."""
    session.mkdir(parents=True, exist_ok=True)
    done = run_python(_BUILD, given=json.dumps({"store": str(session), "layers": layers}), timeout=600)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        shutil.copytree(line, own / pathlib.Path(line).name)


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
