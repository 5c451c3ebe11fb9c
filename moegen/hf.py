"""Temporary stub."""

from typing import Any


def fields_from_hf(source: Any) -> dict[str, Any]:
    raise NotImplementedError
