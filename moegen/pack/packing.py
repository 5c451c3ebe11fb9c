"""`pack`: one layer of a checkpoint into a file that layers map into memory."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ..artifact import Artifact, open_artifact
from ..checkpoints import checkpoint_format_beside
from ..errors import WeightsError
from ..moepack import MoePack
from ..moepack_format import header_for
from ..safetensors import open_safetensors
from ..version import __version__
from ..weights import resolve
from .finding import artifact_of, config_beside, prefix_of
from .writing import write


def pack(
    checkpoint: Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    artifact: Artifact | str | os.PathLike[str] | None = None,
    *,
    layer: int | None = None,
    prefix: str | None = None,
    model: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    store: str | os.PathLike[str] | None = None,
    target: str | None = None,
    layout: str | None = None,
    gate_up: str | None = None,
    checkpoint_format: str | None = None,
    threads: int | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> MoePack:
    """Packs one layer of a checkpoint into a file, for `bind` of the artifact's layers.

    Weights are read, converted and written expert by expert. The file appears whole or not at all, and the same checkpoint and
    artifact give the same bytes.

    Args:
        checkpoint: a .safetensors file, its index, or a folder with either; or names to arrays, as `bind` takes them.
        out: the file; one of packed weights is replaced, any other is not.
        artifact: what to pack for, or its folder; None finds it in the store.
        layer: number of the layer, by which the prefix is found.
        prefix: what the names of the layer's weights begin with, in place of `layer`.
        model: the config.json to find the artifact by; None takes the one beside the checkpoint.
        store: where to look for it; None for the user's.
        target: look among artifacts for `llvm` or `cuda` only; of both, `llvm` is taken.
        layout, gate_up, checkpoint_format: as in `moegen.weights.resolve`.
        threads: that pack; None for all processors.
        progress: called with the bytes that have been written since it was last called.

    Raises:
        WeightsError: a weight is missing, superfluous, of the wrong shape or dtype, or the file cannot be written.
        ArtifactError: no artifact is found, or for CPUs, this machine cannot run it.
        ConfigError: the model's configuration cannot be read.
    """
    if layer is not None and prefix is not None:
        raise WeightsError(f"layer={layer} and prefix={prefix!r} both say where the weights are: give one of them")
    place = pathlib.Path(os.fsdecode(checkpoint)) if isinstance(checkpoint, str | os.PathLike) else None
    weights: Mapping[str, Any] = open_safetensors(place) if place is not None else checkpoint  # type: ignore[assignment]
    if layer is not None:
        prefix = prefix_of(weights, layer)
    made = artifact if isinstance(artifact, Artifact) else _artifact(artifact, place, model, store, target)
    if place is not None and made.config.low_bit:
        checkpoint_format = checkpoint_format or checkpoint_format_beside(place)
    source = resolve(made.config, weights, prefix or "", layout, gate_up, checkpoint_format)
    origin = {"file": place.absolute().name if place is not None else "arrays", "prefix": prefix or ""}
    header = header_for(made, origin, {"moegen": __version__})
    release = getattr(weights, "release", lambda: None)
    write(made, source, pathlib.Path(os.fsdecode(out)), header, threads, release, progress)
    return MoePack(out)


def _artifact(
    path: str | os.PathLike[str] | None,
    checkpoint: pathlib.Path | None,
    model: str | os.PathLike[str] | Mapping[str, Any] | None,
    store: str | os.PathLike[str] | None,
    target: str | None,
) -> Artifact:
    if path is not None:
        return open_artifact(path)
    if model is None:
        if checkpoint is None:
            raise WeightsError("arrays do not say which model they are of: give artifact= or model=")
        model = config_beside(checkpoint)
    return artifact_of(model, store, target)
