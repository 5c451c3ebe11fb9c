"""`moegen serve-bench`: what is asked, progress, tables and files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from ..bench.command import named_subjects
from ..bench.results import write_document
from ..bench.workload import ROUTINGS
from ..config import MoEConfig
from ..display import as_json_text
from ..errors import MeasureError
from ..options import field_options, out_option
from .arrivals import Load
from .batching import Limits
from .request import ENDPOINTS, LayerTarget, LoadRequest, ServerTarget
from .summary import Objective

_CLIENTS = 8
_REQUESTS = 100
_SERVER_ONLY = {"endpoint": "--endpoint", "api_key": "--api-key", "extra_body": "--extra-body", "timeout": "--timeout"}
_LAYER_ONLY = {
    "preset": "--preset",
    "threads": "--threads",
    "routing": "--routing",
    "against": "--against",
    "max_batch_tokens": "--max-batch-tokens",
    "max_requests": "--max-requests",
    "most_seconds": "--most-seconds",
    "memory_gb": "--memory-gb",
    "out": "--out",
}
_above_0 = click.FloatRange(0, min_open=True)


@click.command("serve-bench")
@click.argument("what", required=False, metavar="[PRESET | PATH_OR_NAME]")
@click.option("--url", help="An OpenAI-compatible server, such as http://127.0.0.1:8000/v1; --model is then its name there.")
@click.option("--endpoint", type=click.Choice(ENDPOINTS), help="What to ask the server for. [default: chat]")
@click.option("--api-key", help="The server's key. [default: $OPENAI_API_KEY]")
@click.option("--extra-body", metavar="JSON", help="More fields of each request to the server.")
@click.option("--timeout", type=_above_0, metavar="SECONDS", help="A request to the server fails after so long. [default: 120]")
@click.option("--rate", type=float, metavar="PER_SECOND", help="Open loop: requests come at this mean rate.")
@click.option("--burstiness", type=float, default=1.0, show_default=True, help="1 is Poisson, less comes in bursts, more evenly.")
@click.option(
    "--concurrency", type=click.IntRange(1),
    help=f"Closed loop: so many clients; in an open loop, requests at once at most. [default: {_CLIENTS} without --rate, --trace]",
)  # fmt: skip
@click.option("--trace", type=click.Path(), help="Open loop: replay this file, a JSON object with times and sizes on each line.")
@click.option("--prompt", default=Load.prompt, show_default=True, metavar="SIZES", help="Tokens of prompts, see below.")
@click.option("--output", default=Load.output, show_default=True, metavar="SIZES", help="Tokens of answers.")
@click.option("--requests", type=click.IntRange(1), help=f"Requests of a round. [default: {_REQUESTS} without --duration, --trace]")
@click.option("--duration", type=_above_0, metavar="SECONDS", help="No request comes later.")
@click.option("--warmup", type=click.IntRange(0), default=2, show_default=True, help="Requests before, not counted.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Turns of each contender.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of times, sizes, weights and tokens.")
@click.option("--slo-ttft-ms", type=_above_0, help="Objective: milliseconds to the first token.")
@click.option("--slo-tpot-ms", type=_above_0, help="Objective: milliseconds per token after the first.")
@click.option("--slo-e2e-ms", type=_above_0, help="Objective: milliseconds in all.")
@click.option("--preset", metavar="NAME", help="Take the layer of this preset (`moegen bench --list` shows them).")
@click.option("--threads", type=click.IntRange(1), help="Threads of every contender. [default: all processors]")
@click.option("--routing", type=click.Choice(ROUTINGS), help="How popular the experts are. [default: uniform]")
@click.option("--against", help="Contenders: all, none, or names (`moegen bench --list` shows them). [default: none]")
@click.option("--max-batch-tokens", type=click.IntRange(1), help="Tokens of a step. [default: 512]")
@click.option("--max-requests", type=click.IntRange(1), help="Requests in a step. [default: 256, or the tokens if fewer]")
@click.option("--most-seconds", type=_above_0, help="A turn is cut off after so long. [default: 600]")
@click.option("--memory-gb", type=_above_0, help="Memory for weights. [default: 80% of what is free]")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write results here.")
@click.option("--picture", type=click.Path(path_type=pathlib.Path), help="Draw them here, as a PNG.")
@out_option
@field_options()
def serve_bench(what: str | None, json_file: pathlib.Path | None, picture: pathlib.Path | None, **options: Any) -> None:
    """Send requests to a server, or to a layer in continuous batching, and measure the answers.

    With --url the target is a server, whose answers are streamed. Without, it is a layer, described as for `moegen bench`: a
    request brings the tokens of a prompt and takes a step for each further token, and each step puts tokens of all requests
    that are under way through the layer in one call; outputs are compared with the float64 reference.

    In an open loop (--rate, --trace) latencies count from when a request was due, however late it was sent. In a closed loop
    a slow target is asked less often.

    \b
    SIZES are: 128 (always), 16-512 (uniform), lognormal:200,0.8 (median, sigma of the
    logarithm; a range may follow: lognormal:200,0.8,16-4096), or 32*3,128*1 (with weights).

    \b
    Examples:
      moegen serve-bench --url http://127.0.0.1:8000/v1 --model olmoe --rate 4 --duration 60
      moegen serve-bench olmoe --concurrency 16 --against torch --json load.json --picture load.png
      moegen serve-bench --experts 8 --top-k 2 --hidden 512 --rate 50 --slo-ttft-ms 20
    """
    target = _server(what, options) if options["url"] is not None else _layer(what, options)
    asked = _asked(options)
    for file in (json_file, picture):
        if file is not None:
            _check_writable(file)
    if picture is not None:
        from . import drawing  # before anything is measured: what draws may be missing
    from . import printing, results, run

    with _watch(asked.load.requests) as watch:
        document = run.serve_bench(target, asked, watch)
    click.echo("\n".join(printing.lines(document)))
    if json_file is not None:
        write_document(document, json_file)
    if picture is not None:
        picture.write_bytes(drawing.draw(json.loads(as_json_text(document))))
    for file in (json_file, picture):
        if file is not None:
            click.echo(f"wrote {file}", err=True)
    if document["interrupted"]:
        raise KeyboardInterrupt
    if sentence := _failure(results.ours(document)):
        raise MeasureError(sentence)


def _check_writable(file: pathlib.Path) -> None:
    """Before anything is measured: a result that cannot be kept would be lost."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise MeasureError(f"there is no folder {str(folder)!r} for {file.name}: make it first")
    if file.is_dir() or not os.access(folder, os.W_OK):
        raise MeasureError(f"{str(file)!r} cannot be written: it is a folder, or in one that is read-only")


