"""What shows that the kernels are right on the device, as jobs that run together: proofs, the GPU tests, NVIDIA's checker."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..paths import PACKAGE
from .jobs import ABSENT, TIMED_OUT, Job, Outcome

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
ARTIFACTS_VARIABLE = "MOEGEN_GPU_ARTIFACTS"  # where the GPU tests find built artifacts

_VARIANT_TOKENS = "0,1,2,17,300,1500"  # every height of row blocks
_PRESET_CASES = ("--tokens", "1,17,300", "--routings", "uniform,skewed")
_CHECKED_CASES = ("--tokens", "1,17,1000", "--routings", "skewed", "--seed", "1")
_CHECKS = {
    "memcheck": ("--leak-check", "no"),
    "racecheck": ("--racecheck-report", "analysis"),
}
_TESTS = "GPU tests"
_FOUND = 9  # the checker's exit code for errors
_UNABLE = ("Device not supported", "Failed to initialize", "not supported on this device")


def proofs(variants: Sequence[str], presets: Mapping[str, str], seconds: float) -> list[Job]:
    """The proof of small layers in one job, of every preset in another.

    Args:
        variants: paths of artifacts.
        presets: preset -> path of its artifact.
    """
    command = (sys.executable, "-m", "moegen.field.prove")
    jobs = [Job(f"proof of {name}", (*command, path, *_PRESET_CASES), seconds) for name, path in presets.items()]
    if variants:
        jobs.append(Job("proof of small layers", (*command, *variants, "--tokens", _VARIANT_TOKENS), seconds))
    return jobs


def tests(artifacts: pathlib.Path, seconds: float) -> list[Job]:
    """The GPU tests, where this is a checkout."""
    file = PACKAGE.parent / "tests" / "test_gpu.py"
    if not file.is_file():
        return []
    bare = ("-c", os.devnull, "--rootdir", str(file.parent), "-p", "no:cacheprovider")  # the suite's settings want its plugins
    command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "ignore::pytest.PytestUnknownMarkWarning", *bare, str(file))
    return [Job(_TESTS, command, seconds, {ARTIFACTS_VARIABLE: str(artifacts.resolve())})]


def checkers(program: str, artifact: str, seconds: float) -> list[Job]:
    """memcheck and racecheck of a small layer's proof."""
    proof = (sys.executable, "-m", "moegen.field.prove", artifact, *_CHECKED_CASES)
    return [
        Job(
            tool, (program, "--tool", tool, *options, "--error-exitcode", str(_FOUND), "--target-processes", "all", *proof), seconds
        )
        for tool, options in _CHECKS.items()
    ]


def verdict(outcome: Outcome) -> dict[str, Any]:
    """An outcome in plain JSON values: name, status, why, seconds, and the reports of proofs."""
    said = [line.strip() for line in (outcome.said + "\n" + outcome.output).splitlines() if line.strip()]
    reports = _reports(outcome.output)
    made: dict[str, Any] = {"name": outcome.name, "seconds": round(outcome.seconds, 1), "reports": reports}
    unable = next((line for line in said if any(words in line for words in _UNABLE)), None)
    if outcome.name in _CHECKS and unable:
        return made | {"status": SKIPPED, "why": f"compute-sanitizer cannot run here: {unable.lstrip('= ')}"}
    if outcome.status == ABSENT:
        return made | {"status": SKIPPED, "why": outcome.said}
    if outcome.status == TIMED_OUT:
        return made | {"status": FAILED, "why": f"did not end within {outcome.seconds:.0f} s"}
    if outcome.passed:
        why = _last(said, outcome.name)
        ran = outcome.name != _TESTS or " passed" in why
        return made | {
            "status": PASSED if ran else SKIPPED,
            "why": _proven(reports) if reports and outcome.name not in _CHECKS else why,
        }
    failures = [f"{pathlib.Path(r['artifact']).name}: {why}" for r in reports for why in r.get("failures", ())]
    return made | {"status": FAILED, "why": "; ".join(failures[:4]) or f"exit code {outcome.code}: {_last(said, outcome.name)}"}


def _proven(reports: Sequence[Mapping[str, Any]]) -> str:
    worst = max(float(report["worst_relative_l2"]) for report in reports)
    return f"{len(reports)} layer{'s' if len(reports) != 1 else ''}, relative L2 error at most {worst:.1e}"


def _reports(output: str) -> list[dict[str, Any]]:
    found = []
    for line in output.splitlines():
        if line.startswith('{"artifact"'):
            found.append(json.loads(line))
    return found


def _last(said: Sequence[str], name: str) -> str:
    """The line that sums up: the checker's, or the last one."""
    if name in _CHECKS:
        return next((line.lstrip("= ") for line in reversed(said) if "SUMMARY" in line), said[-1] if said else "")
    plain = [line for line in said if not line.startswith("{")]
    return plain[-1] if plain else ""
