"""What is measured: a layer's weights and token batches, as files that several processes map, and the work that they make.

The folder of a workload holds `layer.json`, one `.npy` file for each weight (names as in `weight_shapes`) and for each batch
of tokens. Everything is in the layer's storage type, bfloat16 as its bits. A variant of a workload has a router of its own and
shares the files of all other weights; its `like.txt` names the folder it is a variant of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import reference
from ..arrays import HostArray, to_float32, to_storage
from ..config import MoEConfig, weight_shapes
from ..errors import ConfigError
from ..quantization import stored_bytes

ROUTINGS = ("uniform", "zipf")
# Bounds on the relative L2 error of what is timed.
_RELATIVE_L2 = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 5e-3}
_BYTE_ROWS_RELATIVE_L2 = 5e-3
_LAYER = "layer.json"
_LIKE = "like.txt"
_PREFIX = "moegen-workload-"
_SHARED_MEMORY = pathlib.Path("/dev/shm")
_ROUTER = "router.weight"
_POOL = 1 << 23
_GUMBEL_DEVIATION = 1.2825  # pi / sqrt(6)
_NEAR_TIE = 2e-5  # float32 routers may decide either way within so much
_CHECKED_TOKENS = 32

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call has to do, averaged over the batches of a point.

    Args:
        flops: of the router, the routed experts within capacity and the shared expert; a multiply-add is two.
        active_experts: different experts that one batch visits.
        weight_bytes: of the weights that one batch has to read: router, active experts, shared expert, as the layer stores them.
        whole_bytes: the same with every weight in the layer's dtype, as other contenders of a layer in few bits have them.
        expert_load: [E], tokens that chose each expert, summed over the batches.
    """

    flops: float
    active_experts: float
    weight_bytes: float
    whole_bytes: float
    expert_load: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Checks:
    """Tokens whose outputs are compared, and what they should be.

    Args:
        rows: for each batch, the indices of its tokens, none of them near a tie of the router.
        expected: for each batch, float64 [len(rows), H].
        whole: the same of the weights before they were rounded to few bits; `expected` itself where they are not.
    """

    rows: list[list[int]]
    expected: list[npt.NDArray[np.float64]]
    whole: list[npt.NDArray[np.float64]]


# ---------------------------------------------------------------- making


