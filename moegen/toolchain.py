"""The machine's C++ compiler."""

from __future__ import annotations

import os
import shutil

from .errors import BuildError


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
