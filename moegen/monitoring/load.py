"""`ExpertLoad`: counts of the experts of any number of layers, from any number of threads."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..arrays import as_host_array
from ..device import DeviceLayer
from ..device_arrays import torch_device
from ..errors import InputError
from ..routing import Routing
from ..runtime import Layer
from .counts import LayerCounts
from .measures import Summary
from .on_device import DeviceCounts
from .watching import watched

KIND = "moegen-expert-load"
SCHEMA_VERSION = 1
LAYER = "0"

AnyLayer = TypeVar("AnyLayer", Layer, DeviceLayer)


class ExpertLoad:
    """Running counts of the choices of each expert, for layers told apart by a label.

    Counts are int64 and exact, before capacity as in `Routing.load`. Any thread may update and read. Choices that come as tensors
    of a CUDA device are counted there, without waiting for it; reading waits.

    Args:
        window_tokens: keep, beside the totals, a window in which a token that is n tokens old counts exp(-n / window_tokens).

    Raises:
        InputError: the window is not a positive number.
    """

    def __init__(self, window_tokens: float | None = None) -> None:
        if window_tokens is not None and not 0 < window_tokens < math.inf:
            raise InputError(f"window_tokens={window_tokens!r} must be a positive number of tokens")
        self.window_tokens = window_tokens
        self._layers: dict[str, LayerCounts] = {}
        self._devices: dict[tuple[str, str, int], DeviceCounts] = {}
        self._lock = threading.Lock()
        self._epoch = time.time() - time.monotonic()  # a clock that is set back must not turn the history around

    # ---------------------------------------------------------------- counting

    def update(self, routing: Any, *, layer: object = LAYER, experts: int | None = None, capacity: int | None = None) -> None:
        """Counts one call.

        Args:
            routing: a `Routing`, or the choices alone, integers [T, K]: a NumPy array, torch tensor or other DLPack array.
                Those of a CUDA device have to be torch tensors.
            layer: the label of the layer.
            experts: E, for choices alone, the first time that the layer is met.
            capacity: most tokens that an expert takes, for choices alone (`MoEConfig.capacity`); None for any number.

        Raises:
            InputError: choices are not integers [T, K] in [0, E), E is not known or not that of the earlier calls. (On a CUDA
                device a choice out of range is counted as `invalid`.)
        """
        if isinstance(routing, Routing):
            self._add(str(layer), routing.load, int(routing.ids.shape[0]), routing.dropped)
            return
        size = self._experts(str(layer), experts)
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 0):
            raise InputError(f"capacity={capacity!r} must be a number of tokens, or None")
        if getattr(torch_device(routing), "type", "") == "cuda":
            if len(routing.shape) != 2 or routing.dtype.is_floating_point or str(routing.dtype) == "torch.bool":
                raise InputError(f"ids must be integers [T, K], not {routing.dtype} {list(routing.shape)}")
            self._add_on_device(str(layer), routing, size, capacity)
            return
        given = as_host_array(routing, "ids")
        if len(given.shape) != 2 or given.data.dtype.kind not in "iu" or given.dtype == "bfloat16":
            raise InputError(f"ids must be integers [T, K], not {given.dtype} {list(given.shape)}")
        outside = given.data[(given.data < 0) | (given.data >= size)]
        if outside.size:
            raise InputError(f"ids has {int(outside[0])}, which is not between 0 and {size - 1}: layer {layer} has {size} experts")
        counts = np.bincount(given.data.ravel().astype(np.int64), minlength=size)
        over = 0 if capacity is None else int(np.maximum(counts - capacity, 0).sum())
        self._add(str(layer), counts, given.shape[0], over)

    def watch(self, layer: AnyLayer, label: object = LAYER) -> AnyLayer:
        """The same layer, whose calls count; it shares the weights with the one given, whose calls do not.

        Calls of the layer, `forward_into` and `experts` count; `route` and `profile` do not.
        """
        return watched(layer, self, str(label))  # type: ignore[return-value]

    def _experts(self, layer: str, given: int | None) -> int:
        known = self._layers.get(layer)
        if known is not None and given not in (None, known.experts):
            raise InputError(f"experts={given}, but layer {layer!r} has {known.experts} so far: give each layer a label of its own")
        if known is None and given is None:
            raise InputError(f"experts is missing: how many layer {layer!r} has does not follow from ids")
        size = given if known is None else known.experts
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"experts={size!r} must be an integer, at least 1")
        return size

    def _add(self, layer: str, counts: npt.NDArray[Any], tokens: int, dropped: int) -> None:
        with self._lock:
            found = self._layers.get(layer)
            if found is None:
                found = self._layers[layer] = LayerCounts(len(counts), self.window_tokens)
            elif len(counts) != found.experts:
                raise InputError(
                    f"a routing over {len(counts)} experts, but layer {layer!r} has {found.experts} so far: "
                    "give each layer a label of its own"
                )
            found.add(counts, tokens, dropped, self._now())

    def _add_on_device(self, layer: str, ids: Any, experts: int, capacity: int | None) -> None:
        """ids [T, K] are a torch tensor of a device."""
        with self._lock:
            self._layers.setdefault(layer, LayerCounts(experts, self.window_tokens))
            key = (layer, str(ids.device), _stream(ids))
            if key not in self._devices:
                self._devices[key] = DeviceCounts(ids, experts)
            self._devices[key].add(ids, capacity)

    def _now(self) -> float:
        return self._epoch + time.monotonic()

    # ---------------------------------------------------------------- reading

    @property
    def layers(self) -> tuple[str, ...]:
        """The labels of the layers that were met, numbers in their order."""
        return tuple(sorted(self._layers, key=_natural))

    def counts(self, layer: object = LAYER, *, recent: bool = False) -> npt.NDArray[Any]:
        """Choices of each expert: int64 [E], or float64 [E] of the window.

        Raises:
            InputError: no such layer, or no window.
        """
        found = self.snapshot(layer)
        if not recent:
            return found.counts
        if found.window is None:
            raise InputError("there is no window: make ExpertLoad(window_tokens=...) to have one")
        return found.window

    def summary(self, layer: object = LAYER, *, recent: bool = False) -> Summary:
        """Entropy, imbalance and the rest, of the totals or of the window.

        Raises:
            InputError: no such layer, or no window.
        """
        return self.snapshot(layer).summary(str(layer), recent)

    def snapshot(self, layer: object = LAYER) -> LayerCounts:
        """A copy of all that is known of a layer.

        Raises:
            InputError: no such layer.
        """
        with self._lock:
            self._collect()
            if str(layer) not in self._layers:
                raise InputError(f"no layer {str(layer)!r} was counted; there are: {', '.join(self.layers) or 'none'}")
            return self._layers[str(layer)].until(self._now())

    def _collect(self) -> None:
        """Adds what devices counted in the meantime."""
        for (layer, _, _), device in self._devices.items():
            new = device.increase()
            if new.calls:
                found = self._layers[layer]
                found.add(new.counts, new.tokens, new.dropped, self._now(), new.calls)
                found.invalid += new.invalid

    def reset(self) -> None:
        """Forgets every count and layer."""
        with self._lock:
            self._layers, self._devices = {}, {}

    # ---------------------------------------------------------------- in and out

    def prometheus(self) -> str:
        """All counts in Prometheus' text format; `moegen.monitoring.prometheus.Collector` is for a registry of yours.

        Raises:
            ReportError: prometheus_client is not installed.
        """
        from .prometheus import text

        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: all counts, windows and histories."""
        with self._lock:
            self._collect()
            layers = {name: self._layers[name].until(self._now()).to_dict() for name in self.layers}
        return {"schema_version": SCHEMA_VERSION, "kind": KIND, "window_tokens": self.window_tokens, "layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str = "the values") -> ExpertLoad:
        """What `to_dict` gave.

        Args:
            name: what messages call it.

        Raises:
            InputError: `to_dict` did not give this.
        """
        if not isinstance(values, Mapping) or values.get("kind") != KIND:
            raise InputError(f"{name} holds no counts of ExpertLoad")
        if values.get("schema_version") != SCHEMA_VERSION:
            raise InputError(f"{name} has schema {values.get('schema_version')!r}; this moegen reads {SCHEMA_VERSION}")
        try:
            made = cls(values["window_tokens"])
            made._layers = {str(k): LayerCounts.from_dict(v, made.window_tokens) for k, v in values["layers"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{name} is damaged: {'no field ' if isinstance(error, KeyError) else ''}{error}") from None
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all counts as JSON, replacing the file in one step.

        Raises:
            InputError: the file cannot be written.
        """
        target = pathlib.Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")
            os.replace(temporary, target)
        except OSError as error:
            raise InputError(f"{str(target)!r} cannot be written ({error.strerror}): give another path") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, *paths: str | os.PathLike[str]) -> ExpertLoad:
        """The sum of the counts in files that `save` wrote, one for each process, say.

        Raises:
            InputError: a file is missing or damaged, or a layer has not as many experts in all files.
        """
        return cls.merged(_read(cls, pathlib.Path(path)) for path in paths)

    @classmethod
    def merged(cls, loads: Iterable[ExpertLoad]) -> ExpertLoad:
        """The sum of several; layers with the same label are the same.

        Raises:
            InputError: there is none, a layer has not as many experts in all, or windows are of different lengths.
        """
        parts = list(loads)
        if not parts:
            raise InputError("there is nothing to merge")
        made = cls(parts[0].window_tokens)
        for part in parts:
            if part.window_tokens != made.window_tokens:
                raise InputError(f"windows of {made.window_tokens} and {part.window_tokens} tokens cannot be added")
            for name in part.layers:
                theirs = part.snapshot(name)
                ours = made._layers.setdefault(name, LayerCounts(theirs.experts, made.window_tokens))
                if ours.experts != theirs.experts:
                    raise InputError(f"layer {name!r} has {ours.experts} experts in one and {theirs.experts} in another")
                ours.merge(theirs)
        return made

    def __repr__(self) -> str:
        return f"ExpertLoad({', '.join(f'{name}: {self._layers[name].tokens} tokens' for name in self.layers)})"


def _read(cls: type[ExpertLoad], path: pathlib.Path) -> ExpertLoad:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}") from None
    return cls.from_dict(values, repr(str(path)))


def _stream(ids: Any) -> int:
    """torch's current stream on the tensor's device; totals of one stream are added up one after the other."""
    if not ids.is_cuda:
        return 0
    return int(sys.modules["torch"].cuda.current_stream(ids.device).cuda_stream)


def _natural(label: str) -> list[tuple[int, int, str]]:
    """Digits as numbers: 9 before 10, and model.layers.9 before model.layers.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", label) if part]
