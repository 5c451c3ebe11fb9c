"""TVM's RPC as measuring uses it: a tracker that is asked, and lines to servers.

TVM's client waits for ever for a server that fell silent, and may hold the interpreter's lock meanwhile. So every exchange is
announced with the time that it may take, to another process that waits no longer (`moegen.tune.remote`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import MeasureError, MoegenError, PlaceLost, without_rpc

try:
    from tvm import rpc
    from tvm.rpc import base
except ModuleNotFoundError as error:
    raise without_rpc(error) from None

PATIENCE_SECONDS = 30.0
PREPARING_SECONDS = 600.0  # from one exchange to the next: imports, reading weights, computing the reference
_POLL_SECONDS = 0.1
_REMOTE_FAILURE = "Error caught from RPC call"  # begins what a server says of a function that failed there

# Takes the seconds that an exchange may take, and what it is.
Announce = Callable[[float, str], None]


class Tracker:
    """The tracker that knows the servers.

    Args:
        address: HOST:PORT.
        patience: seconds that it may take to answer.

    Raises:
        MeasureError: `address` is none.
    """

    def __init__(self, address: str, patience: float = PATIENCE_SECONDS) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise MeasureError(f"tracker={address!r} must be HOST:PORT, such as 10.0.0.5:9190")
        self.address, self.patience = address, patience
        self._host, self._port = host.strip("[]"), int(port)

    def free(self, key: str) -> int:
        """Servers under `key` that nobody is using.

        Raises:
            MeasureError: the tracker does not answer.
        """
        return self.servers(key)[0]

    def servers(self, key: str) -> tuple[int, int]:
        """(free ones, all) under `key`.

        Raises:
            MeasureError: the tracker does not answer.
        """
        summary = self._ask(base.TrackerCode.SUMMARY)[1]
        known = sum(each.get("key") == f"server:{key}" for each in summary["server_info"])
        return int(summary["queue_info"].get(key, {}).get("free", 0)), known

    def claim(self, key: str, session_seconds: int, announce: Announce) -> Line:
        """A line to the next free server under `key`, which ends it after so many seconds.

        Raises:
            PlaceLost: no server becomes free, or the one that the tracker names does not answer, or the tracker does not.
        """
        announce(2 * self.patience + PATIENCE_SECONDS, f"the tracker {self.address} was asked for a server")
        until = time.monotonic() + self.patience
        try:
            while not self.free(key):  # a request would be kept until there is one
                if time.monotonic() > until:
                    raise PlaceLost(f"no server of key {key!r} became free at {self.address}: {self.how_to_serve(key)}")
                time.sleep(_POLL_SECONDS)
            host, port, match = self._ask(base.TrackerCode.REQUEST, key, "", 1)[1]
        except PlaceLost:
            raise
        except MeasureError as error:
            raise PlaceLost(str(error)) from error
        return Line(host, port, match, session_seconds, announce)

    def how_to_serve(self, key: str) -> str:
        """What to start on a machine that is to measure."""
        return (
            f"start `python -m tvm.exec.rpc_server --tracker {self.address} --key {key}` on each machine that is to measure, "
            "where pip install 'moegen[rpc]' was run"
        )

    def _ask(self, *message: Any) -> Any:
        try:
            with socket.create_connection((self._host, self._port), self.patience) as line:
                line.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
                if base.recvall(line, 4) != struct.pack("<i", base.RPC_TRACKER_MAGIC):
                    raise MeasureError(f"what answers at {self.address} is no tracker of TVM's RPC")
                base.sendjson(line, message)
                return base.recvjson(line)
        except (OSError, json.JSONDecodeError) as error:
            raise MeasureError(f"the tracker {self.address} does not answer ({error}): {self._start}") from error

    @property
    def _start(self) -> str:
        return f"start `python -m tvm.exec.rpc_tracker --port {self._port}` there, where pip install 'moegen[rpc]' was run"


class Line:
    """A session with one server of TVM's RPC.

    Args:
        host, port, match: as the tracker gives them.
        session_seconds: after so long the server ends the session.
        announce: told before each exchange how many seconds it may take.

    Raises:
        PlaceLost: the server does not answer.
    """

    def __init__(self, host: str, port: int, match: str, session_seconds: int, announce: Announce) -> None:
        self.address, self.announce = f"{host}:{port}", announce
        with self.within(PATIENCE_SECONDS, "connecting"):
            self.session = rpc.connect(host, port, match, session_seconds)

    @contextlib.contextmanager
    def within(self, seconds: float, doing: str) -> Iterator[None]:
        """Exchanges with the server that together may take so long.

        Raises:
            PlaceLost: the server is gone; the line is of no more use.
            MeasureError: a function that the server was asked to call failed there.
        """
        self.announce(seconds, f"{self} was asked ({doing})")
        try:
            yield
        except MoegenError:
            raise
        except (RuntimeError, OSError) as error:  # TVM's own exceptions are RuntimeErrors
            if _REMOTE_FAILURE in str(error):
                raise MeasureError(f"{self} failed while {doing}: {_remote_reason(error)}") from error
            raise PlaceLost(f"{self} was lost while {doing}: {_first_line(error)}") from error
        finally:
            self.announce(PREPARING_SECONDS, "preparing the next exchange with a server")

    def __str__(self) -> str:
        return f"the server {self.address}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _remote_reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).partition(_REMOTE_FAILURE)[2].splitlines()[1:] if line.strip()]
    return lines[-1] if lines else "it did not say why"
