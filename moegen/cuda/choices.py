"""What a build for CUDA may choose without changing what the layer computes or how its weights are packed, and how it is chosen.

The regimes are those of `moegen.choices`: `few` (products without dispatch and routing in one launch, and up to how many tokens),
`some` (row blocks of the lowest height, and up to how many rows an expert has them) and `many` (the higher ones, and Hopper's own
products). Each has kernels and lines in the table of row blocks of its own, so that what was found for one goes with whatever was
found for the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import MoEConfig
from ..errors import ScheduleError
from ..schedules.cuda import few, hopper, route, tiling
from .architectures import parse
from .emission import ROUTER_FEW_TOKENS, ROUTER_ROWS, RowBlocks

if TYPE_CHECKING:
    from .planning import CudaPlan

FEW_ROWS, SOME_ROWS, MANY_ROWS = 1, (8, 24), (64, 256)  # per expert in the mean, where a regime is measured
MOST_ROUTE_TOKENS = 4096  # for more, a thread block for each token reads the router far too often
MOST_CANDIDATES = 8192  # of a regime: more are represented by some
FEW_TOKENS, ROUTE_TOKENS = "few_tokens", "route_tokens"
_HEIGHTS = {"some": tiling.ROWS[:1], "many": tiling.ROWS[1:]}
_FIXED = ("rows",)  # of a tile: its kernel's name has it
# Where one height of row blocks ends and the next begins; whatever one regime takes, the table's lines ascend.
_ROWS_UP_TO = {16: (8, 24, 48), 64: (56, 96, 192, 384)}

Values = Mapping[str, int]


def tokens_of(config: MoEConfig, regime: str) -> tuple[int, ...]:
    """Numbers of tokens at which a regime is measured; those at the borders of the regimes tell where they should be."""
    each = config.experts / config.top_k
    if regime == "few":
        return tuple(dict.fromkeys((1, max(1, round(min(4, each))), max(1, round(FEW_ROWS * each)))))
    rows = SOME_ROWS if regime == "some" else MANY_ROWS
    return tuple(dict.fromkeys(max(1, round(count * each)) for count in rows))


def values(plan: CudaPlan, regime: str) -> dict[str, int]:
    """What `plan` has for each knob of a regime: those of its kernels by their names, and up to where they are taken."""
    found: dict[str, int] = {}
    for stage in _stages(plan, regime):
        found |= _flat(stage, plan.knobs[stage])
    return found | {name: _bounds(plan)[name] for name in _bound_names(plan, regime)}


def axes(plan: CudaPlan, regime: str) -> list[list[dict[str, int]]]:
    """What is worth trying: for each kernel, and for each end of a height, the values of its knobs that go together.

    The values of `plan` are among them. One of each makes a candidate, whose kernels are all legal.
    """
    found = []
    here = values(plan, regime)
    for stage in _stages(plan, regime):
        found.append([_flat(stage, option) for option in _options(plan, stage)])
    for name in _bound_names(plan, regime):
        found.append([{name: value} for value in sorted(_tried(plan, name))])
    for axis in found:
        own = {name: here[name] for name in axis[0]}
        if own not in axis:
            axis.insert(0, own)
    return found


def candidates(plan: CudaPlan, regime: str) -> list[dict[str, int]]:
    """The candidates of a regime, in a fixed order: all of them, or of more than `MOST_CANDIDATES` those that differ from `plan` in
    one kernel or one end, and others that are drawn from all with a fixed seed.
    """
    found = axes(plan, regime)
    if math.prod(map(len, found)) <= MOST_CANDIDATES:
        return [_joined(parts) for parts in itertools.product(*found)]
    drawn = {tuple(sorted(each.items())): each for each in _near(found, values(plan, regime))}
    rng = np.random.default_rng(0)
    while len(drawn) < MOST_CANDIDATES:
        each = _joined(axis[int(rng.integers(len(axis)))] for axis in found)
        drawn.setdefault(tuple(sorted(each.items())), each)
    return list(drawn.values())


def chosen(plan: CudaPlan, regime: str, wanted: Values) -> CudaPlan:
    """`plan` with other values for some knobs of a regime. The shared expert's kernels follow, where that is legal.

    Raises:
        ScheduleError: the regime has no such knob, or a value is illegal.
    """
    known = values(plan, regime)
    if unknown := sorted(set(wanted) - set(known)):
        raise ScheduleError(f"{unknown[0]!r} is not a knob of regime {regime!r}; known: {', '.join(known)}")
    knobs = dict(plan.knobs)
    for stage in _stages(plan, regime):
        if not (fields := {n.rpartition(".")[2]: value for n, value in wanted.items() if n.startswith(f"{stage}.")}):
            continue
        knobs[stage] = dataclasses.replace(knobs[stage], **fields)
        _check_stage(plan, stage, knobs[stage])
        shared = f"shared_{stage}"
        if shared in knobs and _legal(plan, shared, follower := dataclasses.replace(knobs[shared], **fields)):
            knobs[shared] = follower
    bounds = _bounds(plan) | {name: value for name, value in wanted.items() if name in _bound_names(plan, regime)}
    lines = tuple(RowBlocks(bounds.get(f"rows_up_to_{line.rows}"), line.rows) for line in plan.regimes)
    ends = [line.rows_up_to for line in lines if line.rows_up_to is not None]
    if any(end < 1 for end in ends) or sorted(set(ends)) != ends:
        raise ScheduleError(f"rows_up_to={ends} must be at least 1 and ascend with the height of row blocks")
    if not 0 <= bounds[FEW_TOKENS] <= _most_few_tokens(plan):
        raise ScheduleError(f"few_tokens={bounds[FEW_TOKENS]} must be between 0 and {_most_few_tokens(plan)}")
    if not 0 <= bounds[ROUTE_TOKENS] <= MOST_ROUTE_TOKENS:
        raise ScheduleError(f"route_tokens={bounds[ROUTE_TOKENS]} must be between 0 and {MOST_ROUTE_TOKENS}")
    return dataclasses.replace(plan, knobs=knobs, regimes=lines, few_tokens=bounds[FEW_TOKENS], route_tokens=bounds[ROUTE_TOKENS])


# ---------------------------------------------------------------- kernels


def _stages(plan: CudaPlan, regime: str) -> list[str]:
    """The kernels of a regime that have knobs, Hopper's own where it has one; those of the shared expert follow them."""
    if regime == "few":
        return ["route", "router_few", "up_few", "down_few"] if plan.few_tokens else []
    names = [f"{product}_{rows}" for rows in _HEIGHTS[regime] for product in ("up", "down")]
    names += [f"router_{ROUTER_ROWS}"] if regime == "some" else []
    return [own if (own := f"{name}{hopper.SUFFIX}") in plan.knobs else name for name in names if name in plan.knobs]


