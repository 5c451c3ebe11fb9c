"""Interrupts: noticed where a library loses them, and waiting while a process is started."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from moegen import interrupts
from moegen.bench.contenders import process
from moegen.bench.contenders.family import Settings


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_an_interrupt_that_is_lost_is_noticed(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interrupts.Interrupts() as noticing:
        noticing.check()
        with pytest.raises(RuntimeError):  # noqa: PT012 (as a library does that turns it into an error of its own)
            try:
                os.kill(os.getpid(), number)
                time.sleep(1)
            except KeyboardInterrupt:
                raise RuntimeError from None
        assert noticing.noticed == number
        with pytest.raises(KeyboardInterrupt):
            noticing.check()
    assert signal.getsignal(number) == before


def test_interrupts_wait() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with interrupts.waiting():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(1)
        done.append(2)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_waits_outside_of_the_main_thread() -> None:
    done = []

    def other() -> None:
        with interrupts.waiting():
            done.append(1)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert done == [1]


def test_a_worker_that_is_being_started_is_ended(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the system starts the process."""
    started = []
    start = subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments, **options))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.Process("numpy", Settings(tmp_path, 1, ""), 1.0)
    assert [worker.returncode for worker in started] == [-signal.SIGKILL]
