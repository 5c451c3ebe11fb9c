"""What a command line says: a layer by its fields, the layers that they ask for, or an artifact by its name."""

from __future__ import annotations

import dataclasses
import inspect as introspection
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click

from . import artifact as artifacts
from . import config as layers
from . import presets, storage
from .artifact import Artifact
from .config import MoEConfig
from .display import one_line
from .errors import ArtifactError, ConfigError
from .target import ARCHS, KINDS

LISTED = ("experts", "top_k", "hidden", "intermediate")
DEFAULT_HIDDEN = 512  # of a layer that is described by its experts alone


CHOICES = {
    "dtype": layers.DTYPES,
    "activation": layers.ACTIVATIONS,
    "gating": layers.GATINGS,
    "group_score": layers.GROUP_SCORES,
    "weight_dtype": storage.WEIGHT_DTYPES,
    "scale_dtype": storage.SCALE_DTYPES,
    "activation_dtype": storage.ACTIVATION_DTYPES,
}


class Combination(NamedTuple):
    """Fields of a layer, and the reason why they are illegal, if they are."""

    fields: dict[str, Any]
    config: MoEConfig | None
    reason: str


def combinations(fields: Mapping[str, Any]) -> list[Combination]:
    """Every combination of the fields that hold several values, each different layer once."""
    fields = {name: value[0] if isinstance(value, tuple) and len(value) == 1 else value for name, value in fields.items()}
    names = [name for name, value in fields.items() if isinstance(value, tuple)]
    found: dict[Any, Combination] = {}
    for values in itertools.product(*(fields[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        try:
            config = MoEConfig.from_dict({**fields, **chosen})
            found.setdefault(config, Combination(chosen, config, ""))
        except ConfigError as error:
            found.setdefault(values, Combination(chosen, None, str(error)))
    return list(found.values())


def integers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`8`, or `8,16` for several."""
    if value is None:
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a whole number or a list of them such as 8,16.") from None


def _field_help() -> dict[str, str]:
    """What the docstring of `MoEConfig` says about each field."""
    section = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", introspection.getdoc(MoEConfig) or "", re.DOTALL)
    entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: one_line(text.replace("`", "")) for names, text in entries for name in names.split(", ")}


def _field_option(field: dataclasses.Field[Any], text: str) -> Callable[[Any], Any]:
    name, kind = "--" + field.name.replace("_", "-"), str(field.type).partition(" ")[0]
    settings: dict[str, Any] = {"default": None, "help": _help(field, text)}
    if kind == "bool":
        name = f"{name}/--no-{name[2:]}"
    elif field.name in LISTED:
        settings |= {"callback": integers, "metavar": "N[,N...]"}
    elif field.name in CHOICES:
        settings["type"] = click.Choice(CHOICES[field.name])
    else:
        settings["type"] = {"int": int, "float": float}.get(kind, str)
    return click.option(name, field.name, **settings)


def _help(field: dataclasses.Field[Any], text: str) -> str:
    if field.name == "hidden":
        return f"{text} [default: {DEFAULT_HIDDEN}]"
    if field.default is dataclasses.MISSING or field.default is None or field.name == "intermediate":
        return text
    shown = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    return f"{text} [default: {shown.lower() if isinstance(field.default, bool) else shown}]"


def field_options(*left_out: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One option for each field of `MoEConfig` but those left out, and --model."""
    texts = _field_help()
    fields = [field for field in dataclasses.fields(MoEConfig) if field.name not in left_out]
    options = [_field_option(field, texts.get(field.name, "")) for field in fields]
    model = "Take the layer of this Hugging Face config.json; other options override it."
    return _decorated([*options, click.option("--model", type=click.Path(), help=model)])


_ARCH = (
    f"Architecture: for llvm, of the processor ({', '.join(ARCHS)}) [default: this machine's]; for cuda, of the devices, such as "
    "sm_80, sm_90 or sm_90a, several parted by commas [default: sm_90]."
)


def layer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each field of `MoEConfig`, --model and --preset, and those of the target."""
    preset = "Take the layer of this preset (`moegen bench --list` shows them); other options override it."
    more = [
        click.option("--preset", metavar="NAME", help=preset),
        click.option("--target", type=click.Choice(KINDS), default="llvm", show_default=True, help="What to compile for."),
        click.option("--mcpu", help="Processor as LLVM names it; `--mcpu help` lists them. [default: this machine's]"),
        click.option("--arch", help=_ARCH),
    ]
    return field_options()(_decorated(more)(command))


def _decorated(options: Sequence[Callable[[Any], Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds options in the order given."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


out_option = click.option("--out", type=click.Path(), help="Store folder. [default: $MOEGEN_STORE, or moegen in the user's cache]")


def take_given(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the layer's fields that were given out of a command's options."""
    fields = {field.name: options.pop(field.name, None) for field in dataclasses.fields(MoEConfig)}
    return {name: value for name, value in fields.items() if value is not None}


def wanted_layers(given: Mapping[str, Any], model: str | None = None, preset: str | None = None) -> list[Combination]:
    """The layers that a command line asks for: those of a model or a preset, with the given fields changed."""
    if model and preset:
        raise click.UsageError("--model and --preset are a layer each: give one of them.")
    base = MoEConfig.from_hf(model).to_dict() if model else presets.preset(preset).to_dict() if preset else {}
    base = base or {"hidden": DEFAULT_HIDDEN}
    missing = [name for name in ("experts", "top_k") if name not in {**base, **given}]
    if missing:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise click.UsageError(f"Missing {options} (or --model, or --preset).")
    return combinations({**base, **given})


def skipped_line(combination: Combination) -> str:
    return f"{' '.join(f'{name}={value}' for name, value in combination.fields.items())}: {one_line(combination.reason)}"


def named_artifact(which: str, out: str | None) -> Artifact:
    """The artifact in folder `which`, or the one in the store whose name is or begins like it.

    Raises:
        ArtifactError: there is none, or more than one.
    """
    if os.path.isdir(which):
        return artifacts.open_artifact(which)
    store = pathlib.Path(out) if out else artifacts.default_store()
    if which and os.path.basename(which) == which:
        if (store / which).is_dir():
            return artifacts.open_artifact(store / which)
        names = [path.name for path in sorted(store.glob("*")) if path.name.startswith(which)]
        if len(names) == 1:
            return artifacts.open_artifact(store / names[0])
        if names:
            raise ArtifactError(f"several artifacts in {str(store)!r} begin with {which!r}: {', '.join(names)}")
    raise ArtifactError(
        f"there is no artifact {which!r}, neither as a folder nor in {str(store)!r}; `moegen list` shows what there is"
    )
