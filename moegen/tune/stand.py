"""The measuring stand of one layer: its workloads, the default artifact, and where candidates are measured beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..artifact import open_artifact
from ..bench import workload
from ..config import MoEConfig
from ..display import size
from ..errors import BuildError, CandidateError, MeasureError
from ..machine import available_bytes
from ..presets import weight_bytes
from ..target import Target
from . import kinds
from .building import Candidate, Workshop
from .measurers import Measurer
from .places import Here, Place, Places, measurer_of
from .processes import in_parallel
from .times import Measured, merged, points_of, ratio

_COPIES_IN_MEMORY = 3.0  # of the weights: as files, packed in a file, packed in a worker
_MEMORY_FRACTION = 0.8
_MOST_COPIES = 64  # a layer that needs more to exceed the caches is a toy
_BYTES_PER_SECOND = 50e6  # at the least; what takes longer than all weights do at this rate is a hang
ROUTINGS = ("uniform", "zipf")


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        rounds: turns of the default and of the candidate at each point.
        min_ms: milliseconds of calls in a turn, at least one call.
        patience_seconds: a measurement that takes so much longer than reading the weights counts as hung.
        band: a ratio that is known less well than this is measured again.
        repeats: how often, at the most.
        processes: fresh processes in which a decision is measured.
    """

    rounds: int = 12
    min_ms: float = 5.0
    patience_seconds: float = 120.0
    band: float = 0.04
    repeats: int = 2
    processes: int = 4


class Stand:
    """Builds and measures candidates of one layer; `open_stand` makes one.

    Args:
        config: the layer.
        folder: for workloads, artifacts and results.
        places: where to measure.
        by: what measures there.
    """

    def __init__(
        self,
        config: MoEConfig,
        target: Target,
        folder: pathlib.Path,
        places: Places,
        by: Measurer,
        threads: int,
        seed: int,
        effort: Effort,
    ) -> None:
        self.config, self.target, self.places, self.by = config, target, places, by
        self.kind = kinds.of(target)
        self.threads, self.seed, self.effort = threads, seed, effort
        self.folders = [folder / routing for routing in ROUTINGS]
        workload.make(self.folders[0], config, "uniform", seed)
        workload.make_zipf_variant(self.folders[1], self.folders[0], seed)
        self.workshop = Workshop(config, target, folder)
        self.default = self._default(folder)
        packed_bytes = int(open_artifact(self.default).manifest["packed_bytes"])
        self.copies = min(_MOST_COPIES, -(-2 * by.cache_bytes // packed_bytes))

    def _default(self, folder: pathlib.Path) -> pathlib.Path:
        (built,) = self.workshop.build([Candidate("few", {})])
        if isinstance(built, CandidateError):
            raise BuildError(f"the default cannot be built: {built}")
        return built

    @property
    def processor(self) -> str:
        """The processor or device that measures."""
        return self.by.name

    @property
    def facts(self) -> Mapping[str, Any]:
        """Its sizes, as records keep them."""
        return self.by.facts

    def copy_of_default(self) -> pathlib.Path:
        """The default once more, under another name, so that it is loaded beside itself."""
        copy = self.default.parent / "copy" / self.default.name
        if not copy.exists():
            shutil.copytree(self.default, copy)
        return copy

    def prepare(self, regimes: Sequence[str]) -> None:
        """Draws the tokens of these regimes and computes what the outputs should be."""
        for folder in self.folders:
            for tokens in self.tokens(regimes):
                if workload.read_checks(folder, tokens) is None:
                    workload.make_batches(folder, self.config, tokens, self.seed)
                    workload.save_checks(folder, tokens, workload.study(folder, tokens)[1])

    def tokens(self, regimes: Sequence[str]) -> list[int]:
        """Numbers of tokens at which these regimes are measured."""
        return list(dict.fromkeys(tokens for regime in regimes for tokens in self.kind.tokens(self.config, regime)))

    def build(self, regime: str, candidates: Sequence[Mapping[str, int]]) -> list[pathlib.Path | CandidateError]:
        """Artifacts of the candidates of a regime."""
        return self.workshop.build([Candidate(regime, candidate) for candidate in candidates])

    def measure(self, artifact: pathlib.Path, regimes: Sequence[str], processes: int = 1) -> list[Measured]:
        """An artifact beside the default at the points of some regimes, in one fresh process after another.

        Where the machine is busy, one process more may tell what the first could not.

        Raises:
            CandidateError: it crashes, hangs or is wrong.
            MeasureError: there is no place left to measure at.
        """
        self.prepare(regimes)
        job = self._job(artifact, regimes)
        found = merged([points_of(self.places.measure(job), self.config) for _ in range(processes)])
        for _ in range(self.effort.repeats):
            known = ratio(found)
            if known.high - known.low <= self.effort.band:
                break
            found = merged([found, points_of(self.places.measure(job), self.config)])
        return found

    def _job(self, artifact: pathlib.Path, regimes: Sequence[str]) -> dict[str, Any]:
        return {
            "artifacts": [str(self.default), str(artifact)],
            "workload": [str(folder) for folder in self.folders],
            "tokens": self.tokens(regimes),
            "threads": self.threads,
            "rounds": self.effort.rounds,
            "min_ms": self.effort.min_ms,
            "copies": self.copies,
            "processor": self.by.name,
        }

    def measure_each(
        self, artifacts: Sequence[pathlib.Path | CandidateError], regime: str
    ) -> Iterator[list[Measured] | CandidateError]:
        """One result for each artifact, in order, from as many places at a time as there are."""

        def one(artifact: pathlib.Path | CandidateError) -> list[Measured] | CandidateError:
            try:
                return artifact if isinstance(artifact, CandidateError) else self.measure(artifact, [regime])
            except CandidateError as failure:
                return failure

        self.prepare([regime])
        yield from in_parallel(one, artifacts, max(1, self.places.count))


@contextlib.contextmanager
def open_stand(
    config: MoEConfig,
    target: Target,
    threads: int,
    seed: int = 0,
    effort: Effort | None = None,
    places: Sequence[Place] = (),
) -> Iterator[Stand]:
    """A stand whose files are gone afterwards.

    Args:
        places: where to measure; this machine when there are none.

    Raises:
        TargetError: the target does not run where it is measured.
        PlaceLost: nobody there answers.
        MeasureError: the layer does not fit into memory, or times there are worth nothing.
        BuildError: the default cannot be built.
    """
    kind = kinds.of(target)
    by = measurer_of(places, target.slug, target.arch) if places else kind.here()
    kind.check(config, target, by)
    kind.admitted(by.name)
    needed, budget = round(weight_bytes(config) * _COPIES_IN_MEMORY), int(available_bytes() * _MEMORY_FRACTION)
    if needed > budget:
        raise MeasureError(f"{size(needed)} are needed for {_COPIES_IN_MEMORY:g} copies of the weights, {size(budget)} may be used")
    hurry = effort or Effort()
    with workload.temporary_folder(round(weight_bytes(config) * 2)) as folder:
        here = Here(folder, hurry.patience_seconds + weight_bytes(config) / _BYTES_PER_SECOND, kind.WORKER)
        with contextlib.closing(Places(places or [here])) as everywhere:
            yield Stand(config, target, folder, everywhere, by, threads, seed, hurry)
