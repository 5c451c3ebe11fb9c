"""What to pack and for which artifact, where the user says a layer's number and a model."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping

from ..artifact import Artifact, default_store, list_artifacts
from ..config import MoEConfig
from ..errors import ArtifactError, WeightsError

CONFIG_NAME = "config.json"
# How weights and activations are stored is the user's choice; everything else is the model's.
STORAGE_FIELDS = (
    "dtype", "weight_dtype", "weight_group", "weight_zero_point", "scale_dtype", "activation_dtype", "capacity_factor",
    "balance_coefficient",
)  # fmt: skip


def layers_of(names: Iterable[str]) -> dict[int, list[str]]:
    """Number of each layer that has experts -> the prefixes that they are under, e.g. `model.layers.3.mlp.`."""
    found: dict[int, dict[str, None]] = {}
    for name in names:
        parts = name.split(".")
        if "experts" not in parts:
            continue
        block = parts[: parts.index("experts")]
        numbers = [int(part) for part in block if part.isdecimal() and part.isascii()]
        if numbers:
            found.setdefault(numbers[-1], {})[".".join([*block, ""])] = None
    return {layer: list(found[layer]) for layer in sorted(found)}


def prefix_of(names: Iterable[str], layer: int) -> str:
    """What the names of a layer's weights begin with.

    Raises:
        WeightsError: the layer has no experts, or several blocks of them.
    """
    layers = layers_of(names)
    if layer not in layers:
        have = f"layers with experts: {_ranges(layers)}" if layers else "no layer of this checkpoint has a number and experts"
        raise WeightsError(f"layer {layer} has no experts; {have}")
    if len(layers[layer]) > 1:
        raise WeightsError(f"layer {layer} is at prefix={', '.join(map(repr, layers[layer]))}: say which with --prefix")
    return layers[layer][0]


def _ranges(numbers: Iterable[int]) -> str:
    """0-3, 5, 7-9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def config_beside(checkpoint: str | os.PathLike[str]) -> pathlib.Path:
    """The model's configuration, beside its weights.

    Raises:
        WeightsError: there are no weights.
        ArtifactError: it is not there.
    """
    path = pathlib.Path(checkpoint)
    if not path.exists():
        raise WeightsError(f"there is no checkpoint {str(path)!r}")
    found = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if not found.is_file():
        raise ArtifactError(f"there is no {str(found)!r} to find the artifact by: name it with --artifact, or give --model")
    return found


def artifact_of(
    model: str | os.PathLike[str] | Mapping[str, object], store: str | os.PathLike[str] | None = None, target: str | None = None
) -> Artifact:
    """The artifact in the store that was built for a model's layer; storage types are the builder's choice where only one is there.

    Raises:
        ArtifactError: there is none, or several differ in their storage types.
        ConfigError: the model's configuration cannot be read, or asks for what moegen cannot honour.
    """
    config = MoEConfig.from_hf(model)
    folder = pathlib.Path(store) if store is not None else default_store()
    alike = [a for a in list_artifacts(folder) if isinstance(a, Artifact) and _same_layer(a.config, config)]
    alike = [a for a in alike if target in (None, a.target.kind)]
    alike = [a for a in alike if a.target.kind == "llvm"] or alike
    exact = [a for a in alike if a.config == config] or alike
    if not exact:
        raise ArtifactError(
            f"no artifact in {str(folder)!r} is for {config}: `moegen build --model CONFIG` makes one, or name it with --artifact"
        )
    if len({a.config for a in exact}) > 1:
        names = ", ".join(a.name for a in exact)
        raise ArtifactError(f"several artifacts in {str(folder)!r} are for this model: name one with --artifact: {names}")
    return max(exact, key=lambda a: (len(a.target.features), str(a.manifest.get("created", ""))))


def _same_layer(one: MoEConfig, other: MoEConfig) -> bool:
    a, b = one.to_dict(), other.to_dict()
    return all(a[name] == b[name] for name in a if name not in STORAGE_FIELDS)
