"""Looking into an artifact for CUDA: its kernels' source, PTX, machine code and what they use."""

from __future__ import annotations

from typing import Any

from ..artifact import Artifact
from . import making
from .sass import disassemble


def source(made: Artifact) -> str:
    """CUDA C++ of all kernels, those that Hopper has of its own last: each of the two parts is compiled by itself."""
    return "\n".join(making.sources(made.path))


def ptx(made: Artifact) -> str:
    """PTX, which the driver of a newer device compiles."""
    return (made.path / making.PTX).read_text(encoding="utf-8")


def sass(made: Artifact, begins: str = "") -> dict[str, dict[str, str]]:
    """Architecture -> kernel -> assembly, of the kernels whose name begins so.

    Raises:
        BuildError: there is no disassembler.
    """
    return {
        name: {
            kernel: text
            for code in making.cubins(made.path, name)
            for kernel, text in disassemble(code).items()
            if kernel.startswith(begins)
        }
        for name in made.target.gpus
    }


def resources(made: Artifact, begins: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """Architecture -> kernel -> what it uses, of the kernels whose name begins so."""
    found: dict[str, dict[str, dict[str, Any]]] = made.manifest["resources"]
    return {
        architecture: {name: used for name, used in kernels.items() if name.startswith(begins)}
        for architecture, kernels in found.items()
    }
