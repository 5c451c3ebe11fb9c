"""Checkpoints packed once, for layers that are loaded often.

    from moegen.pack import pack
    pack("model.safetensors", "layer3.moepack", layer=3)
    layer = moegen.load(artifact.path).bind("layer3.moepack")

`moegen.moepack` says what such a file holds, and reads it. Packing for a CUDA device needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .packing import pack

__all__ = ["pack"]


def __getattr__(name: str) -> Any:
    """Imported when first used: the command line imports this package whatever it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import packing

    return getattr(packing, name)
