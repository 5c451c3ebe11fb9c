"""Benchmarks: layers, moegen beside what people would use instead, under ceilings measured in the same run.

Each run makes one workload (weights and batches in files), starts one worker process for each family of contenders, and
measures point after point. Results are plain JSON values, see `moegen.bench.results`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from ..artifact import Artifact
from ..config import MoEConfig
from ..errors import MeasureError
from ..presets import Fitted, weight_bytes
from ..target import usable_processors
from . import results, workload
from .ceilings import Probe
from .contenders.family import Settings
from .contenders.roster import OURS, chosen_families
from .contenders.team import Team
from .measure import Report, measure_point
from .preparing import compiled, fit_into_memory
from .request import Request, Subject, check


class Watch:
    """Is told how a benchmark goes; this one keeps quiet."""

    def step(self, what: str, turns: int = 0) -> None:
        """`what` begins; `turns` rounds were done."""

    def run(self, run: dict[str, Any]) -> None:
        """A run's contenders are ready; it has no points yet."""

    def point(self, run: dict[str, Any], document: dict[str, Any]) -> None:
        """The last point of `run` was measured."""


def bench(
    subjects: Sequence[Subject], request: Request | None = None, document: dict[str, Any] | None = None, watch: Watch | None = None
) -> dict[str, Any]:
    """Measures every subject at every number of threads, routing and number of tokens.

    Args:
        document: results to add to, in place; points that it has already are not measured again.

    Returns:
        The document, whose runs and points are in the order in which they were measured.

    Raises:
        MeasureError: the request is impossible, or a layer does not fit into memory.
        BuildError: a layer cannot be built, or there is no C++ compiler for the probes.
    """
    asked = request or Request()
    found = document if document is not None else results.new_document()
    seen = watch or Watch()
    check(asked)
    for subject in subjects:
        for routing in asked.routings:
            for threads in asked.threads or (usable_processors(),):
                _run(subject, asked, routing, threads, found, seen)
    return found


# ---------------------------------------------------------------- one run


def _run(subject: Subject, asked: Request, routing: str, threads: int, document: dict[str, Any], watch: Watch) -> None:
    families = chosen_families(asked.against)
    fit = fit_into_memory(subject, families, asked.memory_bytes)
    earlier = _earlier(document, fit.config, threads, routing, asked.seed)
    todo = [t for t in asked.tokens if earlier is None or t not in [p["tokens"] for p in earlier["points"]]]
    watch.step("", (len(asked.tokens) - len(todo)) * asked.effort.rounds)
    if not todo:
        return
    watch.step(f"building {subject.label}")
    made, build_seconds = compiled(subject, fit.config, asked.store)
    with workload.temporary_folder(weight_bytes(fit.config)) as folder:
        watch.step(f"drawing the weights of {subject.label}")
        workload.make(folder, fit.config, routing, asked.seed)
        watch.step("starting the contenders")
        settings = Settings(folder, threads, str(made.path))
        with Team(families, settings, asked.effort.patience_seconds) as team, Probe(threads) as probe:
            run = earlier or _new_run(subject, fit, made, threads, routing, asked.seed, build_seconds, team)
            if earlier is None:
                _first_call(run, team, folder, todo[0], asked.seed)
                document["runs"].append(run)
            watch.run(run)
            _points(run, todo, team, probe, folder, asked, document, watch)


def _points(
    run: dict[str, Any],
    todo: list[int],
    team: Team,
    probe: Probe,
    folder: pathlib.Path,
    asked: Request,
    document: dict[str, Any],
    watch: Watch,
) -> None:
    too_slow: dict[str, str] = {}
    for tokens in sorted(todo):
        point = measure_point(
            team,
            probe,
            folder,
            tokens,
            asked.seed,
            asked.effort,
            dense=asked.dense,
            too_slow=too_slow,
            report=_reporting(watch, f"{run['name']}, {tokens} tokens"),
        )
        for entry in point["contenders"]:
            took = entry["seconds"]["median"] if entry["seconds"] else 0.0
            if took > asked.effort.most_call_seconds:
                too_slow[entry["name"]] = f"left out: a call took {took:.1f} s at {tokens} tokens already"
        run["points"].append(point)
        watch.point(run, document)


def _reporting(watch: Watch, where: str) -> Report:
    return lambda what, turns: watch.step(what and f"{where}: {what}", turns)


def _earlier(document: dict[str, Any], config: MoEConfig, threads: int, routing: str, seed: int) -> dict[str, Any] | None:
    """The run of the document that measured the same."""
    key = (config.to_dict(), threads, routing, seed)
    same = (run for run in document["runs"] if (run["config"], run["threads"], run["routing"], run["seed"]) == key)
    return next(same, None)


def _new_run(
    subject: Subject, fit: Fitted, made: Artifact, threads: int, routing: str, seed: int, build: float | None, team: Team
) -> dict[str, Any]:
    if OURS not in team.names:
        raise MeasureError(f"moegen itself cannot be measured: {team.absent.get(OURS, 'its worker did not start')}")
    ours, config = team.facts[OURS], fit.config
    label = f"{subject.label} (scaled down)" if fit.changes else subject.label
    return {
        "preset": subject.preset,
        "name": f"{label} {config.dtype} {threads} thread{'s' if threads > 1 else ''} {routing}",
        "config": config.to_dict(),
        "scaled": fit.to_dict(),
        "threads": threads,
        "routing": routing,
        "seed": seed,
        "artifact": made.name,
        "weights_bytes": weight_bytes(config),
        "packed_bytes": ours["packed_bytes"],
        "library_bytes": made.library.stat().st_size,
        "seconds": {"build": build, **ours["seconds"], "first_call": None},
        "absent": [{"name": name, "reason": reason} for name, reason in team.absent.items()],
        "points": [],
    }


def _first_call(run: dict[str, Any], team: Team, folder: pathlib.Path, tokens: int, seed: int) -> None:
    """The time of our very first call, which starts the threads and allocates the workspace."""
    workload.make_batches(folder, workload.read_layer(folder), tokens, seed)
    team.point(tokens)
    reply = team.ask(OURS, "check", rows=[[0]], to=str(folder / "checked.npy"))
    run["seconds"]["first_call"] = reply["seconds"][0] if "seconds" in reply else None
    workload.remove_batches(folder, tokens)
