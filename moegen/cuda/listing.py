"""Looking into an artifact for CUDA: its kernels' source, PTX, machine code and what they use."""

from __future__ import annotations

from typing import Any

from ..artifact import Artifact
from . import making
from .sass import disassemble


def source(made: Artifact) -> str:
    """CUDA C++ of all kernels."""
    return (made.path / making.KERNELS).read_text(encoding="utf-8")


def ptx(made: Artifact) -> str:
    """PTX, which the driver of a newer device compiles."""
    return (made.path / making.PTX).read_text(encoding="utf-8")


def sass(made: Artifact, begins: str = "") -> dict[str, dict[str, str]]:
    """Architecture -> kernel -> assembly, of the kernels whose name begins so.

    Raises:
        BuildError: there is no disassembler.
    """
    codes = {name: (made.path / making.cubin_of(name)).read_bytes() for name in made.target.gpus}
    return {
        name: {kernel: text for kernel, text in disassemble(code).items() if kernel.startswith(begins)}
        for name, code in codes.items()
    }


def resources(made: Artifact, begins: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """Architecture -> kernel -> what it uses, of the kernels whose name begins so."""
    found: dict[str, dict[str, dict[str, Any]]] = made.manifest["resources"]
    return {
        architecture: {name: used for name, used in kernels.items() if name.startswith(begins)}
        for architecture, kernels in found.items()
    }
