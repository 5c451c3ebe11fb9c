"""moegen's own layer, as a user calls it."""

from __future__ import annotations

from typing import Any

from ..artifact import Artifact
from ..device import DeviceModule
from .material import Batch, Weights
from .torch_experts import Call

OURS = "moegen"


class Own:
    """`layer.experts` of an artifact, on the weights that all contenders share.

    Raises:
        ArtifactError: it cannot run on the device.
    """

    def __init__(self, weights: Weights, artifact: Artifact, name: str, device: int) -> None:
        self.name = name
        self.layer = DeviceModule(artifact, device).layer(weights.blob)

    def prepare(self, batch: Batch) -> Call:
        """What computes a batch."""

        def call() -> Any:
            return self.layer.experts(batch.x, batch.ids, batch.factors)

        return call
