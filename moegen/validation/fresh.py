"""A layer in a new process, in which no compiler can be imported: what loading, binding and the first calls take.

    python -m moegen.validation.fresh ARTIFACT WORKLOAD SEED

prints one line of JSON. Imports are timed apart: they are Python's.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from ..artifact import Artifact
from ..errors import MeasureError
from ..own_processes import environment
from .claims import Finding
from .others import Others, disturbance

COMPILERS = ("tvm", "jinja2", "xgboost", "torch", "numba", "triton")
_CALLS = 20
_PATIENCE_SECONDS = 60.0


def starts(made: Artifact, folder: pathlib.Path, seed: int, times: int) -> tuple[list[dict[str, Any]], dict[str, Finding]]:
    """So many new processes, one after the other; what each said, and findings about the slowest.

    Raises:
        MeasureError: a process did not end in time.
    """
    said, failures, others = [], [], Others()
    for _ in range(times):
        reply = _start(made, folder, seed)
        said.append(reply) if "error" not in reply else failures.append(str(reply["error"]))
    found = {
        "alone": Finding(
            float(len(failures)),
            failures[0] if failures else f"{times} new process{'es' if times > 1 else ''} without {', '.join(COMPILERS)}",
        )
    }
    if said:
        found["load"] = _slowest(said, "load_seconds", others)
        calls = 1e3 * statistics.median(reply["call_seconds"] for reply in said)
        slowest = _slowest(said, "first_call_seconds", others)
        found["first_call"] = Finding(slowest.value, f"{slowest.words}; later calls {calls:.2f} ms", slowest.disturbed)
    return said, found


def _slowest(said: list[dict[str, Any]], name: str, others: Others) -> Finding:
    seconds = [reply[name] for reply in said]
    words = f"slowest of {len(seconds)}: {1e3 * max(seconds):.1f} ms, median {1e3 * statistics.median(seconds):.1f}"
    return Finding(max(seconds), words, disturbance(others.share()))


def _start(made: Artifact, folder: pathlib.Path, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, str(made.path), str(folder), str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS, env=environment())
    except subprocess.TimeoutExpired:
        raise MeasureError(f"{made.name} did not start within {_PATIENCE_SECONDS:g} s in a new process") from None
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    reply: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reply


def main() -> None:
    """Loads, binds and calls, with every compiler out of reach."""
    for name in COMPILERS:
        sys.modules[name] = None  # type: ignore[assignment]
    artifact, folder, seed = sys.argv[1:]
    began = time.perf_counter()
    from .. import runtime

    imported = time.perf_counter()
    module = runtime.load(artifact)
    loaded = time.perf_counter()
    import numpy as np

    from ..arrays import HostArray, to_storage
    from ..bench import workload

    weights = workload.read_weights(pathlib.Path(folder))
    start = time.perf_counter()
    layer = module.bind(weights)
    bound = time.perf_counter()
    values = np.random.default_rng(int(seed)).standard_normal((1, layer.config.hidden), dtype=np.float32)
    x = HostArray(to_storage(HostArray(values, "float32"), layer.config.dtype), layer.config.dtype)
    seconds = []
    for _ in range(1 + _CALLS):
        called = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - called)
    print(
        json.dumps(
            {
                "import_seconds": imported - began,
                "load_seconds": loaded - imported,
                "bind_seconds": bound - start,
                "first_call_seconds": seconds[0],
                "call_seconds": statistics.median(seconds[1:]),
            }
        )
    )


if __name__ == "__main__":
    main()
