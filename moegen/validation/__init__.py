"""Does moegen keep its promises on this machine? Layers are built, proven, and measured beside NumPy and torch.

    from moegen.validation import Scope, validate
    document = validate(Scope(minutes=5), "validation")

Every claim is in `moegen.validation.claims`, with its threshold, stated before anything is measured. What fails is said to fail,
and what could not be tested is not said to hold. The folder has the page (`index.html`), its pictures, and `validation.json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import Progress, validate
    from .scope import Scope

__all__ = ["Progress", "Scope", "validate"]


def __getattr__(name: str) -> Any:
    """Imported when first used: the command line imports this package whatever it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import run, scope

    return getattr(scope if name == "Scope" else run, name)
