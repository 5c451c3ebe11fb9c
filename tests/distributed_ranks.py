"""One rank of tests/test_distributed.py: python distributed_ranks.py SCENARIO,... RANK SIZE FOLDER; a failure is an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import moegen
from moegen.distributed import ExpertParallel
from moegen.errors import DistributedError
from moegen.reference import moe, random_weights

FOLDER = pathlib.Path(sys.argv[4])
RANK, SIZE = int(sys.argv[2]), int(sys.argv[3])
JOB = json.loads((FOLDER / "job.json").read_text())
CONFIG = moegen.MoEConfig.from_dict(JOB["config"])
WEIGHTS = random_weights(CONFIG, np.random.default_rng(JOB["seed"]))
STORE = JOB["store"]


def layer(config: moegen.MoEConfig = CONFIG, weights: Any = WEIGHTS, **options: Any) -> ExpertParallel:
    usual = {"store": STORE, "threads": 1, "timeout_s": 60, "start_timeout_s": 120, "placement": JOB["placement"]}
    return ExpertParallel(config, weights, **usual | options)


def tokens(counts: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of all ranks, and this rank's."""
    x = torch.randn((sum(counts), CONFIG.hidden), generator=torch.Generator().manual_seed(seed))
    return x, x.split(counts)[RANK]


@contextlib.contextmanager
def raises(kind: type[Exception], *parts: str, within_s: float = 20.0) -> Iterator[None]:
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
    assert time.monotonic() - start < within_s
    print(f"rank {RANK}: raised as it should: {caught.value}", flush=True)


def whole(config: moegen.MoEConfig = CONFIG, weights: Any = WEIGHTS) -> moegen.Layer:
    return moegen.load(store=STORE, threads=1, **dataclasses.asdict(config)).bind(weights)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got, expected), f"{(got != expected).sum()} of {got.numel()} differ, by up to {(got - expected).abs().max()}"


def equal_to_one_process() -> None:
    """Any numbers of tokens, any load, both kinds of return."""
    one, spread, summed = whole(), layer(), layer(exact=False)
    for at, counts in enumerate(JOB["counts"]):
        x, mine = tokens(counts, at)
        same(spread(mine), one(x).split(counts)[RANK])
        torch.testing.assert_close(summed(mine), spread(mine), rtol=1e-5, atol=1e-5)
        same(spread(mine.reshape(1, -1, CONFIG.hidden))[0], spread(mine))
    x, mine = tokens(JOB["counts"][0])
    with torch.inference_mode():
        same(spread(mine), one(x).split(JOB["counts"][0])[RANK])
    routing, expected = spread.route(mine), one.route(mine)
    same(routing.ids, expected.ids)
    same(routing.weights, expected.weights)
    assert set(spread.profile(mine)) == {"router", "sort", "send", "shared", "experts", "return", "combine"}


def close_to_one_process() -> None:
    """In bfloat16, with a gated shared expert, by the bound that the class promises."""
    unit, config = 2.0**-8, moegen.MoEConfig.from_dict(JOB["half"])
    weights = random_weights(config, np.random.default_rng(JOB["seed"]))
    one, spread, summed = whole(config, weights), layer(config, weights), layer(config, weights, exact=False)
    for at, counts in enumerate(JOB["counts"]):
        x, mine = (each.bfloat16() for each in tokens(counts, at))
        expected = one(x).split(counts)[RANK].float()
        size = sizes(one, x).split(counts)[RANK] + 3 * expected.abs()
        assert spread(mine).dtype is torch.bfloat16
        assert ((spread(mine).float() - expected).abs() <= unit * size).all()
        assert ((summed(mine).float() - expected).abs() <= 2 * unit * size).all()


def sizes(one: moegen.Layer, x: torch.Tensor) -> torch.Tensor:
    """sum_k |w_k d_k| of each number, the shared expert's among them."""
    routing = one.route(x)
    total = torch.zeros(x.shape)
    for k in range(one.config.top_k):
        alone = torch.zeros_like(routing.weights)
        alone[:, k] = routing.weights[:, k]
        total += one.experts(x, routing.ids, alone).float().abs()
    return total + (one(x).float() - one.experts(x, routing.ids, routing.weights).float()).abs()


def given_routing() -> None:
    """All tokens to one rank's experts, an expert twice for a token, zero weights."""
    one, spread, summed = whole(), layer(), layer(exact=False)
    counts = JOB["counts"][0]
    x, mine = tokens(counts)
    for ids in ([0, 1], [CONFIG.experts - 1, 0], [2, 2]):
        chosen = torch.tensor(ids).expand(len(x), 2).contiguous()
        factors = torch.rand((len(x), 2), generator=torch.Generator().manual_seed(1))
        factors[::3, 0] = 0
        expected = one.experts(x, chosen, factors).split(counts)[RANK]
        for routed in (spread, summed):
            got = routed.experts(mine, chosen.split(counts)[RANK], factors.split(counts)[RANK])
            same(got, expected) if routed is spread else torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def capacity() -> None:
    """An expert takes the first tokens of all ranks, by rank and position."""
    config = dataclasses.replace(CONFIG, capacity_factor=0.5)
    for at, counts in enumerate(JOB["counts"]):
        x, mine = tokens(counts, at)
        expected = torch.from_numpy(moe(config, WEIGHTS, x.numpy())[0]).float().split(counts)[RANK]
        for exact in (True, False):
            torch.testing.assert_close(layer(config, exact=exact)(mine), expected, rtol=1e-5, atol=1e-5)


def from_file() -> None:
    """A checkpoint of which each rank reads its own experts only; the others' are NaN in the file that it is given."""
    _, mine = tokens([3] * SIZE)
    same(layer(weights=FOLDER / f"rank{RANK}.safetensors", prefix="model.layers.3.mlp")(mine), layer()(mine))


