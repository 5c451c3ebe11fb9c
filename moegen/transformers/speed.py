"""Prefill and decoding of a model with moegen's experts beside the library's own, in one process and one run.

    python -m moegen.transformers.speed --layers 4 --prompt 512 --json speed.json
    python -m moegen.transformers.speed --model config.json

The model has random weights, so that routing is near to uniform. Implementations take turns, in rotating order: in a turn the
prompt is read (prefill), and tokens are generated greedily one by one with the cache (decoding). Their logits are compared first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from ..display import as_json_text, number, table
from ..errors import ConfigError, MeasureError, MoegenError
from ..machine import this_machine
from .implementation import NAME, pack

OTHERS = ("eager", "grouped_mm", "batched_mm")
DEFAULT_AGAINST = ("eager", "grouped_mm")
OLMOE = {  # of allenai/OLMoE-1B-7B-0924's config.json
    "model_type": "olmoe",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 16,
    "vocab_size": 50304,
}
_WORST_RELATIVE_L2 = {"float32": 1e-4, "bfloat16": 0.1, "float16": 2e-2}  # of logits, after all layers


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        model: path of a config.json or its folder; None for layers of OLMoE's sizes.
        layers: layers to keep of it; the vocabulary is cut in proportion, so that its share of the time stays.
        dtype: type of weights and activations.
        prompts: lengths of the prompt, each measured on its own.
        batch: sequences at a time.
        new_tokens: tokens generated in a turn.
        rounds: turns of each implementation.
        against: implementations of `OTHERS`.
        threads: threads of torch and of moegen; None for torch's own choice.
    """

    model: str | None = None
    layers: int = 4
    dtype: str = "bfloat16"
    prompts: tuple[int, ...] = (32, 512)
    batch: int = 1
    new_tokens: int = 16
    rounds: int = 7
    against: tuple[str, ...] = DEFAULT_AGAINST
    threads: int | None = None


