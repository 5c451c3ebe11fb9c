"""Processes of the tuner: each leads a group of its own, has a limit of time, and leaves nothing behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..errors import CandidateError
from ..own_processes import environment

_TICK_SECONDS = 0.1
Item = TypeVar("Item")
Result = TypeVar("Result")

_running: set[int] = set()


def run_module(module: str, arguments: Sequence[str], limit_seconds: float, log: pathlib.Path) -> None:
    """Runs a module of moegen in a process group of its own; neither it nor what it started is left when this returns or raises.

    Raises:
        CandidateError: it crashed (`runtime`) or took too long (`timeout`).
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment(),
            start_new_session=True,
        )
        _running.add(process.pid)
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            raise CandidateError(f"it did not end within {limit_seconds:g} s", "timeout") from None
        finally:
            end(process.pid)
            process.wait()
            _running.discard(process.pid)
    if code:
        how = f"it crashed with {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        said = _last_line(log)
        raise CandidateError(f"{how}{f': {said}' if said else ''}", "runtime")


def end_all() -> None:
    """Ends what other threads of this process are running."""
    for pid in list(_running):
        end(pid)


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """What `function` makes of each item, in order, in threads; whatever goes wrong, nothing that they started is left."""
    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(function, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            while concurrent.futures.wait(futures, _TICK_SECONDS).not_done:
                end_all()
            raise


def end(pid: int) -> None:
    """Kills a process that leads a group, its group, and those that it started in groups of their own, as compilers are."""
    for leader in (*_descendants(pid), pid):
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if kill is os.kill or leader == pid or os.getpgid(leader) == leader:
                    kill(leader, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """The processes that come from one, by what the system says of each one's parent."""
    parents: dict[int, int] = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    found, before = [pid], 0
    while len(found) > before:
        before = len(found)
        found += [child for child, parent in parents.items() if parent in found and child not in found]
    return found[1:]


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((" ".join(line.split())[:200] for line in reversed(lines) if line.strip()), "")
