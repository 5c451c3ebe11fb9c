"""Worker processes from outside: started, asked, stopped between the questions, and replaced when they crash or hang."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from ... import interrupts
from ...paths import PACKAGE
from .family import Settings
from .roster import FAMILIES

_LEAST_START_SECONDS = 120.0  # importing a library on a busy machine
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerLost(Exception):
    """A worker crashed or did not answer; the message says which. It is gone."""


class Process:
    """One worker process, in a session of its own so that Ctrl-C reaches the benchmark only.

    Args:
        family: key of `FAMILIES`.
        settings: what the family is told.
        patience_seconds: how long an answer may take.

    Raises:
        WorkerLost: it did not start.
    """

    worker = "moegen.bench.contenders.worker"

    def __init__(self, family: str, settings: Settings, patience_seconds: float) -> None:
        self.patience_seconds = patience_seconds
        self._log = settings.folder / f"worker-{family}.log"
        self._unread = b""
        with contextlib.ExitStack() as undo:
            with interrupts.waiting():
                self._process = self._started(family, settings)
                undo.callback(self.close)
            self.hello = self._reply(max(patience_seconds, _LEAST_START_SECONDS))
            self.signal(signal.SIGSTOP)
            undo.pop_all()

    def _started(self, family: str, settings: Settings) -> subprocess.Popen[bytes]:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        told = json.dumps({"folder": str(settings.folder), "threads": settings.threads, "artifact": settings.artifact})
        command = [sys.executable, "-m", self.worker, FAMILIES[family].module, told, str(requests), str(replies)]
        try:
            with self._log.open("wb") as log:
                return subprocess.Popen(
                    command,
                    pass_fds=(requests, replies),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment(settings.threads),
                    start_new_session=True,
                )
        finally:
            os.close(requests)
            os.close(replies)

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Wakes the worker, asks, and stops it again.

        Returns:
            Its answer; {"error": sentence} when the library raised.

        Raises:
            WorkerLost: it crashed, or did not answer in time.
        """
        with self.awake():
            self.tell(request, **arguments)
            return self.hear()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """The worker runs inside this block only; an error ends it."""
        self.signal(signal.SIGCONT)
        try:
            yield
        except BaseException:
            self.close()
            raise
        self.signal(signal.SIGSTOP)

    def tell(self, request: str, **arguments: Any) -> None:
        """Sends a request to the worker, which is awake."""
        with contextlib.suppress(BrokenPipeError):  # the missing reply says why
            os.write(self._requests, (json.dumps({"ask": request, **arguments}) + "\n").encode())

    def hear(self) -> dict[str, Any]:
        """The next line of the worker's, which is awake.

        Raises:
            WorkerLost: it crashed, or said nothing for too long.
        """
        return self._reply(self.patience_seconds)

    def signal(self, number: int) -> None:
        """Sends a signal to the worker and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Ends the process and what it started."""
        if self._process.poll() is None or self._requests >= 0:
            self.signal(signal.SIGKILL)
        self._process.wait()
        for descriptor in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._requests = self._replies = -1

    def _reply(self, patience_seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + patience_seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                raise WorkerLost(f"did not answer within {patience_seconds:g} s")
            data = os.read(self._replies, 1 << 16)
            if not data:
                raise WorkerLost(self._obituary())
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _obituary(self) -> str:
        code = self._process.wait()
        said = _last_line(self._log)
        how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{how}{f' ({said})' if said else ''}"


def _environment(threads: int) -> dict[str, str]:
    """The same number of threads for every library, and this very moegen."""
    path = os.pathsep.join(part for part in (str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")) if part)
    fixed = {name: str(threads) for name in THREAD_VARIABLES} | {"PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | fixed


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((" ".join(line.split())[:200] for line in reversed(lines) if line.strip()), "")
