"""Reading one dict of a Hugging Face configuration field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError


class Source:
    """One configuration dict, read field by field; every complaint names the field, its value and what is supported."""

    def __init__(self, where: str, raw: Mapping[str, Any]) -> None:
        """`where` is what a complaint starts with: the model type, and the field that the dict is in if it is an inner one."""
        self.where = where
        self.raw = raw

    def reject(self, name: str, supported: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name}={self.raw.get(name)!r} is not supported; supported: {supported}")

    def integer(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that is there; the others are aliases and must not contradict it."""
        given = [name for name in names if name in self.raw]
        if not given and default is not None:
            return default
        if not given or (default is None and self.raw[given[0]] is None):
            raise ConfigError(f"{self.where}: field {names[0]!r} is required")
        for name in given:
            if isinstance(self.raw[name], bool) or not isinstance(self.raw[name], int):
                raise self.reject(name, "a whole number")
            if self.raw[name] != self.raw[given[0]]:
                raise ConfigError(
                    f"{self.where}: {given[0]}={self.raw[given[0]]!r} and {name}={self.raw[name]!r} are the same field "
                    "with two values"
                )
        return int(self.raw[given[0]])

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.reject(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise self.reject(name, "true or false")
        return bool(value)

    def activation(self, name: str, known: Mapping[str, str], default: str) -> str:
        value = self.raw.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.reject(name, ", ".join(known))
        return known[value]

    def must_be(self, name: str, *allowed: Any) -> None:
        """The field, where it is given, has to have one of these values."""
        if self.raw.get(name, allowed[0]) not in allowed:
            raise self.reject(name, ", ".join(repr(a) for a in allowed if a is not None) or "null")
