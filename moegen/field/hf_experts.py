"""transformers' own expert modules: with its grouped products, and as its models run by default (`eager`)."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ..config import MoEConfig
from ..errors import MeasureError
from .material import Batch, Weights
from .torch_experts import Call

WAYS = ("grouped_mm", "eager")


class Transformers:
    """The expert modules of Mixtral (which those of Qwen3, OLMoE and DeepSeek equal) and of gpt-oss.

    Args:
        way: an entry of `WAYS`.

    Raises:
        MeasureError: no module of transformers computes such experts.
    """

    def __init__(self, weights: Weights, way: str) -> None:
        self.name = f"transformers-{way.removesuffix('_mm')}"
        c = weights.config
        with torch.device("meta"):
            self.module = _module(c, way)
        for name, value in _parameters(weights).items():
            setattr(self.module, name, torch.nn.Parameter(value, requires_grad=False))
        self.module.eval()

    def prepare(self, batch: Batch) -> Call:
        """What computes a batch."""
        ids, factors = batch.ids.long(), batch.factors.to(batch.x.dtype)  # as transformers' routers give them

        def call() -> Any:
            with torch.no_grad():
                return self.module(batch.x, ids, factors)

        return call


def _module(c: MoEConfig, way: str) -> Any:
    sizes = {"hidden_size": c.hidden, "intermediate_size": c.intermediate, "num_local_experts": c.experts}
    if c.activation == "swiglu" and not c.expert_bias:
        config, kind = transformers.MixtralConfig(**sizes, num_experts_per_tok=c.top_k), MixtralExperts
    elif c.activation == "swiglu_clamped" and c.expert_bias:
        config, kind = transformers.GptOssConfig(**sizes, num_experts_per_tok=c.top_k, swiglu_limit=c.swiglu_limit), GptOssExperts
        config.swiglu_alpha = c.swiglu_alpha
    else:
        raise MeasureError(f"transformers {transformers.__version__}: no experts with {c.activation} are known here")
    config._experts_implementation = way
    return kind(config)


def _parameters(weights: Weights) -> dict[str, Any]:
    """As the modules name them; gpt-oss has [E, H, 2I] with gate and up alternating, for which a copy is made."""
    if weights.gate_up_bias is None:
        return {"gate_up_proj": weights.gate_up, "down_proj": weights.down}

    def alternating(value: Any) -> Any:
        return torch.stack(value.chunk(2, 1), 2).flatten(1, 2)

    return {
        "gate_up_proj": alternating(weights.gate_up).transpose(1, 2).contiguous(),
        "gate_up_proj_bias": alternating(weights.gate_up_bias),
        "down_proj": weights.down.transpose(1, 2).contiguous(),
        "down_proj_bias": weights.down_bias,
    }
