"""The instructions of machine code for a GPU (SASS), by NVIDIA's disassembler."""

from __future__ import annotations

import collections
import pathlib
import re
import subprocess
import tempfile

from ..errors import BuildError
from ..toolchain import first_error
from . import wheels
from .nvidia import tool

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,]+),.*$", re.MULTILINE)
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def disassemble(cubin: bytes) -> dict[str, str]:
    """The instructions of each kernel of a cubin, a line each, by the kernels' names.

    Raises:
        BuildError: there is no disassembler, or it refuses the cubin.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        command = [_nvdisasm(), "-c", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} does not disassemble the kernels: {first_error(done.stdout)}")
    _, *parts = _SECTION.split(done.stdout)
    return {name: text.strip("\n") for name, text in zip(parts[::2], parts[1::2], strict=True)}


def count_instructions(sass: str) -> collections.Counter[str]:
    """How often each opcode is in a kernel's code, with all that belongs to it: `HMMA.16816.F32.BF16`, `LDGSTS.E.BYPASS.128`."""
    return collections.Counter(_OPCODE.findall(sass))


def of_family(counted: collections.Counter[str], family: str) -> int:
    """How many instructions are of one kind, whatever follows it: `HMMA`, `LDSM`, `LDGSTS`, `STL`."""
    return sum(count for opcode, count in counted.items() if opcode == family or opcode.startswith(f"{family}."))


def _nvdisasm() -> str:
    found = tool("nvdisasm") or wheels.find("nvidia-cuda-nvdisasm", "bin/nvdisasm")
    if not found:
        raise BuildError(f"disassembling needs nvdisasm: {wheels.ADVICE}")
    return str(found)
