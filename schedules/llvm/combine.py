"""Adding expert rows to their tokens: parallel over column panels, in explicit loops of the template."""

from __future__ import annotations

from typing import Any

from ._fixed import Knobs, check, default

__all__ = ["Knobs", "apply", "check", "default"]


def apply(sch: Any, name: str, knobs: Knobs) -> None:
    """Nothing to transform."""
