"""The machine's C++ compiler."""

from __future__ import annotations

import os
import shutil
import subprocess

from .errors import BuildError
from .target import host_arch


def cxx(why: str = "building needs a C++ compiler for the generated host") -> list[str]:
    """The command that compiles C++: $CXX with its arguments, or the first of c++, g++ and clang++ that is there.

    Args:
        why: how the message begins when there is none.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name.split()[0])):
            return [path, *name.split()[1:]]
    raise BuildError(f"{why}: install g++ or clang++ (or set CXX)")


def cxx_for(arch: str) -> list[str]:
    """The command that compiles C++ for an architecture.

    Raises:
        BuildError: there is none; one that compiles for another machine than this one has to be named in $CXX.
    """
    command = cxx()
    if arch != host_arch():
        said = subprocess.run([*command, "-dumpmachine"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not said.stdout.startswith(f"{arch}-"):
            raise BuildError(f"building for {arch} needs a C++ compiler for it: set CXX, for example to {arch}-linux-gnu-g++")
    return command


def first_error(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line for line in text.strip().splitlines() if "ld returned" not in line]  # after the linker's own, which say why
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return (errors or lines or ["no output"])[0].strip()
