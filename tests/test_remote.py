"""Measuring on other machines: a tracker and two servers of TVM's RPC here, candidates that are right, wrong, crash and hang."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tvm_ffi.libinfo
from helpers import TINY, built_with, environment

import moegen
from moegen import artifact as artifacts
from moegen.bench import workload
from moegen.errors import CandidateError, MeasureError, PlaceLost
from moegen.target import X86_FEATURES, host_cpu_flags
from moegen.toolchain import cxx
from moegen.tune import remote
from moegen.tune.guest import _stamps

KEY = "tiny"
CONFIG = moegen.MoEConfig(**TINY, dtype="bfloat16", gating="sigmoid", correction_bias=True)
FAKE = """
#include <cstdlib>
#include <tvm/ffi/c_api.h>
#include <unistd.h>
#define EXPORT(name, ...) extern "C" int __tvm_ffi_moe_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny* result) \\
    { result->type_index = kTVMFFIInt; result->v_int64 = 64; __VA_ARGS__; return 0; }
EXPORT(workspace_bytes)
EXPORT(pool)
EXPORT(pack)
EXPORT(forward, FORWARD)
"""
FAKES = {"crashes": "abort()", "hangs": "sleep(100)", "leaves": "exit(0)", "writes nothing": ""}


class Fleet:
    """The processes, each in a group of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, module: str, *options: str) -> int:
        """Starts a module on a free port, which it returns."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1), *options]
        with open(self.folder / f"{port}.log", "wb") as log:
            self.processes[port] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment())
        return port

    def kill(self, port: int) -> None:
        process = self.processes.pop(port)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, str]]:
    """Two servers, and their tracker's address."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as undo:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # of the places' processes
        undo.callback(lambda: [fleet.kill(port) for port in tuple(fleet.processes)])
        port = fleet.start("tvm.exec.rpc_tracker")
        address = f"127.0.0.1:{port}"
        eventually(lambda: socket.create_connection(("127.0.0.1", port)).close())  # a server that is earlier waits for 5 s
        for _ in range(2):
            fleet.start("tvm.exec.rpc_server", "--tracker", address, "--key", KEY)
        yield fleet, address


@pytest.fixture(scope="module")
def default(store: pathlib.Path) -> moegen.Artifact:
    return built_with(store, CONFIG)


