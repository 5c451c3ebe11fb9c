"""`moegen bench`: what is to be measured, progress, tables and files."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..config import DTYPES, MoEConfig
from ..display import brief, size, table
from ..errors import ArtifactError, ConfigError, MeasureError
from ..options import field_options, integers, named_artifact, out_option, take_given, wanted_layers
from ..presets import PRESETS, preset, weight_bytes
from .contenders.roster import FAMILIES
from .request import TOKENS, Effort, Request, Subject, check, rounds_in
from .workload import ROUTINGS

if TYPE_CHECKING:
    from .run import Watch

_numbers = functools.partial(click.option, metavar="N[,N...]", callback=integers)


def _names(allowed: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...]]:
    """Reads `a,b`."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(part.strip() for part in value.split(","))) if value else ()
        for name in names:
            if name not in allowed:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(map(repr, allowed))}.")
        return names

    return read


@click.command()
@click.argument("what", nargs=-1, metavar="[PRESET | PATH_OR_NAME]...")
@_numbers("--tokens", default=",".join(map(str, TOKENS)), show_default=True, help="T, tokens of a call.")
@click.option("--dtype", "dtypes", metavar="TYPE[,TYPE]", callback=_names(DTYPES), help="Storage types. [default: the preset's]")
@_numbers("--threads", help="Threads of every contender. [default: all processors]")
@click.option(
    "--routing",
    "routings",
    default="uniform",
    show_default=True,
    callback=_names(ROUTINGS),
    help="How popular the experts are: uniform, zipf, or uniform,zipf.",
)
@click.option("--against", default="all", show_default=True, help="Contenders: all, none, or names (--list shows them).")
@click.option("--no-peers", is_flag=True, help="The same as --against none.")
@click.option("--dense", is_flag=True, help="Measure all experts for every token beside.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Turns of each contender.")
@click.option("--min-ms", type=click.FloatRange(0), default=20.0, show_default=True, help="Milliseconds of calls in a turn.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of weights and tokens.")
@click.option("--memory-gb", type=click.FloatRange(0, min_open=True), help="Memory for weights. [default: 80% of what is free]")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write results here after every point.")
@click.option("--csv", "csv_file", type=click.Path(path_type=pathlib.Path), help="Write a table here, too.")
@click.option("--resume", is_flag=True, help="Keep what the --json file has, and measure what is missing.")
@click.option("--list", "listing", is_flag=True, help="List presets and contenders, and leave.")
@out_option
@field_options("dtype")
def bench(what: tuple[str, ...], listing: bool, **options: Any) -> None:
    """Measure layers beside what people would use instead, on this machine.

    A layer is a preset, an artifact's folder or name, or described by the same options as in `moegen build`; options beside
    a preset change it. Every output is compared with the float64 reference first, and what is wrong is not timed. A preset
    that does not fit into memory is made smaller, and every output says so.

    \b
    Examples:
      moegen bench olmoe --tokens 1,16,256 --dtype float32,bfloat16 --json olmoe.json
      moegen bench --experts 8 --top-k 2 --hidden 512 --threads 1 --against numpy,torch
      moegen bench moe-e8-k2-h512 --no-peers --dense
    """
    if listing:
        click.echo(_listing())
        return
    subjects = named_subjects(what, options)
    from . import results, run  # here, because other commands import this module too

    json_file, csv_file = options["json_file"], options["csv_file"]
    document = results.new_document()
    if options["resume"]:
        if json_file is None:
            raise click.UsageError("--resume needs --json FILE, which holds what was measured already.")
        document = results.read_document(json_file) if json_file.exists() else document
    asked = _request(options)
    check(asked)
    with _progress(rounds_in(subjects, asked)) as bar:
        watch = _watch(bar, json_file, csv_file)
        run.bench(subjects, asked, document, watch)
    for file in (json_file, csv_file):
        if file is not None:
            click.echo(f"wrote {file}", err=True)


