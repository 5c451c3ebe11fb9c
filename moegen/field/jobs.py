"""Other programs, several at a time: each ends within its time, and what it said is kept."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

ENDED, TIMED_OUT, ABSENT = "ended", "timed out", "absent"


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to run.

    Args:
        name: what a report calls it.
        command: the program and its arguments.
        seconds: it is killed after so long.
        environment: variables that differ from this process's.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        status: `ended`, `timed out` or `absent` (there is no such program).
        code: its exit code; None when it did not end by itself.
        output: standard output.
        said: standard error.
    """

    name: str
    status: str
    code: int | None
    output: str
    said: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether it ended with exit code 0."""
        return self.code == 0


def run(job: Job) -> Outcome:
    """Runs one job; its children end with it."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            job.command,
            env={**os.environ, **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(job.name, ABSENT, None, "", f"{job.command[0]}: {error.strerror}", time.monotonic() - start)
    status = ENDED
    try:
        output, said = process.communicate(timeout=job.seconds)
    except subprocess.TimeoutExpired:
        status = TIMED_OUT
        kill(process)
        output, said = process.communicate()
    code = process.returncode if status == ENDED else None
    return Outcome(job.name, status, code, output, said, time.monotonic() - start)


def run_together(jobs: Sequence[Job]) -> list[Outcome]:
    """Runs all jobs at the same time; the outcomes in the order of the jobs."""
    if not jobs:
        return []
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a process that leads a session, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
