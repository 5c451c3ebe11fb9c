"""The layers that are validated: shapes like those of models, small enough that all of it takes minutes on two cores."""

from __future__ import annotations

from ..bench.request import Subject
from ..config import MoEConfig

# Few large experts, in float32, softmax gating.
MIXTRAL = MoEConfig(experts=8, top_k=2, hidden=1024, intermediate=1792)
# Many small experts, in bfloat16, softmax gating without renormalisation.
OLMOE = MoEConfig(experts=64, top_k=8, hidden=1024, intermediate=512, dtype="bfloat16", renormalize=False)
# Sigmoid gating in groups with a correction bias, a shared expert, experts in int8. torch computes with bfloat16 weights there.
DEEPSEEK = MoEConfig(
    experts=64,
    top_k=8,
    hidden=1024,
    intermediate=512,
    dtype="bfloat16",
    gating="sigmoid",
    routed_scaling=2.5,
    correction_bias=True,
    n_group=8,
    topk_group=4,
    shared_intermediate=512,
    weight_dtype="int8",
    weight_group=128,
)

SUBJECTS = (Subject("mixtral-like", MIXTRAL), Subject("olmoe-like", OLMOE), Subject("deepseek-like", DEEPSEEK))

# The same kinds, so small that they say nothing about speed.
QUICK_SUBJECTS = (
    Subject("tiny", MoEConfig(experts=4, top_k=2, hidden=32, intermediate=48)),
    Subject("tiny-bfloat16", MoEConfig(experts=8, top_k=2, hidden=32, intermediate=32, dtype="bfloat16", renormalize=False)),
    Subject(
        "tiny-int8",
        MoEConfig(
            experts=8,
            top_k=2,
            hidden=32,
            intermediate=32,
            dtype="bfloat16",
            gating="sigmoid",
            correction_bias=True,
            n_group=4,
            topk_group=2,
            shared_intermediate=32,
            weight_dtype="int8",
            weight_group=32,
        ),
    ),
)
