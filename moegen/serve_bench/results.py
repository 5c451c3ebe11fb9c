"""Results of load tests: the JSON document that they are kept in.

Every quantity is in its base unit (seconds, tokens, and these a second); what could not be measured is null.

document    schema_version 1, kind "moegen-serve-bench", created, versions {package: version},
            machine {cpu, processors, l3_bytes, memory_bytes} (of the side that sends), target, load,
            warmup (requests, not counted), rounds, objective {ttft_s, tpot_s, e2e_s} or null, absent [{name, reason}],
            interrupted, notes [sentence], contenders
target      a server: kind "server", url, model, endpoint, timeout_s, extra_body;
            a layer: kind "layer", name, preset or null, config (every field), scaled {changes {field: [from, to]}, why} or null,
            artifact, build_seconds or null, threads, routing, limits {batch_tokens, active}
load        mode ("open" or "closed"), rate_per_s, concurrency, burstiness, prompt, output, requests, duration_s, seed, trace;
            round i has the seed `seed` + i, and of a trace the same requests
contender   name ("server" for a server), status ("correct", "wrong", "failed", or "measured" where nothing was compared), reason,
            checks (of a layer: [{rows, relative_l2, same_alone}], one for each round), summary (of all rounds, null where the
            status forbids to quote it), ratio_to_moegen, turns
turn        round, seconds, interrupted, offered_per_s, facts, requests [{index, due_s, started_s, first_token_s, ended_s,
            prompt_tokens, output_tokens, status, kind}], seconds after the start of the turn
facts       a layer's: steps, batch_tokens, layer_seconds, cut_off; a server's: endpoint, usage_reported
            (answers whose tokens it counted itself)
summary     requests, succeeded, failed, unfinished, success_rate (of those that ended), failures [{kind, count, example}], seconds,
            requests_per_s, output_tokens_per_s, tokens_per_s, prompt_tokens, output_tokens (all of requests that succeeded),
            most_in_flight, goodput {requests_per_s, share} or null, latency {wait, ttft, tpot, itl, e2e}
latency     null, or count, mean, p50, p95, p99, min, max, thin (percentiles of too few samples), curve (percentiles 0, 1, ... 100).
            wait: from due to sent, or to the layer's first step; ttft: to the first token; tpot: time per output token after
            the first, of a request; itl: between two tokens of a request; e2e: to the end. All count from when the request was due.
ratio_to_moegen
            of medians of rounds: {name: {median, least, most}}, the contender's seconds, ttft_p50, tpot_p50, e2e_p50 and e2e_p95
            divided by ours in the same round
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..bench import results as bench_results
from ..bench.contenders.roster import OURS
from .arrivals import Load
from .outcomes import FAILED, OK, Played
from .request import LoadRequest
from .summary import latencies, spread, summarise

SCHEMA_VERSION = 1
KIND = "moegen-serve-bench"
SERVER = "server"
_CLIENT_PACKAGES = ("aiohttp", "transformers")
_RATIOS = {"ttft_p50": ("ttft", "p50"), "tpot_p50": ("tpot", "p50"), "e2e_p50": ("e2e", "p50"), "e2e_p95": ("e2e", "p95")}


def new_document(target: Mapping[str, Any], asked: LoadRequest) -> dict[str, Any]:
    """A document without contenders."""
    document = bench_results.new_document()
    versions = document["versions"] | bench_results.installed(_CLIENT_PACKAGES)
    load = {"mode": "open" if asked.load.is_open else "closed"} | asked.load.to_dict()
    del document["runs"]
    return document | {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "versions": versions,
        "target": dict(target),
        "load": load,
        "warmup": asked.warmup,
        "rounds": asked.rounds,
        "objective": dataclasses.asdict(asked.objective) if asked.objective else None,
        "absent": [],
        "interrupted": False,
        "notes": [],
        "contenders": [],
    }


def turn(number: int, load: Load, played: Played) -> dict[str, Any]:
    """One turn as the document holds it."""
    return {
        "round": number,
        "seconds": played.seconds,
        "interrupted": played.interrupted,
        "offered_per_s": offered_per_s(load, played),
        "facts": played.facts,
        "requests": [_request(outcome) for outcome in played.outcomes],
    }


def offered_per_s(load: Load, played: Played) -> float | None:
    """Requests a second that came in an open loop; None in a closed one, which has no rate of its own."""
    last = max((outcome.due_s for outcome in played.outcomes), default=0.0)
    return len(played.outcomes) / last if load.is_open and last > 0 else None


def _request(outcome: Any) -> dict[str, Any]:
    names = ("index", "due_s", "started_s", "ended_s", "prompt_tokens", "output_tokens", "status", "kind")
    return {name: getattr(outcome, name) for name in names} | {"first_token_s": outcome.token_s[0] if outcome.token_s else None}


def ratios(turns: Sequence[Played], ours: Sequence[Played]) -> dict[str, Any] | None:
    """A contender's times divided by ours, round by round; None where no round has both."""
    found: dict[str, list[float]] = {}
    for other, own in zip(turns, ours, strict=False):
        if other.interrupted or own.interrupted or other.facts.get("cut_off") or own.facts.get("cut_off"):
            continue
        if own.seconds > 0:
            found.setdefault("seconds", []).append(other.seconds / own.seconds)
        theirs, mine = (latencies([o for o in side.outcomes if o.status == OK]) for side in (other, own))
        for name, (latency, share) in _RATIOS.items():
            a, b = spread(theirs[latency]), spread(mine[latency])
            if a is not None and b is not None and b[share] > 0:
                found.setdefault(name, []).append(a[share] / b[share])
    return {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)} for name, values in found.items()
    } or None