def pairs() -> None:
    """Two layers of two ranks each side by side, in groups of their own and with near-equal parts."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    spread = layer(group=groups[RANK // 2], placement=None)
    assert spread.placement.held == ((0, 1, 2), (3, 4))
    _, mine = tokens([3, 7, 5, 0])
    same(spread(mine), whole()(mine))
    if RANK == 3:
        with raises(moegen.InputError, "x has shape"):
            spread(mine[:, 1:])
    elif RANK == 2:
        with raises(DistributedError, "rank 1 failed: InputError: x has shape"):
            spread(mine)
    dist.barrier()


def bad_input() -> None:
    """What is wrong on one rank is an error on all, and the next call is as good as ever."""
    spread = layer()
    _, mine = tokens([4] * SIZE)
    good = spread(mine)
    ids, factors = torch.zeros((4, 2), dtype=torch.int64), torch.ones((4, 2))
    wild = ids.clone()
    wild[3, 1] = 5
    wrong = {
        "x has shape [4, 3]": lambda: spread(mine[:, :3]),
        "x has dtype float64": lambda: spread(mine.double()),
        "x requires a gradient": lambda: spread(mine.clone().requires_grad_()),
        "ids[3, 1]=5 must be between 0 and 4": lambda: spread.experts(mine, wild, factors),
        "weights has shape [4, 1]": lambda: spread.experts(mine, ids, factors[:, :1]),
    }
    for reason, call in wrong.items():
        right = (lambda: spread.experts(mine, ids, factors)) if "ids" in reason or "weights" in reason else (lambda: spread(mine))
        if RANK == 1:
            with raises(moegen.InputError, reason):
                call()
        else:
            with raises(DistributedError, "rank 1 failed: InputError", reason):
                right()
        same(spread(mine), good)


def disagreement() -> None:
    """Found when the layer is constructed."""
    other = dataclasses.replace(CONFIG, routed_scaling=2.0) if RANK else CONFIG
    with raises(DistributedError, "ranks disagree: routed_scaling is 1.0 on rank 0 and 2.0 on rank 1"):
        layer(other)
    with raises(DistributedError, "ranks disagree: placement"):
        layer(placement=[*([[0, 1, 2], [3, 4]] if RANK else [[0, 1, 3], [2, 4]]), *[[]] * (SIZE - 2)])
    with raises(DistributedError, "ranks disagree: router.weight"):
        layer(weights=random_weights(CONFIG, np.random.default_rng(RANK)))
    if RANK == 1:
        with raises(moegen.WeightsError, "no weight name starts with"):
            layer(prefix="nothing.")
    else:
        with raises(DistributedError, "rank 1 failed: WeightsError: no weight name starts with"):
            layer()
    with raises(moegen.ConfigError, f"placement has 1 ranks, the group has {SIZE}"):
        layer(placement=[[0, 1, 2, 3, 4]])


def different_methods() -> None:
    """One rank calls another method than the others."""
    spread = layer()
    _, mine = tokens([4] * SIZE)
    with raises(DistributedError, "call different layers or methods"):
        if RANK == 1:
            spread.experts(mine, torch.zeros((4, 2), dtype=torch.int64), torch.ones((4, 2)))
        else:
            spread(mine)
    with raises(DistributedError, "construct the layer again"):
        spread(mine)
    layer()(mine)


def failing_rank() -> None:
    """One rank fails while it computes, when the others wait for its results."""
    spread = layer()
    _, mine = tokens([4] * SIZE)
    if RANK == 0:
        spread._share = dataclasses.replace(spread._share, experts=Failing())
        with raises(MemoryError, "no memory left"):
            spread(mine)
    else:
        with raises(DistributedError, "rank 0 failed: MemoryError: no memory left"):
            spread(mine)


class Failing:
    def experts(self, *arguments: Any) -> None:
        raise MemoryError("no memory left")


def stopped_rank() -> None:
    """A rank that stops answering; the others do not wait for it longer than they said."""
    spread = layer(timeout_s=2)
    _, mine = tokens([4] * SIZE)
    spread(mine)
    dist.barrier()
    if RANK == SIZE - 1:
        subprocess.Popen(["sh", "-c", "sleep 6; kill -CONT $PPID"])  # who wakes it up again
        os.kill(os.getpid(), signal.SIGSTOP)
        with raises(DistributedError, ""):
            spread(mine)
    else:
        with raises(DistributedError, f"rank {SIZE - 1} of {SIZE} did not answer", "took longer than timeout_s=2"):
            spread(mine)
        with raises(DistributedError, f"rank {SIZE - 1} of {SIZE} did not answer", "construct the layer again", within_s=1.9):
            spread(mine)


def killed_rank() -> None:
    """A rank that is killed in the middle of a run."""
    spread = layer()
    _, mine = tokens([64] * SIZE)
    with raises(DistributedError, f"rank {SIZE - 1} of {SIZE} did not answer", within_s=60):
        while True:
            spread(mine)
            if RANK == SIZE - 1:
                os.kill(os.getpid(), signal.SIGKILL)


def missing_rank() -> None:
    """A rank that never constructs the layer."""
    three = dist.new_group([0, 1, 2])
    if RANK < 2:
        with raises(DistributedError, "rank 2 of 3 did not begin within start_timeout_s=1"):
            layer(group=three, placement=None, start_timeout_s=1)
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=RANK, world_size=SIZE)
    for scenario in sys.argv[1].split(","):
        start = time.monotonic()
        globals()[scenario]()
        print(f"rank {RANK}: {scenario} passed in {time.monotonic() - start:.2f} s", flush=True)
    os._exit(0)  # not by way of torch's end of process groups, of which some are broken on purpose


if __name__ == "__main__":
    main()
