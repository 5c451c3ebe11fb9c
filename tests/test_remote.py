"""Measuring on other machines: a tracker and two servers of TVM's RPC here, candidates that are right, wrong, crash and hang."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tvm
from fleet import FAKES, Fleet, altered, eventually, fake, open_fleet
from helpers import TINY, built_with

import moegen
from moegen.bench import workload
from moegen.errors import CandidateError, MeasureError, PlaceLost
from moegen.target import X86_FEATURES, host_cpu_flags
from moegen.tune import remote
from moegen.tune.guest import _stamps
from moegen.tune.host import Host

KEY = "tiny"
CONFIG = moegen.MoEConfig(**TINY, dtype="bfloat16", gating="sigmoid", correction_bias=True)
FAKE = "EXPORT(workspace_bytes) EXPORT(pool) EXPORT(pack) EXPORT(forward, FORWARD)"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two servers."""
    with open_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        for _ in range(2):
            fleet.serve(KEY)
        yield fleet


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


def check(result: dict[str, Any], job: dict[str, Any]) -> None:
    assert [(p["workload"], p["tokens"]) for p in result["points"]] == [(w, t) for w in job["workload"] for t in job["tokens"]]
    for point in result["points"]:
        assert all(0 < error < 2e-2 for error in point["relative_l2"])
        assert all(len(samples) == job["rounds"] and all(0 < s < 10 for s in samples) for samples in point["seconds"])
    assert result["machine"]["processors"] >= 1


def against(job: dict[str, Any], candidate: pathlib.Path, **others: Any) -> dict[str, Any]:
    return job | {"artifacts": [job["artifacts"][0], str(candidate)]} | others


def test_two_servers(fleet: Fleet, default: moegen.Artifact, job: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """Both measure; candidates that go wrong cost nothing but themselves; one server is killed, and the other one goes on."""
    with contextlib.ExitStack() as undo:
        places = eventually(lambda: remote.servers(fleet.tracker, KEY, needed=2, patience=10))
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
                places[0].measure(against(job, fake(default, tmp_path / name, FAKE, FAKES[name])))
            assert raised.value.status == status
        with pytest.raises(CandidateError, match="not done after 1 s") as late:
            places[0].measure(against(job, fake(default, tmp_path / "hangs", FAKE, FAKES["hangs"]), limit_s=1))
        assert late.value.status == "timeout"
        wrong = places[0].measure(against(job, fake(default, tmp_path / "wrong", FAKE, FAKES["writes nothing"])))
        for point in wrong["points"]:
            assert point["relative_l2"][0] > 0
            assert point["relative_l2"][1] is None
            assert point["seconds"] == [[], []]
        with pytest.raises(MeasureError, match="default"):
            places[0].measure(
                job | {"artifacts": [str(tmp_path / "crashes"), job["artifacts"][0]], "workload": job["workload"][:1]}
            )

        killer = threading.Timer(0.7, fleet.kill, [int(second["machine"]["server"].rpartition(":")[2])])
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


def test_what_to_start(fleet: Fleet) -> None:
    address = fleet.tracker
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


def test_what_arrives_damaged_is_sent_again() -> None:
    sums: list[int] = []
    host = object.__new__(Host)
    host.line, host.device, host.call = "the server here:1", tvm.cpu(0), lambda name, made: sums.pop(0)
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    sums[:] = [1, zlib.crc32(array.tobytes())]
    assert np.array_equal(host.put(array).numpy(), array)
    assert not sums
    sums[:] = [1, 2, 3]
    with pytest.raises(PlaceLost, match="what is sent to the server here:1 arrives damaged: 3 times out of 3"):
        host.put(array)
