"""A tracker and measuring servers as processes of their own on loopback, and artifacts whose libraries do something else."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import tvm_ffi.libinfo
from helpers import ROOT, environment

import moegen
from moegen import artifact as artifacts
from moegen.errors import MeasureError
from moegen.toolchain import cxx

HEAD = """
#include <cstdlib>
#include <tvm/ffi/c_api.h>
#include <unistd.h>
#define EXPORT(name, ...) extern "C" int __tvm_ffi_moe_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result) \\
    { result->type_index = kTVMFFIInt; result->v_int64 = 64; __VA_ARGS__; return 0; }
"""
FAKES = {"crashes": "abort()", "hangs": "sleep(100)", "leaves": "exit(0)", "writes nothing": ""}


class Fleet:
    """The processes, each in a group of its own.

    Args:
        folder: for their logs.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.tracker = f"127.0.0.1:{self.start('tvm.exec.rpc_tracker')}"
        host, _, port = self.tracker.partition(":")
        eventually(lambda: socket.create_connection((host, int(port))).close())  # a server that is earlier waits for 5 s

    def serve(self, key: str, around: Mapping[str, str] | None = None) -> int:
        """Starts a server, in the environment `around`; returns its port."""
        return self.start("tvm.exec.rpc_server", "--tracker", self.tracker, "--key", key, around=around)

    def start(self, module: str, *options: str, around: Mapping[str, str] | None = None) -> int:
        """Starts a module on a free port, which it returns."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1), *options]
        env = dict(around or os.environ) | {"PYTHONPATH": str(ROOT / "tests" / "without_torch")}  # servers need no moegen
        with open(self.folder / f"{port}.log", "wb") as log:
            self.processes[port] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)
        return port

    def kill(self, port: int) -> None:
        """Kills a process and all that it started."""
        process = self.processes.pop(port)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def open_fleet(folder: pathlib.Path) -> Iterator[Fleet]:
    """A tracker, and what is started beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # of the places' processes
        fleet = Fleet(folder)
        try:
            yield fleet
        finally:
            for port in tuple(fleet.processes):
                fleet.kill(port)


def eventually(what: Callable[[], Any]) -> Any:
    """What `what` returns as soon as it raises nothing more."""
    until = time.monotonic() + 60
    while True:
        try:
            return what()
        except (OSError, MeasureError):
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def altered(default: moegen.Artifact, folder: pathlib.Path, **manifest: Any) -> pathlib.Path:
    """The default with something else in its manifest, and whatever library is put there first."""
    shutil.copytree(default.path, folder, dirs_exist_ok=True, ignore=lambda _, names: [n for n in names if (folder / n).exists()])
    (folder / artifacts.MANIFEST).unlink()
    artifacts.seal(folder, dict(default.manifest) | manifest)
    return folder


def fake(default: moegen.Artifact, folder: pathlib.Path, exports: str, forward: str) -> pathlib.Path:
    """An artifact whose library does something else.

    Args:
        exports: its functions, which say `FORWARD` where `forward` belongs.
    """
    folder.mkdir()
    includes = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    command = [*cxx(), "-shared", "-fPIC", "-xc++", f"-DFORWARD={forward}", *includes, "-", "-o", str(folder / artifacts.LIBRARY)]
    subprocess.run(command, input=HEAD + exports, text=True, check=True)
    return altered(default, folder)
