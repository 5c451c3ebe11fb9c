"""The numerical proof: a compiled module against the float64 reference, on fresh random inputs with poisoned outputs.

Experts may be too many for a float64 copy of all, so that the proof draws a number of distinct experts and gives expert e the
weights of distinct expert e % n: every expert's weights are packed and every expert is called. Of very large layers (packed weights
over 4 GiB) only the distinct experts are packed, the others stay zero; of very large experts only some tokens are compared.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import arrays, reference
from .arrays import HostArray
from .artifact import Artifact, check_loadable, open_artifact
from .checkpoints import from_quantized
from .config import MoEConfig, weight_shapes
from .device import DeviceModule
from .orientation import Matrix
from .quantization import quantize
from .routing import Routing
from .runtime import Module, module_of
from .target import Target
from .weights import WeightSource

TOKENS = (0, 1, 2, 17, 300)
ROUTINGS = ("uniform", "skewed", "all_to_one", "empty_experts", "ties")
# bfloat16 rounds hidden values (as torch does), by 2**-9, which cancelling sums of tiny layers enlarge several times. What is
# wrong is off by tens of percent, and the report has the errors themselves.
RELATIVE_L2 = {"float32": 3e-6, "bfloat16": 1.5e-2, "float16": 5e-3}
ELEMENTWISE = {"float32": 3e-5, "bfloat16": 6e-2, "float16": 2e-3}
# On CUDA devices hidden values are float16 as well, whose rounding is an eighth of bfloat16's.
CUDA_FLOAT16_ELEMENTWISE = 8e-3
# Rows of bytes: a hidden value next to a tie may get the neighbouring code, which is off by 1/127 of the row's largest.
BYTE_ROWS_RELATIVE_L2, BYTE_ROWS_ELEMENTWISE = 2e-3, 3e-2
# Both factors are rounded to as many bits as float16 has; one element may be off by several times as much.
TF32_RELATIVE_L2, TF32_ELEMENTWISE = 5e-3, 2e-2
ROUTING_TOLERANCE = 2e-5
DISTINCT_WEIGHTS = 24_000_000
WHOLE_BLOB_BYTES = 4 << 30
REFERENCE_FLOPS = 2e10
FEWEST_TOKENS = 16
# In layers narrower than this a token, or a whole small case, may cancel by chance, and what is left is rounding: errors are
# relative to what such a layer usually gives at least.
NARROW, USUAL_TOKENS = 64, 64

Array = npt.NDArray[Any]


def verify(
    artifact: Artifact | str | os.PathLike[str],
    seed: int | None = None,
    threads: int | None = None,
    tokens: Sequence[int] = TOKENS,
    routings: Sequence[str] = ROUTINGS,
    also: Sequence[tuple[str, int]] = (),
    launches: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Runs the proof.

    Args:
        artifact: the artifact or its folder.
        seed: seed of weights and inputs; None draws one, which the report names.
        threads: threads of the layer.
        tokens, routings: the cases, each with each.
        also: more cases, a routing and a number of tokens each.
        launches: how many kernels were launched so far, where that can be told: each case says how many its call launched.

    Returns:
        `status` "passed" or "failed", the seed, the bounds, the worst errors, the failures as sentences, and one entry per case:
        routing, T, relative L2, the largest |error| / (|expected| + rms of the token), tokens whose routing is a near tie.
        What is expected of a layer in few bits is what its own codes mean; `rounding` says what storing random weights in few
        bits, and rounding rows to bytes, changes in itself: relative L2 of the reference against itself; None otherwise.

    Raises:
        ArtifactError: it cannot be loaded.
    """
    made = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    check_loadable(made)
    drawn = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    start = time.perf_counter()
    proof = _Proof(module_of(made, threads), np.random.default_rng(drawn), launches)
    asked = [*((routing, count) for routing in routings for count in tokens), *also]
    cases = [proof.case(routing, count) for routing, count in asked]
    failures = [f"{c['routing']} routing, T={c['tokens']}: {reason}" for c in cases for reason in c.pop("failed")]
    return {
        "status": "failed" if failures else "passed",
        "seed": drawn,
        "bounds": dict(zip(("relative_l2", "elementwise"), bounds(made.config, made.target), strict=True)),
        "worst_relative_l2": max(c["relative_l2"] for c in cases),
        "worst_elementwise": max(c["elementwise"] for c in cases),
        "distinct_experts": proof.small.experts,
        "rounding": proof.rounding(),
        "seconds": round(time.perf_counter() - start, 2),
        "failures": failures,
        "cases": cases,
    }


