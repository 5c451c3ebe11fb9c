"""The process that measures, watched: it is asked for one cell at a time, and replaced when it dies or says nothing for long."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from ..errors import MeasureError
from .cells import Cell
from .jobs import kill

STARTING_SECONDS = 120.0
SILENT_SECONDS = 45.0


class Lost(MeasureError):
    """The measuring process is gone.

    Args:
        contender: whose turn it was; empty when it was nobody's.
    """

    def __init__(self, message: str, contender: str) -> None:
        super().__init__(message)
        self.contender = contender


class Measurer:
    """A measuring process, started when first asked.

    Args:
        log: takes what the process says on standard error.
        report: is told what goes on: contender, step.
        command: the program.
        starting_seconds, silent_seconds: how long it may say nothing.
    """

    def __init__(
        self,
        log: IO[str],
        report: Callable[[str, str], None] = lambda contender, what: None,
        command: Sequence[str] = (sys.executable, "-m", "moegen.field.worker", "0"),
        starting_seconds: float = STARTING_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self.log, self.report, self.command = log, report, tuple(command)
        self.starting_seconds, self.silent_seconds = starting_seconds, silent_seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def measure(self, cell: Cell, artifacts: Sequence[str], without: dict[str, str], seconds: float) -> dict[str, Any]:
        """The cell's measurements.

        Raises:
            Lost: the process died, hung or took more than `seconds`; the next call starts another.
            MeasureError: it refused, with its reason.
        """
        patience = self.silent_seconds if self._process else self.starting_seconds
        process = self._process or self._start()
        contender, what = "", "starting"
        end = time.monotonic() + seconds
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"cell": cell.to_dict(), "artifacts": list(artifacts), "without": without}) + "\n")
            process.stdin.flush()
        except OSError:  # it has died already: its last line says so
            pass
        while True:
            try:
                line = self._lines.get(timeout=min(patience, max(0.0, end - time.monotonic())))
            except queue.Empty:
                self.close()
                why = f"nothing for {patience:.0f} s" if time.monotonic() < end else "the time is over"
                raise Lost(f"{_step(contender, what)}: {why}", contender) from None
            if line is None:
                code = process.wait()
                self.close()
                raise Lost(f"{_step(contender, what)}: the process ended with {_ending(code)}", contender)
            answer = json.loads(line)
            if "result" in answer:
                result: dict[str, Any] = answer["result"]
                return result
            if "refused" in answer:
                raise MeasureError(answer["refused"])
            contender, what, patience = answer["at"], answer["what"], self.silent_seconds
            self.report(contender, what)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            kill(self._process)
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        lines: queue.Queue[str | None] = queue.Queue()
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        self._process, self._lines = process, lines
        return process


def _step(contender: str, what: str) -> str:
    return f"{contender}, {what}" if contender else what


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
