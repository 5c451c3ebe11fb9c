"""`python -m moegen.field --out FOLDER`: the command line."""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys

from ..errors import MoegenError
from .cells import LAYERS, ROUTINGS
from .run import DEFAULT_ARCH, STEPS, Request, prepare, run
from .targets import TOKENS


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 with one sentence where nothing can be done, 2 where a check failed or one of moegen's outputs was wrong."""
    asked = _parse(arguments)
    say = functools.partial(print, flush=True)
    request = Request(
        out=asked.out or pathlib.Path(),
        minutes=asked.minutes,
        artifacts=asked.artifacts or (asked.out or pathlib.Path()) / "artifacts",
        layers=tuple(asked.layers),
        tokens=tuple(asked.tokens),
        routings=tuple(asked.routings),
        steps=tuple(asked.steps),
        arch=asked.arch,
        tune_minutes=asked.tune_minutes,
    )
    try:
        if asked.only_build:
            prepare(request, say)
            return 0
        document = run(request, say)
    except MoegenError as error:
        print(f"moegen.field: {error}", file=sys.stderr)
        return 1
    wrong = [
        entry
        for cell in document["cells"]
        for entry in cell["contenders"]
        if entry["name"].startswith("moegen") and entry["status"] != "correct"
    ]
    return 2 if wrong or any(check["status"] == "failed" for check in document["checks"]) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moegen.field",
        description="Proves moegen's kernels on a CUDA device and measures the routed experts against others, in a given time.",
    )

    def several(kind: type) -> functools.partial[list[object]]:
        return functools.partial(_listed, kind=kind)

    parser.add_argument("--out", type=pathlib.Path, help="folder for results.json, table.md, log.txt and pictures")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole run ends within this time (9)")
    parser.add_argument(
        "--artifacts", type=pathlib.Path, help="store of built layers; what is missing is built where TVM is (OUT/artifacts)"
    )
    parser.add_argument("--only-build", action="store_true", help="build the artifacts and stop; needs no device")
    parser.add_argument("--arch", default=DEFAULT_ARCH, help=f"architectures to build for ({DEFAULT_ARCH})")
    parser.add_argument("--layers", type=several(str), default=list(LAYERS), help=f"presets, parted by commas ({','.join(LAYERS)})")
    parser.add_argument("--tokens", type=several(int), default=list(TOKENS), help="numbers of tokens, parted by commas")
    parser.add_argument("--routings", type=several(str), default=list(ROUTINGS), help=f"out of {','.join(ROUTINGS)}")
    parser.add_argument("--steps", type=several(str), default=list(STEPS), help=f"out of {','.join(STEPS)}")
    parser.add_argument(
        "--tune-minutes", type=float, default=0.0, help="tune the first layer for so long at the end (0: not at all)"
    )
    asked = parser.parse_args(arguments)
    if asked.out is None and not (asked.only_build and asked.artifacts):
        parser.error("--out is needed, or --only-build with --artifacts")
    if unknown := [step for step in asked.steps if step not in STEPS]:
        parser.error(f"--steps: {unknown[0]!r} must be one of {', '.join(STEPS)}")
    return asked


def _listed(text: str, kind: type) -> list[object]:
    return [kind(part.strip()) for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    raise SystemExit(main())