def bounds(config: MoEConfig, target: Target | None = None) -> tuple[float, float]:
    """The largest relative L2 error and the largest |error| / (|expected| + rms of the token) that pass (on CPUs without one)."""
    if target is not None and target.tf32:
        return TF32_RELATIVE_L2, TF32_ELEMENTWISE
    if target is not None and target.gpus and config.dtype == "float16":
        return RELATIVE_L2["float16"], CUDA_FLOAT16_ELEMENTWISE
    l2, elementwise = RELATIVE_L2[config.dtype], ELEMENTWISE[config.dtype]
    if config.activation_dtype == "same":
        return l2, elementwise
    return max(l2, BYTE_ROWS_RELATIVE_L2), max(elementwise, BYTE_ROWS_ELEMENTWISE)


class _Proof:
    """One module with random weights, and the reference on the same weights."""

    def __init__(self, module: Module | DeviceModule, rng: np.random.Generator, launches: Callable[[], int] | None = None) -> None:
        self.module, self.rng, self.config, self.launches = module, rng, module.config, launches
        c = self.config
        per_expert = c.hidden * c.intermediate * (3 if c.gated else 2)
        distinct = min(c.experts, max(DISTINCT_WEIGHTS // per_expert, 2))
        self.small = dataclasses.replace(c, experts=distinct, top_k=1, n_group=1, topk_group=1)
        self.most_tokens = max(FEWEST_TOKENS, int(REFERENCE_FLOPS / (2 * per_expert * c.top_k)))
        self.drawn: dict[str, Array] = dict(reference.random_weights(self.small, rng))
        self.lever = rng.choice([-1.0, 1.0], c.hidden)
        self.router = {
            name: reference.round_to_dtype(
                rng.standard_normal(shape) * (c.hidden**-0.5 if name.endswith("weight") else 0.1),
                "float32" if "correction" in name else c.dtype,
            )
            for name, shape in weight_shapes(c).items()
            if name.startswith("router.")
        }
        self.distinct_of = np.arange(c.experts) % distinct
        packed_bytes = int(module.artifact.manifest["packed_bytes"])
        self.filled = range(c.experts if packed_bytes <= WHOLE_BLOB_BYTES else distinct)
        self.stored, self.weights = self._stored(), reference.dequantized(self.small, self.drawn)
        packer, source = module.packer(module.threads), self._source(self.router)
        packer.router(source)
        packer.experts(source, self.filled)
        packer.shared(source)
        self.packer, self.layer = packer, module.layer(packer.blob)
        self.weights = {name: value.astype(np.float64) for name, value in self.weights.items()}  # once, not in every case
        self.least_rms = self._usual_rms() if min(c.hidden, c.intermediate) < NARROW else 0.0

    def _usual_rms(self) -> float:
        x = reference.round_to_dtype(self.rng.standard_normal((USUAL_TOKENS, self.config.hidden)) + self.lever, self.config.dtype)
        y = self._output(x, reference.route(self.config, self.router, x), np.arange(len(x)))
        return float(np.sqrt(np.mean(y**2)))

    def _stored(self) -> dict[str, Matrix | list[Matrix]]:
        """All but the router as the layer stores it, for all E experts, of which only some are distinct."""
        stored: dict[str, Matrix | list[Matrix]] = {}
        for name, value in self.drawn.items():
            if name.startswith("experts."):
                distinct = [self._matrix(name, matrix) for matrix in value]
                stored[name] = [distinct[e] for e in self.distinct_of]
            elif not name.startswith("router."):
                stored[name] = self._matrix(name, value)
        return stored

    def _matrix(self, name: str, value: Array) -> Matrix:
        array = _stored(value, self.config.dtype)
        if not self.config.low_bit or not name.endswith(".weight") or name == "shared_gate.weight":
            return array
        n, k = value.shape
        return from_quantized(quantize(array, self.config, name), self.config, n, k, name)

    def _source(self, router: dict[str, Array]) -> WeightSource:
        return WeightSource(self.config, self.stored | {name: HostArray(value, "float32") for name, value in router.items()})

    def case(self, routing: str, tokens: int) -> dict[str, Any]:
        """One case; its entry `failed` lists what was out of bounds."""
        router = self._router(routing)
        self.packer.router(self._source(router))
        drawn = self.rng.standard_normal((tokens, self.config.hidden)) + self.lever
        x = reference.round_to_dtype(drawn, self.config.dtype)
        given = _stored(x, self.config.dtype)
        out = HostArray(_poisoned(given.shape, self.config.dtype), self.config.dtype)
        before = self.launches() if self.launches else 0
        self.layer.forward_into(given, out)
        launched = {"launches": self.launches() - before} if self.launches else {}
        again, got = self.layer(given, return_routing=True)
        failed: list[str] = []
        expected, near = self._routing(routing, router, x, got, failed)
        checked = np.sort(self.rng.permutation(tokens)[: self.most_tokens])  # all of them, but for very large experts
        y = arrays.to_float32(out)
        l2, elementwise = _errors(y[checked].astype(np.float64), self._output(x, expected, checked), self.least_rms)
        most = bounds(self.config, self.module.artifact.target)
        if not l2 <= most[0]:
            failed.append(f"relative L2 error {l2:.2e} is above {most[0]:.0e}")
        if not elementwise <= most[1]:
            failed.append(f"elementwise error {elementwise:.2e} is above {most[1]:.0e}")
        if not np.isfinite(y).all():
            failed.append("the output is not finite everywhere")
        if not np.array_equal(again.data, out.data):
            failed.append("two calls with the same input differ")
        return {
            "routing": routing,
            "tokens": tokens,
            "relative_l2": l2,
            "elementwise": elementwise,
            "near_ties": int(near),
            **launched,
            "failed": failed,
        }

    def rounding(self) -> dict[str, float] | None:
        """What few bits change: of the weights, and of the rows that they are multiplied with."""
        c = self.small
        if not c.low_bit:
            return None
        x = reference.round_to_dtype(self.rng.standard_normal((FEWEST_TOKENS, c.hidden)), c.dtype)
        ids, ones = self.rng.integers(c.experts, size=(len(x), 1)), np.ones((len(x), 1))
        wide = dataclasses.replace(c, activation_dtype="same")
        drawn, meant, computed = (
            reference.experts(config, weights, x, ids, ones)
            for config, weights in ((wide, self.drawn), (wide, self.weights), (c, self.weights))
        )
        return {"weights_relative_l2": _errors(meant, drawn)[0], "rows_relative_l2": _errors(computed, meant)[0]}

    def _router(self, routing: str) -> dict[str, Array]:
        """Router weights that bring about a kind of routing: all inputs lean towards `lever`, so that a row of weights that
        does so too has larger logits."""
        router, c = dict(self.router), self.config
        weight = router["router.weight"].copy()
        place = self.rng.permutation(c.experts)
        if routing == "ties":
            weight[...] = weight[0]
            router |= {name: np.full_like(v, v[0]) for name, v in router.items() if v.ndim == 1}
        elif routing == "skewed":
            weight += self._push(np.linspace(3.0, -3.0, c.experts)[place])
        elif routing == "all_to_one":
            weight += self._push(np.where(place < c.top_k, 6.0, -6.0))
        elif routing == "empty_experts":
            weight += self._push(np.where(place < max(c.top_k, c.experts // 2), 0.0, -6.0))
        router["router.weight"] = reference.round_to_dtype(weight, c.dtype)
        return router

    def _push(self, logits: Array) -> Array:
        """[E, H] weights that add about so much to each expert's logits."""
        pushed: Array = (logits[:, None] * self.lever / self.config.hidden).astype(np.float32)
        return pushed

    def _routing(
        self, routing: str, router: dict[str, Array], x: Array, got: Routing, failed: list[str]
    ) -> tuple[reference.Routing, int]:
        """The routing to compute the expected output with, and the number of near ties, where the module's choice stands."""
        logits = None
        if routing == "ties":  # float64 products of equal rows may differ in the last bit
            logits = np.repeat(_logits_of_first(router, x), self.config.experts, axis=1)
        expected = reference.route(self.config, router, x, logits)
        tolerance = ROUTING_TOLERANCE * (1 + np.abs(logits_of(router, x)).max(initial=0.0))
        near = np.zeros(len(x), bool) if routing == "ties" else reference.margins(self.config, router, x) < tolerance
        ids, weights = np.asarray(got.ids.data), np.asarray(got.weights.data, np.float64)
        if not np.array_equal(ids[~near], expected.ids[~near]):
            failed.append("expert ids differ from the reference")
        if not _close(weights[~near], expected.weights[~near]):
            failed.append("routing weights differ from the reference")
        if near.any():
            merged = np.where(near[:, None], ids, expected.ids)
            kept = reference.capacity_mask(self.config, merged)
            factors = np.where(near[:, None], weights, expected.weights)
            expected = dataclasses.replace(expected, ids=merged, weights=factors, kept=kept)
        else:
            self._counts(expected, got, failed)
        return expected, int(near.sum())

    def _counts(self, expected: reference.Routing, got: Routing, failed: list[str]) -> None:
        if not np.array_equal(got.load, expected.load) or got.dropped != expected.dropped:
            failed.append(f"tokens per expert or dropped choices ({got.dropped}, expected {expected.dropped}) differ")
        for name in ("load_balancing_loss", "adaptive_loss", "z_loss"):
            if not _close(np.float64(getattr(got, name)), np.float64(getattr(expected, name))):
                failed.append(f"{name} is {getattr(got, name)}, expected {getattr(expected, name)}")

    def _output(self, x: Array, routing: reference.Routing, tokens: Array) -> Array:
        """The expected output of some tokens; each of their choices is a row of its own to the reference."""
        kept = (routing.kept & np.isin(routing.ids, np.asarray(self.filled)))[tokens].reshape(-1, 1)
        ids = self.distinct_of[routing.ids[tokens]].reshape(-1, 1)
        rows = np.repeat(x[tokens], self.config.top_k, axis=0)
        y = reference.experts(self.small, self.weights, rows, ids, routing.weights[tokens].reshape(-1, 1), kept)
        routed: Array = y.reshape(len(tokens), self.config.top_k, self.config.hidden).sum(axis=1)
        return routed + reference.shared(self.small, self.weights, x[tokens])


def _stored(values: Array, dtype: str) -> HostArray:
    return HostArray(arrays.to_storage(HostArray(values, "float32"), dtype), dtype)


def logits_of(router: dict[str, Array], x: Array) -> Array:
    """float64 logits [T, E]."""
    logits: Array = x.astype(np.float64) @ router["router.weight"].astype(np.float64).T
    return logits + router["router.bias"] if "router.bias" in router else logits


def _logits_of_first(router: dict[str, Array], x: Array) -> Array:
    return logits_of({name: value[:1] for name, value in router.items()}, x)


def _close(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=ROUTING_TOLERANCE * 5, atol=1e-9))


def _errors(y: Array, expected: Array, least_rms: float = 0.0) -> tuple[float, float]:
    """(relative L2, largest |error| / (|expected| + rms of the token)); infinite when anything is not finite.

    What is expected counts as of `least_rms` at least, as a whole and of each token.
    """
    if not y.size:
        return 0.0, 0.0
    error = y - expected
    if not np.isfinite(error).all():
        return np.inf, np.inf
    norm = max(float(np.linalg.norm(expected)), least_rms * float(np.sqrt(expected.size)))
    rms = np.sqrt(np.mean(expected**2, axis=1, keepdims=True))
    scale = np.abs(expected) + np.maximum(rms, max(least_rms, 1e-3 * np.sqrt(np.mean(expected**2))))
    return float(np.linalg.norm(error)) / max(norm, 1e-30), float((np.abs(error) / np.maximum(scale, 1e-30)).max())


def _poisoned(shape: tuple[int, ...], dtype: str) -> Array:
    out = arrays.empty_aligned(shape, dtype)
    out.view(np.uint8)[...] = 0xFF  # NaN in all three types
    return out
