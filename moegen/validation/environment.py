"""Where it runs: processor and its instructions, memory, compiler, packages, GPU or that there is none."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from typing import Any

from ..cuda.device_count import devices
from ..cuda.hardware import device
from ..errors import BuildError
from ..machine import available_bytes, processor, this_machine
from ..target import X86_FEATURES, host_cpu_flags
from ..toolchain import cxx
from ..version import __version__

_PACKAGES = ("numpy", "apache-tvm", "apache-tvm-ffi", "torch", "matplotlib", "jinja2", "click")


def environment() -> dict[str, Any]:
    """Plain JSON values; what is not there is null."""
    return {
        "moegen": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "features": [name for name, flag in X86_FEATURES.items() if flag in host_cpu_flags()],
        "machine": dataclasses.asdict(this_machine()),
        "available_bytes": available_bytes(),
        "compiler": _compiler(),
        "gpus": [found.name for index in range(devices()) if (found := device(index)) is not None],
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _compiler() -> str | None:
    """The first line of what the C++ compiler says about itself."""
    try:
        command = cxx()
    except BuildError:
        return None
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    return (said.strip().splitlines() or [" ".join(command)])[0]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