def notes(document: Mapping[str, Any], turns: Mapping[str, Sequence[Played]]) -> list[str]:
    """What a reader of the numbers has to know about them."""
    said = []
    if document["interrupted"]:
        said.append("interrupted: this is what was measured until then")
    for entry in document["contenders"]:
        said += [f"{entry['name']}: {sentence}" for sentence in _notes(document, entry, turns[entry["name"]])]
    return said


def _notes(document: Mapping[str, Any], entry: Mapping[str, Any], played: Sequence[Played]) -> list[str]:
    summary = entry["summary"]
    if summary is None:
        return []
    said = []
    if any(one.facts.get("cut_off") for one in played):
        said.append("cut off before all requests had ended: those that take longest are missing from its latencies")
    if summary["failed"] > 0 and summary["succeeded"]:
        said.append(f"latencies are those of the {summary['succeeded']} requests that succeeded")
    count = summary["succeeded"]
    if thin := (summary["latency"]["e2e"] or {}).get("thin"):
        names = " and ".join(name.upper() for name in thin)
        said.append(f"{count} requests are too few for {names}: little but the slowest of them (P95 needs 20, P99 100)")
    for number, one in enumerate(entry["turns"]):
        rate, done = one["offered_per_s"], len([r for r in one["requests"] if r["status"] in (OK, FAILED)])
        if rate and one["seconds"] and not one["interrupted"] and done / one["seconds"] < 0.8 * rate and done >= 20:
            said.append(
                f"round {number + 1} offered {rate:.3g} requests/s and ended {done / one['seconds']:.3g}/s: "
                "it does not keep up, and latencies grow with the length of the run"
            )
    return said + _client_notes(document, summary, played)


def _client_notes(document: Mapping[str, Any], summary: Mapping[str, Any], played: Sequence[Played]) -> list[str]:
    """What only a server's client has to say."""
    if document["target"]["kind"] != SERVER:
        return []
    said = []
    wait = summary["latency"]["wait"]
    if wait and wait["p99"] > 0.02 and not document["load"]["concurrency"]:
        said.append(f"requests were sent up to {wait['max']:.3g} s late: this machine is too busy to send them on time")
    reported = sum(one.facts["usage_reported"] for one in played)
    if reported < summary["succeeded"]:
        rest = summary["succeeded"] - reported
        said.append(f"of {rest} answers the server did not count the tokens: pieces of their streams are counted as tokens")
    return said


def entry(name: str, turns: Sequence[tuple[Load, Played]], asked: LoadRequest) -> dict[str, Any]:
    """A contender that was measured, without checks and ratios."""
    return {
        "name": name,
        "status": "measured",
        "reason": None,
        "checks": [],
        "summary": summarise([played for _, played in turns], asked.objective),
        "ratio_to_moegen": None,
        "turns": [turn(number, load, played) for number, (load, played) in enumerate(turns)],
    }


def ours(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """moegen's own entry, or the server's; None when neither was measured."""
    return next((one for one in document["contenders"] if one["name"] in (OURS, SERVER)), None)


def read_document(path: pathlib.Path) -> dict[str, Any]:
    """A document from a file.

    Raises:
        MeasureError: the file is not one.
    """
    return bench_results.read_document(path, KIND, SCHEMA_VERSION, "moegen serve-bench")
