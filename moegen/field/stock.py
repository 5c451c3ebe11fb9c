"""The artifacts that a run has."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from ..artifact import Artifact, list_artifacts
from ..config import MoEConfig


def found(folder: pathlib.Path) -> list[Artifact]:
    """The undamaged artifacts for CUDA of a folder, the newest first."""
    made = [one for one in list_artifacts(folder) if isinstance(one, Artifact) and one.target.kind == "cuda"]
    return sorted(made, key=lambda one: str(one.manifest.get("created", "")), reverse=True)


def of_layer(config: MoEConfig, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Those that compute a layer."""
    return [artifact for artifact in artifacts if artifact.config == config]
