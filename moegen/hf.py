"""From a Hugging Face `config.json` to the keyword arguments of `MoEConfig`.

Each function below states one model family's router as transformers 5.23 computes it (`models/<type>/modeling_*.py`); a field
that the dict lacks takes the default of that family's configuration class. Fields that do not concern the MoE layer are
ignored, as are those that act in training only (router_jitter_noise, router_aux_loss_coef, ...). `moegen.hf_quantization` reads
the quantization_config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .hf_quantization import low_bit_fields
from .hf_source import Source

Fields = dict[str, Any]

_DTYPES = ("float32", "bfloat16", "float16")
_SILU = {"silu": "silu", "swish": "silu"}
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate")  # one formula, five spellings
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu", "relu": "reglu"}
_GATED |= dict.fromkeys(_GELU_TANH, "geglu_tanh")
_UNGATED = {"relu2": "relu2", "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu"}
_UNGATED |= dict.fromkeys(_GELU_TANH, "gelu_tanh")


def _mixtral(s: Source) -> Fields:
    return {
        "experts": s.integer("num_local_experts", "num_experts", default=8),
        "top_k": s.integer("num_experts_per_tok", default=2),
        "hidden": s.integer("hidden_size", default=4096),
        "intermediate": s.integer("intermediate_size", default=14336),
        "activation": s.activation("hidden_act", _GATED, "silu"),
        "gating": "softmax",
        "renormalize": True,
    }


def _qwen2_moe(s: Source) -> Fields:
    shared = s.integer("shared_expert_intermediate_size", default=5632)
    return {
        "experts": s.integer("num_experts", default=60),
        "top_k": s.integer("num_experts_per_tok", default=4),
        "hidden": s.integer("hidden_size", default=2048),
        "intermediate": s.integer("moe_intermediate_size", default=1408),
        "activation": s.activation("hidden_act", _GATED, "silu"),
        "gating": "softmax",
        "renormalize": s.flag("norm_topk_prob", False),
        "shared_intermediate": shared,
        "shared_gate": shared != 0,
    }


def _qwen3_moe(s: Source) -> Fields:
    return {
        "experts": s.integer("num_local_experts", "num_experts", default=128),
        "top_k": s.integer("num_experts_per_tok", default=8),
        "hidden": s.integer("hidden_size", default=2048),
        "intermediate": s.integer("moe_intermediate_size", default=768),
        "activation": s.activation("hidden_act", _GATED, "silu"),
        "gating": "softmax",
        "renormalize": s.flag("norm_topk_prob", False),
    }


def _olmoe(s: Source) -> Fields:
    return {
        "experts": s.integer("num_experts", "num_local_experts", default=64),
        "top_k": s.integer("num_experts_per_tok", default=8),
        "hidden": s.integer("hidden_size", default=2048),
        "intermediate": s.integer("intermediate_size", default=2048),
        "activation": s.activation("hidden_act", _GATED, "silu"),
        "gating": "softmax",
        "renormalize": s.flag("norm_topk_prob", False),
    }


def _deepseek_v2(s: Source) -> Fields:
    s.must_be("topk_method", "greedy", "group_limited_greedy")
    s.must_be("scoring_func", "softmax", None)
    s.must_be("mlp_bias", False, None)  # would put biases on the shared expert
    # transformers ignores the flag, DeepSeek's own code renormalises and then leaves out the scaling: no answer is the right one.
    s.must_be("norm_topk_prob", False, None)
    width = s.integer("moe_intermediate_size", default=1407)
    fields = {
        "experts": s.integer("n_routed_experts", "num_experts", default=64),
        "top_k": s.integer("num_experts_per_tok"),
        "hidden": s.integer("hidden_size", default=4096),
        "intermediate": width,
        "activation": s.activation("hidden_act", _GATED, "silu"),
        "gating": "softmax",
        "renormalize": False,
        "routed_scaling": s.number("routed_scaling_factor", 1.0),
        "shared_intermediate": width * s.integer("n_shared_experts", default=2),
    }
    if s.raw.get("topk_method", "greedy") == "group_limited_greedy":
        fields |= {"n_group": s.integer("n_group"), "topk_group": s.integer("topk_group"), "group_score": "max"}
    return fields


def _sigmoid_router(s: Source, *, top_k: int, scaling: float, groups: int, topk_group: int) -> Fields:
    """DeepSeek-V3's router (arXiv:2412.19437), which GLM-4-MoE and Nemotron-H share but for the defaults."""
    s.must_be("topk_method", "noaux_tc", None)
    s.must_be("scoring_func", "sigmoid", None)
    return {
        "top_k": s.integer("num_experts_per_tok", default=top_k),
        "gating": "sigmoid",
        "renormalize": s.flag("norm_topk_prob", True),
        "routed_scaling": s.number("routed_scaling_factor", scaling),
        "correction_bias": True,
        "n_group": s.integer("n_group", default=groups),
        "topk_group": s.integer("topk_group", default=topk_group),
        "group_score": "top2_sum",
    }


def _deepseek_v3(s: Source) -> Fields:
    width = s.integer("moe_intermediate_size", default=2048)
    return _sigmoid_router(s, top_k=8, scaling=2.5, groups=8, topk_group=4) | {
        "experts": s.integer("n_routed_experts", "num_local_experts", default=256),
        "hidden": s.integer("hidden_size", default=7168),
        "intermediate": width,
        "activation": s.activation("hidden_act", _GATED, "silu"),
        "shared_intermediate": width * s.integer("n_shared_experts", default=1),
    }


