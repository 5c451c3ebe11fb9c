"""The kinds of targets as tuning sees them: what has candidates and can be measured. `processors` and `devices` are the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .. import compiler
from ..config import MoEConfig
from ..cuda import planning
from ..cuda.planning import CudaPlan
from ..errors import TargetError
from ..plan import Plan
from ..records import Provenance
from ..target import Target
from . import devices, processors
from .measurers import Measurer


class Candidates(Protocol):
    """Everything that may be chosen for one regime of one layer, the rest being as it is by default."""

    @property
    def default(self) -> dict[str, int]:
        """The candidate that is built when nothing was tuned."""

    @property
    def candidates(self) -> list[dict[str, int]]:
        """Legal candidates, in a fixed order."""

    def choice(self, values: Mapping[str, int]) -> Any:
        """A candidate as a whole choice, cheaply.

        Raises:
            ScheduleError: it is illegal.
        """

    def plan(self, values: Mapping[str, int]) -> Plan | CudaPlan:
        """What building a candidate would do.

        Raises:
            ScheduleError: it is illegal.
        """


class Kind(Protocol):
    """One kind of targets."""

    WORKER: str
    """The module of `moegen.tune` that measures a candidate beside the default in a process of its own."""

    HELPER: str
    """The source in `templates/tune` that measures on a server."""

    WHAT: str
    """What measures, in a word or two."""

    def space(self, config: MoEConfig, target: Target, regime: str) -> Candidates:
        """The candidates of a regime."""

    def tokens(self, config: MoEConfig, regime: str) -> tuple[int, ...]:
        """Numbers of tokens at which a regime is measured."""

    def provenance(self) -> Provenance:
        """What times measured here depend on; without a compiler or a device, as far as there is one."""

    def versions(self) -> dict[str, str]:
        """Versions of everything that decides the code."""

    def here(self) -> Measurer:
        """The processor or device that measures here.

        Raises:
            TargetError: there is none.
        """

    def elsewhere(self, server: str, fields: Mapping[str, str]) -> Measurer:
        """The one that measures on a server.

        Args:
            server: what messages call it.
            fields: what the helper says of its machine.
        """

    def admitted(self, name: str) -> str:
        """The name of what measures, whose times may be recorded.

        Raises:
            MeasureError: they may not.
        """

    def threads(self, wanted: int | None) -> int:
        """Threads of the measured layers.

        Raises:
            MeasureError: there are not so many.
        """

    def runs_here(self, target: Target) -> bool:
        """Whether this machine runs what is compiled for a target."""

    def check(self, config: MoEConfig, target: Target, by: Measurer) -> None:
        """Whether a layer for a target can be measured by that one.

        Raises:
            TargetError, MeasureError: it does not run there, or does not fit.
        """


def of(target: Target | str) -> Kind:
    """The kind of a target, of its slug in the records, or of the word that the slug begins with."""
    slug = target if isinstance(target, str) else target.slug
    return devices if slug.partition("-")[0] == "cuda" else processors


def resolve(target: str, mcpu: str | None = None, arch: str | None = None, *, tf32: bool = False) -> Target:
    """The target that a command line names, with `arch` as `builder.build` has it.

    Raises:
        TargetError: it is unknown, or an argument is for another one.
    """
    if target != "cuda":
        if tf32:
            raise TargetError(f"tf32 is for target cuda, not {target!r}")
        return compiler.resolve_target(target, mcpu, arch)
    if mcpu is not None:
        raise TargetError(f"mcpu={mcpu!r} is for target llvm: of cuda, say the devices' architecture (arch)")
    return planning.resolve_target(arch, tf32=tf32)
