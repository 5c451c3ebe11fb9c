"""Compiled layers in torch: a module, and operators that torch.compile and torch.export see through.

layer = moegen.torch.MoELayer(path, weights)
y = layer(x)
y = layer.experts(x, ids, weights)
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"moegen.torch needs {missing.name}, which is not installed: pip install 'moegen[torch]'", name=missing.name
    ) from None

from .bound import BoundLayer, Routing, bound, experts, forward, route
from .layer import MoELayer
from .trainable import TrainableMoELayer

__all__ = ["BoundLayer", "MoELayer", "Routing", "TrainableMoELayer", "bound", "experts", "forward", "route"]
