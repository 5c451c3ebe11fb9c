"""What the command line prints: artifacts, proofs and results as text, tables and JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import artifact as artifacts
from .artifact import Artifact
from .config import MoEConfig
from .cuda.device_count import devices
from .errors import ArtifactError
from .target import host_arch, missing_features

NOTHING = "\N{EN DASH}"


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def proof(report: Mapping[str, Any]) -> str:
    status = report.get("verified") or report["status"]
    if status == "skipped":
        return f"not verified ({report['reason']})"
    where = f" {report['executed']}" if report.get("executed") else ""
    return f"verified{where} (worst relative L2 error {report['worst_relative_l2']:.1e})"


def summary(done: Sequence[Mapping[str, Any]], skipped: int) -> str:
    failed = sum("error" in result for result in done)
    found = sum(bool(result.get("already_built")) for result in done)
    counts = {"built": len(done) - failed - found, "already built": found, "failed": failed, "skipped as illegal": skipped}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "built")


def listed(found: Artifact | ArtifactError) -> dict[str, Any]:
    """One line of the list as plain JSON values."""
    try:
        if isinstance(found, ArtifactError):
            raise found
        artifacts.check_files(found)
    except ArtifactError as error:
        return {"error": one_line(error)}
    return {
        "name": found.name,
        "path": str(found.path),
        "layer": brief(found.config),
        "config": found.config.to_dict(),
        "target": found.target.to_dict(),
        "runs_here": not obstacles_of(found),
        "verified": found.manifest["verified"],
        "created": found.manifest["created"],
        "bytes": total_bytes(found),
    }


def brief(config: MoEConfig) -> str:
    """E8 K2 H512 I2048 float32 softmax swiglu, and every field that is not as usual."""
    c = config
    words = [f"E{c.experts} K{c.top_k} H{c.hidden} I{c.intermediate} {c.dtype} {c.gating} {c.activation}"]
    for field in dataclasses.fields(c)[7:]:
        value = getattr(c, field.name)
        if value != field.default:
            words.append(field.name if value is True else f"{field.name}={value}")
    return " ".join(words)


def obstacles_of(made: Artifact) -> list[str]:
    """What this machine lacks to run an artifact."""
    if made.target.arch != host_arch():
        return [made.target.arch]
    return ["a CUDA device"] if made.target.kind == "cuda" and not devices() else missing_features(made.target)


def total_bytes(made: Artifact) -> int:
    return sum(int(file["bytes"]) for file in made.manifest["files"].values())


def description(made: Artifact, obstacles: Sequence[str]) -> Iterator[str]:
    manifest, target, report = made.manifest, made.target, made.verification()
    yield made.name
    yield f"  path      {made.path}"
    yield f"  built     {manifest['created']}, {size(total_bytes(made))}"
    yield f"  layer     {brief(made.config)}"
    if target.kind == "cuda":
        yield f"  target    {target} ({target.arch})"
        yield f"  needs     a device of {' or '.join(target.gpus)}, or a newer one (by PTX), and NVIDIA's driver"
    else:
        yield f"  target    {target} ({target.arch}, {target.lanes} float32 lanes)"
        yield f"  needs     {' '.join(target.features) or 'no special CPU features'}"
    yield f"  runs here {'no, missing: ' + ', '.join(obstacles) if obstacles else 'yes'}"
    yield f"  proof     {proof(report)}, seed {report.get('seed', 'none')}"
    if rounding := report.get("rounding"):
        yield f"  few bits  {_rounding(rounding)}"
    yield f"  tokens    at most {manifest['max_tokens']} per call"
    yield f"  versions  {_pairs(manifest['versions'])}"
    yield "\nconfiguration"
    yield from (f"  {name} = {value}" for name, value in made.config.to_dict().items())
    yield "\nfunctions"
    yield from (f"  {name}({', '.join(arguments)})" for name, arguments in manifest["functions"].items())
    yield f"\npacked weights, {size(manifest['packed_bytes'])}"
    rows = [
        (s["name"], s["dtype"], "x".join(map(str, s["shape"])), s["offset_bytes"], s["size_bytes"]) for s in manifest["segments"]
    ]
    yield table(("  segment", "dtype", "shape", "offset", "bytes"), [(f"  {row[0]}", *row[1:]) for row in rows])
    yield "\nschedule"
    yield f"  tiling: {_pairs(manifest['tiling'])}"
    yield from (f"  regime: {_pairs(regime)}" for regime in manifest["regimes"])
    yield from (f"  {stage}: {_pairs(_flat(knobs)) or 'fixed'}" for stage, knobs in manifest["knobs"].items())
    yield from (_tuned(regime, record) for regime, record in manifest.get("records", {}).items())
    if not manifest.get("records"):
        yield "  tuned: no, these are the defaults"
    yield "\nfiles"
    files = [(f"  {name}", file["bytes"], file["sha256"]) for name, file in manifest["files"].items()]
    yield table(("  file", "bytes", "sha256"), files)


def _tuned(regime: str, record: Mapping[str, Any]) -> str:
    """Which tuning record a regime's choices are from, how old it is, and how much less time it was worth."""
    return f"  tuned: {regime} by record {record['id']}, {age(record['created'])} old, time less: {gains(record['points'])}"


