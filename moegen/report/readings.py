"""Reading what a report is made of: results of `moegen bench`, records of `moegen tune`, and counts of experts.

What comes out of here is complete: every field that a picture or a table uses is there and of the right kind.
"""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from ..bench.results import KIND, SCHEMA_VERSION
from ..errors import InputError, ReportError
from ..monitoring import ExpertLoad
from ..monitoring.load import KIND as LOAD_KIND
from ..records import KINDS as RECORD_KINDS

STATUSES = ("correct", "wrong", "failed")
NUMBER = (int, float)


class Maybe(NamedTuple):
    """A value that may be null."""

    shape: Any


class Each(NamedTuple):
    """A mapping from any names to values of one shape."""

    shape: Any


CONTENDER = {
    "name": str,
    "status": str,
    "reason": Maybe(str),
    "seconds": Maybe({name: Maybe(NUMBER) for name in ("median", "p95", "p99", "min", "max")}),
    "calls": Maybe(int),
    **dict.fromkeys(
        ("tokens_per_s", "flops_per_s", "bytes_per_s", "roofline_fraction", "ratio_to_moegen", "relative_l2"), Maybe(NUMBER)
    ),
}
POINT = {
    "tokens": int,
    "flops": NUMBER,
    "active_experts": NUMBER,
    "weight_bytes_read": NUMBER,
    "ceilings": {
        "flops_per_s": NUMBER,
        "read_bytes_per_s": NUMBER,
        "flops_samples": [NUMBER],
        "read_samples": [NUMBER],
        "kind": str,
    },
    "roofline_seconds": NUMBER,
    "contenders": [CONTENDER],
    "parts": Maybe(Each(NUMBER)),
    "expert_load": Maybe([int]),
    "workspace_bytes": Maybe(int),
    "dense": Maybe({"seconds": NUMBER, "measured_ratio": NUMBER, "arithmetic_ratio": NUMBER, "how": str}),
}
RUN = {
    "preset": Maybe(str),
    "name": str,
    "config": {"experts": int, "top_k": int, "hidden": int, "intermediate": int, "dtype": str},
    "scaled": Maybe({"changes": Each([object]), "why": str}),
    "threads": int,
    "routing": str,
    "seed": int,
    "artifact": str,
    **dict.fromkeys(("weights_bytes", "packed_bytes", "library_bytes"), int),
    "seconds": {name: Maybe(NUMBER) for name in ("build", "load", "bind", "first_call")},
    "absent": [{"name": str, "reason": str}],
    "points": [POINT],
}
BENCH = {
    "schema_version": int,
    "kind": str,
    "created": str,
    "versions": Each(object),
    "machine": {"cpu": str, "processors": int, "l3_bytes": Maybe(int), "memory_bytes": Maybe(int)},
    "runs": [RUN],
}
TRIAL = {"trial": int, "seconds": Maybe(NUMBER), "status": str, "default_seconds": NUMBER}
# What a picture takes the logarithm of, or divides by.
POSITIVE = ("tokens", "flops", "weight_bytes_read", "roofline_seconds")


class Run(NamedTuple):
    """One run of a results file; `label` tells it from all others of the report."""

    label: str
    data: Mapping[str, Any]


class Bench(NamedTuple):
    """One results file."""

    file: str
    data: Mapping[str, Any]


class Tuning(NamedTuple):
    """One file of tuning records, in the order of the trials; times in seconds.

    Args:
        decided: what came of the trials, in words; empty while they are going on.
    """

    label: str
    trials: Sequence[Mapping[str, Any]]
    decided: str


class Readings(NamedTuple):
    """All that was given to a report."""

    benches: list[Bench]
    runs: list[Run]
    tunings: list[Tuning]
    load: ExpertLoad | None = None  # the sum of all files with counts


def read(paths: Sequence[str | os.PathLike[str]]) -> Readings:
    """What the files hold; their kind is told from their content.

    Raises:
        ReportError: no file, or one that is missing or none of these.
    """
    if not paths:
        raise ReportError("a report needs at least one file with results: write one with 'moegen bench'")
    benches: list[Bench] = []
    tunings: list[Tuning] = []
    loads: list[ExpertLoad] = []
    for path in map(pathlib.Path, paths):
        found = _read(path)
        if isinstance(found, Bench):
            benches.append(found)
        else:
            tunings.append(found) if isinstance(found, Tuning) else loads.append(found)
    runs = [run for bench in benches for run in bench.data["runs"]]
    labels = _distinct([run["name"] for run in runs])
    return Readings(benches, [Run(label, run) for label, run in zip(labels, runs, strict=True)], tunings, _sum(loads))


