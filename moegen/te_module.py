"""Reading an emitted tensor-expression module that somebody has edited: its text, and the layer and tiling that it is for."""

from __future__ import annotations

import ast
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .config import MoEConfig
from .errors import BuildError

Tiled = TypeVar("Tiled")
_NAMES = ("CONFIG", "TILING")


def read(path: str | os.PathLike[str], tiling_of: Callable[[Mapping[str, Any]], Tiled]) -> tuple[str, MoEConfig, Tiled]:
    """The module's text, its configuration, and what `tiling_of` makes of its TILING; nothing is executed.

    Args:
        tiling_of: raises KeyError or TypeError for what is no tiling of its target.

    Raises:
        BuildError: the file cannot be read or has no CONFIG and TILING.
    """
    file = pathlib.Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in _NAMES
        }
        return text, MoEConfig.from_dict(values["CONFIG"]), tiling_of(values["TILING"])
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"{str(file)!r} cannot be read: {getattr(error, 'strerror', error)}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BuildError(f"{file.name} is not a valid TE module: {error or type(error).__name__}") from error
    except (KeyError, TypeError) as error:
        raise BuildError(f"{file.name} is not an emitted TE module: CONFIG or TILING is missing or incomplete ({error})") from error
