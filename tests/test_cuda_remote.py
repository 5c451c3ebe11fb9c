"""Measuring on another machine's CUDA device: a tracker and servers of TVM's RPC here, whose device is emulated."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from fleet import FAKES, Fleet, eventually, fake, open_fleet
from helpers import built_once

import moegen
from moegen import cli
from moegen.bench import workload
from moegen.cuda import emission, emulated_driver, making, planning
from moegen.cuda_geometry import CudaGeometry
from moegen.errors import CandidateError, MeasureError, TargetError
from moegen.target import host_arch
from moegen.tune import command, devices, remote, stand
from moegen.tune.places import Places
from moegen.tune.times import points_of

# No size is a multiple of what weights are padded to, and there is one of each kind of segment.
CONFIG = moegen.MoEConfig(
    experts=3, top_k=2, hidden=40, intermediate=24, dtype="bfloat16", activation="swiglu", gating="sigmoid",
    router_bias=True, correction_bias=True, expert_bias=True,
)  # fmt: skip
TARGET = planning.resolve_target("sm_90")
KEY, WITHOUT = "gpu", "no-gpu"
FLOAT = "result->type_index = kTVMFFIFloat; result->v_float64 = 1e-3;"
FAKE = f"EXPORT(device_count) EXPORT(prepare) EXPORT(workspace_bytes) EXPORT(time, {FLOAT} FORWARD)"


@pytest.fixture(scope="module")
def default(store: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> moegen.Artifact:
    """Row blocks of 16 are quick to emulate."""
    folder = tmp_path_factory.mktemp("default")
    (folder / "te_source.py").write_text(emission.te_source(CudaGeometry(CONFIG), TARGET, [16]))
    return built_once(store, planning.plan_from_source(folder / "te_source.py", "sm_90"))


@pytest.fixture(scope="module")
def fleet(default: moegen.Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A server with a device, and one without."""
    folder = tmp_path_factory.mktemp("fleet")
    source = (default.path / making.KERNELS).read_text(encoding="utf-8")
    with open_fleet(folder) as fleet:
        fleet.serve(KEY, emulated_driver.environment(source, folder, arch="sm_90"))
        fleet.serve(WITHOUT)
        yield fleet


