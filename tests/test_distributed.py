"""Experts on several processes: equal to one process, and an error on every rank where one of them fails, is gone or stuck."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, few_tiles

import moegen
from moegen.distributed import Placement, local_configs
from moegen.reference import random_weights

torch = pytest.importorskip("torch")

# Its shared expert is like a routed one, so that both are the same artifact.
LAYER: dict[str, Any] = {
    "experts": 5,
    "top_k": 2,
    "hidden": 16,
    "intermediate": 16,
    "activation": "relu",
    "shared_intermediate": 16,
}
PLACEMENT = [[0, 4, 2], [], [1], [3]]  # as many at most as on two ranks with near-equal parts
SCENARIOS = (
    "equal_to_one_process,close_to_one_process,given_routing,capacity,from_file,pairs,bad_input,disagreement,different_methods,"
    "missing_rank,failing_rank,stopped_rank,killed_rank"
)
LIMIT_SECONDS = 240.0


def run(folder: pathlib.Path, scenarios: str, job: dict[str, Any], size: int) -> list[int]:
    """Exit codes of the ranks; a rank that is still there when time is up fails."""
    (folder / "job.json").write_text(json.dumps(job))
    code = str(ROOT / "tests" / "distributed_ranks.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, code, scenarios, str(rank), str(size), str(folder)], env=environment)
        for rank in range(size)
    ]
    try:
        return [rank.wait(LIMIT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def built(store: pathlib.Path, config: moegen.MoEConfig, ranks: Any) -> None:
    """The whole layer for one process, and what its parts need."""
    for each in {config, *local_configs(config, ranks).values()}:
        moegen.build(few_tiles(each), out=store, verify=False)


def checkpoints(folder: pathlib.Path, config: moegen.MoEConfig, seed: int) -> None:
    """For each rank a file in which the experts of other ranks are NaN."""
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = random_weights(config, np.random.default_rng(seed))
    for rank, held in enumerate(PLACEMENT):
        arrays = {}
        for name, array in weights.items():
            part, _, rest = name.partition(".")
            if part != "experts":
                arrays[f"model.layers.3.mlp.{name}"] = array
                continue
            for e in range(config.experts):
                values = array[e] if e in held else np.full_like(array[e], np.nan)
                arrays[f"model.layers.3.mlp.experts.{e}.{rest}"] = values
        safetensors.save_file(arrays, folder / f"rank{rank}.safetensors")


@pytest.mark.slow
def test_processes_are_one_layer(tmp_path: pathlib.Path) -> None:
    """One set of processes for everything, as two layers of two or one of four: starting them is what takes long."""
    config = moegen.MoEConfig(**LAYER)
    half = moegen.MoEConfig(**LAYER | {"dtype": "bfloat16", "shared_gate": True})
    for each in (config, half):
        built(tmp_path / "store", each, PLACEMENT)
    checkpoints(tmp_path, config, seed=3)
    job = {
        "config": config.to_dict(),
        "half": half.to_dict(),
        "seed": 3,
        "store": str(tmp_path / "store"),
        "counts": [[3, 7, 1, 1], [0, 5, 0, 0], [0, 0, 0, 0], [40, 1, 30, 30]],
        "placement": PLACEMENT,
    }
    assert run(tmp_path, SCENARIOS, job, 4) == [0, 0, 0, -signal.SIGKILL]


def test_placements() -> None:
    assert Placement.even(10, 4).held == ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9))
    assert Placement.even(2, 4).held == ((0,), (1,), (), ())
    assert Placement(((2, 0), (), (1,))).most == 2
    for held, reason in {
        ((0, 1), (1,)): "expert 1 twice",
        ((0,), (2,)): "no expert 1",
        ((0, -1), ()): "-1 is no number of an expert",
        ((0, 0.5), ()): "0.5 is no number of an expert",
        ((), ()): "no experts",
    }.items():
        with pytest.raises(moegen.ConfigError, match=reason):
            Placement(held)  # type: ignore[arg-type]
    config = moegen.MoEConfig(**LAYER)
    with pytest.raises(moegen.ConfigError, match="placement has 2 experts, the layer has experts=5"):
        local_configs(config, [[0], [1]])
    with pytest.raises(moegen.ConfigError, match="placement must be a list"):
        local_configs(config, [0, 1])
    with pytest.raises(moegen.ConfigError, match="ranks=0"):
        local_configs(config, 0)


def test_what_ranks_compile() -> None:
    """The router keeps all that decides the routing, the experts nothing of it."""
    routing = {"gating": "sigmoid", "correction_bias": True, "n_group": 2, "topk_group": 1, "routed_scaling": 2.5}
    config = moegen.MoEConfig(
        experts=8, top_k=2, hidden=32, intermediate=64, dtype="bfloat16", weight_dtype="int8", expert_bias=True,
        shared_intermediate=48, capacity_factor=1.5, **routing,
    )  # fmt: skip
    assert local_configs(config, 3) == {
        "router": moegen.MoEConfig(experts=8, top_k=2, hidden=32, intermediate=32, dtype="bfloat16", activation="relu", **routing),
        "experts": moegen.MoEConfig(
            experts=3, top_k=1, hidden=32, intermediate=64, dtype="bfloat16", weight_dtype="int8", expert_bias=True
        ),
        "shared": moegen.MoEConfig(experts=1, top_k=1, hidden=32, intermediate=48, dtype="bfloat16", weight_dtype="int8"),
    }
    like_routed = local_configs(moegen.MoEConfig(**LAYER), PLACEMENT)
    assert like_routed["shared"] == like_routed["experts"]
    assert like_routed["experts"].experts == 3


def test_needs_a_process_group() -> None:
    from moegen.distributed import ExpertParallel

    with pytest.raises(moegen.DistributedError, match="init_process_group"):
        ExpertParallel(moegen.MoEConfig(**LAYER), {})


def test_placements_need_no_torch() -> None:
    code = "import sys, moegen, moegen.distributed as d; d.local_configs(moegen.MoEConfig(experts=2, top_k=1, hidden=4), 2)"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], cwd=ROOT, check=False)
    assert done.returncode == 0
