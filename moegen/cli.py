"""The command line: parses, calls what a Python user would call, prints.

Nothing here imports the compiler before a command needs it: `moegen list` is quick and works without the `[build]` extra.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import artifact as artifacts
from .artifact import Artifact
from .bench.command import bench
from .config import MoEConfig
from .display import (
    as_json_text,
    brief,
    description,
    kernel_tables,
    listed,
    obstacles_of,
    one_line,
    proof,
    proof_table,
    size,
    summary,
    table,
)
from .errors import MoegenError
from .interrupts import Interrupts
from .moepack import is_moepack
from .options import layer_options, named_artifact, out_option, skipped_line, take_given, wanted_layers
from .pack.command import inspect_packed, pack, verify_packed
from .report.command import report
from .serve_bench.command import serve_bench
from .tune.command import tune
from .validation.command import validate
from .version import __version__

if TYPE_CHECKING:
    from .batch import Outcome
    from .cuda.planning import CudaPlan
    from .plan import Plan

TRACEBACK = "MOEGEN_TRACEBACK"


class _Commands(click.Group):
    """Commands whose every failure is one sentence on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        with Interrupts() as ctx.obj:
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
    raise click.ClickException(one_line(sentence))


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


def _processors(arch: str | None) -> list[str]:
    from . import compiler

    return compiler.processors(arch)


