"""The numerical proof of a module for CUDA: on a device where there is one, otherwise with its kernels' source emulated.

Emulated, the artifact runs as it is, with its own host code, above a driver whose kernels are the same CUDA source compiled for
this processor, thread by thread (`emulator`). That proves indices, data movement, barriers, tensor-core fragments and arithmetic;
what it cannot prove is NVIDIA's compiler and hardware.
"""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from .. import verification
from ..artifact import Artifact
from ..config import MoEConfig
from ..cuda_geometry import CudaGeometry
from ..errors import BuildError, EmulationError
from ..own_processes import environment
from ..schedules.cuda.hopper import ARCHITECTURE
from . import emulated_driver, making
from .device_count import devices

EMULATED_MULTIPLY_ADDS = 1.5e9  # of a whole proof: some ten seconds
EMULATED_BLOCKS_MULTIPLY_ADDS = 12e9  # of one more case
EMULATED_COMPARISON = 64  # multiply-adds that take as long as one of the comparisons by which a token's experts are chosen
TOKENS = (0, 1, 2, 17)
BLOCK_TOKENS = 17
MOST_PACKED_BYTES = 4 << 30


def prove(artifact: Artifact, seed: int | None = None) -> dict[str, Any]:
    """The report of `verification.verify`, with `executed` saying where it ran; or `status` "skipped" and the reason.

    Raises:
        BuildError: the emulated proof breaks off.
    """
    if devices():
        return verification.verify(artifact, seed) | {"executed": "on the device"}
    if int(artifact.manifest["packed_bytes"]) > MOST_PACKED_BYTES:
        return {"status": "skipped", "reason": "there is no CUDA device here, and the layer's weights are too large to emulate one"}
    cases = emulated_cases(artifact.config, artifact.manifest["regimes"])
    if not cases:
        return {"status": "skipped", "reason": "there is no CUDA device here, and the layer is too large to emulate one"}
    return _emulated(artifact, seed, cases)


def emulated_cases(config: MoEConfig, regimes: Sequence[Mapping[str, Any]] = ()) -> tuple[int, ...]:
    """Numbers of tokens whose emulation takes seconds; few if the layer is large.

    Args:
        regimes: heights of row blocks, as the manifest has them: of each, the fewest tokens that it is for.
    """
    geometry = CudaGeometry(config)
    padded = {name: math.prod(product.shape[1:]) for name, product in geometry.products.items()}
    per_row = padded["up"] + padded["down"]
    per_token = padded["router"] + padded.get("shared_up", 0) + padded.get("shared_down", 0)
    per_token += EMULATED_COMPARISON * config.top_k * config.experts
    left, taken = EMULATED_MULTIPLY_ADDS / len(verification.ROUTINGS) / 2, []
    highest = [regime["rows_up_to"] * config.experts // config.top_k + 1 for regime in regimes if regime["rows_up_to"] is not None]
    for tokens in sorted({*TOKENS, *highest}):
        rows = tokens * config.top_k if tokens <= 2 else tokens * config.top_k + 16 * min(config.experts, tokens * config.top_k)
        left -= rows * per_row + tokens * per_token
        if left < 0:
            break
        taken.append(tokens)
    return tuple(taken) if len(taken) > 1 else ()


def _emulated(artifact: Artifact, seed: int | None, tokens: tuple[int, ...]) -> dict[str, Any]:
    source, *own = making.sources(artifact.path)
    arch = ARCHITECTURE if own else artifact.target.gpus[0]
    with tempfile.TemporaryDirectory() as folder:
        try:
            around = emulated_driver.environment(source, pathlib.Path(folder), arch=arch, also=own)
        except EmulationError as error:
            raise BuildError(f"the kernels cannot be emulated: {error}") from error
        report = report_from(artifact, around, seed, tokens, blocks_of(artifact.config, tokens))
        return report | {"executed": f"emulated {arch}"}


def blocks_of(config: MoEConfig, tokens: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """A case in which row blocks have rows, for a layer too large to have one among `tokens`: all of them to the same experts."""
    rows = 2 * 16 * config.top_k  # two blocks of the lowest height for each
    wanted = max(tokens) < BLOCK_TOKENS and rows * config.hidden * config.intermediate * 3 < EMULATED_BLOCKS_MULTIPLY_ADDS
    return (("all_to_one", BLOCK_TOKENS),) if wanted else ()


def report_from(
    artifact: Artifact,
    around: Mapping[str, str],
    seed: int | None,
    tokens: Sequence[int],
    also: Sequence[tuple[str, int]] = (),
) -> dict[str, Any]:
    """The report of `verification.verify` in a process with this environment.

    Raises:
        BuildError: the process breaks off.
    """
    job = json.dumps({"path": str(artifact.path.resolve()), "seed": seed, "tokens": tokens, "also": also})
    command = [sys.executable, "-m", "moegen.cuda.emulated_proof"]
    done = subprocess.run(command, input=job, env=environment(around), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BuildError(f"the emulated proof broke off: {said}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