def _listing() -> str:
    presets = [(name, brief(config), size(weight_bytes(config))) for name, config in PRESETS.items()]
    contenders = [
        (name, info.missing() or "installed", text) for info in FAMILIES.values() for name, text in info.contenders.items()
    ]
    layers = table(("preset", "layer", "weights"), presets, right=(2,))
    return f"{layers}\n\n{table(('contender', 'available', 'what it does'), contenders)}"


def named_subjects(what: tuple[str, ...], options: dict[str, Any]) -> list[Subject]:
    """The layers that a command line names: presets and artifacts, or one described by the options that `field_options` makes.

    Args:
        options: of the command; those that describe a layer are taken out of it.
    """
    given, model, dtypes = take_given(options), options.pop("model"), options.pop("dtypes")
    many = {"dtype": dtypes} if dtypes else {}
    if not what:
        if not given and not model:
            raise click.UsageError("Name a preset (--list shows them) or an artifact, or describe a layer as for `moegen build`.")
        combined = wanted_layers({**given, **many}, model)
        return [Subject(_sizes(config), config) for config in _legal(combined)]
    if model:
        raise click.UsageError("--model is a layer of its own: leave out the presets and artifacts, or measure it apart.")
    found: list[Subject] = []
    for name in what:
        if name in PRESETS:
            combined = wanted_layers({**given, **many}, preset=name)
            found += [Subject(name, config, preset=name) for config in _legal(combined)]
        else:
            found.append(_artifact_subject(name, options["out"], bool(given or many)))
    return found


def _legal(combined: list[Any]) -> list[MoEConfig]:
    for combination in combined:
        if combination.config is None:
            raise ConfigError(combination.reason)
    return [combination.config for combination in combined]


def _artifact_subject(name: str, out: str | None, changed: bool) -> Subject:
    try:
        made = named_artifact(name, out)
    except ArtifactError as error:
        try:
            preset(name)
        except ConfigError as unknown:
            raise MeasureError(f"{unknown}; nor is it an artifact: {error}") from None
        raise
    if changed:
        raise click.UsageError(f"{name} is compiled already: leave out the layer's options, which cannot change it.")
    return Subject(made.name, made.config, artifact=made)


def _sizes(config: MoEConfig) -> str:
    return f"E{config.experts} K{config.top_k} H{config.hidden} I{config.intermediate}"


def _request(options: dict[str, Any]) -> Request:
    memory = options["memory_gb"]
    return Request(
        tokens=options["tokens"],
        threads=options["threads"] or (),
        routings=options["routings"],
        against="none" if options["no_peers"] else options["against"],
        dense=options["dense"],
        seed=options["seed"],
        effort=Effort(rounds=options["rounds"], min_ms=options["min_ms"]),
        memory_bytes=None if memory is None else int(memory * 1e9),
        store=options["out"],
    )


# ---------------------------------------------------------------- progress


@contextlib.contextmanager
def _progress(rounds: int) -> Any:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=rounds, unit="round", file=sys.stderr, leave=False, dynamic_ncols=True) as bar:
        yield bar


def _watch(bar: Any, json_file: pathlib.Path | None, csv_file: pathlib.Path | None) -> Watch:
    from . import printing, results
    from .run import Watch

    class Shown(Watch):
        """Tables as they come; files after every point, so that an interrupt keeps what was measured."""

        def step(self, what: str, turns: int = 0) -> None:
            click.get_current_context().obj.check()
            if bar is not None:
                bar.update(turns)
                if what:
                    bar.set_description(what)

        def run(self, started: dict[str, Any]) -> None:
            self._say(printing.run_lines(started))

        def point(self, measured: dict[str, Any], document: dict[str, Any]) -> None:
            self._say(printing.point_lines(measured["points"][-1], measured))
            if json_file is not None:
                results.write_document(document, json_file)
            if csv_file is not None:
                csv_file.write_text(results.as_csv(document), encoding="utf-8")

        def _say(self, lines: Any) -> None:
            text = "\n".join(lines)
            if bar is None:
                click.echo(text)
            else:
                with bar.external_write_mode(file=sys.stderr):
                    click.echo(text)

    return Shown()