def _options(plan: CudaPlan, stage: str) -> tuple[Any, ...]:
    """Every legal choice for a kernel that is worth trying."""
    knobs, item_bytes = plan.knobs[stage], plan.geometry.item_bytes
    found: tuple[Any, ...]
    if isinstance(knobs, few.Knobs):
        found = few.space()
        return found
    if isinstance(knobs, route.Knobs):
        found = route.space(plan.geometry)
        return found
    if isinstance(knobs, tiling.Tile):
        found = tiling.space(knobs.rows, plan.geometry.products[stage.rpartition("_")[0]], item_bytes, _most_shared_bytes(plan))
        return found
    product = _grouped(plan, stage)
    tried = hopper.space(product, knobs.rows)
    every = (dataclasses.replace(knobs, **dict(zip(tried, each, strict=True))) for each in itertools.product(*tried.values()))
    return tuple(each for each in every if _legal(plan, stage, each))


def _check_stage(plan: CudaPlan, stage: str, knobs: Any) -> None:
    """Raises a ScheduleError for what is illegal."""
    if isinstance(knobs, few.Knobs):
        few.check(knobs)
    elif isinstance(knobs, route.Knobs):
        route.check(knobs, plan.geometry)
    elif isinstance(knobs, tiling.Tile):
        product = plan.geometry.products[stage.rpartition("_")[0]]
        tiling.check(knobs, product, plan.geometry.item_bytes, _most_shared_bytes(plan))
    else:
        hopper.check(_grouped(plan, stage), knobs)


def _legal(plan: CudaPlan, stage: str, knobs: Any) -> bool:
    try:
        _check_stage(plan, stage, knobs)
    except ScheduleError:
        return False
    return True


def _grouped(plan: CudaPlan, stage: str) -> hopper.GroupedProduct:
    return hopper.GroupedProduct.of(plan.geometry, stage.partition("_")[0])


def _most_shared_bytes(plan: CudaPlan) -> int:
    return min(one.max_shared_bytes_per_block for one in parse(plan.target.gpus))


def _flat(stage: str, knobs: Any) -> dict[str, int]:
    return {f"{stage}.{name}": int(value) for name, value in dataclasses.asdict(knobs).items() if name not in _FIXED}


# ---------------------------------------------------------------- ends of what kernels are taken for


def _bound_names(plan: CudaPlan, regime: str) -> list[str]:
    if regime == "few":
        return [FEW_TOKENS, ROUTE_TOKENS] if plan.few_tokens else []
    heights = {line.rows for line in plan.regimes if line.rows_up_to is not None}
    return [f"rows_up_to_{rows}" for rows in _HEIGHTS[regime] if rows in heights]


def _bounds(plan: CudaPlan) -> dict[str, int]:
    """Every end by its name."""
    found = {f"rows_up_to_{line.rows}": line.rows_up_to for line in plan.regimes if line.rows_up_to is not None}
    return found | {FEW_TOKENS: plan.few_tokens, ROUTE_TOKENS: plan.route_tokens}


def _tried(plan: CudaPlan, name: str) -> tuple[int, ...]:
    if name == ROUTE_TOKENS:
        return (0, ROUTER_FEW_TOKENS, route.MOST_TOKENS)
    return _few_tokens(plan) if name == FEW_TOKENS else _ROWS_UP_TO[int(name.rpartition("_")[2])]


def _few_tokens(plan: CudaPlan) -> tuple[int, ...]:
    return tuple(count for count in (1, 2, 4, 8, 16, 32) if count <= _most_few_tokens(plan))


def _most_few_tokens(plan: CudaPlan) -> int:
    """Beyond two choices of an expert in the mean, tiles read less; where capacity drops choices, somebody has to count them."""
    return 0 if plan.config.capacity_factor is not None else min(32, max(1, 2 * plan.config.experts // plan.config.top_k))


# ---------------------------------------------------------------- candidates


def _joined(parts: Any) -> dict[str, int]:
    return {name: value for part in parts for name, value in part.items()}


def _near(found: list[list[dict[str, int]]], here: Values) -> Iterator[dict[str, int]]:
    """The default, and what differs from it in one axis."""
    yield dict(here)
    for axis in found:
        for option in axis:
            yield {**here, **option}