def measure(request: Request, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures, and says what it is doing.

    Returns:
        A JSON document: machine, versions, request, model, packed_bytes, pack_seconds, and for each prompt its `cells`: phase
        ("prefill" or "decode"), prompt and, by implementation, median seconds of a call, its median of each round, ratio to
        moegen of the same round (median, least, most) and relative_l2 of the logits against the first of `against`.

    Raises:
        ConfigError: the model's configuration cannot be read, or its model is too small for the request.
        MeasureError: an implementation is unknown, or its logits are others'.
        MoegenError: moegen cannot run the experts.
    """
    if unknown := [name for name in request.against if name not in OTHERS]:
        raise MeasureError(f"against={unknown[0]!r} must be one of {', '.join(OTHERS)}")
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    config = _config(request)
    say(f"making {config.num_hidden_layers} layers of {config.model_type} in {request.dtype}, with random weights")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, request.dtype)).eval()
    say("finding or building artifacts, packing")
    start = time.perf_counter()
    packed_bytes = pack(model)
    pack_seconds = time.perf_counter() - start
    cells = []
    for prompt in request.prompts:
        cells += _cells(model, request, prompt, say)
    machine = this_machine()
    return {
        "schema_version": 1,
        "kind": "moegen-transformers-speed",
        "machine": {"cpu": machine.cpu, "processors": machine.processors, "threads": torch.get_num_threads()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "request": dataclasses.asdict(request),
        "model": config.to_dict(),
        "packed_bytes": packed_bytes,
        "pack_seconds": pack_seconds,
        "cells": cells,
    }


def _config(request: Request) -> Any:
    if request.model is None:
        fields = dict(OLMOE)
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(request.model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the configuration {request.model!r}: {str(error).splitlines()[0]}") from error
    config = copy.deepcopy(config.get_text_config())
    all_layers, layers = config.num_hidden_layers, min(request.layers, config.num_hidden_layers)
    config.num_hidden_layers = layers
    config.vocab_size = max(round(config.vocab_size * layers / all_layers), 256)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None  # those of the whole vocabulary may be beyond it
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0
    return config


def _cells(model: Any, request: Request, prompt: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(0, model.config.vocab_size, (request.batch, prompt), generator=generator)
    names = [NAME, *request.against]
    say(f"prompt of {prompt}: comparing logits")
    errors = _errors(model, names, ids, request.dtype)
    times: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in names} for phase in ("prefill", "decode")}
    for turn in range(request.rounds):
        say(f"prompt of {prompt}: round {turn + 1} of {request.rounds}")
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            model.set_experts_implementation(name)
            prefill, decode = _turn(model, ids, request.new_tokens)
            times["prefill"][name].append(prefill)
            times["decode"][name].append(decode)
    return [
        {
            "phase": phase,
            "prompt": prompt,
            "tokens": request.batch * (prompt if phase == "prefill" else 1),
            "implementations": {name: _standing(by_name[name], by_name[NAME], errors[name]) for name in names},
        }
        for phase, by_name in times.items()
    ]


def _errors(model: Any, names: Sequence[str], ids: torch.Tensor, dtype: str) -> dict[str, float]:
    """Relative L2 difference of each implementation's logits to those of the first of the others."""
    logits = {}
    for name in names:
        model.set_experts_implementation(name)
        with torch.inference_mode():
            logits[name] = model(ids, use_cache=False).logits.double()
    reference = logits[names[1]] if len(names) > 1 else logits[NAME]
    errors = {name: float((values - reference).norm() / reference.norm()) for name, values in logits.items()}
    if wrong := [name for name, error in errors.items() if not error <= _WORST_RELATIVE_L2[dtype]]:
        raise MeasureError(f"the logits of {wrong[0]!r} are off by {errors[wrong[0]]:.1e} (relative L2): nothing was measured")
    return errors


def _turn(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and the median of those of the tokens after it."""
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        prefill = time.perf_counter() - start
        steps = []
        for _ in range(new_tokens):
            start = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            steps.append(time.perf_counter() - start)
    return prefill, statistics.median(steps)


def _standing(rounds: list[float], ours: list[float], error: float) -> dict[str, Any]:
    ratios = [theirs / mine for theirs, mine in zip(rounds, ours, strict=True)]
    return {
        "seconds": statistics.median(rounds),
        "rounds": rounds,
        "ratio_to_moegen": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "relative_l2": error,
    }


def lines(document: dict[str, Any]) -> str:
    """The document as a table."""
    header = ("phase", "prompt", "implementation", "ms", "tokens/s", "x moegen", "least to most", "rel. L2")
    rows = []
    for cell in document["cells"]:
        for name, entry in cell["implementations"].items():
            spread = f"{entry['ratio_least']:.2f} to {entry['ratio_most']:.2f}"
            seconds, ratio = entry["seconds"], entry["ratio_to_moegen"]
            times = (number(seconds, 1e3), number(cell["tokens"] / seconds), f"{ratio:.2f}", spread, f"{entry['relative_l2']:.1e}")
            rows.append((cell["phase"], cell["prompt"], name, *times))
    return table(header, rows, right=range(3, 8))


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 with one sentence where nothing could be measured."""
    asked = vars(_parser().parse_args(arguments))
    json_file: pathlib.Path | None = asked.pop("json")
    asked |= {name: tuple(asked[name]) for name in ("prompts", "against")}
    request = Request(**asked)
    try:
        document = measure(request, lambda line: print(line, file=sys.stderr, flush=True))
    except MoegenError as error:
        print(f"moegen.transformers.speed: {error}", file=sys.stderr)
        return 1
    print(lines(document))
    if json_file is not None:
        json_file.write_text(as_json_text(document) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Request()
    parser = argparse.ArgumentParser(
        prog="python -m moegen.transformers.speed",
        description="Measures prefill and decoding of a model with moegen's experts beside the library's own implementations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="config.json or its folder; OLMoE's sizes without it")
    parser.add_argument("--layers", type=int, default=default.layers, help="layers to keep of it")
    parser.add_argument("--dtype", choices=tuple(_WORST_RELATIVE_L2), default=default.dtype)
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=list(default.prompts), metavar="TOKENS", help="lengths of the prompt"
    )
    parser.add_argument("--batch", type=int, default=default.batch, help="sequences at a time")
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens, help="tokens generated in a turn")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="turns of each implementation")
    parser.add_argument("--against", nargs="+", choices=OTHERS, default=list(default.against), help="whom to compare with")
    parser.add_argument("--threads", type=int, help="threads of torch and of moegen")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the document there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