def correct(point: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The contenders of a point that may be shown with a speed."""
    return [c for c in point["contenders"] if c["status"] == "correct"]


def _sum(loads: Sequence[ExpertLoad]) -> ExpertLoad | None:
    try:
        return ExpertLoad.merged(loads) if loads else None
    except InputError as error:
        raise ReportError(f"the counts of experts cannot be added: {error}") from None


def _read(path: pathlib.Path) -> Bench | Tuning | ExpertLoad:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ReportError(f"{path} cannot be read ({what}): give a file that 'moegen bench' or 'moegen tune' wrote") from None
    try:
        whole = _parse(text)
    except ValueError:
        return _tuning(path, text)
    if isinstance(whole, dict) and ("trial" in whole or whole.get("kind") in RECORD_KINDS):
        return _tuning(path, text)
    if isinstance(whole, dict) and whole.get("kind") == LOAD_KIND:
        try:
            return ExpertLoad.from_dict(whole, str(path))
        except InputError as error:
            raise ReportError(str(error)) from None
    if not isinstance(whole, dict) or whole.get("kind") != KIND:
        raise ReportError(
            f'{path} is neither results (with "kind": "{KIND}") nor tuning records (with "trial" in each line) '
            "nor counts of experts"
        )
    return Bench(path.name, _bench(path, whole))


def _bench(path: pathlib.Path, data: Mapping[str, Any]) -> Mapping[str, Any]:
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ReportError(
            f"{path} has schema_version={version!r}, this moegen reads {SCHEMA_VERSION}: measure again, or use what wrote it"
        )
    _check(data, BENCH, path, "")
    for r, run in enumerate(data["runs"]):
        for p, point in enumerate(run["points"]):
            _check_point(point, path, f"runs[{r}].points[{p}]")
    return data


def _check_point(point: Mapping[str, Any], path: pathlib.Path, where: str) -> None:
    """What the shapes do not say: which numbers are positive, and that a correct contender has a speed."""
    for name in POSITIVE:
        if not point[name] > 0:
            _reject(path, f"{where}.{name}", f"is {point[name]}, not positive")
    for name in ("flops_per_s", "read_bytes_per_s"):
        if not point["ceilings"][name] > 0:
            _reject(path, f"{where}.ceilings.{name}", f"is {point['ceilings'][name]}, not positive")
    for c, contender in enumerate(point["contenders"]):
        here = f"{where}.contenders[{c}]"
        if contender["status"] not in STATUSES:
            _reject(path, f"{here}.status", f"is {contender['status']!r}, not one of {', '.join(STATUSES)}")
        speeds = [(contender["seconds"] or {}).get("median"), contender["tokens_per_s"], contender["flops_per_s"]]
        if contender["status"] == "correct" and not all(value is not None and value > 0 for value in speeds):
            _reject(path, here, "is correct but lacks a positive median, tokens_per_s or flops_per_s")


def _tuning(path: pathlib.Path, text: str) -> Tuning:
    trials, decisions = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            trial = _parse(line)
        except ValueError:
            raise ReportError(f"{path} line {number} is not JSON: remove the line, or write the file again") from None
        if isinstance(trial, dict) and trial.get("kind", "trial") != "trial":
            decisions += [trial] if trial["kind"] == "decision" else []
            continue
        _check(trial, TRIAL, path, f"line {number}")
        if not trial["default_seconds"] > 0:
            _reject(path, f"line {number}.default_seconds", f"is {trial['default_seconds']}, not positive")
        trials.append(trial)
    # A run under other circumstances begins anew, in the same file.
    trials = [trial for trial in trials if trial.get("provenance") == trials[-1].get("provenance")]
    if not trials:
        what = "has no trials" if text.strip() else "is empty"
        raise ReportError(f"{path} {what}: give a file that 'moegen bench' or 'moegen tune' wrote")
    decided = [str(d["reason"]) for d in decisions if d.get("reason") and d.get("provenance") == trials[-1].get("provenance")]
    return Tuning(path.stem, sorted(trials, key=lambda trial: int(trial["trial"])), decided[-1] if decided else "")


def _parse(text: str) -> Any:
    """JSON without its extensions: NaN and infinities are refused as any other text that is not JSON."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def _check(value: Any, shape: Any, path: pathlib.Path, where: str) -> None:
    """Compares a value with the shape that it should have; a mapping may have further fields."""
    if isinstance(shape, Maybe):
        return None if value is None else _check(value, shape.shape, path, where)
    if isinstance(shape, dict | Each):
        if not isinstance(value, dict):
            _reject(path, where, f"is {_kind(value)}, not an object")
        fields = shape if isinstance(shape, dict) else dict.fromkeys(value, shape.shape)
        for name, inner in fields.items():
            here = f"{where}.{name}" if where else name
            if name not in value:
                _reject(path, here, "is missing")
            _check(value[name], inner, path, here)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            _reject(path, where, f"is {_kind(value)}, not a list")
        for index, item in enumerate(value):
            _check(item, shape[0], path, f"{where}[{index}]")
    elif shape is not object and (isinstance(value, bool) or not isinstance(value, shape)):
        _reject(path, where, f"is {_kind(value)}, not {_words(shape)}")
    elif isinstance(value, float) and not math.isfinite(value):
        _reject(path, where, "is not finite")


def _reject(path: pathlib.Path, where: str, what: str) -> NoReturn:
    raise ReportError(f"{path}: {where} {what}: write the file again with this version of moegen")


def _words(shape: Any) -> str:
    return {str: "text", int: "an integer"}.get(shape, "a number")


def _kind(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, those that occur more than once numbered."""
    times = collections.Counter(names)
    seen: collections.Counter[str] = collections.Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name} #{seen[name]}" if times[name] > 1 else name)
    return labels
