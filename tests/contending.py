"""A contender of `moegen.field` on the processor, against the truth; only torch is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moegen.config import MoEConfig
from moegen.cuda_geometry import CudaGeometry
from moegen.field import material, truth


def error_of(make: Callable[[Any], Any], fields: dict[str, Any], tokens: int, routing: str) -> float:
    """Relative L2 error of the contender that `make` makes of weights, in float32 for a layer of odd sizes with these `fields`."""
    config = MoEConfig(**{"experts": 5, "top_k": 2, "hidden": 48, "intermediate": 40, **fields})
    geometry = CudaGeometry(config)
    manifest = {"packed_bytes": geometry.packed_bytes, "segments": geometry.describe()}
    weights = material.draw_weights(config, manifest, "cpu", 1)
    batch = material.draw_batches(config, tokens, routing, 2, "cpu", 3)[1]
    chosen = truth.checked(tokens)
    wanted = truth.expected(weights, batch, chosen)
    assert float(wanted.abs().mean()) > 1e-3
    return truth.relative_l2(make(weights).prepare(batch)()[chosen], wanted)
