"""The command line: parses, calls what a Python user would call, prints.

Nothing here imports the compiler before a command needs it: `moegen list` is quick and works without the `[build]` extra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect as introspection
import itertools
import json
import math
import os
import pathlib
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from . import artifact as artifacts
from . import config as layers
from .artifact import Artifact
from .config import MoEConfig
from .errors import ArtifactError, ConfigError, MoegenError, TargetError
from .target import host_arch, missing_features
from .version import __version__

if TYPE_CHECKING:
    from .builder import Outcome, Plan

TRACEBACK = "MOEGEN_TRACEBACK"
TARGETS = ("llvm", "cuda")
LISTED = ("experts", "top_k", "hidden", "intermediate")
CHOICES = {
    "dtype": layers.DTYPES,
    "activation": layers.ACTIVATIONS,
    "gating": layers.GATINGS,
    "group_score": layers.GROUP_SCORES,
}


class _Interrupts:
    """Notices Ctrl-C even where the compiler turns the KeyboardInterrupt into an error of its own; kill and hang-up likewise."""

    def __init__(self) -> None:
        self.noticed = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._notice)
        return self

    def _notice(self, number: int, frame: Any) -> NoReturn:
        self.noticed = number
        raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises the KeyboardInterrupt that was lost."""
        if self.noticed:
            raise KeyboardInterrupt


class _Commands(click.Group):
    """Commands whose every failure is one sentence on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        with _Interrupts() as ctx.obj:
            try:
                return super().invoke(ctx)
            except BaseException as error:
                if ctx.obj.noticed or isinstance(error, KeyboardInterrupt):
                    click.echo("Interrupted.", err=True)
                    ctx.exit(128 + (ctx.obj.noticed or signal.SIGINT))
                sentence = _sentence(error)
                if sentence is None or os.environ.get(TRACEBACK):
                    raise
                _fail(sentence)


def _sentence(error: BaseException) -> str | None:
    """What to say about an error; None for those that are click's to handle."""
    if isinstance(error, click.ClickException | click.Abort | click.exceptions.Exit) or not isinstance(error, Exception):
        return None
    if isinstance(error, MoegenError):
        return str(error)
    if isinstance(error, OSError):  # of a broken pipe, click makes a quiet end
        parts = (error.filename, error.strerror or error)
        return None if error.errno == errno.EPIPE else ": ".join(str(part) for part in parts if part)
    last = (str(error).strip().splitlines() or ["no message"])[-1]
    return f"unexpected {type(error).__name__}: {last} ({TRACEBACK}=1 shows where)"


def _fail(sentence: str) -> NoReturn:
    raise click.ClickException(_one_line(sentence))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moegen")
def main() -> None:
    """Mixture-of-Experts layers, generated, compiled and verified ahead of time.

    \b
    Example:
      moegen build --experts 8 --top-k 2 --hidden 512
      moegen list
    """


# ---------------------------------------------------------------- the layer's options


class Combination(NamedTuple):
    """Fields of a layer, and the reason why they are illegal, if they are."""

    fields: dict[str, Any]
    config: MoEConfig | None
    reason: str