def gains(points: Iterable[Mapping[str, Any]]) -> str:
    """How much less time than the default a tuning record was worth at its points, in percent with the band."""
    return "; ".join(_gain(point) for point in points) or NOTHING


def _gain(point: Mapping[str, Any]) -> str:
    less, (low, high) = 100 * (1 - point["ratio"]), point["band"]
    return f"T={point['tokens']} {point['routing']} {less:.1f} % ({100 * (1 - high):.1f} to {100 * (1 - low):.1f})"


def age(created: str) -> str:
    """Time since an ISO 8601 date, in the largest unit of which it is at least one."""
    try:
        seconds = (datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(created)).total_seconds()
    except (ValueError, TypeError):
        return NOTHING
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def kernel_tables(resources: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[str]:
    """What the kernels of each architecture use."""
    header = ("kernel", "threads", "registers", "shared", "dynamic", "stack", "spills", "code")
    fields = ("threads", "registers", "static_shared_bytes", "dynamic_shared_bytes", "stack_bytes", "spilled_bytes", "code_bytes")
    for architecture, kernels in resources.items():
        yield f"{architecture}: threads of a block, registers of a thread, bytes of a block's memory, of a thread's stack, of code"
        yield table(header, [(name, *(used[f] for f in fields)) for name, used in kernels.items()], range(1, len(header)))


def proof_table(made: Artifact, report: Mapping[str, Any]) -> Iterator[str]:
    names = {"tokens": "T", "relative_l2": "relative L2", "near_ties": "near ties"}
    columns = [name for name in report["cases"][0] if name in ("routing", "elementwise", "launches", *names)]
    rows = [[f"{c[name]:.1e}" if isinstance(c[name], float) else c[name] for name in columns] for c in report["cases"]]
    yield table([names.get(name, name) for name in columns], rows)
    bounds = report["bounds"]
    yield f"bounds: relative L2 {bounds['relative_l2']:.0e}, elementwise {bounds['elementwise']:.0e}; seed {report['seed']}"
    if report["rounding"]:
        yield f"few bits: {_rounding(report['rounding'])}"
    yield from (f"FAILED: {reason}" for reason in report["failures"])
    where = f", {report['executed']}" if "executed" in report else ""
    yield f"{made.name}: {report['status']} in {report['seconds']:.1f} s{where}"


def _rounding(rounding: Mapping[str, float]) -> str:
    """What few bits change in themselves, of random weights and rows."""
    rows = f", rows as bytes {rounding['rows_relative_l2']:.1e} more" if rounding["rows_relative_l2"] else ""
    return f"random weights as codes change the output by {rounding['weights_relative_l2']:.1e}{rows} (relative L2)"


def as_json_text(value: Any) -> str:
    return json.dumps(_plain(value), indent=2)


def _plain(value: Any) -> Any:
    """JSON has no infinities: an error that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs of a part under its name: {"few": {"k_unroll": 1}} as few.k_unroll."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def size(count: int) -> str:
    """Bytes with a unit: 512 B, 12.9 GB."""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def number(value: float | None, scale: float = 1) -> str:
    """A number to three significant digits at least, without an exponent unless it is tiny; a dash for none."""
    if value is None:
        return NOTHING
    scaled = value * scale
    if abs(scaled) >= 999.5:
        return f"{scaled:,.0f}"
    return f"{scaled:#.3g}".rstrip(".") if abs(scaled) >= 1e-3 or scaled == 0 else f"{scaled:.1e}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f}%"


def scientific(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The factor from seconds to the unit in which such a time reads well, and the unit."""
    return (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")


def duration(seconds: float) -> str:
    """Three digits and a unit: 4.20 µs, 12.3 ms."""
    factor, unit = time_unit(seconds)
    return f"{number(seconds * factor)} {unit}"


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], right: Collection[int] = ()) -> str:
    """Columns of text; those of which `right` has the index are aligned to the right, as numbers are."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = (
        [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
