"""TVM's RPC as measuring uses it: a tracker that is asked, and lines to servers on which every exchange ends in time.

TVM's client waits for ever for a server that fell silent. So it does not connect to the server itself, but to a relay in this
process, which can be cut; an exchange that takes too long then ends like one whose server is gone.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..errors import MeasureError, MoegenError, PlaceLost, without_rpc

try:
    from tvm import rpc
    from tvm.rpc import base
except ModuleNotFoundError as error:
    raise without_rpc(error) from None

PATIENCE_SECONDS = 30.0
_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.1
_REMOTE_FAILURE = "Error caught from RPC call"  # begins what a server says of a function that failed there


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
        queues = self._ask(base.TrackerCode.SUMMARY)[1]["queue_info"]
        return int(queues.get(key, {}).get("free", 0))

    def claim(self, key: str, session_seconds: int) -> Line:
        """A line to the next free server under `key`, which ends it after so many seconds.

        Raises:
            PlaceLost: no server becomes free, or the one that the tracker names does not answer, or the tracker does not.
        """
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
        return Line(host, port, match, session_seconds, self.patience)

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
        patience: seconds that connecting may take.

    Raises:
        PlaceLost: the server does not answer.
    """

    def __init__(self, host: str, port: int, match: str, session_seconds: int, patience: float) -> None:
        self.address = f"{host}:{port}"
        try:
            self._far = socket.create_connection((host, port), patience)
        except OSError as error:
            raise PlaceLost(f"{self} does not answer: {error}") from error
        self._far.settimeout(None)
        self._sockets = [self._far, socket.create_server(("127.0.0.1", 0))]
        threading.Thread(target=self._relay, daemon=True).start()
        with self.within(patience, "connecting"):
            self.session = rpc.connect("127.0.0.1", self._sockets[1].getsockname()[1], match, session_seconds)

    @contextlib.contextmanager
    def within(self, seconds: float, doing: str) -> Iterator[None]:
        """Exchanges with the server that together take at most so long.

        Raises:
            PlaceLost: they took longer, or the server is gone; the line is of no more use.
            MeasureError: a function that the server was asked to call failed there.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            self.cut()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except MoegenError:
            raise
        except (RuntimeError, OSError) as error:  # TVM's own exceptions are RuntimeErrors
            if _REMOTE_FAILURE in str(error):
                raise MeasureError(f"{self} failed while {doing}: {_remote_reason(error)}") from error
            reason = f"no answer for {seconds:.0f} s" if late.is_set() else str(error).strip().split("\n")[0]
            self.cut()
            raise PlaceLost(f"{self} was lost while {doing}: {reason}") from error
        finally:
            timer.cancel()

    def cut(self) -> None:
        """Ends the line; the server is free again."""
        for end in self._sockets:
            with contextlib.suppress(OSError):  # not connected any more
                end.shutdown(socket.SHUT_RDWR)

    def _relay(self) -> None:
        """Carries what TVM's client says to the server, and back, until one of the two hangs up."""
        with contextlib.ExitStack() as stack:
            far, listener = (stack.enter_context(end) for end in tuple(self._sockets))
            try:
                near = stack.enter_context(listener.accept()[0])
            except OSError:  # cut before TVM's client came
                return
            self._sockets.append(near)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            there = threading.Thread(target=self._carry, args=(near, far), daemon=True)
            there.start()
            self._carry(far, near)
            there.join()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one of the two is gone, which the client notices by itself
            while data := source.recv(_CHUNK_BYTES):
                sink.sendall(data)
        self.cut()

    def __str__(self) -> str:
        return f"the server {self.address}"


def _remote_reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).partition(_REMOTE_FAILURE)[2].splitlines()[1:] if line.strip()]
    return lines[-1] if lines else "it did not say why"
