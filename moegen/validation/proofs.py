"""What can be proven in this process: numbers against the float64 reference, and what must be the same bit by bit."""

from __future__ import annotations

import concurrent.futures
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import HostArray, to_float32, to_storage
from ..artifact import Artifact
from ..bench import workload
from ..runtime import Layer, Module, load
from ..target import usable_processors
from ..verification import verify
from .claims import Finding

Findings = dict[str, Finding]
Bits = npt.NDArray[Any]

TOKENS = (0, 1, 2, 17, 130)
THREADS = (1, 2, 3)
_SIZES = (1, 9, 130)
_ALONE = 12
_PARTS = (17, 50)
_CALLERS = 4


def numerics(made: Artifact, seed: int) -> tuple[dict[str, Any], Findings]:
    """The proof on fresh random weights and inputs, hostile routings among them; the report of `moegen.verify`, and findings."""
    report = verify(made, seed, tokens=TOKENS)
    cases, others = len(report["cases"]), [f for f in report["failures"] if "relative L2" not in f and "elementwise" not in f]
    seen = f"worst of {cases} cases, seed {seed}"
    return report, {
        "relative_l2": Finding(_number(report["worst_relative_l2"]), f"{report['worst_relative_l2']:.1e}, {seen}"),
        "elementwise": Finding(_number(report["worst_elementwise"]), f"{report['worst_elementwise']:.1e}, {seen}"),
        "routing": Finding(float(len(others)), others[0] if others else f"none in {cases} cases, seed {seed}"),
    }


def _number(value: float) -> float:
    """NaN is no small error."""
    return float("inf") if np.isnan(value) else float(value)


def invariance(made: Artifact, folder: pathlib.Path, seed: int) -> Findings:
    """What must not depend on threads, callers, or the rest of the batch, with the weights of the workload in `folder`.

    Values that differ are counted over all comparisons; -0 is not 0, and NaN is compared by its bits.
    """
    module = load(made.path)
    assert isinstance(module, Module), "a CPU's"
    layer = module.bind(workload.read_weights(folder))
    rng = np.random.default_rng([seed, 4])
    inputs = [_tokens(layer, count, rng) for count in _SIZES]
    return {
        "threads": _threads(layer, inputs),
        "callers": _callers(layer, inputs),
        "batch": _batch(layer, inputs[-1], rng),
        "nan": _nan(layer, inputs[-1]),
        "empty": _empty(layer),
    }


def _threads(layer: Layer, inputs: list[HostArray]) -> Finding:
    counts = sorted({*THREADS, usable_processors()})
    differing = compared = 0
    for x in inputs:
        first = _bits(layer, x)
        for count in counts:
            other = Layer(layer.module, layer.packed, count)
            for _ in range(2):
                differing += int((_bits(other, x) != first).sum())
                compared += first.size
    return _differing(differing, compared, f"{', '.join(map(str, counts))} threads, twice each")


def _callers(layer: Layer, inputs: list[HostArray]) -> Finding:
    expected = [_bits(layer, x) for x in inputs]
    jobs = [index for _ in range(4) for index in range(len(inputs))]
    with concurrent.futures.ThreadPoolExecutor(_CALLERS) as pool:
        got = list(pool.map(lambda index: _bits(layer, inputs[index]), jobs))
    differing = sum(int((bits != expected[index]).sum()) for index, bits in zip(jobs, got, strict=True))
    return _differing(differing, sum(bits.size for bits in got), f"{_CALLERS} threads at once, {len(jobs)} calls")


def _batch(layer: Layer, x: HostArray, rng: np.random.Generator) -> Finding:
    """Tokens alone, in parts, and in another order."""
    if layer.config.capacity_factor is not None:
        return Finding(None, "with a capacity factor a token's output may depend on the batch")
    whole = _bits(layer, x)
    differing = compared = 0
    for rows in _subsets(len(whole), rng):
        got = _bits(layer, HostArray(x.data[rows], x.dtype))
        differing += int((got != whole[rows]).sum())
        compared += got.size
    return _differing(differing, compared, f"{_ALONE} tokens alone, parts of {' and '.join(map(str, _PARTS))}, another order")


def _subsets(tokens: int, rng: np.random.Generator) -> Iterator[Bits]:
    for token in rng.permutation(tokens)[:_ALONE]:
        yield np.array([token])
    for size in _PARTS:
        for begin in range(0, tokens, size):
            yield np.arange(begin, min(begin + size, tokens))
    yield rng.permutation(tokens)


def _nan(layer: Layer, x: HostArray) -> Finding:
    before, spoilt = _bits(layer, x), len(x.data) // 2
    data = x.data.copy()
    data[spoilt, 0] = _stored(np.array([np.nan]), x.dtype).data[0]
    y = layer(HostArray(data, x.dtype))
    after, others = _as_bits(y), np.arange(len(data)) != spoilt
    numbers = int((~np.isnan(to_float32(HostArray(y.data[spoilt], y.dtype)))).sum())
    if layer.config.capacity_factor is not None:
        return Finding(float(numbers), f"{numbers} values of the token are not NaN")
    return _differing(numbers + int((after[others] != before[others]).sum()), after.size, "one token of many")


def _empty(layer: Layer) -> Finding:
    shapes = [(0, layer.config.hidden), (2, 0, layer.config.hidden)]
    got = [tuple(layer(_stored(np.zeros(shape), layer.config.dtype)).shape) for shape in shapes]
    return Finding(float(sum(a != b for a, b in zip(got, shapes, strict=True))), f"shapes {got[0]} and {got[1]}")


def _tokens(layer: Layer, count: int, rng: np.random.Generator) -> HostArray:
    return _stored(rng.standard_normal((count, layer.config.hidden)), layer.config.dtype)


def _stored(values: Any, dtype: str) -> HostArray:
    return HostArray(to_storage(HostArray(np.asarray(values, np.float32), "float32"), dtype), dtype)


def _bits(layer: Layer, x: HostArray) -> Bits:
    """[T, H] integers."""
    return _as_bits(layer(x))


def _as_bits(y: HostArray) -> Bits:
    return y.data.view({2: np.uint16, 4: np.uint32}[y.data.itemsize])


def _differing(differing: int, compared: int, how: str) -> Finding:
    return Finding(float(differing), f"{differing} of {compared:,}: {how}")
