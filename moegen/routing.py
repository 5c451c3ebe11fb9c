"""What a router decided, as callers get it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Routing(NamedTuple):
    """What the router decided for T tokens.

    ids int32 [T, K] and weights float32 [T, K] come as the kind of array that the input was; load int32 [E] counts the tokens
    that chose each expert, before capacity; dropped counts the choices over capacity. The losses are those of
    `moegen.reference.Routing`.
    """

    ids: Any
    weights: Any
    load: npt.NDArray[np.int32]
    dropped: int
    load_balancing_loss: float
    adaptive_loss: float
    z_loss: float


def routing_of(ids: Any, weights: Any, load: npt.NDArray[np.int32], stats: npt.NDArray[np.float64]) -> Routing:
    """From what a library writes: stats float64 [4] are dropped choices and the three losses."""
    dropped, balance, adaptive, z = (float(value) for value in stats)
    return Routing(ids, weights, load, int(dropped), balance, adaptive, z)
