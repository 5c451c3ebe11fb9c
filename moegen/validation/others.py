"""How much of the processors other processes had: a time that is missed on a busy machine says nothing."""

from __future__ import annotations

import os
import pathlib
import resource
import time

from .claims import QUIET_SHARE

_STAT = pathlib.Path("/proc/stat")


class Others:
    """Counts from when it is made; the processors are those that this process may use."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Of the processors' time, what neither idled nor went to this process and those that it waited for; None where the
        system does not say."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        taken = (busy - self._busy) - (_own_seconds() - self._own)
        return max(taken, 0.0) / max((time.monotonic() - self._wall) * len(os.sched_getaffinity(0)), 1e-9)


def disturbance(share: float | None) -> str:
    """What to say about a share that is too large, or nothing."""
    return f"other processes had {share:.0%} of the processors" if share is not None and share > QUIET_SHARE else ""


def _busy_seconds() -> float | None:
    """Seconds that the usable processors were busy since the machine started, those stolen by other machines included."""
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
        mine = {f"cpu{index}" for index in os.sched_getaffinity(0)}
        rows = [[int(part) for part in line.split()[1:9]] for line in lines if line.split(" ", 1)[0] in mine]
    except (OSError, ValueError, AttributeError):
        return None
    if not rows:
        return None
    return sum(sum(row) - row[3] - row[4] for row in rows) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for disks


def _own_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)
