"""What several test files share: weights and inputs of any dtype, and the comparison with the float64 reference."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

import moegen
from moegen import reference
from moegen.arrays import HostArray, empty_aligned, to_float32, to_storage
from moegen.cuda.planning import CudaPlan
from moegen.plan import Plan, plan

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The layer that tests use which need any layer: built once per session.
SMALL: dict[str, Any] = {"experts": 4, "top_k": 2, "hidden": 64, "intermediate": 96}
TINY: dict[str, Any] = {"experts": 2, "top_k": 1, "hidden": 16, "intermediate": 16, "activation": "relu"}

RELATIVE_L2 = {"float32": 3e-6, "bfloat16": 1.5e-2, "float16": 5e-3}
# |error| <= ulp * |expected| + 3e-5 * rms of the token: one rounding of the output on top of float32 arithmetic.
# Of the token's rms: what summing costs, and in bfloat16 the rounding of hidden values on their way to the second product.
OF_RMS = {"float32": 3e-5, "bfloat16": 4e-2, "float16": 3e-5}
HALF_ULP = {"float32": 3e-5, "bfloat16": 2.0**-8, "float16": 2.0**-10}
BYTE_ROWS = 2e-3  # hidden values rounded to bytes: one next to a tie may be one of 127 steps off
LOGIT_ROUNDING = 3e-7  # of a float32 sum, relative to the largest logit
FLOAT16_TINY, FLOAT32_TINY = 2.0**-24, 2.0**-126
LOGIT_ERROR = 5e-6  # relative to the largest logit (to 1 at least for scores); a choice decided by less may go either way


def stored(x: Any, dtype: str) -> HostArray:
    """`x` rounded to `dtype`, as a layer takes it."""
    return HostArray(to_storage(HostArray(np.asarray(x, np.float32), "float32"), dtype), dtype)


def tokens(config: moegen.MoEConfig, count: int, rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """[count, H] float32 values that the layer's dtype holds exactly."""
    return reference.round_to_dtype(rng.standard_normal((count, config.hidden)) * scale, config.dtype)


def weights_as(config: moegen.MoEConfig, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The weights in the layer's own dtype where NumPy has it (bfloat16 stays float32)."""
    if config.dtype != "float16":
        return weights
    return {name: w if "correction" in name else w.astype(np.float16) for name, w in weights.items()}


def values(array: Any) -> np.ndarray:
    """What a layer returned for a `HostArray`, in float64."""
    return to_float32(array).astype(np.float64)


def bits(array: Any) -> np.ndarray:
    """What a layer returned, as integers: NaN equals NaN, and -0 is not 0."""
    data = array.data if isinstance(array, HostArray) else np.asarray(array)
    return np.ascontiguousarray(data).view({2: np.uint16, 4: np.uint32}[data.itemsize]).copy()


def forward_poisoned(layer: moegen.Layer, x: HostArray, **options: Any) -> HostArray:
    """The output, written over NaN."""
    out = HostArray(empty_aligned(x.shape, x.data.dtype), x.dtype)
    out.data.view(np.uint8)[...] = 0xFF
    layer.forward_into(x, out, **options)
    return out


def assert_close(config: moegen.MoEConfig, got: np.ndarray, expected: np.ndarray) -> None:
    """Both bounds, relative L2 over everything and element by element."""
    assert got.shape == expected.shape
    if not got.size:
        return
    assert np.isfinite(got).all()
    error = np.abs(got - expected)
    underflow = FLOAT16_TINY if config.dtype == "float16" else FLOAT32_TINY
    most = max(RELATIVE_L2[config.dtype], BYTE_ROWS if config.activation_dtype == "int8" else 0.0)
    relative = np.linalg.norm(error) / (np.linalg.norm(expected) + underflow / RELATIVE_L2[config.dtype] * np.sqrt(error.size))
    assert relative <= most, f"relative L2 error {relative:.2e}"
    rms = np.sqrt(np.mean(expected**2, axis=-1, keepdims=True))
    rms = np.maximum(rms, 1e-2 * np.sqrt(np.mean(expected**2)))  # a token whose parts cancel is not held to its own size
    rms += 0.3 * np.sqrt(np.mean(expected**2)) if config.dtype == "bfloat16" else 0.0  # hidden values may cancel as well
    of_rms = max(OF_RMS[config.dtype], 10 * BYTE_ROWS if config.activation_dtype == "int8" else 0.0)
    bound = HALF_ULP[config.dtype] * np.abs(expected) + of_rms * rms + underflow
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), (
        f"at {worst}: {got[worst]} instead of {expected[worst]}, off by {error[worst] / bound[worst]:.2f} x the bound"
    )


