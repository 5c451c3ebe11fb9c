"""Where a run happens: the device, its clocks, driver and programs, as `nvidia-smi` and the packages say. Nothing is changed."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
from typing import Any

from .jobs import Job, run

_PACKAGES = (
    "moegen",
    "torch",
    "triton",
    "transformers",
    "apache-tvm-ffi",
    "apache-tvm",
    "numpy",
    "matplotlib",
    "nvidia-cuda-nvrtc",
)
_DEVICE = (
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.memory",
    "mig.mode.current",
)
_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active", "memory.used")
_CHECKER = "compute-sanitizer"


def surroundings(device: int) -> dict[str, Any]:
    """Plain JSON values."""
    return {
        "device": {"name": f"an emulated {emulated()}"} if emulated() else _asked(_DEVICE, device),
        "state": state(device),
        "machine": {"system": platform.platform(), "processors": os.cpu_count(), "python": sys.version.split()[0]},
        "packages": {name: _version(name) for name in _PACKAGES},
        "programs": {name: program(name) for name in ("nvcc", _CHECKER, "ncu", "cuobjdump")},
    }


def emulated() -> str | None:
    """The architecture of an emulated device (`moegen.cuda.emulated_driver`); None of a real one."""
    return os.environ.get("MOEGEN_EMULATED_ARCH")


def state(device: int) -> dict[str, str]:
    """Clocks, temperature and power at this moment; empty where nobody says."""
    return _asked(_STATE, device)


def program(name: str) -> str | None:
    """Where a program of NVIDIA's toolkit is."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    places = [str(pathlib.Path(home) / part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def checker() -> str | None:
    """Where compute-sanitizer is."""
    return program(_CHECKER)


def _asked(fields: tuple[str, ...], device: int) -> dict[str, str]:
    command = ("nvidia-smi", f"--id={device}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    done = run(Job("nvidia-smi", command, 10))
    if not done.passed:
        return {"nvidia-smi": (done.output + done.said).strip() or done.status}
    return dict(zip(fields, (part.strip() for part in done.output.strip().split(",")), strict=False))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
