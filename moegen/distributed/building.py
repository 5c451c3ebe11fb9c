"""Artifacts for the ranks: found in the store, or built there by one of a machine's processes while the others wait."""

from __future__ import annotations

import functools
import os
import pathlib

from .. import first_use
from ..artifact import Artifact, default_store
from ..config import MoEConfig
from ..errors import ArtifactError


def artifact_for(config: MoEConfig, target: str, store: str | os.PathLike[str] | None, limit_s: float) -> Artifact:
    """The artifact of `config`, built first if this machine's processor is the target and there is none.

    Args:
        limit_s: seconds for building, or for waiting until another process has built.

    Raises:
        ArtifactError: there is none for CUDA, or the store cannot be written.
        BuildError: building failed, or took too long.
    """
    folder = pathlib.Path(store) if store is not None else default_store()
    find = functools.partial(first_use.find, folder, config, target)
    if (found := find()) is not None:
        return found
    if target != "llvm":
        raise ArtifactError(f"{str(folder)!r} has no artifact of {config} for {target}: build what `local_configs` names first")
    return first_use.build_once(folder, config, find, limit_s=limit_s, limit_name="start_timeout_s")
