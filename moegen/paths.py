"""Where the folders beside the code are: inside the package in a wheel, at the top level in a checkout."""

from __future__ import annotations

import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parent


def package_folder(name: str) -> pathlib.Path:
    """Folder `templates`, `schedules` or `tuning_logs`, wherever this installation has it."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
