"""moegen itself: load, bind, call."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ...arrays import HostArray
from ...runtime import Module, load
from .family import Family, Settings
from .roster import DENSE, OURS


class MoegenLayer(Family):
    """The compiled layer, and every token through every expert by the same compiled experts."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        start = time.perf_counter()
        module = load(settings.artifact, threads=settings.threads)
        assert isinstance(module, Module), "a CPU's"
        loaded = time.perf_counter()
        self.layer = module.bind(self.weights())
        self.seconds = {"load": loaded - start, "bind": time.perf_counter() - loaded}
        self.calls = {OURS: self._call, DENSE: self._dense}

    def _call(self, x: HostArray, out: HostArray) -> None:
        self.layer.forward_into(x, out)

    def _dense(self, x: HostArray, out: HostArray) -> None:
        """Each call of the experts takes K of them; the last may meet some a second time."""
        c, tokens = self.config, len(x.data)
        weights = np.full((tokens, c.top_k), 1.0 / c.experts, np.float32)
        for first in range(0, c.experts, c.top_k):
            ids = np.arange(first, first + c.top_k, dtype=np.int32) % c.experts
            self.layer.experts(x, np.broadcast_to(ids, (tokens, c.top_k)), weights)

    def facts(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "packed_bytes": self.layer.packed_bytes}

    def workspace_bytes(self, tokens: int) -> int:
        return self.layer.workspace_bytes(tokens)

    def profile(self, x: HostArray) -> dict[str, float]:
        return self.layer.profile(x)


def open_family(settings: Settings) -> Family:
    """moegen with its weights packed."""
    return MoegenLayer(settings)
