"""A layer whose weights change: packed again before a call that finds them changed, and operators for its forward and backward.

`weights` are those of `moegen.config.weight_shapes(config)`, in that order, of any float types. The forward rounds them to the
layer's dtype. The backward computes with the same values in float32, in which the forward's sums are, so that it finds the same
side of every clamp. Its gradients have the types of what they are gradients of (straight through the rounding).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..config import weight_shapes
from ..device import DeviceLayer, DeviceModule
from ..errors import InputError
from ..runtime import Layer, Module
from ..weights import resolve
from . import ops
from .gradients import layer_gradients
from .handles import layer_of, number_of
from .opening import in_host_memory, open_module

_DEVICES = ("cpu", "cuda")
_SAMPLES = 8  # along the rows and columns of every matrix


class _Seen(NamedTuple):
    """A weight as it was when it was packed. The alias keeps its memory from being given to another tensor."""

    alias: torch.Tensor
    version: int
    sample: torch.Tensor

    def still(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is that tensor with those values.

        A version counts all that torch does to a tensor's values; what is written past torch's eyes (through `.data` or NumPy)
        shows in a sample of every matrix, unless it was a few elements only.
        """
        alias = self.alias
        if weight.is_inference() or weight._version != self.version or weight.data_ptr() != alias.data_ptr():
            return False
        alike = weight.dtype == alias.dtype and weight.shape == alias.shape and weight.stride() == alias.stride()
        return alike and bool(torch.equal(_sample(weight), self.sample))


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Some elements of every matrix of `weight`, their bits compared as they are: NaN equals NaN."""
    strides = [max(extent // _SAMPLES, 1) for extent in weight.shape[-2:]]
    some = weight.detach()[..., :: strides[-1]] if weight.dim() == 1 else weight.detach()[..., :: strides[0], :: strides[1]]
    return some.contiguous().view(torch.uint8).clone()


class TrainedLayer:
    """A loaded module, and the layer with the weights that it was last called with.

    Args:
        module: what `moegen.load` returned.

    Raises:
        InputError: its configuration stores weights in few bits, which have no gradient.
    """

    def __init__(self, module: Module | DeviceModule) -> None:
        if module.config.low_bit:
            raise InputError(
                f"weight_dtype={module.config.weight_dtype!r} cannot be trained, its codes have no gradient: "
                "build the layer with weight_dtype='same'"
            )
        self.module = module
        self.config = module.config
        self.names = tuple(weight_shapes(module.config))
        self.device = torch.device("cuda", module.device) if isinstance(module, DeviceModule) else torch.device("cpu")
        self.dtype: torch.dtype = getattr(torch, module.config.dtype)
        self.packings = 0
        self.number = number_of(self)
        self._seen: dict[str, _Seen] = {}
        self._layer: Layer | DeviceLayer | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def with_weights(self, weights: list[torch.Tensor]) -> Iterator[Layer | DeviceLayer]:
        """The layer with these weights, packed again as far as they changed since the last call; they stay so meanwhile."""
        with self._lock:
            given = dict(zip(self.names, weights, strict=True))
            changed = {name for name, w in given.items() if name not in self._seen or not self._seen[name].still(w)}
            if changed or self._layer is None:
                self._pack(given, changed)
            assert self._layer is not None
            yield self._layer

    def forget(self) -> None:
        """Packs everything again at the next call."""
        with self._lock:
            self._seen.clear()

    def _pack(self, given: dict[str, torch.Tensor], changed: set[str]) -> None:
        for name in changed:
            self._seen.pop(name, None)  # an error on the way must not leave a half-packed layer that looks whole
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # calls under way still read what is packed over
        source = resolve(self.config, in_host_memory({name: w.detach() for name, w in given.items()}))
        packer = self.module.packer(self.module.threads, None if self._layer is None else self._layer.packed)
        if any(name.startswith(("router.", "shared_gate.")) for name in changed):
            packer.router(source)
        if any(name.startswith("experts.") for name in changed):
            packer.experts(source, range(self.config.experts))
        if any(name.startswith("shared.") for name in changed):
            packer.shared(source)
        if self._layer is None:
            self._layer = self.module.layer(packer.blob)
        for name in changed:
            weight = given[name]
            version = -1 if weight.is_inference() else weight._version
            self._seen[name] = _Seen(weight.detach(), version, _sample(weight))
        self.packings += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedLayer:
        return TrainedLayer(self.module)

    def __reduce__(self) -> tuple[Any, ...]:
        device = self.module.device if isinstance(self.module, DeviceModule) else 0
        return _unpickled, (str(self.module.artifact.path.resolve()), self.module.threads, device)


def _unpickled(path: str, threads: int, device: int) -> TrainedLayer:
    return TrainedLayer(open_module(path, threads=threads, device=device))


def _state(number: int) -> TrainedLayer:
    state = layer_of(number)
    if not isinstance(state, TrainedLayer):
        raise InputError(f"the number is that of {state!r}, whose weights are constants: its operator is moegen::forward")
    return state


# ---------------------------------------------------------------- operators


# No argument has a default: torch drops those from the call, and then misses their gradients where there are lists of tensors.
@torch.library.custom_op(
    "moegen::trained", mutates_args=(), device_types=_DEVICES,
    schema=(
        "(Tensor x, Tensor[] weights, SymInt layer, SymInt experts, SymInt top_k, Tensor? router_x)"
        " -> (Tensor y, Tensor ids, Tensor weights, Tensor load, Tensor stats)"
    ),
)  # fmt: skip
def trained(
    x: torch.Tensor, weights: list[torch.Tensor], layer: int, experts: int, top_k: int, router_x: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole layer with `weights`, and what its router decided."""
    with _state(layer).with_weights(weights) as bound:
        return ops.routed(bound, x, experts, top_k, router_x)


