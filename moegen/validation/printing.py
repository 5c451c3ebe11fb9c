"""What a terminal shows at the end: one line for each claim that needs attention, and the count of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..display import size
from .claims import FAIL, NOT_TESTED, PASS, counted

Json = Mapping[str, Any]


def summary_lines(document: Json, page: str) -> Iterator[str]:
    """The summary: every layer's claims, failures and what was not tested with the reason."""
    where, machine = document["environment"], document["environment"]["machine"]
    rest = [f"{machine['processors']} processors", size(machine["memory_bytes"]), ", ".join(where["gpus"]) or "no GPU"]
    yield f"moegen {where['moegen']} on {machine['cpu']}, {', '.join(rest)}"
    for layer in document["layers"]:
        verdicts = [v for v in document["verdicts"] if v["layer"] == layer["label"]]
        yield f"\n{layer['label']}  {layer['words']}"
        for verdict in verdicts:
            yield f"  {_MARKS[verdict['status']]:<10}  {verdict['says']}: {_measured(verdict)}"
    yield ""
    for what in document["left_out"]:
        yield f"left out: {what}"
    if document["others"] is not None:
        yield f"other processes had {document['others']:.0%} of the processors meanwhile"
    yield f"{counted(document['verdicts'])}; {document['seconds']:.0f} s; {page}"


_MARKS = {PASS: "pass", FAIL: "FAIL", NOT_TESTED: "not tested"}


def _measured(verdict: Json) -> str:
    words = str(verdict["words"])
    return words if verdict["status"] == NOT_TESTED else f"{words}; {verdict['threshold']}"
