"""Results of a load test as a terminal shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..bench.results import changes
from ..config import MoEConfig
from ..display import NOTHING, brief, duration, number, percent, scientific, table
from .results import SERVER
from .summary import PERCENTILES

_NAMES = {
    "wait": "wait",
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between tokens",
    "e2e": "whole request",
}


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The whole document."""
    yield from _target(document["target"])
    yield f"  load         {load_words(document['load'])}"
    rounds = f", {document['rounds']} rounds" if document["rounds"] > 1 else ""
    yield f"  warm-up      {document['warmup']} requests before, not counted{rounds}"
    if document["objective"]:
        yield f"  objective    {objective_words(document['objective'])}"
    for entry in document["absent"]:
        yield f"  absent       {entry['name']}: {entry['reason']}"
    shown = [entry for entry in document["contenders"] if entry["summary"] is not None]
    if document["contenders"]:
        yield ""
        yield _rates(document)
    for entry in shown:
        for failure in entry["summary"]["failures"]:
            yield f"{entry['name']}: {failure['count']} x {failure['kind']}: {failure['example']}"
    if any(entry["summary"]["succeeded"] for entry in shown):
        yield ""
        yield _latencies(shown)
    yield from _ratios(document)
    if document["notes"]:
        yield ""
        yield from (f"note: {note}" for note in document["notes"])


def _target(target: Mapping[str, Any]) -> Iterator[str]:
    if target["kind"] == SERVER:
        yield f"{target['url']}: {target['model']}, {target['endpoint']}, at most {target['timeout_s']:g} s for a request"
        return
    limits = target["limits"]
    what = brief(MoEConfig.from_dict(target["config"]))
    yield what if what.startswith(target["name"]) else f"{target['name']}: {what}"
    if target["scaled"]:
        yield f"  SCALED DOWN  {changes(target)}: {target['scaled']['why']}"
    yield (
        f"  layer        {target['artifact']}, {target['threads']} thread{'s' if target['threads'] > 1 else ''}, "
        f"{target['routing']} routing; steps of at most {limits['batch_tokens']} tokens and {limits['active']} requests"
    )


def load_words(load: Mapping[str, Any]) -> str:
    """A load in a few words."""
    if load["trace"]:
        how, sizes = f"open loop, replayed from {load['trace']}", ""
    elif load["mode"] == "open":
        kind = "Poisson" if load["burstiness"] == 1 else f"gamma arrivals of burstiness {load['burstiness']:g}"
        how, sizes = f"open loop, {load['rate_per_s']:g} requests/s ({kind})", f"; prompt {load['prompt']}, output {load['output']}"
    else:
        many = f"{load['concurrency']} client{'s' if load['concurrency'] > 1 else ''}"
        how, sizes = f"closed loop, {many}", f"; prompt {load['prompt']}, output {load['output']}"
    if load["mode"] == "open" and load["concurrency"]:
        how += f", at most {load['concurrency']} at once"
    ends = [f"{load['requests']} requests"] if load["requests"] else []
    ends += [f"{load['duration_s']:g} s"] if load["duration_s"] else []
    return f"{how}{sizes}{'; at most ' + ' and '.join(ends) if ends else ''}; seed {load['seed']}"


def objective_words(objective: Mapping[str, Any]) -> str:
    """What a good request keeps."""
    return ", ".join(f"{_NAMES[name[:-2]]} within {duration(limit)}" for name, limit in objective.items() if limit is not None)


def _rates(document: Mapping[str, Any]) -> str:
    good = document["objective"] is not None
    checked = any(entry["checks"] for entry in document["contenders"])
    header = ["contender", "requests", "success", "requests/s", "output tokens/s", "tokens/s", "most at once"]
    header += ["goodput/s", "good"] if good else []
    header += ["rel. L2", "alone"] if checked else []
    rows = [[*_rate_cells(entry, good), *(_check_cells(entry) if checked else [])] for entry in document["contenders"]]
    reasons = [entry["reason"] or "" for entry in document["contenders"]]
    return table([*header, ""], [[*row, reason] for row, reason in zip(rows, reasons, strict=True)], right=range(1, len(header)))


def _rate_cells(entry: Mapping[str, Any], good: bool) -> list[str]:
    summary = entry["summary"]
    if summary is None:
        mark = "WRONG" if entry["status"] == "wrong" else "-"
        return [entry["name"], mark, *[""] * (7 if good else 5)]
    rate = summary["success_rate"]
    cells = [entry["name"], str(summary["requests"]), NOTHING if rate is None else f"{100 * rate:.4g}%"]
    cells += [number(summary[name]) for name in ("requests_per_s", "output_tokens_per_s", "tokens_per_s")]
    cells.append(str(summary["most_in_flight"]))
    return cells + ([number(summary["goodput"]["requests_per_s"]), percent(summary["goodput"]["share"])] if good else [])


def _check_cells(entry: Mapping[str, Any]) -> list[str]:
    """The largest error of a round, and whether requests' outputs are those of the same rows alone."""
    errors = [check["relative_l2"] for check in entry["checks"] if check["relative_l2"] is not None]
    alone = [check["same_alone"] for check in entry["checks"] if check["same_alone"] is not None]
    return [scientific(max(errors, default=None)), NOTHING if not alone else "same" if all(alone) else "differs"]


def _latencies(shown: list[Mapping[str, Any]]) -> str:
    rows = []
    for name, words in _NAMES.items():
        for entry in shown:
            found = entry["summary"]["latency"][name]
            if found is not None:
                cells = [duration(found["mean"]), *(_percentile(found, share) for share in PERCENTILES), duration(found["max"])]
                rows.append([words, entry["name"], str(found["count"]), *cells])
    return table(("", "contender", "samples", "mean", "P50", "P95", "P99", "max"), rows, right=range(2, 8))


def _percentile(found: Mapping[str, Any], share: str) -> str:
    """In brackets where there are too few samples for it."""
    shown = duration(found[share])
    return f"({shown})" if share in found["thin"] else shown


def _ratios(document: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for entry in document["contenders"]:
        if entry["ratio_to_moegen"]:
            rows.append([entry["name"], *(_ratio(entry["ratio_to_moegen"].get(name)) for name in _RATIOS)])
    if rows:
        yield "\ntimes of the others divided by moegen's, same requests" + (
            " (median, least and most of the rounds)" if document["rounds"] > 1 else ""
        )
        yield table(("contender", *_RATIOS.values()), rows, right=range(1, 1 + len(_RATIOS)))


_RATIOS = {
    "seconds": "whole run",
    "ttft_p50": "first token P50",
    "tpot_p50": "per token P50",
    "e2e_p50": "request P50",
    "e2e_p95": "request P95",
}


def _ratio(found: Mapping[str, float] | None) -> str:
    if found is None:
        return NOTHING
    spread = f" ({number(found['least'])} to {number(found['most'])})" if found["least"] != found["most"] else ""
    return f"{number(found['median'])}{spread}"
