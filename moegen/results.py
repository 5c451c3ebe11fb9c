"""Results of benchmarks: the JSON document that they are kept in, its CSV form, and tables to read.

A document is {"schema_version": 1, "kind": "moegen-bench", "created", "versions", "machine", "runs": [...]}. A run is one
layer at one number of threads and one routing; its points are numbers of tokens, and a point has one entry for each contender.
Every quantity is in its base unit (seconds, bytes, flops); what could not be measured is null beside a reason.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

from .display import as_json_text, size, table
from .errors import MeasureError
from .machine import this_machine
from .version import __version__

SCHEMA_VERSION = 1
KIND = "moegen-bench"
_PACKAGES = ("numpy", "apache-tvm", "apache-tvm-ffi", "torch", "onnxruntime")
_RUN_COLUMNS = ("name", "preset", "threads", "routing", "seed", "artifact", "scaled")
_CONFIG_COLUMNS = ("experts", "top_k", "hidden", "intermediate", "dtype")
_POINT_COLUMNS = ("tokens", "flops", "active_experts", "weight_bytes_read", "roofline_seconds")
_CONTENDER_COLUMNS = (
    "status", "calls", "tokens_per_s", "flops_per_s", "bytes_per_s", "roofline_fraction", "ratio_to_moegen", "relative_l2",
    "reason",
)  # fmt: skip
_QUANTILES = ("median", "p95", "p99", "min", "max")


def new_document() -> dict[str, Any]:
    """A document without runs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"moegen": __version__, "python": platform.python_version()} | _installed(),
        "machine": dataclasses.asdict(this_machine()),
        "runs": [],
    }


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_document(path: pathlib.Path) -> dict[str, Any]:
    """A document from a file.

    Raises:
        MeasureError: the file is not one.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise MeasureError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MeasureError(f"{str(path)!r} is not readable JSON: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise MeasureError(f"{str(path)!r} does not hold results of `moegen bench`")
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise MeasureError(f"{str(path)!r} has schema {found}; this moegen reads {SCHEMA_VERSION}: measure again")
    return document


def write_document(document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Replaces the file in one step, so that an interrupt never leaves half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(as_json_text(document) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- CSV


def as_csv(document: Mapping[str, Any]) -> str:
    """One line for each contender of each point."""
    out = io.StringIO()
    columns = [*_RUN_COLUMNS, *_CONFIG_COLUMNS, *_POINT_COLUMNS, "peak_flops_per_s", "peak_read_bytes_per_s", "contender"]
    columns += [*(f"{name}_seconds" for name in _QUANTILES), *_CONTENDER_COLUMNS]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for run in document["runs"]:
        fixed = [run[name] for name in _RUN_COLUMNS[:-1]] + [_changes(run)] + [run["config"][name] for name in _CONFIG_COLUMNS]
        for point in run["points"]:
            work = [point[name] for name in _POINT_COLUMNS]
            work += [point["ceilings"][name] for name in ("flops_per_s", "read_bytes_per_s")]
            for entry in point["contenders"]:
                quantiles = [(entry["seconds"] or {}).get(name) for name in _QUANTILES]
                writer.writerow([*fixed, *work, entry["name"], *quantiles, *(entry[name] for name in _CONTENDER_COLUMNS)])
    return out.getvalue()


def _changes(run: Mapping[str, Any]) -> str:
    """What was made smaller, or nothing."""
    changes = run["scaled"]["changes"] if run["scaled"] else {}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())


# ---------------------------------------------------------------- to read


def run_lines(run: Mapping[str, Any]) -> Iterator[str]:
    """What a run is, before its points."""
    yield f"\n{run['name']}"
    if run["scaled"]:
        yield f"  SCALED DOWN  {_changes(run)}: {run['scaled']['why']}"
    took, build = run["seconds"], run["seconds"]["build"]
    yield (
        f"  artifact     {run['artifact']}: "
        f"{'built already' if build is None else f'built in {build:.1f} s'}, loaded in {duration(took['load'])}, "
        f"bound in {duration(took['bind'])}, first call {duration(took['first_call'])}"
    )
    yield (
        f"  memory       weights {size(run['weights_bytes'])}, packed {size(run['packed_bytes'])}, "
        f"library {size(run['library_bytes'])}"
    )
    for entry in run["absent"]:
        yield f"  absent       {entry['name']}: {entry['reason']}"


def point_lines(point: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    """One point as a table and what explains it."""
    peak, tokens = point["ceilings"], point["tokens"]
    yield (
        f"\n{run['name']}: {tokens} token{'s' if tokens != 1 else ''}; {point['flops'] / 1e9:.3g} GFLOP, "
        f"{point['active_experts']:.1f} of {run['config']['experts']} experts active, "
        f"{size(round(point['weight_bytes_read']))} of weights"
    )
    yield (
        f"ceilings met: {peak['flops_per_s'] / 1e9:.0f} GFLOP/s ({peak['kind']}), {peak['read_bytes_per_s'] / 1e9:.1f} GB/s; "
        f"roofline {duration(point['roofline_seconds'])}"
    )
    rows = [_row(entry) for entry in sorted(point["contenders"], key=_speed)]
    header = ("contender", "median", "P95", "tokens/s", "GFLOP/s", "GB/s", "roofline", "x moegen", "rel. L2", "")
    yield table(header, rows)
    if any((entry["roofline_fraction"] or 0.0) > 1.0 for entry in point["contenders"]):
        yield "over 100% of the roofline: weights were still in the caches, or the ceilings were sampled at slower moments"
    if point["parts"]:
        yield "parts: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in point["parts"].items() if seconds)
    if point["workspace_bytes"] is not None:
        load = sorted(point["expert_load"], reverse=True)
        spread = f"{load[0]} (most), {load[len(load) // 2]} (median), {load[-1]} (least)"
        yield f"workspace {size(point['workspace_bytes'])}; tokens per expert {spread}"
    if point["dense"]:
        dense = point["dense"]
        yield (
            f"dense: {duration(dense['seconds'])}, {dense['measured_ratio']:.2f} times moegen's "
            f"(arithmetic: {dense['arithmetic_ratio']:.2f}); {dense['how']}"
        )


def _speed(entry: Mapping[str, Any]) -> float:
    return float(entry["seconds"]["median"]) if entry["seconds"] else float("inf")


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    error = "" if entry["relative_l2"] is None else f"{entry['relative_l2']:.1e}"
    if not entry["seconds"]:
        mark = "WRONG" if entry["status"] == "wrong" else "-"
        return (entry["name"], mark, "", "", "", "", "", "", error, entry["reason"] or "")
    ratio = entry["ratio_to_moegen"]
    return (
        entry["name"],
        duration(entry["seconds"]["median"]),
        duration(entry["seconds"]["p95"]),
        f"{entry['tokens_per_s']:.4g}",
        f"{entry['flops_per_s'] / 1e9:.3g}",
        f"{entry['bytes_per_s'] / 1e9:.3g}",
        f"{entry['roofline_fraction']:.0%}",
        "" if ratio is None else f"{ratio:.2f}",
        error,
        "few calls" if entry["calls"] < 5 else "",
    )


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            amount = seconds * factor
            return f"{amount:.{max(0, 2 - len(str(int(amount))) + 1)}f} {unit}"
    raise AssertionError
