"""Processes that have an emulated device: the artifact as it is, with its own host code, on a machine without a GPU."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Literal

from .architectures import parse
from .native import driver, library


def environment(
    source: str,
    folder: str | os.PathLike[str],
    *,
    arch: str = "sm_90",
    threads: int = 0,
    order: Literal["ascending", "descending", "shuffled"] = "ascending",
    seed: int = 0,
    also: Sequence[str] = (),
) -> dict[str, str]:
    """The environment of a subprocess in which `libcuda.so.1` is the emulated driver.

    Args:
        source: the CUDA C of the kernels that the process launches; images that it loads are ignored.
        folder: where the driver and the kernels' library are made; what is there already is not made again.
        arch: what the device says it is, and `__CUDA_ARCH__`.
        threads: that run blocks at the same time, 0 for one per processor.
        order, seed: as in `Emulated.launch`.
        also: more sources, each compiled by itself; no two kernels have one name.

    Raises:
        EmulationError: the source uses what is not emulated, or does not compile.
        BuildError: there is no C++ compiler.
        TargetError: the architecture is not known.
    """
    place = pathlib.Path(folder)
    kernels = [library(each, place, arch).resolve() for each in (source, *also)]
    paths = [str(driver(place).resolve()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "MOEGEN_EMULATED_KERNELS": os.pathsep.join(map(str, kernels)),
        "MOEGEN_EMULATED_ARCH": arch,
        "MOEGEN_EMULATED_SHARED_BYTES": str(parse([arch])[0].max_shared_bytes_per_block),
        "MOEGEN_EMULATED_THREADS": str(threads),
        "MOEGEN_EMULATED_ORDER": order,
        "MOEGEN_EMULATED_SEED": str(seed),
    }
