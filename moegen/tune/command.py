"""`moegen tune`: what is to be tuned, progress, and what became of it."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..choices import REGIMES
from ..config import MoEConfig
from ..display import as_json_text, brief
from ..errors import ConfigError
from ..options import layer_options, take_given, wanted_layers
from . import shelf

if TYPE_CHECKING:
    from ..records import Line
    from ..target import Target
    from .places import Place
    from .session import Watch


def _regimes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
    for name in names:
        if name not in REGIMES:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(REGIMES)}.")
    return tuple(name for name in REGIMES if name in names)


@click.command()
@layer_options
@click.option("--trials", type=click.IntRange(1), default=64, show_default=True, help="Candidates to measure for each regime.")
@click.option("--exhaustive", is_flag=True, help="Measure every candidate.")
@click.option(
    "--regime", "regimes", default="few,some,many", show_default=True, callback=_regimes, metavar="NAME[,NAME...]",
    help="Rows per expert to tune for: few (about 1), some (8), many (64).",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of the layer, on CPUs. [default: all processors]")
@click.option("--rounds", type=click.IntRange(3), default=12, show_default=True, help="Turns of a candidate at each point.")
@click.option("--tf32", is_flag=True, help="For cuda and float32: multiply on tensor cores, rounded to 10 bits of mantissa.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the search, weights and tokens.")
@click.option("--logs", type=click.Path(), help="Folder of records. [default: $MOEGEN_LOGS, or moegen-tuning beside the store]")
@click.option("--rpc", metavar="HOST:PORT", help="Measure on the machines that this tracker knows, instead of here.")
@click.option("--key", help="Under which name they are registered there.")
@click.option("--list", "listing", is_flag=True, help="List the records there are, and leave.")
@click.option("--export", "exported", type=click.Path(path_type=pathlib.Path), help="Write all records to this file, and leave.")
@click.option(
    "--import", "imported", type=click.Path(path_type=pathlib.Path), help="Take over the records of such a file, and leave."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tune(
    model: str | None,
    preset: str | None,
    target: str,
    mcpu: str | None,
    arch: str | None,
    listing: bool,
    exported: pathlib.Path | None,
    imported: pathlib.Path | None,
    **options: Any,
) -> None:
    """Search for faster choices for a layer on this machine, and record what was found.

    Every candidate is checked against the float64 reference and measured beside the default. What is recorded is used by
    `moegen build` from then on, where it is faster. Ctrl-C keeps what was measured; the same command goes on.

    \b
    Examples:
      moegen tune --preset olmoe
      moegen tune --experts 8 --top-k 2 --hidden 512 --regime few --trials 32
      moegen tune --preset olmoe --target cuda --arch sm_90a
      moegen tune --preset olmoe --target cuda --rpc 10.0.0.5:9190 --key h100
      moegen tune --list
    """
    logs, as_json = options["logs"], options["as_json"]
    if listing:
        shelf.show(logs, as_json)
    elif exported is not None:
        click.echo(shelf.export_to(exported, logs))
    elif imported is not None:
        click.echo(shelf.import_from(imported, logs))
    else:
        _tune(_layer(options, model, preset), target, mcpu, arch, options)


def _layer(options: dict[str, Any], model: str | None, preset: str | None) -> MoEConfig:
    wanted = wanted_layers(take_given(options), model, preset)
    if len(wanted) > 1:
        raise click.UsageError("tune takes one layer: give one value for each option.")
    if wanted[0].config is None:
        raise ConfigError(wanted[0].reason)
    return wanted[0].config


def _tune(config: MoEConfig, target: str, mcpu: str | None, arch: str | None, options: dict[str, Any]) -> None:
    from . import kinds, session, stand  # here, because `moegen --help` needs no compiler

    with contextlib.ExitStack() as stack:
        places = _places(options, stack)
        resolved = kinds.resolve(target, mcpu, arch or _arch(target, places), tf32=options["tf32"])
        if not places:
            kind = kinds.of(resolved)
            kind.check(config, resolved, kind.here())
        asked = session.Request(
            config,
            resolved,
            options["regimes"],
            options["trials"],
            options["exhaustive"],
            options["threads"],
            options["seed"],
            options["logs"],
            stand.Effort(rounds=options["rounds"]),
        )
        watch = _watch(stack, config, resolved)
        try:
            decisions = session.tune(asked, watch, places)
        except KeyboardInterrupt:
            stack.close()
            click.echo(shelf.kept(asked.logs), err=True)
            raise
        here = kinds.of(resolved).provenance()
        if options["as_json"]:
            click.echo(as_json_text([session.summary(line) for line in decisions]))
        elif any(line["better"] and not here.differs_in(line["provenance"]) for line in decisions):
            click.echo("`moegen build` with the same layer uses what is faster from now on")


def _places(options: dict[str, Any], stack: contextlib.ExitStack) -> Sequence[Place]:
    """Where to measure, until the stack is closed; nothing stands for this machine."""
    tracker, key = options["rpc"], options["key"]
    if bool(tracker) != bool(key):
        raise click.UsageError("--rpc HOST:PORT and --key NAME go together.")
    if not tracker:
        return ()
    # Imported here, because only this needs the packages of remote calls.
    from .remote import servers

    found: Sequence[Place] = servers(tracker, key, queue=lambda text: click.echo(text, err=True))
    for place in found:
        stack.callback(place.close)
    return found


def _arch(target: str, places: Sequence[Place]) -> str | None:
    """The architecture of the device that measures, where it is another machine's; otherwise the target has its own default."""
    if target != "cuda" or not places:
        return None
    from ..target import host_arch
    from . import devices
    from .places import measurer_of

    return devices.architecture(measurer_of(places, target, host_arch()))


def _watch(stack: contextlib.ExitStack, config: MoEConfig, target: Target) -> Watch:
    from tqdm import tqdm

    from .session import Watch

    class Shown(Watch):
        """A bar for each regime, on standard error."""

        def __init__(self) -> None:
            self.bar: Any = None
            self.best = 1.0
            self.start, self.done = time.monotonic(), 0
            self.say(f"tuning {brief(config)} for {target}")

        def say(self, text: str) -> None:
            tqdm.write(text, file=sys.stderr)

        def stage(self, what: str) -> None:
            self._check()
            if self.bar is not None:
                self.bar.set_description(what)
            elif sys.stderr.isatty():
                self.say(f"{what} ...")

        def regime(self, name: str, total: int, done: Sequence[Line]) -> None:
            self.bar = stack.enter_context(
                tqdm(total=total, initial=len(done), desc=name, unit="trial", file=sys.stderr, disable=None, leave=True)
            )
            self.best, self.start, self.done = 1.0, time.monotonic(), 0
            if done:
                self.say(f"{name}: going on after {len(done)} trials")
            for line in done:
                self._better(line)

        def trial(self, line: Line) -> None:
            self._check()
            self._better(line)
            self.done += 1
            minutes = (time.monotonic() - self.start) / 60
            self.bar.set_postfix_str(f"best {100 * (self.best - 1):+.1f} %, {self.done / minutes:.1f} trials/min")
            self.bar.update()

        def decided(self, line: Line) -> None:
            if self.bar is not None:
                self.bar.close()
                self.bar = None
            self.say(shelf.said(line))

        def _better(self, line: Line) -> None:
            if line["status"] == "correct":
                self.best = min(self.best, float(line["ratio"]))

        def _check(self) -> None:
            click.get_current_context().obj.check()

    return Shown()