def combinations(fields: Mapping[str, Any]) -> list[Combination]:
    """Every combination of the fields that hold several values, each different layer once."""
    fields = {name: value[0] if isinstance(value, tuple) and len(value) == 1 else value for name, value in fields.items()}
    names = [name for name, value in fields.items() if isinstance(value, tuple)]
    found: dict[Any, Combination] = {}
    for values in itertools.product(*(fields[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        try:
            config = MoEConfig.from_dict({**fields, **chosen})
            found.setdefault(config, Combination(chosen, config, ""))
        except ConfigError as error:
            found.setdefault(values, Combination(chosen, None, str(error)))
    return list(found.values())


def _integers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`8`, or `8,16` for several."""
    if value is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a whole number or a list of them such as 8,16.") from None


def _field_help() -> dict[str, str]:
    """What the docstring of `MoEConfig` says about each field."""
    section = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", introspection.getdoc(MoEConfig) or "", re.DOTALL)
    entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: _one_line(text.replace("`", "")) for names, text in entries for name in names.split(", ")}


def _field_option(field: dataclasses.Field[Any], text: str) -> Callable[[Any], Any]:
    name, kind = "--" + field.name.replace("_", "-"), str(field.type).partition(" ")[0]
    settings: dict[str, Any] = {"default": None, "help": _help(field, text)}
    if kind == "bool":
        name = f"{name}/--no-{name[2:]}"
    elif field.name in LISTED:
        settings |= {"callback": _integers, "metavar": "N[,N...]"}
    elif field.name in CHOICES:
        settings["type"] = click.Choice(CHOICES[field.name])
    else:
        settings["type"] = {"int": int, "float": float}.get(kind, str)
    return click.option(name, field.name, **settings)


def _help(field: dataclasses.Field[Any], text: str) -> str:
    if field.default is dataclasses.MISSING or field.default is None or field.name == "intermediate":
        return text
    shown = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    return f"{text} [default: {shown.lower() if isinstance(field.default, bool) else shown}]"


def layer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each field of `MoEConfig`, and those of the target."""
    texts = _field_help()
    options = [_field_option(field, texts.get(field.name, "")) for field in dataclasses.fields(MoEConfig)]
    options += [
        click.option(
            "--model", type=click.Path(), help="Take the layer of this Hugging Face config.json; other options override it."
        ),
        click.option("--target", type=click.Choice(TARGETS), default="llvm", show_default=True, help="What to compile for."),
        click.option("--mcpu", help="Processor as LLVM names it; `--mcpu help` lists them. [default: this machine's]"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the layer's fields that were given out of a command's options."""
    fields = {field.name: options.pop(field.name) for field in dataclasses.fields(MoEConfig)}
    return {name: value for name, value in fields.items() if value is not None}


def _wanted(given: Mapping[str, Any], model: str | None) -> list[Combination]:
    """The layers that a command line asks for."""
    base = MoEConfig.from_hf(model).to_dict() if model else {}
    missing = [name for name in ("experts", "top_k", "hidden") if name not in {**base, **given}]
    if missing:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise click.UsageError(f"Missing {options} (or --model).")
    return combinations({**base, **given})


def _check_target(target: str) -> None:
    if target == "cuda":
        raise TargetError("target 'cuda' is not available in this version of moegen: use --target llvm")


def _processors() -> list[str]:
    from . import builder, compiler  # builder first: without the compiler, its error says what to install

    del builder
    return compiler.processors()


# ---------------------------------------------------------------- build


out_option = click.option("--out", type=click.Path(), help="Store folder. [default: $MOEGEN_STORE, or moegen in the user's cache]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@main.command()
@layer_options
@click.option(
    "--from", "source", type=click.Path(), metavar="TE_SOURCE", help="Build from an edited TE module; the layer is in it."
)
@out_option
@click.option("--jobs", type=click.IntRange(1), help="Builds at a time. [default: one per processor]")
@click.option("--force", is_flag=True, help="Build even what is already built.")
@click.option("--no-verify", is_flag=True, help="Leave out the numerical proof.")
@json_option
def build(
    model: str | None,
    target: str,
    mcpu: str | None,
    source: str | None,
    out: str | None,
    jobs: int | None,
    force: bool,
    no_verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile and verify one layer, or each legal combination of several sizes.

    \b
    Examples:
      moegen build --experts 8 --top-k 2 --hidden 512 --target llvm
      moegen build --experts 8,16 --top-k 1,2 --hidden 512,1024 --out layers
      moegen build --model Mixtral-8x7B/config.json --dtype bfloat16
      moegen build --from te_source.py
    """
    if mcpu == "help":
        click.echo("\n".join(_processors()))
        return
    _check_target(target)
    given = _given(options)
    if source and (given or model):
        raise click.UsageError("--from takes the layer from the file: leave out --model and the layer's options.")
    wanted = [] if source else _wanted(given, model)
    legal = [c.config for c in wanted if c.config is not None]
    illegal = [c for c in wanted if c.config is None]
    if not legal and not source:
        _fail(illegal[0].reason if len(illegal) == 1 else f"none of {len(illegal)} combinations is legal; {_skipped(illegal[0])}")
    from . import builder

    todo: Sequence[MoEConfig | Plan] = [builder.plan_from_source(source, target, mcpu)] if source else legal
    for combination in illegal:
        click.echo(f"skipped {_skipped(combination)}", err=True)
    before = _present(out)
    settings: dict[str, Any] = {"mcpu": mcpu, "verify": not no_verify, "force": force, "jobs": jobs}
    done = []
    with contextlib.closing(_outcomes(builder.build_many(todo, target, out, **settings), len(todo))) as outcomes:
        for outcome in outcomes:
            click.get_current_context().obj.check()
            done.append(_result(outcome, before))
            if not as_json:
                _print_result(done[-1], len(todo) > 1)
    failed = sum("error" in result for result in done)
    if as_json:
        click.echo(_json({"results": done, "skipped": [{"fields": c.fields, "reason": c.reason} for c in illegal]}))
    elif len(wanted) > 1:
        click.echo(_summary(done, len(illegal)))
    if failed:
        click.get_current_context().exit(1)


def _skipped(combination: Combination) -> str:
    return f"{' '.join(f'{name}={value}' for name, value in combination.fields.items())}: {_one_line(combination.reason)}"


def _present(out: str | None) -> dict[str, str]:
    """Name and checksum of what the store has."""
    return {a.name: a.manifest["manifest_sha256"] for a in artifacts.list_artifacts(out) if isinstance(a, Artifact)}


def _outcomes(source: Iterator[Outcome], count: int) -> Generator[Outcome, None, None]:
    """Outcomes as they come, with a progress bar on a terminal."""
    if count < 2 or not sys.stderr.isatty():
        yield from source
        return
    from tqdm import tqdm

    with tqdm(total=count, unit="layer", desc="building", file=sys.stderr, leave=False) as bar:
        for outcome in source:
            with tqdm.external_write_mode(file=sys.stderr):
                yield outcome
            bar.update()


def _result(outcome: Outcome, before: Mapping[str, str]) -> dict[str, Any]:
    """How one build ended, as plain JSON values."""
    if outcome.artifact is None:
        return {"config": outcome.config.to_dict(), "error": _one_line(outcome.error), "seconds": round(outcome.seconds, 2)}
    made, report = outcome.artifact, outcome.artifact.verification()
    return {
        "name": made.name,
        "path": str(made.path),
        "config": made.config.to_dict(),
        "already_built": before.get(made.name) == made.manifest["manifest_sha256"],
        "verified": report["status"],
        "reason": report.get("reason"),
        "worst_relative_l2": report.get("worst_relative_l2"),
        "seconds": round(outcome.seconds, 2),
    }


def _print_result(result: Mapping[str, Any], several: bool) -> None:
    if "error" in result:
        layer = f"{_brief(MoEConfig.from_dict(result['config']))}: " if several else ""
        click.echo(f"Error: {layer}{result['error']}", err=True)
        return
    how = "already built" if result["already_built"] else f"built in {result['seconds']:.1f} s"
    click.echo(f"{result['name']}: {how}, {_proof(result)}: {result['path']}")


def _proof(report: Mapping[str, Any]) -> str:
    status = report.get("verified") or report["status"]
    if status == "skipped":
        return f"not verified ({report['reason']})"
    return f"verified (worst relative L2 error {report['worst_relative_l2']:.1e})"


def _summary(done: Sequence[Mapping[str, Any]], skipped: int) -> str:
    failed = sum("error" in result for result in done)
    found = sum(bool(result.get("already_built")) for result in done)
    counts = {"built": len(done) - failed - found, "already built": found, "failed": failed, "skipped as illegal": skipped}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "built")


# ---------------------------------------------------------------- emit


@main.command()
@layer_options
@click.option("--host", is_flag=True, help="The generated C++ host instead of the TE module.")
@click.option("-o", "--output", type=click.Path(), help="Write to this file.")
def emit(model: str | None, target: str, mcpu: str | None, host: bool, output: str | None, **options: Any) -> None:
    """Print the tensor-expression module that a layer is compiled from.

    \b
    Example:
      moegen emit --experts 8 --top-k 2 --hidden 512 -o te_source.py
    """
    if mcpu == "help":
        click.echo("\n".join(_processors()))
        return
    _check_target(target)
    wanted = _wanted(_given(options), model)
    if len(wanted) > 1:
        raise click.UsageError("emit prints one layer: give one value for each option.")
    if wanted[0].config is None:
        _fail(wanted[0].reason)
    from . import builder

    plan = builder.plan(wanted[0].config, target, mcpu)
    text = host_source(plan) if host else plan.te_source
    if output:
        pathlib.Path(output).write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)


def host_source(plan: Plan) -> str:
    """The generated C++ host around a plan's stages."""
    from . import compiler, emission

    with tempfile.TemporaryDirectory() as folder:
        module = compiler.load_module(plan.te_source, pathlib.Path(folder) / artifacts.TE_SOURCE)
    return emission.host_source(plan.geometry, [name for name, _ in module.stages()])


# ---------------------------------------------------------------- list


@main.command(name="list")
@out_option
@json_option
def list_(out: str | None, as_json: bool) -> None:
    """Show what is in the store.

    \b
    Example:
      moegen list --out layers
    """
    store = pathlib.Path(out) if out else artifacts.default_store()
    rows = [_listed(found) for found in artifacts.list_artifacts(store)]
    if as_json:
        click.echo(_json(rows))
        return
    if not rows:
        click.echo(f"{str(store)!r} has no artifacts; `moegen build` makes one")
        return
    table = [(r["name"], r["layer"], r["target"]["mcpu"], r["verified"], _size(r["bytes"])) for r in rows if "error" not in r]
    if table:
        click.echo(_table(("name", "layer", "target", "verified", "size"), table))
    for row in rows:
        if "error" in row:
            click.echo(f"damaged: {row['error']}")


def _listed(found: Artifact | ArtifactError) -> dict[str, Any]:
    """One line of the list as plain JSON values."""
    try:
        if isinstance(found, ArtifactError):
            raise found
        artifacts.check_files(found)
    except ArtifactError as error:
        return {"error": _one_line(error)}
    return {
        "name": found.name,
        "path": str(found.path),
        "layer": _brief(found.config),
        "config": found.config.to_dict(),
        "target": found.target.to_dict(),
        "runs_here": not _obstacles(found),
        "verified": found.manifest["verified"],
        "created": found.manifest["created"],
        "bytes": _bytes(found),
    }


def _brief(config: MoEConfig) -> str:
    """E8 K2 H512 I2048 float32 softmax swiglu, and every field that is not as usual."""
    c = config
    words = [f"E{c.experts} K{c.top_k} H{c.hidden} I{c.intermediate} {c.dtype} {c.gating} {c.activation}"]
    for field in dataclasses.fields(c)[7:]:
        value = getattr(c, field.name)
        if value != field.default:
            words.append(field.name if value is True else f"{field.name}={value}")
    return " ".join(words)


def _obstacles(made: Artifact) -> list[str]:
    """What this machine lacks to run an artifact."""
    return [made.target.arch] if made.target.arch != host_arch() else missing_features(made.target)


def _bytes(made: Artifact) -> int:
    return sum(int(file["bytes"]) for file in made.manifest["files"].values())


# ---------------------------------------------------------------- inspect


@main.command()
@click.argument("which", metavar="PATH_OR_NAME")
@out_option
@click.option("--te-source", is_flag=True, help="Print the tensor-expression module that it was compiled from.")
@click.option("--manifest", is_flag=True, help="Print manifest.json as it is.")
@json_option
def inspect(which: str, out: str | None, te_source: bool, manifest: bool, as_json: bool) -> None:
    """Show what an artifact is: layer, target, functions, weight layout, schedule, proof.

    PATH_OR_NAME is an artifact's folder, or its name in the store, or the beginning of one.

    \b
    Example:
      moegen inspect moe-e8-k2-h512
      moegen inspect layers/moe-e8-k2-h512-... --te-source
    """
    made = _open(which, out)
    artifacts.check_files(made)
    if te_source or manifest:
        file = made.path / (artifacts.TE_SOURCE if te_source else artifacts.MANIFEST)
        click.echo(file.read_text(encoding="utf-8"), nl=False)
        return
    obstacles = _obstacles(made)
    if as_json:
        own = {"name": made.name, "path": str(made.path), "runs_here": not obstacles, "missing_features": obstacles}
        click.echo(_json({**own, **made.manifest, "verification": made.verification()}))
        return
    click.echo("\n".join(_description(made, obstacles)))


def _open(which: str, out: str | None) -> Artifact:
    """The artifact in folder `which`, or the one in the store whose name is or begins like it."""
    if os.path.isdir(which):
        return artifacts.open_artifact(which)
    store = pathlib.Path(out) if out else artifacts.default_store()
    if which and os.path.basename(which) == which:
        if (store / which).is_dir():
            return artifacts.open_artifact(store / which)
        names = [path.name for path in sorted(store.glob("*")) if path.name.startswith(which)]
        if len(names) == 1:
            return artifacts.open_artifact(store / names[0])
        if names:
            raise ArtifactError(f"several artifacts in {str(store)!r} begin with {which!r}: {', '.join(names)}")
    raise ArtifactError(
        f"there is no artifact {which!r}, neither as a folder nor in {str(store)!r}; `moegen list` shows what there is"
    )


def _description(made: Artifact, obstacles: Sequence[str]) -> Iterator[str]:
    manifest, target, report = made.manifest, made.target, made.verification()
    yield made.name
    yield f"  path      {made.path}"
    yield f"  built     {manifest['created']}, {_size(_bytes(made))}"
    yield f"  layer     {_brief(made.config)}"
    yield f"  target    {target} ({target.arch}, {target.lanes} float32 lanes)"
    yield f"  needs     {' '.join(target.features) or 'no special CPU features'}"
    yield f"  runs here {'no, missing: ' + ', '.join(obstacles) if obstacles else 'yes'}"
    yield f"  proof     {_proof(report)}, seed {report.get('seed', 'none')}"
    yield f"  tokens    at most {manifest['max_tokens']} per call"
    yield f"  versions  {_pairs(manifest['versions'])}"
    yield "\nconfiguration"
    yield from (f"  {name} = {value}" for name, value in made.config.to_dict().items())
    yield "\nfunctions"
    yield from (f"  {name}({', '.join(arguments)})" for name, arguments in manifest["functions"].items())
    yield f"\npacked weights, {_size(manifest['packed_bytes'])}"
    rows = [
        (s["name"], s["dtype"], "x".join(map(str, s["shape"])), s["offset_bytes"], s["size_bytes"]) for s in manifest["segments"]
    ]
    yield _table(("  segment", "dtype", "shape", "offset", "bytes"), [(f"  {row[0]}", *row[1:]) for row in rows])
    yield "\nschedule"
    yield f"  tiling: {_pairs(manifest['tiling'])}"
    yield from (f"  {stage}: {_pairs(knobs) or 'fixed'}" for stage, knobs in manifest["knobs"].items())
    yield "\nfiles"
    files = [(f"  {name}", file["bytes"], file["sha256"]) for name, file in manifest["files"].items()]
    yield _table(("  file", "bytes", "sha256"), files)


# ---------------------------------------------------------------- verify


@main.command()
@click.argument("which", metavar="PATH_OR_NAME")
@out_option
@click.option("--seed", type=click.IntRange(0), help="Seed of weights and inputs. [default: a new one]")
@json_option
def verify(which: str, out: str | None, seed: int | None, as_json: bool) -> None:
    """Prove an artifact again: random weights and inputs against the float64 reference.

    \b
    Example:
      moegen verify moe-e8-k2-h512 --seed 1
    """
    made = _open(which, out)
    from .verification import verify as prove

    report = prove(made, seed)
    if as_json:
        click.echo(_json({"name": made.name, "path": str(made.path), **report}))
    else:
        click.echo("\n".join(_proof_table(made, report)))
    if report["status"] != "passed":
        click.get_current_context().exit(1)


def _proof_table(made: Artifact, report: Mapping[str, Any]) -> Iterator[str]:
    columns = ("routing", "tokens", "relative_l2", "elementwise", "near_ties")
    rows = [[f"{c[name]:.1e}" if isinstance(c[name], float) else c[name] for name in columns] for c in report["cases"]]
    yield _table(("routing", "T", "relative L2", "elementwise", "near ties"), rows)
    bounds = report["bounds"]
    yield f"bounds: relative L2 {bounds['relative_l2']:.0e}, elementwise {bounds['elementwise']:.0e}; seed {report['seed']}"
    yield from (f"FAILED: {reason}" for reason in report["failures"])
    yield f"{made.name}: {report['status']} in {report['seconds']:.1f} s"


# ---------------------------------------------------------------- printing


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=2)


def _plain(value: Any) -> Any:
    """JSON has no infinities: an error that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _size(count: int) -> str:
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    main()
