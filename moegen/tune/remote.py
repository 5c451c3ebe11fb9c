"""Measuring on other machines, through TVM's RPC: places that measure as the local one does, one for each server.

On the machine that knows the others, and on each machine that is to measure, where pip install 'moegen[rpc]' was run:

    python -m tvm.exec.rpc_tracker --port 9190
    python -m tvm.exec.rpc_server --tracker HOST:9190 --key NAME

(and --custom-addr ADDRESS for a server on the tracker's own machine, that others reach by another address than the tracker).
Whoever reaches a server can run anything there: TVM's RPC is for networks whose users are trusted.

A server measures for one client at a time. It needs neither moegen nor a compiler, but a processor or a CUDA device (with NVIDIA's
driver) that runs the code that is measured: one that lacks what the layers were compiled for is refused. Of several devices the
first one measures; $CUDA_VISIBLE_DEVICES of the server says which that is. A run measures on the same processor or device
everywhere, so that servers of each kind have a key of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import errors
from ..errors import CandidateError, MeasureError, PlaceLost
from ..own_processes import environment
from .measurers import Measurer
from .wire import PATIENCE_SECONDS, PREPARING_SECONDS, Tracker

_ERRAND = "moegen.tune.errand"
_POLL_SECONDS = 1.0


def servers(
    tracker: str, key: str, needed: int = 1, patience: float = PATIENCE_SECONDS, queue: Callable[[str], None] | None = None
) -> list[Place]:
    """One place for each free server that the tracker has under a key.

    Args:
        tracker: HOST:PORT.
        key: what the servers were started with.
        needed: the fewest that will do.
        patience: seconds that the tracker may take to answer and a server to become free.
        queue: waits as long as others have the servers, and is told so in a sentence; None waits for nobody.

    Raises:
        MeasureError: the tracker does not answer, or has fewer; the message says what to start.
    """
    where = Tracker(tracker, patience)
    free, known = where.servers(key)
    if queue is not None and free < needed <= known:
        queue(f"waiting: the tracker {tracker} has {known} servers under key {key!r}, and others are using {known - free} of them")
        while free < needed <= known:
            time.sleep(_POLL_SECONDS)
            free, known = where.servers(key)
    if free < needed:
        raise MeasureError(
            f"the tracker {tracker} has {free} free servers under key {key!r}, needed are {needed}: {where.how_to_serve(key)}"
        )
    return [Place(where, key) for _ in range(free)]


class Place:
    """Measures on whichever server of a key the tracker names, and stays there; a process of its own speaks with the server.

    What the server holds of the default and of the weights is kept between jobs, and brought anew when the default or the number
    of copies changes, or to another server after the first was lost. Several places may measure at once, each in a thread.
    """

    def __init__(self, tracker: Tracker, key: str) -> None:
        self.tracker, self.key = tracker, key
        self._errand: _Process | None = None

    def measurer(self, target: str, arch: str) -> Measurer:
        """What measures there.

        Args:
            target: a target's slug, or `cuda` or `llvm`.
            arch: architecture of the servers.

        Raises:
            PlaceLost, MeasureError, BuildError: as `measure`; there is no device.
        """
        return Measurer.of(self._ask({"measurer": target, "arch": arch}))

    def measure(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Carries out a job; a point where a layer is wrong is not timed, nor are those that follow.

        Args:
            job: "artifacts": folders of the default and of the candidate, with the same packed layout; "workload": folders made by
                `moegen.bench.workload`, with batches for each T of "tokens"; "threads"; "rounds"; "min_ms" of a turn; "copies" of
                the weights to go around; perhaps "limit_s", after which a candidate that does not answer is given up, and the
                name of the "processor" or device that has to measure.

        Returns:
            "points": for each folder and T, "workload", "tokens", "relative_l2" [default, candidate] (None when not finite) and
            "seconds" [[...], [...]], one for each round; "machine": "server", "processor", "processors".

        Raises:
            PlaceLost: the server is gone, or none was free. The next job looks for one again.
            CandidateError: the candidate crashed, hung or failed; the server and what it holds are well.
            TargetError, MeasureError: the job cannot be done here, whatever the candidate.
            ArtifactError, BuildError: an artifact is damaged; there is no C++ compiler for the helper that servers are given.
        """
        return self._ask(job)

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        if self._errand is None:
            self._errand = _Process(self.tracker, self.key)
        try:
            reply = self._errand.ask(job)
        except BaseException:
            self.close()
            raise
        if "result" in reply:
            result: dict[str, Any] = reply["result"]
            return result
        if reply["error"] == CandidateError.__name__:
            raise CandidateError(reply["message"], reply["status"])
        if reply["error"] == PlaceLost.__name__:
            self.close()
        raise getattr(errors, reply["error"])(reply["message"])

    def close(self) -> None:
        """Gives the server back; a job that is under way in another thread is lost."""
        errand, self._errand = self._errand, None
        if errand is not None:
            errand.close()

    def __str__(self) -> str:
        return f"a server of key {self.key!r} at {self.tracker.address}"


class _Process:
    """The process that runs errands, in a session of its own so that Ctrl-C reaches the tuner only; it ends with its input."""

    def __init__(self, tracker: Tracker, key: str) -> None:
        jobs, self._jobs = os.pipe()
        self._replies, replies = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        command = [sys.executable, "-m", _ERRAND, tracker.address, key, str(tracker.patience), str(jobs), str(replies)]
        self._process = subprocess.Popen(
            command,
            pass_fds=(jobs, replies),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment(),
            start_new_session=True,
        )
        os.close(jobs)
        os.close(replies)
        self._unread = b""

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer to a job.

        Raises:
            PlaceLost: it ended, or an exchange with the server took longer than it was announced.
        """
        with contextlib.suppress(BrokenPipeError):  # the missing reply says why
            os.write(self._jobs, (json.dumps(dict(job)) + "\n").encode())
        seconds, doing = PREPARING_SECONDS, "starting"
        while "within" in (reply := self._reply(seconds, doing)):
            seconds, doing = float(reply["within"]), str(reply["doing"])
        return reply

    def _reply(self, seconds: float, doing: str) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                raise PlaceLost(f"no answer for {seconds:.0f} s: {doing}")
            data = os.read(self._replies, 1 << 16)
            if not data:
                raise PlaceLost(f"{self._obituary()}: {doing}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _obituary(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process that speaks with the server {how}{f' ({said[-1]})' if said else ''}"

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        for descriptor in (self._jobs, self._replies):
            with contextlib.suppress(OSError):
                os.close(descriptor)


__all__ = ["Place", "PlaceLost", "servers"]
