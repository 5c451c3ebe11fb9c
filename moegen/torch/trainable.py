"""`TrainableMoELayer`: parameters, forward by a compiled layer, backward by torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..config import MoEConfig, weight_shapes
from ..errors import InputError
from ..weights import resolve
from . import gradients
from .bound import Routing, entering, jittered, refuse_tangents
from .layer import MoELayer
from .opening import Source, check_stays, config_of, in_host_memory, open_module
from .trained import TrainedLayer


class TrainableMoELayer(torch.nn.Module):
    """A layer that learns: its forward is the compiled layer's, its backward torch's, recomputed from the input and the routing.

    Parameters have the canonical names (`router.weight`, `experts.up.weight` [E, I, H] ..., see `moegen.weights`), so that its
    `state_dict` is what `Module.bind` and `MoELayer` take; the correction bias, which decides the selection only and has no
    gradient, is a buffer. They may be of any float type: the forward rounds them to the layer's, and gradients go straight
    through. Gradients reach x, the router (through the weights of the chosen experts and through the losses), the experts and
    the shared expert. There are no second derivatives, and no forward mode.

    Weights are packed again when a call finds them changed, by an optimizer or by anything else that torch counts
    (`Tensor._version`), or replaced. Writing past that (through `.data` or NumPy) is noticed unless it was a few elements only:
    call `refresh()` then.

    Args:
        source, store, target, device, threads: as in `MoELayer`; the configuration cannot be one in few bits.
        weights: what `Module.bind` takes, or a torch module that has them; None for random ones, by torch's generator.
        prefix, layout, gate_up: as in `Module.bind`.
        dtype: of the parameters; None for the layer's.

    Raises:
        ArtifactError: there is no such artifact, it is damaged, or this machine cannot run it.
        WeightsError: a weight is missing, superfluous, or of the wrong shape or dtype.
        InputError: the configuration has weights in few bits, or `dtype` is no float type.
    """

    def __init__(
        self,
        source: Source,
        weights: Mapping[str, Any] | torch.nn.Module | str | os.PathLike[str] | None = None,
        *,
        prefix: str = "",
        layout: str | None = None,
        gate_up: str | None = None,
        dtype: torch.dtype | None = None,
        store: str | os.PathLike[str] | None = None,
        target: str | None = None,
        device: int = 0,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.trained = TrainedLayer(open_module(source, store=store, threads=threads, device=device, target=target))
        chosen = self.trained.dtype if dtype is None else dtype
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise InputError(f"dtype={dtype} must be a float type of torch")
        if weights is None:
            values = {name: _random(name, shape) for name, shape in weight_shapes(self.config).items()}
        else:
            found = resolve(self.config, in_host_memory(weights), prefix, layout, gate_up).to_float32()
            values = {name: torch.from_numpy(array).clone() for name, array in found.items()}
        for name, value in values.items():
            self._place(name, value.to(device=self.trained.device), chosen)

    @classmethod
    def from_module(cls, block: torch.nn.Module, source: Source | None = None, **options: Any) -> TrainableMoELayer:
        """A layer that computes what a transformers MoE block does, with a copy of its weights; as `MoELayer.from_module`."""
        return cls(config_of(block) if source is None else source, block, **options)

    @property
    def config(self) -> MoEConfig:
        """What it computes."""
        return self.trained.config

    def forward(self, x: torch.Tensor, *, return_routing: bool = False, jitter: torch.Tensor | None = None) -> Any:
        """The layer's output, of x's shape and the layer's dtype.

        Args:
            x: [T, H] or [batch, sequence, H] as in `MoELayer.forward`; it may require a gradient.
            return_routing: return (output, `moegen.torch.Routing`), whose weights and losses have gradients.
            jitter: factors of x's shape that multiply the router's input only.

        Raises:
            InputError: the wrong shape, dtype or device.
        """
        state, config = self.trained, self.config
        x = entering(x, state.dtype)
        router_x = None if jitter is None else jittered(x, jitter)
        weights = [self._named(name) for name in state.names]
        refuse_tangents(*weights)
        y, ids, factors, load, stats = torch.ops.moegen.trained(x, weights, state.number, config.experts, config.top_k, router_x)
        if not return_routing:
            return y
        seen = (x if router_x is None else router_x).reshape(-1, config.hidden).to(torch.float32)
        router = {name: self._named(name).to(state.dtype).to(torch.float32) for name in state.names if name.startswith("router.")}
        with torch.autocast(x.device.type, enabled=False):
            balance, adaptive, z = gradients.losses(config, gradients.logits(router, seen), load)
        return y, Routing(ids, factors, load, stats[0].to(torch.int64), balance, adaptive, z)

    def refresh(self) -> None:
        """Packs the weights again at the next call, whether or not they seem changed."""
        self.trained.forget()

    def frozen(self, name: str | None = None) -> MoELayer:
        """A `MoELayer` with the weights of this moment."""
        return MoELayer(self.trained.module, self.state_dict(), name=name)

    def _named(self, name: str) -> torch.Tensor:
        owner, _, last = name.rpartition(".")
        return getattr(self.get_submodule(owner), last)

    def _place(self, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
        *path, last = name.split(".")
        owner: torch.nn.Module = self
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        if last == "correction_bias":  # which stays float32
            owner.register_buffer(last, value.to(torch.float32))
        else:
            owner.register_parameter(last, torch.nn.Parameter(value.to(dtype)))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TrainableMoELayer:
        check_stays(fn, self.trained.device, None)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.config}, {self.trained.device}"


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal with standard deviation 1/sqrt(fan-in) for a matrix, zeros for a bias."""
    return torch.randn(shape) / shape[-1] ** 0.5 if name.endswith(".weight") else torch.zeros(shape)
