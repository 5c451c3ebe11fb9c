"""`moegen pack`, and what `moegen inspect` and `moegen verify` say of a packed file."""

from __future__ import annotations

import contextlib
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from ..artifact import Artifact
from ..display import as_json_text, brief, duration, size, table
from ..errors import WeightsError
from ..moepack import MoePack
from ..options import named_artifact
from ..orientation import GATE_UPS, LAYOUTS
from ..target import KINDS
from .finding import artifact_of, config_beside, layers_of

_NUMBER = "{layer}"


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=pathlib.Path))
@click.option("--layer", "layers", metavar="N[-M][,...]|all", help="Number of the layer, or several, or all that have experts.")
@click.option("--prefix", help="What the names of the layer's weights begin with, in place of --layer.")
@click.option(
    "--out", metavar="FILE", help=f"File to write; {_NUMBER} in it becomes the layer's number. [default: layer{_NUMBER}.moepack]"
)
@click.option("--artifact", metavar="PATH_OR_NAME", help="What to pack for. [default: found in the store by the configuration]")
@click.option("--model", type=click.Path(), help="The model's config.json. [default: the one beside the checkpoint]")
@click.option("--store", type=click.Path(), help="Store folder. [default: $MOEGEN_STORE, or moegen in the user's cache]")
@click.option("--target", type=click.Choice(KINDS), help="Look among artifacts for this kind of target only.")
@click.option("--layout", type=click.Choice(LAYOUTS), help="Which way round the experts' matrices are. [default: by the model]")
@click.option("--gate-up", type=click.Choice(GATE_UPS), help="How matrices hold gate and up in one. [default: by the model]")
@click.option("--checkpoint-format", help="gptq or gptq_v2. [default: as the config.json beside the checkpoint says]")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads that pack. [default: all processors]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pack(
    checkpoint: pathlib.Path,
    layers: str | None,
    prefix: str | None,
    out: str | None,
    artifact: str | None,
    model: str | None,
    store: str | None,
    target: str | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Pack a layer of a checkpoint into a file that layers map into memory.

    CHECKPOINT is a .safetensors file, the index of a sharded one, or a folder with either.

    \b
    Examples:
      moegen pack model.safetensors --layer 3 --out layer3.moepack
      moegen pack Mixtral-8x7B --layer all --out packed/layer{layer}.moepack --target cuda
      moegen pack experts.safetensors --prefix model.layers.3.mlp. --artifact moe-e8-k2-h512
    """
    from .packing import pack as pack_layer  # here, because it imports what runs layers

    if layers is not None and prefix is not None:
        raise click.UsageError("--layer and --prefix both say where the weights are: give one of them.")
    if artifact is not None and model is not None:
        raise click.UsageError("--artifact and --model both say what to pack for: give one of them.")
    numbers = [None] if layers is None else _numbers(layers, checkpoint)
    out = out or ("layer.moepack" if layers is None else f"layer{_NUMBER}.moepack")
    if len(numbers) > 1 and _NUMBER not in out:
        raise click.UsageError(f"--out {out} would hold {len(numbers)} layers: put {_NUMBER} into its name.")
    made = (
        named_artifact(artifact, store) if artifact is not None else artifact_of(model or config_beside(checkpoint), store, target)
    )
    for number in numbers:
        path, started = out.replace(_NUMBER, str(number)), time.monotonic()
        with _progress(path, int(made.manifest["packed_bytes"])) as progress:
            packed = pack_layer(checkpoint, path, made, layer=number, prefix=prefix, progress=progress, **reading)
        _print_packed(packed, made, time.monotonic() - started, as_json)


def _numbers(text: str, checkpoint: pathlib.Path) -> Sequence[int]:
    """`3`, `0-3`, `1,4-6` or `all`."""
    if text == "all":
        from ..safetensors import open_safetensors

        if not (found := list(layers_of(open_safetensors(checkpoint)))):
            raise WeightsError(f"no layer of {str(checkpoint)!r} has a number and experts: say where they are with --prefix")
        return found
    numbers: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise click.UsageError(f"--layer {text} is not a number, a range such as 0-3, a list of them, or all.")
        numbers |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1))
    return list(numbers)


@contextlib.contextmanager
def _progress(path: str, total: int) -> Iterator[Callable[[int], object]]:
    """What to call with bytes that were done; it draws a bar on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # it comes with [build]; packing needs the runtime alone
        yield lambda done: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, desc=path, file=sys.stderr, leave=False) as bar:
        yield bar.update


def _print_packed(packed: MoePack, made: Artifact, seconds: float, as_json: bool) -> None:
    if as_json:
        click.echo(as_json_text({"path": packed.path, "artifact": made.name, "seconds": round(seconds, 3), **_summary(packed)}))
        return
    origin = packed.header.source
    where = f" at {origin['prefix']}" if origin["prefix"] else ""
    click.echo(
        f"{packed.path}: {size(packed.header.packed_bytes)} of {origin['file']}{where}, for {made.name}, {duration(seconds)}"
    )


# ---------------------------------------------------------------- inspect and verify


def inspect_packed(path: str, as_json: bool) -> None:
    """Prints what a packed file holds; its payload is not read."""
    packed = MoePack(path)
    header = packed.header
    if as_json:
        segments = [{"name": s.name, "dtype": s.dtype, "shape": s.shape, "offset_bytes": s.offset_bytes} for s in header.segments]
        click.echo(as_json_text({"path": packed.path, **_summary(packed), "segments": segments}))
        return
    click.echo(f"{packed.path}\n  layer     {brief(header.config)}")
    click.echo(f"  packed    {size(header.packed_bytes)} at byte {packed.offset_bytes}, for target {header.target}")
    click.echo(f"  with      {header.artifact['name']} (moegen {header.versions.get('moegen', 'unknown')})")
    click.echo(f"  from      {header.source.get('file', 'unknown')}, prefix {header.source.get('prefix', '')!r}")
    click.echo(f"  layout    {header.layout}\n")
    rows = [(f"  {s.name}", s.dtype, "x".join(map(str, s.shape)), s.offset_bytes, s.size_bytes) for s in header.segments]
    click.echo(table(("  segment", "dtype", "shape", "offset", "bytes"), rows))


def verify_packed(path: str, as_json: bool) -> None:
    """Compares a packed file with its checksums, and prints that it is sound."""
    packed, started = MoePack(path), time.monotonic()
    with _progress(packed.path, packed.header.packed_bytes) as progress:
        packed.verify(progress)
    seconds = time.monotonic() - started
    if as_json:
        click.echo(as_json_text({"path": packed.path, "status": "sound", "seconds": round(seconds, 3), **_summary(packed)}))
    else:
        checksums = sum(len(s.sha256) for s in packed.header.segments)
        read = size(packed.header.packed_bytes)
        click.echo(f"{packed.path}: sound, {read} agree with {checksums} checksums, read in {duration(seconds)}")


def _summary(packed: MoePack) -> dict[str, Any]:
    header = packed.header
    return {
        "config": header.config.to_dict(),
        "target": header.target,
        "packed_with": dict(header.artifact),
        "source": dict(header.source),
        "layout": header.layout,
        "packed_bytes": header.packed_bytes,
        "payload_offset_bytes": packed.offset_bytes,
    }
