"""Building the artifacts that a run lacks; this needs the compiler, but no device."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

from ..batch import build_many
from ..config import MoEConfig
from .stock import found


def build_missing(layers: Mapping[str, MoEConfig], folder: pathlib.Path, arch: str, jobs: int | None = None) -> Iterator[str]:
    """Builds what the folder lacks, several at a time, unproven: a device proves them. Yields a sentence on each."""
    present = {artifact.config for artifact in found(folder)}
    missing = {config: name for name, config in layers.items() if config not in present}
    for outcome in build_many(list(missing), "cuda", folder, arch=arch, verify=False, jobs=jobs) if missing else ():
        ended = f"built in {outcome.seconds:.0f} s" if outcome.artifact else f"not built: {outcome.error}"
        yield f"{missing[outcome.config]}: {ended}"
