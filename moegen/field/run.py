"""A run: surroundings, checks, cells in the order of their importance, a short tuning; what is done is written at once."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..artifact import Artifact
from ..config import MoEConfig
from ..cuda.device_count import devices
from ..errors import ArtifactError, MeasureError
from ..presets import PRESETS, preset
from . import checks, jobs, stock, summary, surroundings
from .budget import Budget
from .cells import CHECKED, LAYERS, ROUTINGS, VARIANTS, WIDE, Cell, cells
from .targets import TOKENS
from .watching import Lost, Measurer

STEPS = ("proofs", "tests", "checkers", "cells")
RESULTS, TABLE, LOG = "results.json", "table.md", "log.txt"
DEFAULT_ARCH = "sm_90a"
_CHECK_SHARE = 0.35  # of the whole time
_CLOSING_SECONDS = 12.0
_VAIN = 3
_ATTEMPTS = 4  # at a cell, each without the contender that the one before was lost with

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What a run does.

    Args:
        out: where results go.
        minutes: of the whole run.
        artifacts: the store with built layers; what it lacks is built into it where there is a compiler.
        layers, tokens, routings: what is measured.
        steps: entries of `STEPS`.
        arch: what is built for.
        tune_minutes: for `moegen tune --target cuda` of the first layer, at the end.
    """

    out: pathlib.Path
    minutes: float
    artifacts: pathlib.Path
    layers: tuple[str, ...] = LAYERS
    tokens: tuple[int, ...] = TOKENS
    routings: tuple[str, ...] = ROUTINGS
    steps: tuple[str, ...] = STEPS
    arch: str = DEFAULT_ARCH
    tune_minutes: float = 0.0


def layers_of(names: Sequence[str]) -> dict[str, MoEConfig]:
    """The presets to measure, the small layers to prove and the one for tests, by name."""
    return {name: preset(name) for name in names} | VARIANTS | {"wide": WIDE}


def prepare(asked: Request, say: Say) -> list[Artifact]:
    """The artifacts of a run, those that are missing built where there is a compiler.

    Raises:
        ArtifactError: there are none.
    """
    wanted = layers_of(asked.layers)
    present = {artifact.config for artifact in stock.found(asked.artifacts)}
    if any(config not in present for config in wanted.values()) and importlib.util.find_spec("tvm") is not None:
        from .building import build_missing  # needs the compiler

        for line in build_missing(wanted, asked.artifacts, asked.arch):
            say(line)
    found = stock.found(asked.artifacts)
    if not any(artifact.config in wanted.values() for artifact in found):
        raise ArtifactError(
            f"{str(asked.artifacts)!r} has none of the layers of this run, and nothing can be built here: build them where "
            "moegen[build] is installed, with `python -m moegen.field --only-build --artifacts FOLDER`"
        )
    return found


def run(asked: Request, say: Say = print) -> dict[str, Any]:
    """The whole run; returns the document that `results.json` has.

    Raises:
        MeasureError: there is no device.
        ArtifactError: there are no artifacts.
    """
    if not devices():
        raise MeasureError("there is no CUDA device here, or no NVIDIA driver, and nothing is measured without one")
    if surroundings.emulated() and "cells" in asked.steps:
        raise MeasureError(
            "this is an emulated device, whose times mean nothing: leave the step cells out, or run this on a real one"
        )
    budget = Budget(asked.minutes * 60 - _CLOSING_SECONDS)
    wanted = cells(asked.layers, asked.tokens, asked.routings)
    asked.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "asked": {
            name: str(value) if isinstance(value, pathlib.Path) else value for name, value in dataclasses.asdict(asked).items()
        },
        "surroundings": surroundings.surroundings(0),
        "artifacts": [],
        "checks": [],
        "cells": [],
        "left_out": [],
        "lost": [],
    }
    for part in ("device", "state", "packages", "programs"):
        say(f"{part}: " + ", ".join(f"{name} {value}" for name, value in document["surroundings"][part].items() if value))
    artifacts = prepare(asked, say)
    document["artifacts"] = [{"name": one.name, "created": one.manifest.get("created")} for one in artifacts]
    with open(asked.out / LOG, "w", encoding="utf-8") as log, _written(document, asked.out):
        for outcome in jobs.run_together(_checks(asked, artifacts, budget, document)):
            log.write(f"---- {outcome.name}\n{outcome.output}\n{outcome.said}\n")
            document["checks"].append(checks.verdict(outcome))
            said = document["checks"][-1]
            say(f"{said['name']}: {said['status']} ({said['seconds']} s) {said['why']}")
        if "cells" in asked.steps:
            log.flush()
            with contextlib.closing(Measurer(log, lambda contender, what: None)) as measurer:
                for _ in measure(measurer, wanted, artifacts, budget, document, say):
                    write(document, asked.out)
        if asked.tune_minutes:
            document["tuning"] = tune(asked, log)
            say(f"tuning: {document['tuning']['status']} {document['tuning']['why']}")
    say(summary.closing(document))
    return document


