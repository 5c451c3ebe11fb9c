"""Which process holds which experts, and what is compiled for them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from ..config import MoEConfig
from ..errors import ConfigError

NARROW = 32  # of experts that are not run: the least whose hidden values together are sure to be proven within the bounds


@dataclasses.dataclass(frozen=True)
class Placement:
    """The experts that each rank holds; every expert is held by one rank, and a rank may hold none.

    Args:
        held: for each rank its experts, in the order in which its artifact numbers them.

    Raises:
        ConfigError: an expert is held by no rank or by two, or something is no number of an expert.
    """

    held: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", tuple(tuple(map(_expert, _listed(experts))) for experts in _listed(self.held)))
        everyone = sorted(e for experts in self.held for e in experts)
        for expected, e in enumerate(everyone):
            if e < expected:
                raise ConfigError(f"placement has expert {e} twice ({self}): every expert is on one rank")
            if e > expected:
                raise ConfigError(f"placement has no expert {expected}, but {e} ({self}): every expert is on one rank")
        if not everyone:
            raise ConfigError("placement has no experts")

    @classmethod
    def even(cls, experts: int, ranks: int) -> Placement:
        """Contiguous parts whose sizes differ by one at most, the larger ones first."""
        if ranks < 1:
            raise ConfigError(f"ranks={ranks} must be at least 1")
        size, larger = divmod(experts, ranks)
        starts = [rank * size + min(rank, larger) for rank in range(ranks + 1)]
        return cls(tuple(tuple(range(starts[rank], starts[rank + 1])) for rank in range(ranks)))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.held)

    @property
    def experts(self) -> int:
        """E, number of experts on all ranks together."""
        return sum(map(len, self.held))

    @property
    def most(self) -> int:
        """Experts on the rank that has most of them."""
        return max(map(len, self.held))

    def __str__(self) -> str:
        return "; ".join(f"rank {rank}: {', '.join(map(str, experts)) or 'none'}" for rank, experts in enumerate(self.held))


def placement_of(config: MoEConfig, ranks: int | Placement | Sequence[Sequence[int]]) -> Placement:
    """A placement of this layer's experts: near-equal parts for a number of ranks, or the one given.

    Raises:
        ConfigError: it is none of this layer's experts.
    """
    if isinstance(ranks, int):
        return Placement.even(config.experts, ranks)
    placement = ranks if isinstance(ranks, Placement) else Placement(tuple(map(tuple, map(_listed, _listed(ranks)))))
    if placement.experts != config.experts:
        raise ConfigError(f"placement has {placement.experts} experts, the layer has experts={config.experts}")
    return placement


def local_configs(config: MoEConfig, ranks: int | Placement | Sequence[Sequence[int]]) -> dict[str, MoEConfig]:
    """What has to be compiled for a layer on several ranks; all of them use the same artifacts.

    * `router`: the router of all E experts. Nothing else of it is run, so that its experts are as narrow as can be.
    * `experts`: the largest number of experts that a rank holds, one choice for each row (K=1).
    * `shared`, if there is one: the shared expert as a layer of one expert, the same as `experts` where it is like one of them.
      With a gate it stays a shared expert, beside a routed one that is as narrow as can be and adds zeros.

    Args:
        ranks: how many there are, for near-equal parts, or a placement.

    Raises:
        ConfigError: the placement is not one of this layer's experts.
    """
    placement = placement_of(config, ranks)
    bare = _without_router(config)
    configs = {
        "router": dataclasses.replace(
            config.whole, intermediate=NARROW, activation="relu", expert_bias=False, weight_on_input=False, shared_intermediate=0,
            shared_gate=False, capacity_factor=None, **_defaults("swiglu_alpha", "swiglu_limit", "scale_dtype"),
        ),
        "experts": dataclasses.replace(bare, experts=placement.most),
    }  # fmt: skip
    if config.shared_intermediate:
        configs["shared"] = _of_shared(config, bare, configs["experts"])
    return configs


def _of_shared(config: MoEConfig, bare: MoEConfig, experts: MoEConfig) -> MoEConfig:
    alone = dataclasses.replace(bare, expert_bias=False, weight_on_input=False)
    if config.shared_gate:
        return dataclasses.replace(alone, intermediate=NARROW, shared_intermediate=config.shared_intermediate, shared_gate=True)
    alone = dataclasses.replace(alone, intermediate=config.shared_intermediate)
    return experts if dataclasses.replace(experts, experts=1) == alone else alone


def _without_router(config: MoEConfig) -> MoEConfig:
    """One routed expert of the layer: nothing that is the router's or the shared expert's."""
    of_router = (
        "gating", "renormalize", "routed_scaling", "router_bias", "correction_bias", "n_group", "topk_group", "group_score",
        "shared_intermediate", "shared_gate", "capacity_factor", "balance_coefficient",
    )  # fmt: skip
    return dataclasses.replace(config, experts=1, top_k=1, **_defaults(*of_router))


def _defaults(*names: str) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(MoEConfig) if field.name in names}


def _listed(value: Any) -> Iterable[Any]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"placement must be a list of experts for each rank, {value!r} is no list")
    return value


def _expert(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"placement: {value!r} is no number of an expert") from None
    if number < 0:
        raise ConfigError(f"placement: {number} is no number of an expert")
    return number
