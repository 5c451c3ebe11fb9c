"""Load tests: the same requests to a server, or to a compiled layer and what people would use instead."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from ..bench import workload
from ..bench.contenders.family import Settings
from ..bench.contenders.process import WorkerLost
from ..bench.contenders.roster import OURS, chosen_families
from ..bench.preparing import compiled, fit_into_memory
from ..errors import MeasureError
from ..presets import weight_bytes
from ..target import usable_processors
from . import results
from .arrivals import Load
from .layers import Checked, Layers
from .outcomes import Played
from .request import LayerTarget, LoadRequest, ServerTarget, check


class Watch:
    """Is told how a load test goes; this one keeps quiet."""

    def step(self, what: str) -> None:
        """`what` begins."""

    def ended(self, count: int) -> None:
        """So many requests of this turn have ended."""


@dataclasses.dataclass
class _Standing:
    """A contender's turns so far."""

    turns: list[tuple[Load, Played]] = dataclasses.field(default_factory=list)
    checks: list[Checked] = dataclasses.field(default_factory=list)
    lost: str = ""

    @property
    def wrong(self) -> str:
        return next((check.wrong for check in self.checks if check.wrong), "")


def serve_bench(target: ServerTarget | LayerTarget, asked: LoadRequest, watch: Watch | None = None) -> dict[str, Any]:
    """Sends a load to a target and measures what comes back.

    An interrupt (KeyboardInterrupt) once requests are on their way ends the test, and the document, which says so, holds what was
    measured until then.

    Returns:
        The document that `moegen.serve_bench.results` describes.

    Raises:
        MeasureError: the request is impossible, the layer does not fit into memory, or the client is not installed.
        BuildError: the layer cannot be built.
    """
    check(target, asked)
    seen = watch or Watch()
    if isinstance(target, ServerTarget):
        return _server(target, asked, seen)
    return _layer(target, asked, seen)


# ---------------------------------------------------------------- a server


def _server(target: ServerTarget, asked: LoadRequest, watch: Watch) -> dict[str, Any]:
    from . import client, openai_api  # here, because a layer needs no client

    shown = openai_api.url_without_secrets(target)
    if target.model is None:
        target = dataclasses.replace(target, model=openai_api.only_model(target))
    described: dict[str, Any] = {"kind": results.SERVER, "url": shown, "model": target.model, "endpoint": target.endpoint}
    described |= {"timeout_s": target.timeout_s, "extra_body": target.extra_body}
    document = results.new_document(described, asked)
    standing = _Standing()

    def take(number: int) -> bool:
        load = asked.load.with_seed(asked.load.seed + number)
        watch.step(_said(results.SERVER, number, asked))
        played = client.play(target, load, asked.warmup_load() if number == 0 else None, watch.ended)
        standing.turns.append((load, played))
        return played.interrupted

    document["interrupted"] = _rounds(asked.rounds, take)
    return _concluded(document, {results.SERVER: standing}, asked)


def _rounds(count: int, take: Callable[[int], bool]) -> bool:
    """Round after round until one was interrupted; returns whether."""
    try:
        return any(take(number) for number in range(count))
    except KeyboardInterrupt:  # between turns: what was measured stays
        return True


def _said(name: str, number: int, asked: LoadRequest) -> str:
    return f"{name}, round {number + 1} of {asked.rounds}" if asked.rounds > 1 else name


# ---------------------------------------------------------------- layers


def _layer(target: LayerTarget, asked: LoadRequest, watch: Watch) -> dict[str, Any]:
    families = chosen_families(target.against)
    fit = fit_into_memory(target.subject, families, target.memory_bytes)
    threads = target.threads or usable_processors()
    watch.step(f"building {target.subject.label}")
    made, build_seconds = compiled(target.subject, fit.config, target.store)
    described = {
        "kind": "layer",
        "name": target.subject.label,
        "preset": target.subject.preset,
        "config": fit.config.to_dict(),
        "scaled": fit.to_dict(),
        "artifact": made.name,
        "build_seconds": build_seconds,
        "threads": threads,
        "routing": target.routing,
        "limits": dataclasses.asdict(target.limits),
    }
    document = results.new_document(described, asked)
    with workload.temporary_folder(weight_bytes(fit.config)) as folder:
        watch.step(f"drawing the weights of {target.subject.label}")
        workload.make(folder, fit.config, target.routing, asked.load.seed)
        watch.step("starting the contenders")
        settings = Settings(pathlib.Path(folder), threads, str(made.path))
        with Layers(families, settings, asked.load.seed, target.patience_seconds) as layers:
            if OURS not in layers.names:
                raise MeasureError(f"moegen itself cannot be measured: {layers.absent.get(OURS, 'its worker did not start')}")
            document["absent"] = [{"name": name, "reason": reason} for name, reason in layers.absent.items()]
            standings = {name: _Standing() for name in layers.names}
            document["interrupted"] = _rounds(asked.rounds, lambda number: _round(number, layers, standings, target, asked, watch))
    return _concluded(document, standings, asked)


def _round(
    number: int, layers: Layers, standings: dict[str, _Standing], target: LayerTarget, asked: LoadRequest, watch: Watch
) -> bool:
    """A turn of each contender with the same requests, in rotating order; returns whether it was interrupted."""
    load = asked.load.with_seed(asked.load.seed + number)
    shift = number % len(layers.names)
    for name in layers.names[shift:] + layers.names[:shift]:
        standing = standings[name]
        if standing.lost or standing.wrong:
            continue
        watch.step(_said(name, number, asked))
        try:
            played, kept = layers.play(name, load, asked.warmup_load(), target.limits, target.most_seconds, watch.ended)
        except WorkerLost as loss:
            standing.lost = str(loss)
            continue
        standing.turns.append((load, played))  # before the comparison, which may be interrupted, too
        watch.step(f"{_said(name, number, asked)}, compared with the reference")
        standing.checks.append(layers.check(name, kept))
        if played.interrupted:
            return True
    return False


# ---------------------------------------------------------------- results


def _concluded(document: dict[str, Any], standings: dict[str, _Standing], asked: LoadRequest) -> dict[str, Any]:
    """The document with its contenders, ratios and notes."""
    for name, standing in standings.items():
        if standing.turns or standing.lost:
            document["contenders"].append(_entry(name, standing, asked))
    turns = {name: [played for _, played in standing.turns] for name, standing in standings.items()}
    own = results.ours(document)
    for entry in document["contenders"]:
        if own is not None and own["summary"] is not None and entry["summary"] is not None and entry is not own:
            entry["ratio_to_moegen"] = results.ratios(turns[entry["name"]], turns[own["name"]])
    document["notes"] = results.notes(document, turns)
    return document


def _entry(name: str, standing: _Standing, asked: LoadRequest) -> dict[str, Any]:
    entry = results.entry(name, standing.turns, asked)
    entry["checks"] = [
        {"rows": check.rows, "relative_l2": check.relative_l2, "same_alone": check.same_alone} for check in standing.checks
    ]
    if any(check.rows for check in standing.checks):
        entry["status"] = "correct"
    if standing.wrong or standing.lost:
        entry |= {"status": "wrong" if standing.wrong else "failed", "reason": standing.wrong or standing.lost, "summary": None}
    return entry