def _checks(asked: Request, artifacts: Sequence[Artifact], budget: Budget, document: dict[str, Any]) -> list[jobs.Job]:
    """The jobs of the steps that are asked for; what cannot be is named."""
    seconds = budget.left * (_CHECK_SHARE if "cells" in asked.steps else 1.0)
    first = {
        name: str(stock.of_layer(config, artifacts)[0].path)
        for name, config in layers_of(asked.layers).items()
        if stock.of_layer(config, artifacts)
    }
    found: list[jobs.Job] = []
    left_out = document["left_out"]
    left_out += [{"what": name, "why": "no artifact"} for name in layers_of(asked.layers) if name not in first]
    if "proofs" in asked.steps:
        variants = [path for name, path in first.items() if name in VARIANTS]
        found += checks.proofs(variants, {name: path for name, path in first.items() if name in PRESETS}, seconds)
    if "tests" in asked.steps:
        made = checks.tests(asked.artifacts, seconds)
        left_out += [] if made else [{"what": "GPU tests", "why": "this is no checkout with tests/test_gpu.py"}]
        found += made
    if "checkers" in asked.steps:
        program = surroundings.checker()
        if program and CHECKED in first:
            found += checks.checkers(program, first[CHECKED], seconds)
        else:
            left_out.append(
                {"what": "memcheck and racecheck", "why": "no compute-sanitizer here" if not program else "no artifact"}
            )
    return found


def measure(
    measurer: Measurer, wanted: Sequence[Cell], artifacts: Sequence[Artifact], budget: Budget, document: dict[str, Any], say: Say
) -> Iterator[Cell]:
    """Measures cells while there is time; yields each that is done. Contenders that a process was lost with are left out of cells
    of the same layer and size; a process that is lost again and again without one is not started any more."""
    without: dict[tuple[str, int], dict[str, str]] = {}
    for cell in wanted:
        paths = [str(artifact.path) for artifact in stock.of_layer(preset(cell.layer), artifacts)]
        if not paths:
            continue
        if not budget.allows(cell.tokens):
            document["left_out"].append(
                {"what": str(cell), "why": f"no time: {budget.expected(cell.tokens):.0f} s needed, {budget.left:.0f} left"}
            )
            continue
        known = without.setdefault((cell.layer, cell.tokens), {})
        if _hopeless(document["lost"]):
            document["left_out"].append({"what": str(cell), "why": "the measuring process does not stay alive"})
            continue
        before = budget.left
        result = _attempts(measurer, cell, paths, known, budget, document, say)
        if result is None:
            continue
        budget.took(cell.tokens, before - budget.left)
        document["cells"].append(result | {"took": before - budget.left})
        say(summary.closing({"cells": [result]}))
        yield cell


def _hopeless(lost: Sequence[Mapping[str, Any]]) -> bool:
    return len(lost) >= _VAIN and not any(loss["contender"] for loss in lost[-_VAIN:])


def _attempts(
    measurer: Measurer, cell: Cell, paths: Sequence[str], known: dict[str, str], budget: Budget, document: dict[str, Any], say: Say
) -> dict[str, Any] | None:
    """A cell's measurements; None where they cannot be had, and the document says why."""
    why = ""
    for _ in range(_ATTEMPTS):
        try:
            return measurer.measure(cell, paths, known, budget.left)
        except Lost as lost:
            why = str(lost)
            say(f"{cell}: lost with {why}")
            document["lost"].append({"cell": cell.to_dict(), "contender": lost.contender, "why": why})
            if not lost.contender or not budget.left:
                break
            known[lost.contender] = why
        except MeasureError as error:
            why = str(error)
            break
    document["left_out"].append({"what": str(cell), "why": why})
    return None


def tune(asked: Request, log: Any) -> dict[str, Any]:
    """`moegen tune --target cuda` of the first layer for so long, where this moegen has it; its records are in OUT/tuning."""
    help_text = jobs.run(jobs.Job("help", (sys.executable, "-m", "moegen", "tune", "--help"), 60))
    if "cuda" not in help_text.output:
        return {"status": checks.SKIPPED, "why": "this moegen does not tune for cuda"}
    command = (sys.executable, "-m", "moegen", "tune", "--target", "cuda", "--preset", asked.layers[0], "--arch", asked.arch)
    outcome = jobs.run(jobs.Job("tuning", command, asked.tune_minutes * 60, {"MOEGEN_LOGS": str(asked.out / "tuning")}))
    log.write(f"---- tuning\n{outcome.output}\n{outcome.said}\n")
    ended = "the time was over" if outcome.status == jobs.TIMED_OUT else checks.verdict(outcome)["why"]
    return {"status": outcome.status, "why": ended}


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def _written(document: Mapping[str, Any], out: pathlib.Path) -> Iterator[None]:
    """Whatever happens, what is known then is in the files; pictures where matplotlib is."""
    try:
        yield
    finally:
        write(document, out)
        if importlib.util.find_spec("matplotlib") is not None and document["cells"]:
            from .drawing import draw

            draw(document, out)


def write(document: Mapping[str, Any], out: pathlib.Path) -> None:
    """Both files, each replaced as a whole."""
    for name, text in ((RESULTS, json.dumps(document, indent=1)), (TABLE, summary.markdown(document))):
        partial = out / f".{name}"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out / name)
