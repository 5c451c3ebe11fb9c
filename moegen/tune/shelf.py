"""The records there are: listed, exported, imported, and told in a sentence."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import click

from .. import records
from ..display import age, as_json_text, gains, table
from ..errors import BuildError, RecordError
from ..records import Line, Provenance
from .journal import Journal

Logs = str | os.PathLike[str] | None


def said(line: Line) -> str:
    """A decision in one line."""
    outcome = "tuned" if line["better"] else "the default stands"
    return f"{line['regime']}: {outcome}: {line['reason']} ({_counts(line['trials'])})"


def kept(logs: Logs) -> str:
    """What to say about a run that was interrupted."""
    return f"What was measured is kept in {str(records.user_folder(logs))!r}; the same command goes on from there."


def _counts(trials: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in trials.items()) or "no trials"


# ---------------------------------------------------------------- the list


def show(logs: Logs, as_json: bool) -> None:
    """Prints every decision there is, the user's and the curated ones."""
    found = [row for where, folder in zip(("user", "curated"), records.folders(logs), strict=True) for row in _rows(where, folder)]
    if as_json:
        click.echo(as_json_text(found))
        return
    if not found:
        click.echo(
            f"there are no tuning records, neither in {str(records.user_folder(logs))!r} nor with moegen; `moegen tune` makes them"
        )
        return
    whole = [row for row in found if "damaged" not in row]
    names = ("layer", "target", "regime", "age")
    lines = [(*(row[name] for name in names), gains(_own(row)), row["standing"], row["where"]) for row in whole]
    if lines:
        click.echo(table((*names, "time less, at T tokens", "standing", "from"), lines))
    for row in found:
        if "damaged" in row:
            click.echo(f"damaged: {row['file']} line {row['line']}: {row['damaged']}")


def _rows(where: str, folder: pathlib.Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path, found in records.everything(folder):
        rows += [{"where": where, "file": str(path), "line": number, "damaged": why} for number, why in found.damaged]
        decisions = [line for line in found.lines if line["kind"] == "decision"]
        trials = [line for line in found.lines if line["kind"] == "trial"]
        for line in decisions[-1:]:
            rows.append(_row(where, path, line, standing(line, found.lines, _here(line["target"]))))
        if trials and not decisions:
            rows.append(_row(where, path, trials[-1], f"unfinished, {len(trials)} trials") | {"points": []})
    return rows


def _row(where: str, path: pathlib.Path, line: Line, how: str) -> dict[str, Any]:
    points = [{name: value for name, value in point.items() if name != "samples"} for point in line.get("points", [])]
    return {
        "where": where,
        "file": str(path),
        "id": line.get("id"),
        "layer": records.layer_name(line["layer"]),
        "target": line["target"],
        "regime": line["regime"],
        "created": line["created"],
        "age": age(line["created"]),
        "knobs": line["knobs"],
        "points": points,
        "own_tokens": line.get("own_tokens", []),
        "standing": how,
    }


def _own(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [point for point in row["points"] if point["tokens"] in row["own_tokens"]]


def _here(target: str) -> Provenance | None:
    """The provenance of what would be measured here for a target's slug; None without a compiler, when nothing would."""
    try:
        from . import kinds  # here, because a list needs no compiler
    except BuildError:
        return None
    return kinds.of(target).provenance()


def standing(line: Line, lines: Sequence[Line], here: Provenance | None) -> str:
    """What a decision is good for on this machine."""
    if not line["better"]:
        return "no better than the default"
    if here is None or not (differences := here.differs_in(line["provenance"])):
        return "used here"
    verdict = records.verdicts_here(lines, here).get(line["id"])
    origin = " and ".join(f"from {what}" for what in differences)
    if verdict is None:
        return f"{origin}: measured when the layer is built"
    return f"{origin}, {'used here' if verdict else 'no better than the default here'}"


# ---------------------------------------------------------------- from machine to machine


def export_to(file: pathlib.Path, logs: Logs) -> str:
    """Writes the user's records to one file.

    Raises:
        RecordError: there are none, or the file cannot be written.
    """
    lines = records.export(records.user_folder(logs))
    if not lines:
        raise RecordError(f"there are no tuning records in {str(records.user_folder(logs))!r}; `moegen tune` makes them")
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        raise RecordError(f"cannot write {str(file)!r}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return f"wrote {len(lines)} records to {file}"


def import_from(file: pathlib.Path, logs: Logs) -> str:
    """Adds the records of an exported file to the user's; those that are there already are passed over.

    Raises:
        RecordError: a line is damaged, and nothing was imported; or the records cannot be written.
    """
    groups: dict[pathlib.Path, list[Line]] = {}
    for line in records.accepted(file):
        path = records.file_of(records.user_folder(logs), line["target"], line["layer"], line["regime"])
        groups.setdefault(path, []).append(line)
    added = known = 0
    for path, lines in groups.items():
        with Journal(path) as journal:
            new = [line for line in lines if line not in journal.lines]
            for line in new:
                journal.append(line)
        added, known = added + len(new), known + len(lines) - len(new)
    return f"took over {added} records{f', {known} were there already' if known else ''}"
