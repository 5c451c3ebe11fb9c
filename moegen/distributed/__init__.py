"""The experts of one layer on several processes, with torch.distributed.

    layer = moegen.distributed.ExpertParallel(config, "model.safetensors", prefix="model.layers.3.mlp.")
    y = layer(x)  # in every process, each with tokens of its own

Placements and the configurations of their artifacts need no torch, so that a machine that only builds can ask for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .placement import Placement, local_configs

if TYPE_CHECKING:
    from .parallel import ExpertParallel

__all__ = ["ExpertParallel", "Placement", "local_configs"]


def __getattr__(name: str) -> Any:
    if name != "ExpertParallel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .parallel import ExpertParallel
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise ModuleNotFoundError(
            "moegen.distributed.ExpertParallel needs torch, which is not installed: pip install 'moegen[torch]'", name="torch"
        ) from None

    return ExpertParallel