@contextlib.contextmanager
def temporary_folder(needed_bytes: int) -> Iterator[pathlib.Path]:
    """A temporary folder for a workload: in shared memory where that is large enough, so that nothing is written to a disk.

    Shared memory outlives its processes: what killed ones left there is removed first.
    """
    roomy = _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK)
    for leftover in _SHARED_MEMORY.glob(f"{_PREFIX}*") if roomy else ():
        pid = leftover.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not pathlib.Path(f"/proc/{pid}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
    roomy = roomy and shutil.disk_usage(_SHARED_MEMORY).free > 2 * needed_bytes + (1 << 30)
    prefix = f"{_PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=_SHARED_MEMORY if roomy else None, ignore_cleanup_errors=True) as name:
        yield pathlib.Path(name)


def make(folder: pathlib.Path, config: MoEConfig, routing: str, seed: int) -> None:
    """Writes a layer's random weights into `folder`, with standard deviation 1/sqrt(fan-in), biases 0.1.

    Args:
        routing: `uniform` leaves the router random. `zipf` makes the e-th most popular expert about e times rarer than the
            first: the first feature of every token is 1, and its router weights hold the logarithms of the popularity, in
            proportion to the spread of the other features' logits.

    Raises:
        ConfigError: no such routing.
    """
    if routing not in ROUTINGS:
        raise ConfigError(f"routing={routing!r} must be one of {', '.join(ROUTINGS)}")
    rng = np.random.default_rng([seed, 0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _LAYER).write_text(json.dumps(config.to_dict()), encoding="utf-8")
    pool = rng.standard_normal(_POOL, dtype=np.float32)
    for name, shape in weight_shapes(config).items():
        dtype = _dtype(config, name)
        scale = np.float32(shape[-1] ** -0.5 if name.endswith(".weight") else 0.1)
        stored = to_storage(HostArray(pool * scale, "float32"), dtype)
        file = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=stored.dtype, shape=shape)
        _fill(file.reshape(-1), stored, rng)
        if name == _ROUTER and routing == "zipf":
            file[:, 0] = to_storage(HostArray(_zipf_logits(config.experts, rng), "float32"), dtype)
        file.flush()


def make_zipf_variant(folder: pathlib.Path, like: pathlib.Path, seed: int) -> None:
    """Writes the workload in `like`, whose routing is uniform, into `folder` once more, with Zipf's routing."""
    config = read_layer(like)
    folder.mkdir(parents=True)
    for name in (_LAYER, *(f"{name}.npy" for name in weight_shapes(config) if name != _ROUTER)):
        os.link(like / name, folder / name)
    router = np.load(like / f"{_ROUTER}.npy")
    logits = _zipf_logits(config.experts, np.random.default_rng([seed, 2]))
    router[:, 0] = to_storage(HostArray(logits, "float32"), config.dtype)
    np.save(folder / f"{_ROUTER}.npy", router)
    (folder / _LIKE).write_text(str(like), encoding="utf-8")


def variant_of(folder: pathlib.Path) -> pathlib.Path:
    """The workload that has all weights but the router in common with this one; the folder itself when it is no variant."""
    like = folder / _LIKE
    return pathlib.Path(like.read_text(encoding="utf-8")) if like.exists() else folder


def _dtype(config: MoEConfig, name: str) -> str:
    return "float32" if name == "router.correction_bias" else config.dtype


def _fill(out: Array, pool: Array, rng: np.random.Generator) -> None:
    """Fills `out` with stretches of `pool` that begin anywhere: random enough, and as fast as memory."""
    stretch = len(pool) // 2
    for begin in range(0, len(out), stretch):
        part = out[begin : begin + stretch]
        start = int(rng.integers(len(pool) - len(part)))
        part[...] = pool[start : start + len(part)]


def _zipf_logits(experts: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """[E], centred. Gumbel noise would give Zipf's law exactly; the logits' noise is normal, so its spread is matched."""
    logits = -np.log(1.0 + rng.permutation(experts)) / _GUMBEL_DEVIATION
    return np.asarray(logits - logits.mean(), np.float32)


def make_batches(folder: pathlib.Path, config: MoEConfig, tokens: int, seed: int) -> int:
    """Writes several batches of `tokens` random tokens; returns how many.

    They differ, so that a small batch does not find the experts of the previous call in the caches.
    """
    rng = np.random.default_rng([seed, 1, tokens])
    count = next((n for most, n in ((4, 16), (16, 8), (64, 4)) if tokens <= most), 2)
    for index in range(count):
        x = rng.standard_normal((tokens, config.hidden), dtype=np.float32)
        x[:, 0] = 1.0
        np.save(_batch_file(folder, tokens, index), to_storage(HostArray(x, "float32"), config.dtype))
    return count


# ---------------------------------------------------------------- reading


def read_layer(folder: pathlib.Path) -> MoEConfig:
    """The layer that `make` wrote weights for."""
    return MoEConfig.from_dict(json.loads((folder / _LAYER).read_text(encoding="utf-8")))


def read_weights(folder: pathlib.Path) -> dict[str, HostArray]:
    """The weights that `make` wrote, mapped rather than read."""
    config = read_layer(folder)
    return {name: HostArray(np.load(folder / f"{name}.npy", mmap_mode="r"), _dtype(config, name)) for name in weight_shapes(config)}


def read_batches(folder: pathlib.Path, tokens: int) -> list[HostArray]:
    """The batches that `make_batches` wrote."""
    dtype = read_layer(folder).dtype
    files = sorted(folder.glob(f"batch-{tokens}-*.npy"))
    return [HostArray(np.load(file), dtype) for file in files]


def remove_batches(folder: pathlib.Path, tokens: int) -> None:
    """Deletes the batches of one size."""
    for file in folder.glob(f"batch-{tokens}-*.npy"):
        file.unlink()


def _batch_file(folder: pathlib.Path, tokens: int, index: int) -> pathlib.Path:
    return folder / f"batch-{tokens}-{index:02}.npy"


# ---------------------------------------------------------------- the work and the answers


def save_checks(folder: pathlib.Path, tokens: int, checks: Checks) -> None:
    """Keeps what the outputs of a size should be, for processes that compare with it."""
    counts = [len(chosen) for chosen in checks.rows]
    rows, expected, whole = (np.concatenate(parts) for parts in (checks.rows, checks.expected, checks.whole))
    np.savez(_checks_file(folder, tokens), counts=counts, rows=rows, expected=expected, whole=whole)


def read_checks(folder: pathlib.Path, tokens: int) -> Checks | None:
    """What `save_checks` kept; None when nothing was."""
    file = _checks_file(folder, tokens)
    if not file.exists():
        return None
    with np.load(file) as kept:
        ends = np.cumsum(kept["counts"])[:-1]
        rows = [[int(t) for t in part] for part in np.split(kept["rows"], ends)]
        expected, whole = (np.split(kept[name], ends) for name in ("expected", "whole"))
        return Checks(rows, expected, whole)


def relative_l2(got: Array, expected: Array) -> float:
    """Error of an output in float64; infinite when it is not finite."""
    error = got.astype(np.float64) - expected
    return float(np.linalg.norm(error) / max(float(np.linalg.norm(expected)), 1e-30)) if np.isfinite(error).all() else math.inf


def _checks_file(folder: pathlib.Path, tokens: int) -> pathlib.Path:
    return folder / f"checks-{tokens}.npz"


def study(folder: pathlib.Path, tokens: int) -> tuple[Work, Checks]:
    """What the batches of one size have to do by the reference's routing, and the right outputs of some of their tokens."""
    config, weights = read_layer(folder), read_weights(folder)
    router = {name: to_float32(array) for name, array in weights.items() if name.startswith("router.")}
    batches = [to_float32(batch) for batch in read_batches(folder, tokens)]
    routings = [reference.route(config, router, x) for x in batches]
    work = _work(config, routings, tokens)
    each = max(1, _CHECKED_TOKENS // len(batches))
    rows = [_settled(config, router, x, each) for x in batches]
    taken = [(x[chosen], r, chosen) for x, r, chosen in zip(batches, routings, rows, strict=True)]
    x, ids, factors = (
        np.concatenate(parts)
        for parts in zip(*((part, r.ids[chosen], (r.weights * r.kept)[chosen]) for part, r, chosen in taken), strict=True)
    )
    ends = np.cumsum([len(chosen) for chosen in rows])[:-1]
    expected = np.split(_outputs(config, weights, x, ids, factors), ends)
    whole = np.split(_outputs(config.whole, weights, x, ids, factors), ends) if config.low_bit else expected
    return work, Checks(rows, expected, whole)


def answers(folder: pathlib.Path, x: Array) -> Checks:
    """The right outputs of tokens that are no batch of the workload.

    Args:
        x: float32 [T, H], as the layer stores them.

    Returns:
        One batch of checks: the indices of those that are not near a tie of the router, and what their outputs should be.
    """
    config, weights = read_layer(folder), read_weights(folder)
    router = {name: to_float32(array) for name, array in weights.items() if name.startswith("router.")}
    rows = _settled(config, router, x, len(x))
    routing = reference.route(config, router, x[rows])
    factors = routing.weights * routing.kept
    expected = _outputs(config, weights, x[rows], routing.ids, factors)
    whole = _outputs(config.whole, weights, x[rows], routing.ids, factors) if config.low_bit else expected
    return Checks([rows], [expected], [whole])


def _work(config: MoEConfig, routings: Sequence[reference.Routing], tokens: int) -> Work:
    c, projections = config, 3 if config.gated else 2
    active = float(np.mean([len(np.unique(r.ids[r.kept])) for r in routings]))
    visits = float(np.mean([r.kept.sum() for r in routings]))
    return Work(
        flops=2.0 * c.hidden * (projections * (visits * c.intermediate + tokens * c.shared_intermediate) + tokens * c.experts),
        active_experts=active,
        weight_bytes=_weight_bytes(c, active),
        whole_bytes=_weight_bytes(c.whole, active),
        expert_load=tuple(int(n) for n in np.sum([r.load for r in routings], axis=0)),
    )


def _weight_bytes(config: MoEConfig, active: float) -> float:
    """Of the weights that a batch reads which visits `active` experts."""
    found = 0.0
    for name, shape in weight_shapes(config).items():
        if name.endswith(".weight") and name.startswith(("experts.", "shared.")):
            size = float(stored_bytes(config, shape[-2], shape[-1]))
        else:
            size = np.prod(shape[1:] if name.startswith("experts.") else shape) * (
                4.0 if _dtype(config, name) == "float32" else 2.0
            )
        found += size * (active if name.startswith("experts.") else 1)
    return found


def bound(config: MoEConfig) -> float:
    """The largest relative L2 error of an output that is right."""
    return max(_RELATIVE_L2[config.dtype], _BYTE_ROWS_RELATIVE_L2 if config.activation_dtype == "int8" else 0.0)


def _settled(config: MoEConfig, router: dict[str, Any], x: Array, count: int) -> list[int]:
    """Up to `count` tokens spread over the batch whose experts do not hang on the last digits of the logits."""
    margins = reference.margins(config, router, x)
    scale = 1.0 + np.abs(x.astype(np.float64) @ router["router.weight"].T.astype(np.float64)).max(axis=1)
    clear = np.flatnonzero(margins > _NEAR_TIE * scale)
    spread = np.linspace(0, len(clear) - 1, min(count, len(clear))).astype(int)
    return [int(t) for t in clear[spread]]


def _outputs(config: MoEConfig, weights: dict[str, HostArray], x: Array, ids: Array, factors: Array) -> npt.NDArray[np.float64]:
    """The layer's output for a routing, float64."""
    shared = {n: to_float32(a) for n, a in weights.items() if n.startswith("shared")}
    if shared:
        shared = reference.dequantized(dataclasses.replace(config, experts=1, top_k=1, n_group=1, topk_group=1), shared)
    return _experts(config, weights, x, ids, factors) + reference.shared(config, shared, x)


def _experts(config: MoEConfig, weights: dict[str, HostArray], x: Array, ids: Array, factors: Array) -> npt.NDArray[np.float64]:
    """The routed experts in float64, one expert's weights at a time."""
    one = dataclasses.replace(config, experts=1, top_k=1, n_group=1, topk_group=1)
    y = np.zeros((len(x), config.hidden))
    for expert, tokens, slots in _visits(ids):
        own = {n: to_float32(HostArray(a.data[expert : expert + 1], a.dtype)) for n, a in weights.items() if n[:8] == "experts."}
        routed = factors[tokens, slots][:, None]
        y[tokens] += reference.experts(one, reference.dequantized(one, own), x[tokens], np.zeros(routed.shape, int), routed)
    return y


def _visits(ids: Array) -> Iterator[tuple[int, Array, Array]]:
    for expert in np.unique(ids):
        tokens, slots = np.nonzero(ids == expert)
        yield int(expert), tokens, slots
