"""moegen: Mixture-of-Experts kernels, generated, compiled and verified ahead of time.

    artifact = moegen.build(moegen.MoEConfig(experts=8, top_k=2, hidden=512))
    layer = moegen.load(artifact.path).bind(weights)
    y = layer(x)

Names are imported when first used: loading an artifact never imports the compiler.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .own_processes import WITHOUT_TORCH, hide_torch
from .paths import PACKAGE
from .version import __version__

if not (PACKAGE / "schedules").is_dir():  # a checkout: schedules, templates and tuning_logs are at the top level
    __path__.append(str(PACKAGE.parent))
if os.environ.get(WITHOUT_TORCH):
    hide_torch()

if TYPE_CHECKING:
    from .artifact import Artifact, find_artifact, list_artifacts, open_artifact
    from .batch import build_many
    from .builder import build
    from .config import MoEConfig
    from .errors import (
        ArtifactError,
        BuildError,
        ConfigError,
        DistributedError,
        InputError,
        MoegenError,
        ScheduleError,
        TargetError,
        VerificationError,
        WeightsError,
    )
    from .runtime import Layer, Module, Routing, load
    from .verification import verify

_HOMES = {
    "artifact": ("Artifact", "find_artifact", "list_artifacts", "open_artifact"),
    "batch": ("build_many",),
    "builder": ("build",),
    "config": ("MoEConfig",),
    "errors": (
        "ArtifactError",
        "BuildError",
        "ConfigError",
        "DistributedError",
        "InputError",
        "MoegenError",
        "ScheduleError",
        "TargetError",
        "VerificationError",
        "WeightsError",
    ),
    "runtime": ("Layer", "Module", "Routing", "load"),
    "verification": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Artifact",
    "ArtifactError",
    "BuildError",
    "ConfigError",
    "DistributedError",
    "InputError",
    "Layer",
    "MoEConfig",
    "Module",
    "MoegenError",
    "Routing",
    "ScheduleError",
    "TargetError",
    "VerificationError",
    "WeightsError",
    "__version__",
    "build",
    "build_many",
    "find_artifact",
    "list_artifacts",
    "load",
    "open_artifact",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moegen' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
