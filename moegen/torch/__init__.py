"""Compiled layers in torch: operators that torch.compile and torch.export see through.

bound = moegen.torch.BoundLayer(moegen.load(path).bind(weights))
y = bound.forward(x)
y = moegen.torch.experts(bound, x, ids, weights)
"""

from __future__ import annotations

from .bound import BoundLayer, Routing, bound, experts, forward, route

__all__ = ["BoundLayer", "Routing", "bound", "experts", "forward", "route"]