@trained.register_fake
def _fake_trained(
    x: torch.Tensor, weights: list[torch.Tensor], layer: int, experts: int, top_k: int, router_x: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    return x.new_empty(x.shape), *ops.routing_like(x, experts, top_k)


@torch.library.custom_op(
    "moegen::trained_backward", mutates_args=(), device_types=_DEVICES,
    schema=(
        "(Tensor grad_y, Tensor? grad_weights, Tensor x, Tensor[] weights, Tensor ids, Tensor? router_x, SymInt layer,"
        " bool[] wanted) -> Tensor[]"
    ),
)  # fmt: skip
def trained_backward(
    grad_y: torch.Tensor,
    grad_weights: torch.Tensor | None,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    ids: torch.Tensor,
    router_x: torch.Tensor | None,
    layer: int,
    wanted: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, of router_x where it is given, and of the wanted weights, in this order."""
    state = _state(layer)
    hidden = state.config.hidden
    names = [name for name, want in zip(state.names, wanted, strict=True) if want]
    given = {name: w.detach() for name, w in zip(state.names, weights, strict=True)}

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(-1, hidden).to(torch.float32)

    with torch.autocast(x.device.type, enabled=False):
        of_x, of_seen, of_weights = layer_gradients(
            state.config, given, rows(x), ids, rows(grad_y), grad_weights,
            None if router_x is None else rows(router_x), frozenset(names), state.dtype,
        )  # fmt: skip
    made = [of_x] if of_seen is None else [of_x, of_seen]
    return [grad.reshape(x.shape).to(x.dtype) for grad in made] + [of_weights[name] for name in names]


@trained_backward.register_fake
def _fake_trained_backward(
    grad_y: torch.Tensor,
    grad_weights: torch.Tensor | None,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    ids: torch.Tensor,
    router_x: torch.Tensor | None,
    layer: int,
    wanted: list[bool],
) -> list[torch.Tensor]:
    made = [x.new_empty(x.shape)] + ([] if router_x is None else [x.new_empty(x.shape)])
    return made + [w.new_empty(w.shape) for w, want in zip(weights, wanted, strict=True) if want]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weights, layer, _, _, router_x = inputs
    ctx.save_for_backward(x, output[1], router_x, *weights)
    ctx.layer, ctx.wanted = layer, [w.requires_grad for w in weights]
    ctx.mark_non_differentiable(output[1], output[3], output[4])


def _backward(ctx: Any, grad_y: torch.Tensor | None, _: Any, grad_weights: torch.Tensor | None, *__: Any) -> tuple[Any, ...]:
    x, ids, router_x, *weights = ctx.saved_tensors
    given = torch.zeros_like(x) if grad_y is None else grad_y
    made = list(torch.ops.moegen.trained_backward(given, grad_weights, x, weights, ids, router_x, ctx.layer, ctx.wanted))
    of_x, of_seen = made.pop(0), None if router_x is None else made.pop(0)
    return of_x, [made.pop(0) if want else None for want in ctx.wanted], None, None, None, of_seen


trained.register_autograd(_backward, setup_context=_save)


def _no_second_backward(*_: Any) -> None:
    raise InputError("a compiled layer's backward has no backward of its own: there are no second derivatives")


trained_backward.register_autograd(_no_second_backward)
