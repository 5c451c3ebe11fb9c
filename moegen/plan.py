"""What a build will do: everything that decides the artifact, in one value with one key."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from typing import Any

from . import choices, compiler, emission, records, sources, te_module
from .choices import Choice
from .config import MoEConfig, config_key
from .errors import ScheduleError
from .geometry import Geometry, Regime, Tiling
from .machine import processor
from .target import Target
from .version import __version__

SOURCES = ("templates/llvm/*", "templates/te/*", "schedules/*.py", "schedules/llvm/*.py")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides what a build produces; two plans with the same key give the same artifact.

    Args:
        geometry: the layer and its tiling.
        target: what it is compiled for.
        te_source: the tensor-expression module.
        knobs: stage -> its knobs.
        regimes: how an expert's rows are cut.
        edited: the module was edited by hand.
        records: regime -> the tuning record that its choices come from, as `records.origin` has it; what they are is in the other
            fields.
    """

    geometry: Geometry
    target: Target
    te_source: str
    knobs: Mapping[str, Any]
    regimes: tuple[Regime, ...]
    edited: bool = False
    records: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> MoEConfig:
        """The layer."""
        return self.geometry.config

    @property
    def key(self) -> str:
        """SHA-256 of all inputs: configuration, target, tiling, knobs, sources and versions."""
        parts = {
            "config": config_key(self.config),
            "target": self.target.to_dict(),
            "tiling": dataclasses.asdict(self.geometry.tiling),
            "knobs": {stage: dataclasses.asdict(k) for stage, k in self.knobs.items()},
            "regimes": [dataclasses.asdict(regime) for regime in self.regimes],
            "te_source": self.te_source,
            "own_sources": own_sources(),
            "versions": {name: version for name, version in versions().items() if name != "python"},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Name of the artifact's folder."""
        c = self.config
        sizes = f"e{c.experts}-k{c.top_k}-h{c.hidden}-i{c.intermediate}"
        stored = f"{c.dtype}-{c.weight_dtype}" if c.low_bit else c.dtype
        return f"moe-{sizes}-{stored}-{c.gating}-{c.activation}-{self.target.mcpu}-{self.key[:10]}".replace("_", "-")


def plan(
    config: MoEConfig,
    target: str = "llvm",
    mcpu: str | None = None,
    tiling: Tiling | None = None,
    arch: str | None = None,
    *,
    tuned: bool = True,
    logs: str | os.PathLike[str] | None = None,
) -> Plan:
    """What building `config` would do.

    Args:
        tiling: instead of the default one; tuning records are for that one.
        tuned: take the choices of tuning records that hold on this machine.
        logs: the user's records, as in `records.user_folder`.

    Raises:
        TargetError: the target, the architecture or the processor is unknown.
        ScheduleError: the tiling is illegal.
        RecordError: records cannot be read.
    """
    resolved = compiler.resolve_target(target, mcpu, arch)
    choice = choices.default(config, resolved, tiling)
    if not tuned or tiling is not None:
        return plan_of(config, resolved, choice)
    used = {}
    for regime, decision in records.choose(config, resolved.slug, choices.REGIMES, provenance(), logs).used.items():
        with contextlib.suppress(ScheduleError):  # knobs that are none of this layer's are no reason not to build it
            overlaid = choices.chosen(choice, regime, decision["knobs"])
            choices.check(config, resolved, overlaid)
            choice, used[regime] = overlaid, records.origin(decision)
    return plan_of(config, resolved, choice, used)


def plan_of(config: MoEConfig, target: Target, choice: Choice, used: Mapping[str, Mapping[str, Any]] | None = None) -> Plan:
    """What building `config` with this choice would do.

    Raises:
        ScheduleError: the choice is illegal.
    """
    choices.check(config, target, choice)
    geometry = Geometry(config, choice.tiling)
    return Plan(geometry, target, emission.te_source(geometry, target), choice.knobs, choice.regimes, records=used or {})


def plan_from_source(path: str | os.PathLike[str], target: str = "llvm", mcpu: str | None = None, arch: str | None = None) -> Plan:
    """What building an edited TE module would do; configuration and tiling are read from the file.

    Raises:
        BuildError: the file cannot be read or has no CONFIG and TILING.
    """
    text, config, tiling = te_module.read(path, _tiling)
    resolved = compiler.resolve_target(target, mcpu, arch)
    choice = choices.default(config, resolved, tiling)
    choices.check(config, resolved, choice)
    return Plan(Geometry(config, tiling), resolved, text, choice.knobs, choice.regimes, edited=True)


def _tiling(values: Mapping[str, Any]) -> Tiling:
    wanted = {field.name: str(field.type) for field in dataclasses.fields(Tiling)}
    made = Tiling(**values)
    if not all(type(value).__name__ == wanted[name] for name, value in values.items()):
        raise TypeError(f"TILING must hold {', '.join(f'{name} ({kind})' for name, kind in wanted.items())}")
    return made


def own_sources() -> str:
    """SHA-256 of templates and schedules, which decide the code as much as the choices do; comments in schedules do not count."""
    return sources.digest(SOURCES)


def provenance() -> records.Provenance:
    """What times measured here and now depend on."""
    found = versions()
    return records.Provenance(own_sources(), f"apache-tvm {found['apache-tvm']}, LLVM {compiler.llvm_version()}", processor())


def versions() -> dict[str, str]:
    """Versions of everything that the build depends on."""
    return {
        "moegen": __version__,
        "apache-tvm": importlib.metadata.version("apache-tvm"),
        "apache-tvm-ffi": importlib.metadata.version("apache-tvm-ffi"),
        "python": platform.python_version(),
    }