def _glm4_moe(s: Source) -> Fields:
    width = s.integer("moe_intermediate_size", default=1408)
    return _sigmoid_router(s, top_k=8, scaling=1.0, groups=1, topk_group=1) | {
        "experts": s.integer("n_routed_experts", "num_local_experts", default=128),
        "hidden": s.integer("hidden_size", default=4096),
        "intermediate": width,
        "activation": s.activation("hidden_act", _GATED, "silu"),
        "shared_intermediate": width * s.integer("n_shared_experts", default=1),
    }


def _nemotron_h(s: Source) -> Fields:
    s.must_be("moe_latent_size", None)
    s.must_be("mlp_bias", False)
    # transformers always builds one shared expert and never reads the count; other engines multiply by it.
    s.must_be("n_shared_experts", 1)
    shared = s.integer("moe_shared_expert_intermediate_size", default=7688)
    return _sigmoid_router(s, top_k=2, scaling=1.0, groups=1, topk_group=1) | {
        "experts": s.integer("n_routed_experts", "num_local_experts", default=8),
        "hidden": s.integer("hidden_size", default=4096),
        "intermediate": s.integer("moe_intermediate_size", default=7688),
        "activation": s.activation("mlp_hidden_act", _UNGATED, "relu2"),
        "shared_intermediate": shared or s.integer("intermediate_size", default=21504),  # `or` as in NemotronHMLP
    }


def _gpt_oss(s: Source) -> Fields:
    s.activation("hidden_act", _SILU, "silu")  # the sigmoid of the clamped SwiGLU is fixed; anything else would be a lie
    return {
        "experts": s.integer("num_local_experts", "num_experts", default=128),
        "top_k": s.integer("num_experts_per_tok", default=4),
        "hidden": s.integer("hidden_size", default=2880),
        "intermediate": s.integer("intermediate_size", default=2880),
        "activation": "swiglu_clamped",
        "swiglu_alpha": s.number("swiglu_alpha", 1.702),
        "swiglu_limit": s.number("swiglu_limit", 7.0),
        "gating": "topk_softmax",
        "renormalize": True,
        "router_bias": True,
        "expert_bias": True,
    }


def _llama4_text(s: Source) -> Fields:
    width = s.integer("intermediate_size", default=8192)
    return {
        "experts": s.integer("num_local_experts", default=16),
        "top_k": s.integer("num_experts_per_tok", default=1),
        "hidden": s.integer("hidden_size", default=5120),
        "intermediate": width,
        "activation": s.activation("hidden_act", _GATED, "silu"),
        "gating": "sigmoid",
        "renormalize": False,
        "weight_on_input": True,
        "shared_intermediate": width,
    }


_READERS: dict[str, Callable[[Source], Fields]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4_text,
    "llama4_text": _llama4_text,
    "glm4_moe": _glm4_moe,
    "nemotron_h": _nemotron_h,
}
MODEL_TYPES: tuple[str, ...] = tuple(_READERS)


def fields_from_hf(source: str | os.PathLike[str] | Mapping[str, Any]) -> Fields:
    """Keyword arguments of `MoEConfig` for the MoE layer of a Hugging Face model.

    Args:
        source: path of a `config.json`, the folder it is in, or the parsed dict. `llama4` is read from its `text_config`.

    Raises:
        ConfigError: the file cannot be read, the model type is not in `MODEL_TYPES`, or a field asks for what moegen cannot
            honour; the message names the field, its value and what is supported.
    """
    raw = source if isinstance(source, Mapping) else _read_json(source)
    model_type = raw.get("model_type")
    if model_type is None:
        raise ConfigError(f"the configuration has no 'model_type'; known: {', '.join(MODEL_TYPES)}")
    if not isinstance(model_type, str) or model_type not in _READERS:
        raise ConfigError(f"model_type={model_type!r} is not supported; known: {', '.join(MODEL_TYPES)}")
    layers = [raw]
    if model_type == "llama4":
        if not isinstance(raw.get("text_config"), Mapping):
            raise ConfigError("llama4: field 'text_config' is required and must be an object")
        layers.insert(0, raw["text_config"])
    dtype = _dtype(layers)
    return _READERS[model_type](Source(model_type, layers[0])) | {"dtype": dtype} | low_bit_fields(model_type, layers, dtype)


def _dtype(layers: list[Mapping[str, Any]]) -> str:
    """The storage type from `dtype` or, as written before transformers 5, `torch_dtype`; inner configurations first."""
    for layer in layers:
        for name in ("dtype", "torch_dtype"):
            value = layer.get(name)
            if value is None:
                continue
            dtype = str(value).removeprefix("torch.")
            if dtype not in _DTYPES:
                raise ConfigError(f"{name}={value!r} is not supported; supported: {', '.join(_DTYPES)}")
            return dtype
    return "float32"


def _read_json(source: Any) -> Mapping[str, Any]:
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"a configuration is a path of a config.json, its folder, or a dict, not {type(source).__name__} "
            "(a transformers configuration has .to_dict())"
        )
    path = Path(os.fsdecode(source))
    try:
        if path.is_dir():
            path = path / "config.json"
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or a NUL in the path
        raise ConfigError(f"the configuration {str(path)!r} is not readable JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"the configuration {str(path)!r} holds a JSON {type(raw).__name__}, not an object")
    return raw
