"""The candidates of a regime: flat mappings of knob -> value, all of them legal by what the schedules say."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

from .. import choices
from ..choices import Choice
from ..config import MoEConfig
from ..cuda import choices as cuda_choices
from ..cuda import planning
from ..cuda.planning import CudaPlan
from ..errors import ScheduleError
from ..plan import Plan, plan_of
from ..target import Target


@dataclasses.dataclass(frozen=True)
class Space:
    """Everything that may be chosen for one regime of one layer, the rest being as it is by default.

    Args:
        config: the layer.
        target: what it is compiled for.
        regime: one of `choices.REGIMES`.
    """

    config: MoEConfig
    target: Target
    regime: str

    @functools.cached_property
    def base(self) -> Choice:
        """The default choice."""
        return choices.default(self.config, self.target)

    @functools.cached_property
    def knobs(self) -> dict[str, tuple[int, ...]]:
        """Knob -> the values that are tried."""
        return choices.space(self.config, self.target, self.base, self.regime)

    @property
    def default(self) -> dict[str, int]:
        """The candidate that is built when nothing was tuned."""
        return choices.values(self.base, self.regime)

    def choice(self, values: Mapping[str, int]) -> Choice:
        """A candidate as a whole choice.

        Raises:
            ScheduleError: it is illegal.
        """
        choice = choices.chosen(self.base, self.regime, values)
        choices.check(self.config, self.target, choice)
        return choice

    def plan(self, values: Mapping[str, int]) -> Plan:
        """What building a candidate would do.

        Raises:
            ScheduleError: it is illegal.
        """
        return plan_of(self.config, self.target, self.choice(values))

    @functools.cached_property
    def candidates(self) -> list[dict[str, int]]:
        """Every legal candidate, in a fixed order."""
        return list(self._legal())

    def _legal(self) -> Iterator[dict[str, int]]:
        for combination in itertools.product(*self.knobs.values()):
            values = dict(zip(self.knobs, combination, strict=True))
            try:
                self.choice(values)
            except ScheduleError:
                continue
            yield values


@dataclasses.dataclass(frozen=True)
class CudaSpace:
    """The same for CUDA devices, where a choice is a whole plan.

    Args:
        config: the layer.
        target: what it is compiled for.
        regime: one of `choices.REGIMES`.
    """

    config: MoEConfig
    target: Target
    regime: str

    @functools.cached_property
    def base(self) -> CudaPlan:
        """The default plan."""
        return planning.default_plan(self.config, self.target)

    @property
    def default(self) -> dict[str, int]:
        """The candidate that is built when nothing was tuned."""
        return cuda_choices.values(self.base, self.regime)

    def choice(self, values: Mapping[str, int]) -> CudaPlan:
        """A candidate as a whole plan.

        Raises:
            ScheduleError: it is illegal.
        """
        return cuda_choices.chosen(self.base, self.regime, values)

    def plan(self, values: Mapping[str, int]) -> CudaPlan:
        """The same."""
        return self.choice(values)

    @functools.cached_property
    def candidates(self) -> list[dict[str, int]]:
        """Legal candidates, in a fixed order; of very many, some."""
        return cuda_choices.candidates(self.base, self.regime)
