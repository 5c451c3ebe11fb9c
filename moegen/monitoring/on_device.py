"""Counts in a CUDA device's memory: torch adds them up on the stream of the call, and nothing waits for the device.

The additions are kernels of the stream like any other, so that a call captured in a CUDA graph counts each time it is replayed.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Increase(NamedTuple):
    """What was counted on a device since the last time."""

    counts: npt.NDArray[np.int64]
    tokens: int
    dropped: int
    invalid: int
    calls: int


class DeviceCounts:
    """Totals of one layer on one stream: int64 [E + 4], the choices, then invalid choices, dropped ones, tokens and calls.

    Args:
        ids: torch tensor whose device the totals are kept on.
        experts: E.
    """

    def __init__(self, ids: Any, experts: int) -> None:
        self.torch = sys.modules["torch"]
        self.experts = experts
        self.totals = self.torch.zeros(experts + 4, dtype=self.torch.int64, device=ids.device)
        self._seen = np.zeros(experts + 4, np.int64)

    def add(self, ids: Any, capacity: int | None) -> None:
        """ids [T, K], any integers; an expert takes at most `capacity` tokens."""
        torch, experts = self.torch, self.experts
        flat = ids.detach().reshape(-1).to(torch.int64)
        places = torch.where((flat >= 0) & (flat < experts), flat, experts)
        new = torch.zeros_like(self.totals).index_add_(0, places, torch.ones_like(places))
        if capacity is not None:
            new[experts + 1] = (new[:experts] - capacity).clamp_(min=0).sum()
        new[experts + 2] = ids.shape[0]
        new[experts + 3] = 1
        self.totals.add_(new)

    def increase(self) -> Increase:
        """Waits for the device, and says what came since the last time."""
        if self.totals.is_cuda:
            self.torch.cuda.synchronize(self.totals.device)
        now = self.totals.cpu().numpy()
        new, self._seen = now - self._seen, now.copy()
        invalid, dropped, tokens, calls = (int(n) for n in new[self.experts :])
        return Increase(new[: self.experts], tokens, dropped, invalid, calls)
