"""What a family of contenders is to the worker that hosts it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ...arrays import HostArray, empty_aligned
from ...config import MoEConfig
from ..workload import read_layer, read_weights

# Gated activation -> the function of its gate.
GATES = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}

# Writes the layer's output for x [T, H] into out [T, H], both as the family's `wrap` made them.
Call = Callable[[Any, Any], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a worker tells its family.

    Args:
        folder: the workload.
        threads: threads to compute with.
        artifact: the compiled layer's folder.
    """

    folder: pathlib.Path
    threads: int
    artifact: str


class Family:
    """One library with its copy of a layer's weights.

    `calls` maps the contenders that can run the layer to what runs them; `obstacles` the others to the reason.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.config: MoEConfig = read_layer(settings.folder)
        self.calls: dict[str, Call] = {}
        self.obstacles: dict[str, str] = {}

    def weights(self) -> dict[str, HostArray]:
        """The workload's weights, mapped: every family copies what it keeps."""
        return read_weights(self.settings.folder)

    def wrap(self, array: HostArray) -> Any:
        """The library's own view of an array, sharing its memory."""
        return array

    def facts(self) -> dict[str, Any]:
        """What else is worth reporting about the family, as JSON values."""
        return {}

    def workspace_bytes(self, tokens: int) -> int | None:
        """Scratch memory of a call with so many tokens, where the library says."""
        return None

    def profile(self, x: Any) -> dict[str, float]:
        """Seconds in each part of one call, where the library says."""
        return {}


def copied(array: HostArray) -> HostArray:
    """A copy in memory of its own on huge pages, where a library that took its time to load weights would have them."""
    own = empty_aligned(array.shape, array.data.dtype)
    own[...] = array.data
    return HostArray(own, array.dtype)


def poison(array: HostArray) -> None:
    """Fills an array with NaN (in all three types)."""
    array.data.view(np.uint8)[...] = 0xFF