def settled_routing(
    config: moegen.MoEConfig, weights: dict[str, np.ndarray], router_x: np.ndarray, got: moegen.Routing
) -> reference.Routing:
    """The reference's routing, checked against the layer's; where it is a near tie, the layer's choice stands.

    So do the layer's weights where logits are so large that their own rounding moves the output. Ids must agree exactly
    elsewhere, and near ties must be rare.
    """
    expected = reference.route(config, weights, router_x)
    ids, chosen = np.asarray(_data(got.ids)), np.asarray(_data(got.weights))
    assert ids.dtype == np.int32
    assert chosen.dtype == np.float32
    assert ids.shape == chosen.shape == expected.ids.shape
    largest = np.abs(_logits(weights, router_x)).max(axis=1, initial=0.0)
    tolerance = LOGIT_ERROR * (largest if config.selects_by_logit else 1 + largest)
    near = reference.margins(config, weights, router_x) < tolerance
    assert near.sum() <= 2 + 0.02 * max(config.top_k / 4, 1) * len(near)  # more choices, more neighbours
    assert ((ids >= 0) & (ids < config.experts)).all()
    np.testing.assert_array_equal(ids[~near], expected.ids[~near])
    error = np.abs(chosen - expected.weights)[~near]
    # A logit's absolute error is a weight's relative one, but for what makes up the rest of 1: dw = w (1 - w) dl.
    sure = np.abs(expected.weights[~near])
    relative = 2e-5 + LOGIT_ROUNDING * largest[~near, None] * np.clip(1 - sure, 0, 1)
    assert (error <= relative * sure + 1e-9).all(), (error.max(), largest.max())
    if (near.sum() == 0) or np.array_equal(ids, expected.ids):
        assert got.load.tolist() == expected.load.tolist()
        for loss in ("load_balancing_loss", "z_loss", "adaptive_loss"):
            assert getattr(got, loss) == np.float64(0) == getattr(expected, loss) or np.isclose(
                getattr(got, loss), getattr(expected, loss), rtol=2e-5, atol=1e-9
            ), loss
    merged = np.where(near[:, None], ids, expected.ids)
    kept = reference.capacity_mask(config, merged)
    assert got.load.tolist() == np.bincount(merged.ravel(), minlength=config.experts).tolist()
    assert got.dropped == int((~kept).sum())
    # Weights that stand within their bound, but further from the reference than an output may be, are taken as they came.
    given = near | (LOGIT_ROUNDING * largest > RELATIVE_L2["float32"])
    return dataclasses.replace(expected, ids=merged, weights=np.where(given[:, None], chosen, expected.weights), kept=kept)


def expected_output(
    config: moegen.MoEConfig, weights: dict[str, np.ndarray], x: np.ndarray, routing: reference.Routing
) -> np.ndarray:
    """The layer's output in float64 for a settled routing."""
    meant = reference.dequantized(config, weights)
    y = reference.experts(config, meant, x, routing.ids, routing.weights, routing.kept)
    return y + reference.shared(config, meant, x)


def check_against_reference(
    layer: moegen.Layer, weights: dict[str, np.ndarray], x: np.ndarray, jitter: np.ndarray | None = None
) -> tuple[HostArray, reference.Routing]:
    """One call of `layer` with poisoned output against the reference; returns the output and the settled routing."""
    config = layer.config
    given = stored(x, config.dtype)
    routed = x if jitter is None else reference.round_to_dtype(x * jitter, config.dtype)
    out = forward_poisoned(layer, given, jitter=jitter)
    again, routing = layer(given, return_routing=True, jitter=jitter)
    np.testing.assert_array_equal(bits(out), bits(again), "with and without routing")
    settled = settled_routing(config, weights, routed, routing)
    alone = layer.route(given, jitter=jitter)
    np.testing.assert_array_equal(_data(alone.ids), _data(routing.ids))
    np.testing.assert_array_equal(_data(alone.weights), _data(routing.weights))
    assert alone.load.tolist() == routing.load.tolist()
    assert alone[3:] == routing[3:]
    assert_close(config, values(out), expected_output(config, weights, x, settled))
    return out, settled


def _logits(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weights["router.weight"].astype(np.float64).T + weights.get("router.bias", 0.0)


def _data(array: Any) -> Any:
    return array.data if isinstance(array, HostArray) else array


def few_tiles(config: moegen.MoEConfig, max_rows: int = 2, **tiling: int) -> Plan:
    """A plan with few register tiles: building takes a third of the time that the default ones take."""
    default = plan(config).geometry.tiling
    few = dataclasses.replace(default, **{"max_rows": min(max_rows, default.max_rows), "chunk_rows": 16 * max_rows} | tiling)
    if "pair" not in tiling and few.lanes != default.lanes:
        few = dataclasses.replace(few, pair=1)
    return plan(config, tiling=few)


def built_with(store: pathlib.Path, config: moegen.MoEConfig, checked: bool = False, **tiling: int) -> moegen.Artifact:
    """Builds into `store` with `few_tiles`; `checked` stages refuse what does not fit them, as those of edited modules do."""
    return moegen.build(dataclasses.replace(few_tiles(config, **tiling), edited=checked), out=store, verify=False)


def built_once(store: pathlib.Path, todo: Plan | CudaPlan, verify: bool = False) -> moegen.Artifact:
    """Builds into the session's store, or finds it there: other processes of pytest-xdist wait for the first."""
    store.mkdir(parents=True, exist_ok=True)
    with open(store / f".lock-{todo.key[:16]}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return moegen.build(todo, out=store, verify=verify)


def environment(**others: str) -> dict[str, str]:
    """For interpreters that can import moegen and the tests' modules, but not torch."""
    tests = ROOT / "tests"
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests / "without_torch", ROOT, tests)))} | others


def run_python(
    code: str, *arguments: object, timeout: float = 60, given: str | None = None, **others: str
) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter that can import moegen; a hang fails."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=environment(**others), input=given, capture_output=True, text=True, timeout=timeout, check=False
    )
