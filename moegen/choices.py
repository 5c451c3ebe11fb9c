"""What a build may choose without changing what the layer computes or how its weights are packed, and how a part of it is chosen.

How many rows an expert has decides which kernels run, so that choices come in three regimes that are tuned apart: `few` (tiles of
at most `FEW_ROWS` rows), `some` (one tile for each expert) and `many` (several). Each regime has its own kernels' knobs or its own
line in the table of regimes, so that what was found for one of them goes with whatever was found for the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .config import MoEConfig
from .errors import ScheduleError
from .geometry import Geometry, Regime, Tiling
from .schedules import llvm
from .target import Target

REGIMES = ("few", "some", "many")
ROWS = {"few": 1, "some": 8, "many": 64}  # per expert in the mean, where a regime is measured
_KERNELS = {"few": "few", "some": "others"}  # regime -> its part of the knobs of an expert's product
_PRODUCTS = {"up": ("expert_up", "shared_up"), "down": ("expert_down", "shared_down")}
_LINE: dict[str, tuple[str, ...]] = {  # what is worth choosing of a regime's line in the table
    "few": (),
    "some": ("tile_rows",),
    "many": ("tile_rows", "pass_rows", "tasks_per_thread"),
}

Values = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Everything that a build chooses.

    Args:
        tiling: sizes of tiles; only its `chunk_rows` is a matter of speed alone.
        knobs: stage -> its knobs.
        regimes: how an expert's rows are cut.
    """

    tiling: Tiling
    knobs: Mapping[str, Any]
    regimes: tuple[Regime, ...]


def default(config: MoEConfig, target: Target, tiling: Tiling | None = None) -> Choice:
    """What is chosen when nothing was tuned.

    Raises:
        ScheduleError: `tiling` is illegal.
    """
    tiled = tiling or llvm.tiling.default(config, target)
    llvm.tiling.check(config, target, tiled)
    geometry = Geometry(config, tiled)
    knobs = {stage: module.default(geometry, target) for stage, module in llvm.STAGES.items()}
    return Choice(tiled, knobs, llvm.tiling.default_regimes(config, target, tiled))


def check(config: MoEConfig, target: Target, choice: Choice) -> None:
    """Legality, as the schedules state it.

    Raises:
        ScheduleError: something is illegal.
    """
    llvm.tiling.check(config, target, choice.tiling)
    llvm.tiling.check_regimes(choice.tiling, choice.regimes)
    geometry = Geometry(config, choice.tiling)
    for stage, knobs in choice.knobs.items():
        llvm.STAGES[stage].check(geometry, target, knobs)


def space(config: MoEConfig, target: Target, choice: Choice, regime: str) -> dict[str, tuple[int, ...]]:
    """Knob of a regime -> the values worth trying, that of `choice` among them. Not all combinations are legal."""
    found: dict[str, tuple[int, ...]] = {}
    if part := _KERNELS.get(regime):
        streaming = llvm.expert.space(Geometry(config, choice.tiling), target)
        found |= {f"{product}.{field}": streaming[field] for product in _PRODUCTS for field in streaming}
    host = llvm.tiling.space(choice.tiling)
    found |= {field: host[field] for field in _host_fields(regime)}
    here = values(choice, regime)
    assert set(found) == set(here), f"{part} and {regime} name the same knobs"
    return {name: tuple(sorted({*tried, here[name]})) for name, tried in found.items()}


def values(choice: Choice, regime: str) -> dict[str, int]:
    """What `choice` has for each knob of a regime."""
    found: dict[str, int] = {}
    if part := _KERNELS.get(regime):
        for product, (stage, _) in _PRODUCTS.items():
            streaming = dataclasses.asdict(getattr(choice.knobs[stage], part))
            found |= {f"{product}.{field}": int(value) for field, value in streaming.items()}
    line = llvm.tiling.three_regimes(choice.tiling, choice.regimes)[REGIMES.index(regime)]
    found |= {field: int(getattr(line, field)) for field in _LINE[regime]}
    if regime == "many":
        found["chunk_rows"] = choice.tiling.chunk_rows
    return found


def chosen(choice: Choice, regime: str, wanted: Values) -> Choice:
    """`choice` with other values for some knobs of a regime; whether that is legal, `check` says.

    Raises:
        ScheduleError: the regime has no such knob.
    """
    if unknown := sorted(set(wanted) - set(values(choice, regime))):
        raise ScheduleError(f"{unknown[0]!r} is not a knob of regime {regime!r}; known: {', '.join(values(choice, regime))}")
    knobs = dict(choice.knobs)
    for product, stages in _PRODUCTS.items() if regime in _KERNELS else ():
        fields = {name.partition(".")[2]: value for name, value in wanted.items() if name.startswith(f"{product}.")}
        for stage in stages:
            part = dataclasses.replace(getattr(knobs[stage], _KERNELS[regime]), **fields)
            knobs[stage] = dataclasses.replace(knobs[stage], **{_KERNELS[regime]: part})
    lines = list(llvm.tiling.three_regimes(choice.tiling, choice.regimes))
    here = REGIMES.index(regime)
    lines[here] = dataclasses.replace(lines[here], **{name: wanted[name] for name in _LINE[regime] if name in wanted})
    tiling = dataclasses.replace(choice.tiling, chunk_rows=wanted.get("chunk_rows", choice.tiling.chunk_rows))
    return Choice(tiling, knobs, tuple(lines))


def tokens_of(config: MoEConfig, regime: str) -> tuple[int, ...]:
    """Numbers of tokens at which a regime is measured."""
    tokens = max(1, round(ROWS[regime] * config.experts / config.top_k))
    return tuple(dict.fromkeys((1, tokens))) if regime == "few" else (tokens,)


def _host_fields(regime: str) -> tuple[str, ...]:
    return (*_LINE[regime], "chunk_rows") if regime == "many" else _LINE[regime]
