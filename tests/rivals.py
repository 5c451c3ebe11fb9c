"""Contenders that misbehave, for the tests of the benchmark; their worker finds this module on PYTHONPATH."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from moegen.arrays import HostArray
from moegen.bench.contenders.family import Family, Settings
from moegen.bench.contenders.numpy_layer import NumpyLayer


class Rivals(NumpyLayer):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        honest = self.calls["numpy-grouped"]

        def liar(x: HostArray, out: HostArray) -> None:
            honest(x, out)
            np.multiply(out.data, np.float32(1.001), out=out.data)

        def lazy(x: HostArray, out: HostArray) -> None:
            """Writes nothing: only poison can tell, once an honest one has used the same memory."""

        def crasher(x: HostArray, out: HostArray) -> None:
            os.kill(os.getpid(), signal.SIGSEGV)

        def hanger(x: HostArray, out: HostArray) -> None:
            time.sleep(3600)

        def raiser(x: HostArray, out: HostArray) -> None:
            raise RuntimeError("this library cannot\nmultiply")

        def late(x: HostArray, out: HostArray) -> None:
            """Right when it is checked, gone when it is timed."""
            honest(x, out)
            late.calls += 1  # type: ignore[attr-defined]
            if late.calls > 40:  # type: ignore[attr-defined]
                os._exit(3)

        late.calls = 0  # type: ignore[attr-defined]
        self.calls = {
            "honest": honest,
            "liar": liar,
            "lazy": lazy,
            "crasher": crasher,
            "hanger": hanger,
            "raiser": raiser,
            "late": late,
            "last": honest,
        }
        self.obstacles = {"refuser": "has no time for this layer"}


def open_family(settings: Settings) -> Family:
    return Rivals(settings)