@pytest.fixture(scope="module")
def job(default: moegen.Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The default beside its copy: a token, and row blocks."""
    folder = tmp_path_factory.mktemp("work")
    folders = [folder / routing for routing in workload.ROUTINGS]
    workload.make(folders[0], CONFIG, "uniform", 1)
    workload.make_zipf_variant(folders[1], folders[0], 1)
    for each in folders:
        for tokens in (1, 9):
            workload.make_batches(each, CONFIG, tokens, 2)
            workload.save_checks(each, tokens, workload.study(each, tokens)[1])
    copy = folder / default.path.name
    shutil.copytree(default.path, copy)
    sizes = {"tokens": [1, 9], "threads": 1, "rounds": 3, "min_ms": 0.1, "copies": 2}
    return {"artifacts": [str(default.path), str(copy)], "workload": [str(each) for each in folders], **sizes}


@pytest.fixture
def place(fleet: Fleet) -> Iterator[remote.Place]:
    """The one with the device."""
    (found,) = eventually(lambda: remote.servers(fleet.tracker, KEY))
    yield found
    found.close()


def sessions(fleet: Fleet) -> int:
    """How often the first server was connected to."""
    return (fleet.folder / f"{list(fleet.processes)[1]}.log").read_text(encoding="utf-8").count("connected from")


@pytest.mark.slow
def test_a_device_elsewhere(
    fleet: Fleet, place: remote.Place, default: moegen.Artifact, job: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """It says what it is and measures; candidates that go wrong cost nothing but themselves; a line that is cut is laid anew.

    Who comes meanwhile waits.
    """
    by = place.measurer("cuda", host_arch())
    assert (by.name, by.capability, by.facts["multiprocessors"]) == ("emulated sm_90", (9, 0), 132)
    assert command._arch("cuda", [place]) == devices.architecture(by) == "sm_90"
    with (
        pytest.raises(MeasureError, match="the CUDA device is 'emulated sm_90': its times are those of a processor"),
        stand.open_stand(CONFIG, TARGET, 1, places=[place]),
    ):
        pass
    with pytest.raises(
        TargetError, match=r"cuda .*sm_80 does not run on the server .*, the emulated sm_90: tune with --arch sm_90 or"
    ):
        devices.check(CONFIG, planning.resolve_target("sm_80"), by)

    result = place.measure(job | {"processor": by.name})
    assert [(point.routing, point.tokens, len(point.candidate)) for point in points_of(result, CONFIG)] == [
        (routing, tokens, 3) for routing in workload.ROUTINGS for tokens in (1, 9)
    ]
    assert result["machine"]["processor"] == by.name
    json.dumps(result)

    def against(name: str, **others: Any) -> dict[str, Any]:
        return job | {"artifacts": [str(default.path), str(fake(default, tmp_path / name, FAKE, FAKES[name]))]} | others

    for name, reason in (("crashes", "the candidate on the server.*signal 6"), ("leaves", "exit status 0")):
        with pytest.raises(CandidateError, match=reason) as raised:
            place.measure(against(name))
        assert raised.value.status == "runtime"
    with pytest.raises(CandidateError, match="not done after 1 s") as late:
        place.measure(against("hangs", limit_s=0.9))
    assert late.value.status == "timeout"
    wrong = place.measure(against("writes nothing"))
    assert [point["relative_l2"][1] for point in wrong["points"]] == [None] * 4
    assert [point["seconds"] for point in wrong["points"]] == [[[], []]] * 4
    with pytest.raises(MeasureError, match="has emulated sm_90, and this run measures on NVIDIA H200"):
        place.measure(job | {"processor": "NVIDIA H200"})
    assert sessions(fleet) == 1, "one session, one set of weights"

    places = Places([place])
    assert place._errand is not None
    killer = threading.Timer(0.5, place._errand._process.kill)
    killer.start()
    again = places.measure(job)
    killer.join()
    assert (len(points_of(again, CONFIG)), places.count, sessions(fleet)) == (4, 1, 2)

    with pytest.raises(MeasureError, match="0 free servers"):
        remote.servers(fleet.tracker, KEY)
    told: list[str] = []

    def queue(text: str) -> None:
        told.append(text)
        place.close()

    assert len(remote.servers(fleet.tracker, KEY, queue=queue)) == 1
    assert "has 1 servers under key 'gpu', and others are using 1 of them" in told[0]


def test_refusals(fleet: Fleet, tmp_path: pathlib.Path) -> None:
    eventually(lambda: remote.servers(fleet.tracker, WITHOUT))  # the tracker knows it
    for key, reason in (
        (WITHOUT, r"the server 127.0.0.1:\d+ has no CUDA device to measure on \(failed: there is no libcuda.so.1"),
        ("nobody", r"0 free servers under key 'nobody', needed are 1: start `python -m tvm.exec.rpc_server"),
    ):
        sizes = ["--experts=4", "--top-k=2", "--hidden=64", f"--logs={tmp_path}", f"--rpc={fleet.tracker}", f"--key={key}"]
        done = CliRunner().invoke(cli.main, ["tune", *sizes, "--target", "cuda"])
        assert done.exit_code == 1
        assert done.output.count("Error:") == 1
        assert re.search(reason, done.output)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(("capability", "name"), [((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 3), "sm_103"), ((12, 9), "sm_121")])
def test_what_an_architecture_is_called(capability: tuple[int, int], name: str) -> None:
    fields = {"name": "A device", "major": str(capability[0]), "minor": str(capability[1]), "l2_bytes": "1", "memory_bytes": "2"}
    assert devices.architecture(devices.elsewhere("the server here:1", fields)) == name
    with pytest.raises(TargetError, match=r"A device of the server here:1 has compute capability 7\.5"):
        devices.architecture(devices.elsewhere("the server here:1", fields | {"major": "7", "minor": "5"}))