def _failure(own: Any) -> str:
    """Why the command fails although everything was measured; nothing where it does not."""
    if own is None:
        return "nothing was measured"
    if own["summary"] is None:
        return f"{own['name']}: {own['reason']}"
    if own["summary"]["requests"] and not own["summary"]["succeeded"]:
        kinds = ", ".join(f"{failure['count']} x {failure['kind']}" for failure in own["summary"]["failures"])
        return f"none of {own['summary']['requests']} requests succeeded{f': {kinds}' if kinds else ''}"
    return ""


# ---------------------------------------------------------------- what was asked


def _server(what: str | None, options: dict[str, Any]) -> ServerTarget:
    fields = [field.name for field in dataclasses.fields(MoEConfig) if options[field.name] is not None]
    given = [words for name, words in _LAYER_ONLY.items() if options[name] is not None]
    given += [f"--{name.replace('_', '-')}" for name in fields]
    if what is not None or given:
        raise click.UsageError(f"--url is a target of its own: leave out {what or given[0]}, which describes a layer.")
    return ServerTarget(
        url=options["url"],
        model=options["model"],
        endpoint=options["endpoint"] or "chat",
        timeout_s=options["timeout"] or ServerTarget.timeout_s,
        api_key=options["api_key"] or os.environ.get("OPENAI_API_KEY"),
        extra_body=_object(options["extra_body"]),
    )


def _object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError('--extra-body must be an object such as {"ignore_eos": true}.')
    return value


def _layer(what: str | None, options: dict[str, Any]) -> LayerTarget:
    for name, words in _SERVER_ONLY.items():
        if options[name] is not None:
            raise click.UsageError(f"{words} is for servers: give --url, too.")
    if what is not None and options["preset"] is not None:
        raise click.UsageError(f"{what} and --preset {options['preset']} are a layer each: give one of them.")
    name = what if what is not None else options["preset"]
    subjects = named_subjects(() if name is None else (name,), options | {"dtypes": ()})
    if len(subjects) != 1:
        raise click.UsageError(f"these are {len(subjects)} layers: give one at a time.")
    memory, tokens = options["memory_gb"], options["max_batch_tokens"] or Limits.batch_tokens
    return LayerTarget(
        subjects[0],
        threads=options["threads"],
        routing=options["routing"] or "uniform",
        against=options["against"] or "none",
        limits=Limits(tokens, options["max_requests"] or min(Limits.active, tokens)),
        most_seconds=options["most_seconds"] or LayerTarget.most_seconds,
        memory_bytes=None if memory is None else int(memory * 1e9),
        store=options["out"],
    )


def _asked(options: dict[str, Any]) -> LoadRequest:
    is_open = options["rate"] is not None or options["trace"] is not None
    ends = options["requests"] is not None or options["duration"] is not None or options["trace"] is not None
    load = Load(
        rate_per_s=options["rate"],
        concurrency=options["concurrency"] or (None if is_open else _CLIENTS),
        burstiness=options["burstiness"],
        prompt=options["prompt"],
        output=options["output"],
        requests=options["requests"] if ends else _REQUESTS,
        duration_s=options["duration"],
        seed=options["seed"],
        trace=options["trace"],
    )
    limits = (None if options[f"slo_{name}_ms"] is None else options[f"slo_{name}_ms"] / 1e3 for name in ("ttft", "tpot", "e2e"))
    return LoadRequest(load, options["warmup"], Objective(*limits), options["rounds"])


# ---------------------------------------------------------------- progress


@contextlib.contextmanager
def _watch(total: int | None) -> Iterator[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    from .run import Watch

    if not sys.stderr.isatty():
        yield Watch()
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="request", file=sys.stderr, leave=False, dynamic_ncols=True) as bar:

        class Shown(Watch):
            """One bar, begun anew for each turn."""

            def step(self, what: str) -> None:
                bar.reset()
                bar.set_description(what)

            def ended(self, count: int) -> None:
                bar.update(count - bar.n)

        yield Shown()
