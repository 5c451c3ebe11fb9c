"""Tuning records: what was measured, kept as JSON lines; which of them hold for a layer on this machine, and moving them about.

<folder>/<target slug>/<layer>-<regime>.jsonl   every line by itself, of one `kind`:
    trial     a candidate of a search: how it ended, its knobs and its times beside the default's
    null      the default beside its own copy: what the machine's noise does to a ratio
    decision  the end of a search: the knobs that won, or none, when the default stands
    verdict   whether a decision from elsewhere still beats the default here

`moegen.tune` writes them; a plan reads decisions and verdicts. Lines that cannot be read are passed over, and `read` says which.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from .artifact import default_store
from .choices import REGIMES
from .config import MoEConfig
from .errors import RecordError
from .paths import package_folder

SCHEMA_VERSION = 1
EMULATED = "emulated"  # begins the name of a device that is none: its times are another machine's
KINDS = ("trial", "null", "decision", "verdict")
STATUSES = ("correct", "rejected", "compile", "runtime", "timeout", "wrong")
# What decides the kernels' work. How tokens are routed does not: gating, biases of the router, losses.
LAYER_FIELDS = (
    "experts", "top_k", "hidden", "intermediate", "dtype", "activation", "expert_bias", "shared_intermediate", "weight_on_input",
    "capacity_factor", "weight_dtype", "weight_group", "weight_zero_point", "scale_dtype", "activation_dtype",
)  # fmt: skip
_IN_NAME = 6  # of the layer's fields; the others by their digest, where one is not as usual

_PLAIN = re.compile(r"\w[\w.+-]*")
_NUMBER = (int, float)
_COMMON: dict[str, Any] = {
    "schema_version": int, "kind": str, "regime": str, "layer": dict, "target": str, "created": str, "provenance": dict,
}  # fmt: skip
_FIELDS: dict[str, dict[str, Any]] = {
    "trial": {"trial": int, "status": str, "knobs": dict, "default_seconds": _NUMBER},
    "null": {"ratio": _NUMBER, "band": list, "default_seconds": _NUMBER},
    "decision": {"id": str, "better": bool, "knobs": dict, "points": list, "null": dict, "trials": dict, "reason": str},
    "verdict": {"decision": str, "holds": bool},
}

Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where measured times come from, as far as they depend on it.

    Args:
        sources: SHA-256 of schedules and templates.
        compiler: versions of TVM and of LLVM or NVIDIA's compiler.
        processor: the processor's name, family and model, or the CUDA device's name; empty where a build is for devices that this
            machine has not, when times of all will do that are of real ones.
    """

    sources: str
    compiler: str
    processor: str

    def differs_in(self, other: Mapping[str, Any]) -> list[str]:
        """What of another line's provenance is not as it is here, in words."""
        words = {"processor": "another processor", "compiler": "another compiler", "sources": "other schedules"}
        any_will_do = not self.processor and not str(other.get("processor")).startswith(EMULATED)
        asked = [name for name in words if name != "processor" or not any_will_do]
        return [words[name] for name in asked if other.get(name) != getattr(self, name)]


class Choices(NamedTuple):
    """What the records say about one layer.

    Args:
        used: regime -> the decision whose knobs hold here.
        open: decisions that were made elsewhere and would be used if they beat the default here.
    """

    used: dict[str, Line]
    open: list[Line]


# ---------------------------------------------------------------- places


