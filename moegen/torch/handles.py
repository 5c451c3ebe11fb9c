"""Numbers for layers: torch's operators take tensors and numbers, and a number stands for a bound layer.

A number belongs to one layer as long as that lives, and to no other afterwards: calling with the number of a layer that is gone,
or of another process, is an error that says so. Layers are held weakly; who keeps a number keeps the layer.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import weakref
from typing import Any

from ..errors import InputError

_BITS = 62  # positive as int64, and too many for one of another process to be met by accident

_layers: dict[int, weakref.ref[Any]] = {}
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_names: dict[int, str] = {}
_lock = threading.Lock()


def number_of(layer: Any, name: str | None = None) -> int:
    """The number that stands for `layer`, given when first asked for.

    Args:
        layer: a bound layer, or anything else that has its `config` and can be held weakly.
        name: makes the number the same in every process for layers with this name and configuration, so that an exported
            program, which has the number only, finds its layer again; without one it is drawn at random.

    Raises:
        InputError: another layer of this configuration has that name, or the layer has another number already.
    """
    with _lock:
        known = _numbers.get(layer)
        number = _named(layer, name) if name is not None else known if known is not None else _unnamed()
        if known is not None and known != number:
            raise InputError(f"{layer!r} has {_shown(known)} already: it cannot be named {name!r}")
        if known is None:
            holder = _alive(number)
            if holder is not None:
                raise InputError(f"a living layer, {holder!r}, is named {name!r} already: choose another name")
            _layers[number] = weakref.ref(layer)
            _numbers[layer] = number
            if name is not None:
                _names[number] = name
        return number


def layer_of(number: int) -> Any:
    """The layer that a number stands for.

    Raises:
        InputError: it is gone, or was never in this process.
    """
    held = _layers.get(number)
    layer = held() if held is not None else None
    if layer is not None:
        return layer
    if held is not None:
        raise InputError(f"the layer with {_shown(number)} was freed: keep the layer (or its module) as long as what calls it")
    raise InputError(
        f"no layer with {_shown(number)} was made in this process: a program that was exported elsewhere finds its layers by name; "
        "give them one when it is exported, MoELayer(..., name=...), and make them here with the same name before it is called"
    )


def name_of(number: int) -> str | None:
    """The name that a number was made of, if it was."""
    return _names.get(number)


def named(like: Any, name: str) -> Any:
    """The living layer of `like`'s configuration with this name, or None."""
    return _alive(_named(like, name))


def _alive(number: int) -> Any:
    held = _layers.get(number)
    return held() if held is not None else None


def _named(layer: Any, name: str) -> int:
    text = f"{type(layer).__name__}\0{name}\0{layer.config}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - _BITS)


def _unnamed() -> int:
    while (number := secrets.randbits(_BITS)) in _layers:
        pass
    return number


def _shown(number: int) -> str:
    return f"number {number}" + (f" ({_names[number]!r})" if number in _names else "")
