"""Results of benchmarks: the JSON document that they are kept in, and its CSV form.

Every quantity is in its base unit (seconds, bytes, flops, and these a second); what could not be measured is null.

document    schema_version 1, kind "moegen-bench", created, versions {package: version},
            machine {cpu, processors, l3_bytes, memory_bytes}, runs
run         one layer at one number of threads and one routing: name, preset or null, config (every field of the layer),
            scaled {changes {field: [from, to]}, why} or null, threads, routing, seed, artifact, weights_bytes, packed_bytes,
            library_bytes, seconds {build, load, bind, first_call} (build is null where the layer was built already),
            absent [{name, reason}], points
point       one number of tokens: tokens, flops, active_experts and weight_bytes_read (of a call, averaged over the batches),
            ceilings {kind, flops_per_s, read_bytes_per_s (medians), flops_samples, read_samples}, roofline_seconds,
            contenders, parts {part of moegen's call: seconds}, expert_load [tokens of each expert, over the batches],
            workspace_bytes, dense {seconds, measured_ratio, arithmetic_ratio, how} or null,
            rounding_relative_l2 (what storing weights, and rows, in few bits changes in itself; null where they are not)
contender   name, status ("correct", "wrong" or "failed"), reason, relative_l2, calls, seconds {median, p95, p99, min, max},
            samples (of at most 200 calls), turn_medians (of each round's calls), turn_waits (share of the turn in which threads
            were ready and other processes had the processor, or null), tokens_per_s, flops_per_s, bytes_per_s,
            roofline_fraction, ratio_to_moegen
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
from collections.abc import Iterable, Mapping
from typing import Any

from ..display import as_json_text
from ..errors import MeasureError
from ..machine import this_machine
from ..version import __version__

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
        "versions": {"moegen": __version__, "python": platform.python_version()} | installed(_PACKAGES),
        "machine": dataclasses.asdict(this_machine()),
        "runs": [],
    }


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_document(
    path: pathlib.Path, kind: str = KIND, schema_version: int = SCHEMA_VERSION, command: str = "moegen bench"
) -> dict[str, Any]:
    """A document from a file.

    Args:
        kind, schema_version: of the documents that `command` writes.

    Raises:
        MeasureError: the file is not one.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise MeasureError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MeasureError(f"{str(path)!r} is not readable JSON: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise MeasureError(f"{str(path)!r} does not hold results of `{command}`")
    if document.get("schema_version") != schema_version:
        found = document.get("schema_version")
        raise MeasureError(f"{str(path)!r} has schema {found}; this moegen reads {schema_version}: measure again")
    return document


def write_document(document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Replaces the file in one step, so that an interrupt never leaves half of one.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(as_json_text(document) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
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
        fixed = [run[name] for name in _RUN_COLUMNS[:-1]] + [changes(run)] + [run["config"][name] for name in _CONFIG_COLUMNS]
        for point in run["points"]:
            work = [point[name] for name in _POINT_COLUMNS]
            work += [point["ceilings"][name] for name in ("flops_per_s", "read_bytes_per_s")]
            for entry in point["contenders"]:
                quantiles = [(entry["seconds"] or {}).get(name) for name in _QUANTILES]
                writer.writerow([*fixed, *work, entry["name"], *quantiles, *(entry[name] for name in _CONTENDER_COLUMNS)])
    return out.getvalue()


def changes(run: Mapping[str, Any]) -> str:
    """What was made smaller than it is in the model, or nothing."""
    changes = run["scaled"]["changes"] if run["scaled"] else {}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items())
