"""The packed weights of one experts module: made at first use, made again when its parameters change, or kept without them.

A parameter counts as changed when its memory, its shape or its version counter is another, or when one of some elements, spread
over all experts, has another value: in-place changes of `parameter.data` move no counter. (On CUDA devices, elements are not
looked at, for that would wait for the device.)
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..arrays import HostArray, as_host_array
from ..device import DeviceLayer
from ..errors import InputError, WeightsError
from ..runtime import Layer, Module
from .building import module_for
from .experts import parameter_names, parameters_of, understand, weights_of
from .released import Released

_ATTRIBUTE = "_moegen"
_SAMPLES = 64
_EXPERTS_SAMPLED = 256
_FREED = "the model whose experts these are was freed: keep it as long as what was compiled from it"

_numbers = itertools.count(1)
_known: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()
_first_use = threading.Lock()


class _Stamp:
    """How to tell that a parameter is what it was."""

    def __init__(self, value: torch.Tensor) -> None:
        self._place = _place(value)
        self._at: tuple[Any, ...] = ()
        self._view: HostArray | None = None
        if value.device.type == "cpu" and value.numel():
            self._view = as_host_array(value, "the experts' weights", WeightsError)
            self._at = np.unravel_index(_samples(value.shape), tuple(value.shape))
        self._bits = self._sampled()

    def holds(self, value: Any) -> bool:
        """Whether `value` is still the parameter that was stamped, unchanged."""
        return isinstance(value, torch.Tensor) and _place(value) == self._place and self._sampled() == self._bits

    def _sampled(self) -> bytes:
        return b"" if self._view is None else self._view.data[self._at].tobytes()


def _place(value: torch.Tensor) -> tuple[Any, ...]:
    version = -1 if value.is_inference() else value._version
    return (value.data_ptr(), version, value.shape, value.stride(), value.dtype)


def _samples(shape: Sequence[int]) -> npt.NDArray[np.int64]:
    """Flat indices of elements to compare: one in each of many experts, others anywhere, the first and the last."""
    total = int(np.prod(shape))
    experts, each = shape[0], total // shape[0]
    random = np.random.default_rng(0)
    some = np.arange(experts)[:: -(-experts // _EXPERTS_SAMPLED)]
    inside = some * each + random.integers(0, each, len(some))
    return np.unique(np.concatenate([inside, random.integers(0, total, _SAMPLES), [0, total - 1]]))


class _State(NamedTuple):
    """What was packed, of what, for how many choices per token; replaced as a whole, so that it is read without a lock."""

    layer: Layer | DeviceLayer
    top_k: int
    stamps: tuple[_Stamp, ...]


class Packed:
    """One module's experts, ready to be called from several threads.

    Copies of the module (`copy.deepcopy`, pickle) begin without one: they have parameters of their own.
    """

    def __init__(self, module: Any) -> None:
        self.module = weakref.ref(module)
        self.number = next(_numbers)
        self._state: _State | None = None
        self._lock = threading.Lock()
        _known[self.number] = self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return (type(None), ())

    def layer(self, top_k: int) -> Layer | DeviceLayer:
        """The layer with the module's weights as they are now.

        Raises:
            MoegenError: moegen cannot run these experts, or there is no artifact and none can be built.
        """
        state = self._current(top_k)
        if state is None:
            with self._lock:
                state = self._current(top_k)
                if state is None:
                    self._state = None  # a former copy goes before the next one comes
                    state = self._state = self._pack(top_k)
        return self._with_threads(state)

    def release(self) -> int:
        """Puts `Released` in the place of the parameters: the packed weights are all there is.

        Returns:
            Bytes that were given back; 0 if they had been before.
        """
        with self._lock:
            module, given_back = self._module(), 0
            for name in parameter_names(module):
                value = getattr(module, name)
                if not isinstance(value, Released):
                    given_back += value.nbytes
                    setattr(module, name, Released.like(value))
            if self._state is not None:
                self._state = self._state._replace(stamps=())  # which look at the parameters' memory
            return given_back

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights; 0 before first use."""
        return 0 if self._state is None else self._state.layer.packed_bytes

    def _module(self) -> Any:
        if (module := self.module()) is None:
            raise InputError(_FREED)
        return module

    def _current(self, top_k: int) -> _State | None:
        """What is packed, if it still is what the module has."""
        state, module = self._state, self._module()
        if state is None or top_k != state.top_k:
            return None
        values = [getattr(module, name, None) for name in parameter_names(module)]
        if all(isinstance(value, Released) for value in values):
            return state
        same = len(values) == len(state.stamps) and all(map(_Stamp.holds, state.stamps, values))
        return state if same else None

    def _pack(self, top_k: int) -> _State:
        module = self._module()
        values = parameters_of(module)
        if any(isinstance(value, Released) for value in values):
            raise WeightsError(
                "some of the experts' parameters were released after packing, and have to be packed again (others were changed, or "
                f"top_k is {top_k} now): load the model again"
            )
        experts = understand(module, top_k)
        stamps = tuple(map(_Stamp, values))  # before reading: what changes meanwhile is noticed
        compiled = module_for(experts.config, str(values[0].device))
        threads = torch.get_num_threads()
        packer = compiled.packer(threads)
        packer.experts(weights_of(module, experts), range(experts.config.experts))
        layer = Layer(compiled, packer.blob, threads) if isinstance(compiled, Module) else compiled.layer(packer.blob)
        return _State(layer, top_k, stamps)

    def _with_threads(self, state: _State) -> Layer | DeviceLayer:
        """The layer with as many threads as torch has."""
        layer, threads = state.layer, torch.get_num_threads()
        if isinstance(layer, DeviceLayer) or layer.threads == threads:
            return layer
        layer = Layer(layer.module, layer.packed, threads)
        with self._lock:
            if self._state is state:
                self._state = state._replace(layer=layer)
        return layer


def packed_of(module: Any) -> Packed:
    """What is packed of `module`, begun when first asked for."""
    held = module.__dict__.get(_ATTRIBUTE)
    if isinstance(held, Packed) and held.module() is module:
        return held
    with _first_use:
        held = module.__dict__.get(_ATTRIBUTE)
        if not isinstance(held, Packed) or held.module() is not module:
            held = Packed(module)
            object.__setattr__(module, _ATTRIBUTE, held)
    return held


def numbered(number: int) -> Packed:
    """The one with this number.

    Raises:
        InputError: its module was freed.
    """
    if (held := _known.get(number)) is None:
        raise InputError(_FREED)
    return held