# ---------------------------------------------------------------- build


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
@click.option("--no-tuning", is_flag=True, help="Leave tuning records out of account.")
@click.option("--tf32", is_flag=True, help="For cuda and float32: multiply on tensor cores, rounded to 10 bits of mantissa.")
@json_option
def build(
    model: str | None,
    preset: str | None,
    target: str,
    mcpu: str | None,
    arch: str | None,
    source: str | None,
    out: str | None,
    jobs: int | None,
    force: bool,
    no_verify: bool,
    no_tuning: bool,
    tf32: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compile and verify one layer, or each legal combination of several sizes.

    \b
    Examples:
      moegen build --experts 8 --top-k 2 --hidden 512 --target llvm
      moegen build --experts 8 --top-k 2 --hidden 512 --dtype bfloat16 --target cuda --arch sm_80,sm_90
      moegen build --experts 8,16 --top-k 1,2 --hidden 512,1024 --out layers
      moegen build --model Mixtral-8x7B/config.json --dtype bfloat16
      moegen build --preset olmoe --dtype float32
      moegen build --from te_source.py
    """
    if mcpu == "help":
        click.echo("\n".join(_processors(arch)))
        return
    given = take_given(options)
    if source and (given or model or preset):
        raise click.UsageError("--from takes the layer from the file: leave out --model, --preset and the layer's options.")
    wanted = [] if source else wanted_layers(given, model, preset)
    legal = [c.config for c in wanted if c.config is not None]
    illegal = [c for c in wanted if c.config is None]
    if not legal and not source:
        _fail(
            illegal[0].reason if len(illegal) == 1 else f"none of {len(illegal)} combinations is legal; {skipped_line(illegal[0])}"
        )
    from . import batch, builder

    todo: Sequence[MoEConfig | Plan | CudaPlan] = legal
    if source:
        todo = [builder.plan_from_source_for(source, target, mcpu, arch, tf32=tf32)]
    for combination in illegal:
        click.echo(f"skipped {skipped_line(combination)}", err=True)
    if not no_tuning:
        _settle(legal, target, mcpu, arch, tf32)
    before = _present(out)
    settings: dict[str, Any] = {"mcpu": mcpu, "arch": arch, "verify": not no_verify, "force": force, "jobs": jobs}
    settings |= {"tuning": not no_tuning, "tf32": tf32}
    done = []
    with contextlib.closing(_outcomes(batch.build_many(todo, target, out, **settings), len(todo))) as outcomes:
        for outcome in outcomes:
            click.get_current_context().obj.check()
            done.append(_result(outcome, before))
            if not as_json:
                _print_result(done[-1], len(todo) > 1)
    failed = sum("error" in result for result in done)
    if as_json:
        click.echo(as_json_text({"results": done, "skipped": [{"fields": c.fields, "reason": c.reason} for c in illegal]}))
    elif len(wanted) > 1:
        click.echo(summary(done, len(illegal)))
    if failed:
        click.get_current_context().exit(1)


def _settle(layers: Sequence[MoEConfig], target: str, mcpu: str | None, arch: str | None, tf32: bool) -> None:
    """Measures tuning records that come from elsewhere, once and before anything else runs, where this machine can measure."""
    from .tune import kinds, verdicts

    for layer in layers:
        for sentence in verdicts.settle(layer, kinds.resolve(target, mcpu, arch, tf32=tf32)):
            click.echo(one_line(sentence), err=True)


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
        return {"config": outcome.config.to_dict(), "error": one_line(outcome.error), "seconds": round(outcome.seconds, 2)}
    made, report = outcome.artifact, outcome.artifact.verification()
    return {
        "name": made.name,
        "path": str(made.path),
        "config": made.config.to_dict(),
        "already_built": before.get(made.name) == made.manifest["manifest_sha256"],
        "verified": report["status"],
        "reason": report.get("reason"),
        "executed": report.get("executed"),
        "worst_relative_l2": report.get("worst_relative_l2"),
        "seconds": round(outcome.seconds, 2),
    }


def _print_result(result: Mapping[str, Any], several: bool) -> None:
    if "error" in result:
        layer = f"{brief(MoEConfig.from_dict(result['config']))}: " if several else ""
        click.echo(f"Error: {layer}{result['error']}", err=True)
        return
    how = "already built" if result["already_built"] else f"built in {result['seconds']:.1f} s"
    click.echo(f"{result['name']}: {how}, {proof(result)}: {result['path']}")


# ---------------------------------------------------------------- emit


@main.command()
@layer_options
@click.option("--host", is_flag=True, help="The generated C++ host instead of the TE module.")
@click.option("--asm", metavar="STAGE", help="The machine code of one function of the TE module, such as expert_up_4, as assembly.")
@click.option("-o", "--output", type=click.Path(), help="Write to this file.")
def emit(
    model: str | None,
    preset: str | None,
    target: str,
    mcpu: str | None,
    arch: str | None,
    host: bool,
    asm: str | None,
    output: str | None,
    **options: Any,
) -> None:
    """Print the tensor-expression module that a layer is compiled from.

    \b
    Examples:
      moegen emit --experts 8 --top-k 2 --hidden 512 -o te_source.py
      moegen emit --experts 8 --top-k 2 --hidden 512 --asm expert_up_4
    """
    if mcpu == "help":
        click.echo("\n".join(_processors(arch)))
        return
    if host and asm is not None:
        raise click.UsageError("--host and --asm exclude each other.")
    wanted = wanted_layers(take_given(options), model, preset)
    if len(wanted) > 1:
        raise click.UsageError("emit prints one layer: give one value for each option.")
    if wanted[0].config is None:
        _fail(wanted[0].reason)
    from . import builder, compiler
    from .plan import Plan

    todo = builder.plan_for(wanted[0].config, target, mcpu, arch)
    if not isinstance(todo, Plan):
        if host or asm is not None:
            raise click.UsageError("--host and --asm are for --target llvm; `moegen inspect` has --cuda-source, --ptx and --sass.")
        text = todo.te_source
    elif asm is not None:
        text = compiler.assembly(todo.te_source, [asm], todo.geometry, todo.target, todo.knobs)
    else:
        text = host_source(todo) if host else todo.te_source
    if output:
        pathlib.Path(output).write_text(text, encoding="utf-8")
    else:
        click.echo(text, nl=False)


def host_source(plan: Plan) -> str:
    """The generated C++ host around a plan's stages."""
    from . import compiler, emission

    with tempfile.TemporaryDirectory() as folder:
        module = compiler.load_module(plan.te_source, pathlib.Path(folder) / artifacts.TE_SOURCE)
    return emission.host_source(plan.geometry, [name for name, _ in module.stages()], plan.regimes)


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
    rows = [listed(found) for found in artifacts.list_artifacts(store)]
    if as_json:
        click.echo(as_json_text(rows))
        return
    if not rows:
        click.echo(f"{str(store)!r} has no artifacts; `moegen build` makes one")
        return
    lines = [(r["name"], r["layer"], r["target"]["mcpu"], r["verified"], size(r["bytes"])) for r in rows if "error" not in r]
    if lines:
        click.echo(table(("name", "layer", "target", "verified", "size"), lines, right=(4,)))
    for row in rows:
        if "error" in row:
            click.echo(f"damaged: {row['error']}")


# ---------------------------------------------------------------- inspect


@main.command()
@click.argument("which", metavar="PATH_OR_NAME")
@out_option
@click.option("--te-source", is_flag=True, help="Print the tensor-expression module that it was compiled from.")
@click.option("--manifest", is_flag=True, help="Print manifest.json as it is.")
@click.option("--cuda-source", is_flag=True, help="Print the CUDA C++ source of its kernels.")
@click.option("--ptx", is_flag=True, help="Print the PTX that is in it for newer devices.")
@click.option("--sass", is_flag=True, help="Print the machine code of its kernels as assembly (needs nvdisasm).")
@click.option("--resources", is_flag=True, help="Show registers, shared memory and spills of its kernels.")
@click.option("--kernel", metavar="NAME", help="With --sass and --resources: only kernels whose name begins so.")
@json_option
def inspect(
    which: str,
    out: str | None,
    te_source: bool,
    manifest: bool,
    cuda_source: bool,
    ptx: bool,
    sass: bool,
    resources: bool,
    kernel: str | None,
    as_json: bool,
) -> None:
    """Show what an artifact is: layer, target, functions, weight layout, schedule, proof; or what a packed file holds.

    PATH_OR_NAME is an artifact's folder, or its name in the store, or the beginning of one; or a file that `moegen pack` wrote.

    \b
    Examples:
      moegen inspect moe-e8-k2-h512
      moegen inspect layer3.moepack
      moegen inspect layers/moe-e8-k2-h512-... --te-source
      moegen inspect layers/moe-...-cuda-sm-90-... --resources
    """
    if is_moepack(which):
        inspect_packed(which, as_json)
        return
    made = named_artifact(which, out)
    artifacts.check_files(made)
    if te_source or manifest:
        file = made.path / (artifacts.TE_SOURCE if te_source else artifacts.MANIFEST)
        click.echo(file.read_text(encoding="utf-8"), nl=False)
        return
    if cuda_source or ptx or sass or resources:
        if made.target.kind != "cuda":
            raise click.UsageError(f"{made.name} is for {made.target.kind}: it has no CUDA kernels.")
        _inspect_kernels(made, cuda_source, ptx, sass, kernel or "", as_json)
        return
    obstacles = obstacles_of(made)
    if as_json:
        own = {"name": made.name, "path": str(made.path), "runs_here": not obstacles, "missing_features": obstacles}
        click.echo(as_json_text({**own, **made.manifest, "verification": made.verification()}))
        return
    click.echo("\n".join(description(made, obstacles)))


def _inspect_kernels(made: Artifact, cuda_source: bool, ptx: bool, sass: bool, kernel: str, as_json: bool) -> None:
    from .cuda import listing

    if cuda_source or ptx:
        click.echo(listing.source(made) if cuda_source else listing.ptx(made), nl=False)
    elif sass:
        for architecture, kernels in listing.sass(made, kernel).items():
            for name, text in kernels.items():
                click.echo(f"// {architecture} {name}\n{text.rstrip()}\n")
    elif as_json:
        click.echo(as_json_text(listing.resources(made, kernel)))
    else:
        click.echo("\n".join(kernel_tables(listing.resources(made, kernel))))


# ---------------------------------------------------------------- verify


@main.command()
@click.argument("which", metavar="PATH_OR_NAME")
@out_option
@click.option("--seed", type=click.IntRange(0), help="Seed of weights and inputs. [default: a new one]")
@json_option
def verify(which: str, out: str | None, seed: int | None, as_json: bool) -> None:
    """Prove an artifact again: random weights and inputs against the float64 reference. Of a packed file, compare the checksums.

    \b
    Examples:
      moegen verify moe-e8-k2-h512 --seed 1
      moegen verify layer3.moepack
    """
    if is_moepack(which):
        verify_packed(which, as_json)
        return
    made = named_artifact(which, out)
    if made.target.kind == "cuda":
        from .cuda.proof import prove
    else:
        from .verification import verify as prove

    report = prove(made, seed)
    if report["status"] == "skipped":
        _fail(f"{made.name} cannot be verified here: {report['reason']}")
    if as_json:
        click.echo(as_json_text({"name": made.name, "path": str(made.path), **report}))
    else:
        click.echo("\n".join(proof_table(made, report)))
    if report["status"] != "passed":
        click.get_current_context().exit(1)


main.add_command(bench)
main.add_command(pack)
main.add_command(report)
main.add_command(serve_bench)
main.add_command(tune)
main.add_command(validate)


if __name__ == "__main__":
    main()
