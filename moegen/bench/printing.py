"""Results as a terminal shows them: what a run is, and a table for each of its points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..display import duration, number, percent, scientific, size, table
from .results import changes


def run_lines(run: Mapping[str, Any]) -> Iterator[str]:
    """What a run is, before its points."""
    yield f"\n{run['name']}"
    if run["scaled"]:
        yield f"  SCALED DOWN  {changes(run)}: {run['scaled']['why']}"
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
    yield table(header, rows, right=range(1, 9))
    if any((entry["roofline_fraction"] or 0.0) > 1.0 for entry in point["contenders"]):
        yield "over 100% of the roofline: weights were still in the caches, or the ceilings were sampled at slower moments"
    if point["rounding_relative_l2"] is not None:
        stored, l2 = run["config"]["weight_dtype"], scientific(point["rounding_relative_l2"])
        yield f"few bits: only moegen reads weights as {stored}, which in itself changes the output by {l2} (relative L2)"
    if point["parts"]:
        yield "parts: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in point["parts"].items() if seconds)
    if point["workspace_bytes"] is not None:
        load = sorted(point["expert_load"], reverse=True)
        spread = f"{load[0]} (most), {load[len(load) // 2]} (median), {load[-1]} (least)"
        yield f"workspace {size(point['workspace_bytes'])}; tokens per expert, all batches together: {spread}"
    if point["dense"]:
        dense = point["dense"]
        yield (
            f"dense: {duration(dense['seconds'])}, {dense['measured_ratio']:.2f} times moegen's "
            f"(arithmetic: {dense['arithmetic_ratio']:.2f}); {dense['how']}"
        )


def _speed(entry: Mapping[str, Any]) -> float:
    return float(entry["seconds"]["median"]) if entry["seconds"] else float("inf")


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    l2 = "" if entry["relative_l2"] is None else scientific(entry["relative_l2"])
    if not entry["seconds"]:
        mark = "WRONG" if entry["status"] == "wrong" else "-"
        return (entry["name"], mark, "", "", "", "", "", "", l2, entry["reason"] or "")
    return (
        entry["name"],
        duration(entry["seconds"]["median"]),
        duration(entry["seconds"]["p95"]),
        number(entry["tokens_per_s"]),
        number(entry["flops_per_s"], 1e-9),
        number(entry["bytes_per_s"], 1e-9),
        percent(entry["roofline_fraction"]),
        "" if entry["ratio_to_moegen"] is None else number(entry["ratio_to_moegen"]),
        l2,
        "few calls" if entry["calls"] < 5 else "",
    )
