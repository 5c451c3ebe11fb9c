"""Presets are the layers of the models that they are named after, and say what was changed to make them fit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

import moegen
from moegen import ConfigError
from moegen.config import weight_shapes
from moegen.presets import PRESETS, fitted, preset, weight_bytes

# The fields of the models' own config.json files that concern the layer.
HUB: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 4096,
        "intermediate_size": 14336, "hidden_act": "silu", "torch_dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048,
        "moe_intermediate_size": 768, "hidden_act": "silu", "norm_topk_prob": True, "torch_dtype": "bfloat16",
    },
    "olmoe": {
        "model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "hidden_size": 2048, "intermediate_size": 1024,
        "hidden_act": "silu", "norm_topk_prob": False, "torch_dtype": "bfloat16",
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4, "hidden_size": 2880,
        "intermediate_size": 2880, "hidden_act": "silu", "swiglu_limit": 7.0, "torch_dtype": "bfloat16",
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8, "hidden_size": 7168,
        "moe_intermediate_size": 2048, "hidden_act": "silu", "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_presets_are_the_models_layers(name: str) -> None:
    assert preset(name) == moegen.MoEConfig.from_hf(HUB[name])


def test_seed_is_the_ungated_layer() -> None:
    assert {*HUB, "seed"} == set(PRESETS)
    assert preset("seed") == moegen.MoEConfig(experts=8, top_k=2, hidden=512, intermediate=2048, activation="relu")


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"^unknown preset 'olmo': did you mean 'olmoe'\? presets are seed, mixtral, "):
        preset("olmo")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_weight_bytes(name: str, dtype: str) -> None:
    config = dataclasses.replace(preset(name), dtype=dtype)
    weights = sum(math.prod(shape) for shape in weight_shapes(config).values())
    extra = 2 * config.experts if config.correction_bias and dtype == "bfloat16" else 0  # the correction bias is float32
    assert weight_bytes(config) == weights * (4 if dtype == "float32" else 2) + extra


def test_what_fits_is_left_alone() -> None:
    fit = fitted(preset("olmoe"), 2.0, 2 * weight_bytes(preset("olmoe")))
    assert fit.config is preset("olmoe")
    assert fit.changes == {}
    assert fit.to_dict() is None


def test_experts_go_first_and_groups_stay_legal() -> None:
    config = preset("deepseek-v3")
    fit = fitted(config, 5.0, 18_000_000_000)
    assert fit.changes == {"experts": (256, 32)}
    assert fit.to_dict() == {"changes": {"experts": [256, 32]}, "why": fit.why}
    assert "5 copies of the weights" in fit.why
    assert "113.2 GB" in fit.why
    assert "18.0 GB may be used" in fit.why
    assert fit.changes == {"experts": (256, 32)}
    assert fit.why.startswith("5 copies")
    smaller = fitted(config, 5.0, 2_000_000_000)
    assert smaller.config.experts == 32, "fewer than four experts for each choice are not a sparse layer"
    assert smaller.changes["intermediate"] == smaller.changes["shared_intermediate"], "the shared expert keeps its ratio"
    kept = ("top_k", "gating", "correction_bias", "n_group", "topk_group", "activation", "routed_scaling", "dtype")
    assert all(getattr(smaller.config, name) == getattr(config, name) for name in kept)


def test_few_experts_keep_their_number() -> None:
    fit = fitted(preset("mixtral"), 5.0, 2_000_000_000)
    assert fit.config.experts == 8
    assert fit.changes == {"hidden": (4096, 2048), "intermediate": (14336, 3584)}
    assert weight_bytes(fit.config) * 5 <= 2_000_000_000


def test_what_can_never_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"5 copies of the weights, 1\.0 kB are there, and the layer cannot be made smaller: .*--ag"
    ):
        fitted(preset("mixtral"), 5.0, 1000)
