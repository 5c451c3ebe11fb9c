"""Processes of moegen's own that have no use for torch: tvm_ffi imports it where it is installed, which takes seconds each time."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from .paths import PACKAGE

WITHOUT_TORCH = "MOEGEN_WITHOUT_TORCH"  # in the environment: `import moegen` hides torch


def environment(around: Mapping[str, str] | None = None) -> dict[str, str]:
    """For an interpreter that can import moegen and not torch, with what is in `around`, or in this process's environment."""
    known = os.environ if around is None else around
    path = os.pathsep.join(part for part in (str(PACKAGE.parent), known.get("PYTHONPATH", "")) if part)
    return {**known, "PYTHONPATH": path, WITHOUT_TORCH: "1"}


def hide_torch() -> None:
    """From what is imported from here on, unless torch is there already."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def begin_in_group() -> None:
    """How a process of a pool begins: without torch, and as the leader of a process group."""
    hide_torch()
    os.setpgrp()
