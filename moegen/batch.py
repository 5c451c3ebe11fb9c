"""Several builds at once, in parallel processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import pathlib
import signal
from collections.abc import Generator, Sequence
from typing import Any

from . import artifact as artifacts
from .artifact import Artifact
from .builder import build
from .config import MoEConfig
from .cuda.planning import CudaPlan
from .errors import BuildError, MoegenError
from .own_processes import begin_in_group
from .plan import Plan


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one of several builds ended: with an artifact (built now or found) or with the reason why not."""

    config: MoEConfig
    artifact: Artifact | None
    error: MoegenError | None
    seconds: float


def build_many(
    configs: Sequence[MoEConfig | Plan | CudaPlan],
    target: str = "llvm",
    out: str | os.PathLike[str] | None = None,
    *,
    mcpu: str | None = None,
    arch: str | None = None,
    verify: bool = True,
    force: bool = False,
    tuning: bool = True,
    jobs: int | None = None,
    tf32: bool = False,
) -> Generator[Outcome, None, None]:
    """Builds several layers in parallel processes; yields each outcome as it comes.

    Args:
        jobs: processes at a time; None for one per processor, at most one per configuration.
    """
    workers = min(jobs or os.cpu_count() or 1, len(configs))
    options = {"target": target, "out": out, "mcpu": mcpu, "arch": arch, "verify": verify, "force": force, "tuning": tuning}
    options["tf32"] = tf32
    if workers <= 1:
        for config in configs:
            yield _attempt(config, options)
        return
    context = multiprocessing.get_context("spawn")
    # Each worker leads a process group: the terminal's Ctrl-C is the parent's to handle, and killing one takes its compiler too.
    executor = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=begin_in_group)
    try:
        futures = {executor.submit(_attempt, config, options): config for config in configs}
        for future in concurrent.futures.as_completed(futures):
            try:
                yield future.result()
            except concurrent.futures.BrokenExecutor:
                layer = futures[future]
                killed = BuildError("a build process was killed, perhaps for want of memory: try fewer at a time (jobs)")
                yield Outcome(layer if isinstance(layer, MoEConfig) else layer.config, None, killed, 0.0)
    except BaseException:
        for process in list((getattr(executor, "_processes", None) or {}).values()):
            process.terminate()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGTERM)
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        artifacts.clear_leftovers(pathlib.Path(out) if out is not None else artifacts.default_store())


def _attempt(config: MoEConfig | Plan | CudaPlan, options: dict[str, Any]) -> Outcome:
    start = datetime.datetime.now()
    layer = config if isinstance(config, MoEConfig) else config.config
    try:
        made, error = build(config, **options), None
    except MoegenError as caught:
        made, error = None, caught
    return Outcome(layer, made, error, (datetime.datetime.now() - start).total_seconds())
