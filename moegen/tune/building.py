"""Building candidates, each in a process of its own, so that a compiler that crashes or hangs costs one of them.

python -m moegen.tune.building JOB.json
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..builder import build
from ..config import MoEConfig
from ..errors import CandidateError, MoegenError, ScheduleError
from ..machine import end_with_parent
from ..target import Target, usable_processors
from . import kinds
from .processes import in_parallel, run_module


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to build: knobs of one regime, the rest being as it is by default."""

    regime: str
    knobs: Mapping[str, int]


class Workshop:
    """Where the candidates of one layer are built; what they have in common is compiled once.

    Args:
        config: the layer.
        target: what it is compiled for.
        folder: for artifacts and objects.
        limit_seconds: a build that takes longer is a hang.
    """

    def __init__(self, config: MoEConfig, target: Target, folder: pathlib.Path, limit_seconds: float = 300.0) -> None:
        self.config, self.target, self.folder, self.limit_seconds = config, target, folder, limit_seconds
        self._count = 0
        (folder / "objects").mkdir()

    def build(self, candidates: Sequence[Candidate]) -> list[pathlib.Path | CandidateError]:
        """Artifacts of the candidates, built side by side, or why there is none."""
        todo = [(candidate, self._new_folder()) for candidate in candidates]
        return list(in_parallel(lambda each: self._build(*each), todo, usable_processors()))

    def remove(self, artifact: pathlib.Path) -> None:
        """Makes room."""
        shutil.rmtree(artifact.parent, ignore_errors=True)

    def _new_folder(self) -> pathlib.Path:
        self._count += 1
        folder = self.folder / f"built-{self._count}"
        folder.mkdir()
        return folder

    def _build(self, candidate: Candidate, folder: pathlib.Path) -> pathlib.Path | CandidateError:
        try:
            kinds.of(self.target).space(self.config, self.target, candidate.regime).choice(candidate.knobs)
        except ScheduleError as error:
            return CandidateError(str(error), "rejected")
        job = {
            "config": self.config.to_dict(),
            "target": self.target.to_dict(),
            "regime": candidate.regime,
            "knobs": dict(candidate.knobs),
            "out": str(folder),
            "objects": str(self.folder / "objects"),
        }
        file = folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        try:
            run_module("building", [str(file)], self.limit_seconds, folder / "building.log")
        except CandidateError as failure:
            return failure if failure.status == "timeout" else CandidateError(str(failure), "compile")
        return next(path.parent for path in folder.glob("*/manifest.json"))


def main() -> None:
    """Builds what the job says; a failure is one sentence and an exit code."""
    end_with_parent()
    job: dict[str, Any] = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    target = Target.from_dict(job["target"])
    space = kinds.of(target).space(MoEConfig.from_dict(job["config"]), target, job["regime"])
    try:
        build(space.plan(job["knobs"]), out=job["out"], verify=False, known_objects=job["objects"])
    except MoegenError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
