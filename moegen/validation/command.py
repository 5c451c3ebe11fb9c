"""`moegen validate`: what, how long and where to, progress and the summary."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import click

from ..bench.request import Subject
from ..display import as_json_text, table
from ..errors import TargetError
from ..options import named_artifact

if TYPE_CHECKING:
    from .run import Progress
    from .scope import Scope


@click.command()
@click.argument("which", nargs=-1, metavar="[PATH_OR_NAME]...")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="Most time to take.")
@click.option("--out", type=click.Path(path_type=pathlib.Path), help="Folder for page and data. [default: a new temporary one]")
@click.option("--seed", type=click.IntRange(0), help="Seed of weights and inputs. [default: a new one]")
@click.option("--quick", "is_quick", is_flag=True, help="Tiny layers and little effort: shows that it runs, not how fast.")
@click.option("--claims", "listing", is_flag=True, help="List all claims with their thresholds, and leave.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def validate(
    which: tuple[str, ...],
    minutes: float,
    out: pathlib.Path | None,
    seed: int | None,
    is_quick: bool,
    listing: bool,
    as_json: bool,
) -> None:
    """Check on this machine what moegen claims: build, prove and measure three layers, beside NumPy and torch.

    Artifacts that are named are validated instead of the three. The exit code is 1 when a claim fails. What could not be tested
    is said to be so, and does not change the exit code. Ctrl-C ends with what there is.

    \b
    Examples:
      moegen validate --out validation
      moegen validate --minutes 2
      moegen validate moe-e8-k2-h512
    """
    from . import claims  # here, because other commands import this module too

    scope = _scope(which, minutes, seed, is_quick)
    if listing:
        rows = [(c.layer, c.says, c.threshold) for c in claims.claims(scope.subjects, scope.tokens)]
        click.echo(table(("layer", "claim", "threshold"), rows))
        return
    from . import page, printing, run  # which draw

    folder = out if out is not None else pathlib.Path(tempfile.mkdtemp(prefix="moegen-validation-"))
    document = run.validate(scope, folder, _shown())
    click.echo(as_json_text(document) if as_json else "\n".join(printing.summary_lines(document, str(folder / page.PAGE))))
    if document["interrupted"]:
        click.get_current_context().exit(128 + (click.get_current_context().obj.noticed or signal.SIGINT))
    if run.failed(document):
        click.get_current_context().exit(1)


def _scope(which: tuple[str, ...], minutes: float, seed: int | None, is_quick: bool) -> Scope:
    from . import scope as scopes

    scope = scopes.quick(minutes, seed) if is_quick else scopes.Scope(minutes, seed=seed)
    if not which:
        return scope
    subjects: dict[str, Subject] = {}
    for name in which:
        made = named_artifact(name, None)
        if made.target.kind != "llvm":
            raise TargetError(f"{made.name} is for {made.target.kind}: `python -m moegen.field` proves and measures such layers")
        subjects[made.name] = Subject(made.name, made.config, artifact=made)
    return dataclasses.replace(scope, subjects=tuple(subjects.values()))


def _shown() -> Progress:
    """Stages on standard error, what happens inside them on terminals only."""
    from . import run

    start, width = time.monotonic(), 110

    class Shown(run.Progress):
        def stage(self, what: str) -> None:
            self.detail("")
            click.echo(f"[{time.monotonic() - start:4.0f} s] {what}", err=True)

        def detail(self, what: str) -> None:
            if sys.stderr.isatty():
                click.echo(f"\r{f'         {what}'[:width] if what else '':<{width}}\r", err=True, nl=False)

    return Shown()
