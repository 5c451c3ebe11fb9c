"""`MoELayer`: a compiled layer as a module of torch, for inference."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..config import MoEConfig
from ..device import DeviceLayer
from ..errors import InputError
from ..runtime import Layer
from . import ops
from .bound import BoundLayer, Routing
from .opening import Source, check_stays, config_of, in_host_memory, open_module


class MoELayer(torch.nn.Module):
    """A compiled layer with packed weights, on the device that it was compiled for.

    torch.compile(fullgraph=True) and torch.export pass through it, with any number of tokens. (Who compiles many layers one by
    one, not the model, sets `torch._dynamo.config.allow_unspec_int_on_nn_module`, or each is compiled anew.) It has no parameters
    and nothing in `state_dict`: weights are packed once, when it is made, and are constants, whatever becomes of the tensors that
    they came from. Copies share them; a pickle holds them and the artifact's path. `.to` of another device or type is an error,
    as is an input that requires a gradient in grad mode: `TrainableMoELayer` trains.

    An exported program has a number in the layer's place. Another process finds the layer by it when one with the same name and
    configuration was made there; with none, or without a name, the program's call is an error that says so.

    Args:
        source: an artifact's folder or the artifact, a `MoEConfig`, whose artifact is looked for in the store, or a module that
            `moegen.load` returned; or a layer that has weights already.
        weights: what `Module.bind` takes, or a torch module that has them; none if `source` has.
        prefix, layout, gate_up, checkpoint_format: as in `Module.bind`.
        name: what exported programs find the layer by, e.g. "model.layers.3.mlp"; one living layer of a configuration has it.
        store, target, device: as in `moegen.load`.
        threads: threads of a layer on CPUs; None for as many as torch uses when it is made.

    Raises:
        ArtifactError: there is no such artifact, it is damaged, or this machine cannot run it.
        WeightsError: a weight is missing, superfluous, or of the wrong shape or dtype.
        InputError: another layer has the name.
    """

    def __init__(
        self,
        source: Source | Layer | DeviceLayer | BoundLayer,
        weights: Mapping[str, Any] | torch.nn.Module | str | os.PathLike[str] | None = None,
        *,
        prefix: str = "",
        layout: str | None = None,
        gate_up: str | None = None,
        checkpoint_format: str | None = None,
        name: str | None = None,
        store: str | os.PathLike[str] | None = None,
        target: str | None = None,
        device: int = 0,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(source, Layer | DeviceLayer | BoundLayer):
            if weights is not None:
                raise InputError("a layer that is bound has its weights already: give it alone, or the module and weights")
            self.bound = BoundLayer(source.layer if isinstance(source, BoundLayer) else source, name)
            return
        module = open_module(source, store=store, threads=threads, device=device, target=target)
        if weights is None:
            raise InputError(f"{module!r} has no weights: give them, a mapping of names to arrays or a .safetensors file")
        layer = module.bind(
            in_host_memory(weights), prefix=prefix, layout=layout, gate_up=gate_up, checkpoint_format=checkpoint_format
        )
        self.bound = BoundLayer(layer, name)

    @classmethod
    def from_module(cls, block: torch.nn.Module, source: Source | None = None, **options: Any) -> MoELayer:
        """The compiled layer that computes what a transformers MoE block does, with its weights.

        Args:
            block: such as `model.model.layers[3].mlp`; see `moegen.weights` for the names that are understood.
            source: as above; None for the configuration that the block keeps, in the dtype of its parameters.
            **options: the other arguments above.

        Raises:
            InputError: the block keeps no configuration.
            ConfigError: moegen cannot honour it.
            ArtifactError: the store has no layer for it.
        """
        return cls(config_of(block) if source is None else source, block, **options)

    @property
    def layer(self) -> Layer | DeviceLayer:
        """The layer without torch."""
        return self.bound.layer

    @property
    def config(self) -> MoEConfig:
        """What it computes."""
        return self.bound.layer.config

    def forward(self, x: torch.Tensor, *, return_routing: bool = False, jitter: torch.Tensor | None = None) -> Any:
        """The layer's output, of x's shape and the layer's dtype.

        Args:
            x: [T, H] or [batch, sequence, H] on the layer's device, of the layer's dtype. A float32 layer widens float16 and
                bfloat16; under torch.autocast any float type is converted.
            return_routing: return (output, `moegen.torch.Routing`).
            jitter: factors of x's shape that multiply the router's input only.

        Raises:
            InputError: the wrong shape, dtype or device, or x requires a gradient.
        """
        if (
            getattr(x, "requires_grad", False) and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ):  # which meets the operator's own
            raise InputError(ops.NO_BACKWARD)
        return self.bound.forward_routed(x, jitter) if return_routing else self.bound.forward(x, jitter)

    def route(self, x: torch.Tensor, *, jitter: torch.Tensor | None = None) -> Routing:
        """The router alone."""
        return self.bound.route(x, jitter)

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The routed experts alone, with anybody's routing, as `BoundLayer.experts`."""
        return self.bound.experts(x, ids, weights)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MoELayer:
        check_stays(fn, self.bound.device, self.bound.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.config}, {self.bound.device}" + (f", name={self.bound.name!r}" if self.bound.name else "")