@pytest.fixture(scope="module")
def job(default: moegen.Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The default against itself."""
    folders = [tmp_path_factory.mktemp("work") / routing for routing in workload.ROUTINGS]
    for folder in folders:
        workload.make(folder, CONFIG, folder.name, seed=1)
    for file in folders[0].glob("experts.*"):
        folders[1].joinpath(file.name).unlink()
        os.link(file, folders[1] / file.name)
    for folder in folders:
        for tokens in (1, 7):
            workload.make_batches(folder, CONFIG, tokens, seed=2)
    both = [str(default.path)] * 2
    sizes = {"tokens": [1, 7], "threads": 1, "rounds": 3, "min_ms": 0.1, "copies": 2}
    return {"artifacts": both, "workload": [str(folder) for folder in folders], **sizes}


def altered(default: moegen.Artifact, folder: pathlib.Path, **manifest: Any) -> pathlib.Path:
    """The default with something else in its manifest, and whatever library is put there first."""
    shutil.copytree(default.path, folder, dirs_exist_ok=True, ignore=lambda _, names: [n for n in names if (folder / n).exists()])
    (folder / artifacts.MANIFEST).unlink()
    artifacts.seal(folder, dict(default.manifest) | manifest)
    return folder


def fake(default: moegen.Artifact, folder: pathlib.Path, forward: str) -> pathlib.Path:
    """An artifact whose library does something else."""
    folder.mkdir()
    includes = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    command = [*cxx(), "-shared", "-fPIC", "-xc++", f"-DFORWARD={forward}", *includes, "-", "-o", str(folder / artifacts.LIBRARY)]
    subprocess.run(command, input=FAKE, text=True, check=True)
    return altered(default, folder)


def check(result: dict[str, Any], job: dict[str, Any]) -> None:
    assert [(p["workload"], p["tokens"]) for p in result["points"]] == [(w, t) for w in job["workload"] for t in job["tokens"]]
    for point in result["points"]:
        assert all(0 < error < 2e-2 for error in point["relative_l2"])
        assert all(len(samples) == job["rounds"] and all(0 < s < 10 for s in samples) for samples in point["seconds"])
    assert result["machine"]["processors"] >= 1


def against(job: dict[str, Any], candidate: pathlib.Path, **others: Any) -> dict[str, Any]:
    return job | {"artifacts": [job["artifacts"][0], str(candidate)]} | others


def test_two_servers(fleet: tuple[Fleet, str], default: moegen.Artifact, job: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """Both measure; candidates that go wrong cost nothing but themselves; one server is killed, and the other one goes on."""
    processes, address = fleet
    with contextlib.ExitStack() as undo:
        places = eventually(lambda: remote.servers(address, KEY, needed=2, patience=10))
        assert len(places) == 2
        for place in places:
            undo.callback(place.close)
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda place: place.measure(job), places)
        check(first, job)
        check(second, job)
        assert first["machine"]["server"] != second["machine"]["server"]
        json.dumps(first)

        for name, status, reason in (("crashes", "runtime", "signal 6"), ("leaves", "runtime", "exit status 0")):
            with pytest.raises(CandidateError, match=reason) as raised:
                places[0].measure(against(job, fake(default, tmp_path / name, FAKES[name])))
            assert raised.value.status == status
        with pytest.raises(CandidateError, match="not done after 1 s") as late:
            places[0].measure(against(job, fake(default, tmp_path / "hangs", FAKES["hangs"]), limit_s=1))
        assert late.value.status == "timeout"
        wrong = places[0].measure(against(job, fake(default, tmp_path / "wrong", FAKES["writes nothing"])))
        for point in wrong["points"]:
            assert point["relative_l2"][0] > 0
            assert point["relative_l2"][1] is None
            assert point["seconds"] == [[], []]
        with pytest.raises(MeasureError, match="default"):
            places[0].measure(
                job | {"artifacts": [str(tmp_path / "crashes"), job["artifacts"][0]], "workload": job["workload"][:1]}
            )

        killer = threading.Timer(0.7, processes.kill, [int(second["machine"]["server"].rpartition(":")[2])])
        killer.start()
        with pytest.raises(PlaceLost, match=second["machine"]["server"]):
            places[1].measure(job | {"rounds": 1000, "min_ms": 10})
        killer.join()
        again = places[0].measure(job)
        check(again, job)
        assert again["machine"]["server"] == first["machine"]["server"]

        lacking = sorted(feature for feature, flag in X86_FEATURES.items() if flag not in host_cpu_flags())
        if default.target.arch == "x86_64" and lacking:
            target = default.target.to_dict() | {"features": lacking[:1]}
            folder = altered(default, tmp_path / "lacking", target=target)
            with pytest.raises(MeasureError, match=f"lacks {lacking[0]}"):
                places[0].measure(job | {"artifacts": [str(folder)] * 2})


def test_what_is_packed_again(job: dict[str, Any]) -> None:
    """Workloads that share the experts' files do not send them again."""
    first, second = (_stamps(pathlib.Path(folder)) for folder in job["workload"])
    assert first["experts"] == second["experts"]
    assert first["others"] != second["others"]


def test_what_to_start(fleet: tuple[Fleet, str]) -> None:
    _, address = fleet
    with pytest.raises(MeasureError, match=f"0 free servers under key 'nobody'.*rpc_server --tracker {address} --key nobody"):
        remote.servers(address, "nobody")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(MeasureError, match=f"tracker 127.0.0.1:{port} does not answer.*rpc_tracker --port {port}"):
        remote.servers(f"127.0.0.1:{port}", KEY)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(MeasureError, match="does not answer"):
            remote.servers(f"127.0.0.1:{port}", KEY, patience=0.2)
    for address in ("9190", ":9190", "here:port", "here:0"):
        with pytest.raises(MeasureError, match="must be HOST:PORT"):
            remote.servers(address, KEY)