def user_folder(logs: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The user's records: `logs`, else $MOEGEN_LOGS, else a folder beside the default store."""
    if chosen := logs or os.environ.get("MOEGEN_LOGS"):
        return pathlib.Path(chosen).expanduser()
    store = default_store()
    return store.with_name(f"{store.name}-tuning")


def folders(logs: str | os.PathLike[str] | None = None) -> tuple[pathlib.Path, pathlib.Path]:
    """The user's records and the curated ones, in the order in which they are asked."""
    return user_folder(logs), package_folder("tuning_logs")


def layer_of(config: MoEConfig) -> dict[str, Any]:
    """The fields of a layer that a record belongs to."""
    return {name: getattr(config, name) for name in LAYER_FIELDS}


def layer_name(layer: Mapping[str, Any]) -> str:
    """A layer's part of a file name, different for different layers."""
    e, k, h, i, dtype, activation = (layer[name] for name in LAYER_FIELDS[:_IN_NAME])
    stored = dtype if layer["weight_dtype"] == "same" else f"{dtype}-{layer['weight_dtype']}"
    name = f"e{e}-k{k}-h{h}-i{i}-{stored}-{activation}".replace("_", "-")
    usual = layer_of(MoEConfig(experts=1, top_k=1, hidden=1))
    if all(layer[field] == usual[field] for field in LAYER_FIELDS[_IN_NAME:]):
        return name
    return f"{name}-{hashlib.sha256(json.dumps(layer, sort_keys=True).encode()).hexdigest()[:8]}"


def file_of(folder: pathlib.Path, target: str, layer: Mapping[str, Any], regime: str) -> pathlib.Path:
    """Where the lines of a layer and a regime are."""
    return folder / target / f"{layer_name(layer)}-{regime}.jsonl"


def origin(decision: Line) -> dict[str, Any]:
    """What an artifact keeps of a decision: which it is, when it was made, and what it was worth at the points of its regime."""
    own = [point for point in decision["points"] if point["tokens"] in decision.get("own_tokens", [])]
    worth = [{name: point[name] for name in ("routing", "tokens", "ratio", "band")} for point in own]
    return {"id": decision["id"], "created": decision["created"], "points": worth}


# ---------------------------------------------------------------- reading


class Read(NamedTuple):
    """A file's lines, and what cannot be read: (line number, reason)."""

    lines: list[Line]
    damaged: list[tuple[int, str]]


def read(path: pathlib.Path) -> Read:
    """The lines of a file; none where there is no such file.

    Raises:
        RecordError: the file cannot be read at all.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Read([], [])
    except OSError as error:
        raise RecordError(f"cannot read {str(path)!r}: {error.strerror}") from error
    found = Read([], [])
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw, parse_constant=_refuse)
        except (ValueError, RecursionError):
            whole = number <= data.count(b"\n")
            found.damaged.append((number, "it is not JSON" if whole else "it is truncated"))
            continue
        if reason := fault(line):
            found.damaged.append((number, reason))
        else:
            found.lines.append(line)
    return found


def fault(line: Any) -> str:
    """What is wrong with a line; nothing when it is whole."""
    if not isinstance(line, dict):
        return "it is not an object"
    version, kind = line.get("schema_version"), line.get("kind")
    if version != SCHEMA_VERSION:
        return f"schema_version={version!r}, this moegen reads {SCHEMA_VERSION}"
    if kind not in KINDS:
        return f"kind={kind!r} must be one of {', '.join(KINDS)}"
    for name, wanted in {**_COMMON, **_FIELDS[kind]}.items():
        value = line.get(name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            return f"{name} is missing or of the wrong kind"
    if set(line["layer"]) != set(LAYER_FIELDS):
        return "layer has other fields than this moegen's layers"
    if line["regime"] not in REGIMES:
        return f"regime={line['regime']!r} must be one of {', '.join(REGIMES)}"
    if not all(_PLAIN.fullmatch(name) for name in (line["target"], layer_name(line["layer"]))):
        return "target or layer cannot be the name of a file"
    if kind == "trial" and line["status"] not in STATUSES:
        return f"status={line['status']!r} must be one of {', '.join(STATUSES)}"
    knobs = line.get("knobs", {})
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in knobs.values()):
        return "a knob is not a whole number"
    if kind == "decision":
        if line["better"] and not line["points"]:
            return "it is better, but has no points"
        if not _is_band(line["null"].get("band")):
            return "null lacks its band"
        if not isinstance(line.get("own_tokens", []), list):
            return "own_tokens is not a list"
        return next((reason for point in line["points"] if (reason := _point_fault(point))), "")
    return ""


def _point_fault(point: Any) -> str:
    if not isinstance(point, dict) or not isinstance(point.get("tokens"), int) or not isinstance(point.get("routing"), str):
        return "a point lacks tokens or routing"
    return "" if _is_positive(point.get("ratio")) and _is_band(point.get("band")) else "a point lacks its ratio or band"


def _is_band(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value))


def _is_positive(value: Any) -> bool:
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and value > 0 and math.isfinite(value)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def everything(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, Read]]:
    """All files of a folder of records, in order."""
    for path in sorted(folder.glob("*/*.jsonl")):
        yield path, read(path)


# ---------------------------------------------------------------- which of them hold


def choose(
    config: MoEConfig, target: str, regimes: Sequence[str], here: Provenance, logs: str | os.PathLike[str] | None = None
) -> Choices:
    """The decisions that apply to a layer, the user's before curated ones, the newest first.

    A decision holds where it was made (same schedules, compiler and processor) or where a verdict of this machine says so.
    """
    found = Choices({}, [])
    for regime in regimes:
        asked = [_lines(folder, config, target, regime) for folder in folders(logs)]
        verdicts = verdicts_here([line for lines in asked for line in lines], here)
        unsure: list[Line] = []
        for decision in (line for lines in asked for line in reversed(lines) if line["kind"] == "decision"):
            holds = verdicts.get(decision["id"]) if here.differs_in(decision["provenance"]) else True
            if holds:
                found.used.update({regime: decision} if decision["better"] else {})
                break
            unsure += [decision] if holds is None and decision["better"] else []
        else:
            found.open.extend(unsure[:1])
    return found


def verdicts_here(lines: Sequence[Line], here: Provenance) -> dict[str, bool]:
    """Id of a decision -> whether it holds, by the last verdict that was given under the same circumstances."""
    given = [line for line in lines if line["kind"] == "verdict" and not here.differs_in(line["provenance"])]
    return {line["decision"]: line["holds"] for line in given}


def _lines(folder: pathlib.Path, config: MoEConfig, target: str, regime: str) -> list[Line]:
    layer = layer_of(config)
    lines = read(file_of(folder, target, layer, regime)).lines
    return [line for line in lines if (line["layer"], line["target"], line["regime"]) == (layer, target, regime)]


# ---------------------------------------------------------------- from machine to machine


def export(folder: pathlib.Path) -> list[str]:
    """All readable lines of a folder, as text."""
    return [json.dumps(line, sort_keys=True) for _, found in everything(folder) for line in found.lines]


def accepted(path: pathlib.Path) -> list[Line]:
    """The lines of an exported file, all of them whole.

    Raises:
        RecordError: the file cannot be read, or a line is damaged; the message says which.
    """
    if not path.is_file():
        raise RecordError(f"there is no file {str(path)!r}; `moegen tune --export FILE` writes one")
    found = read(path)
    if found.damaged:
        number, reason = found.damaged[0]
        raise RecordError(f"{str(path)!r} line {number} is damaged ({reason}): nothing was imported; export the records again")
    return found.lines
