"""`python -m moegen.field.worker`: the process that measures, a cell at a time, so that what hangs or dies there ends nothing else.

A line of JSON comes in for each cell: {"cell", "artifacts": paths, "without": {contender: reason}}. Lines of JSON go out: {"at",
"what"} before every step that may take long, then {"result"} with the cell's measurements, or {"refused"} with the reason.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import torch

from ..artifact import Artifact, open_artifact
from ..errors import MoegenError
from . import measure, torch_experts
from .ceilings import Ceilings
from .cells import Cell
from .material import Weights, draw_weights
from .own_experts import OURS, Own
from .surroundings import state

SEED = 20251122
_ROOM = 0.55  # of the device's memory, for what contenders keep between their products


class Bench:
    """A device with the layers that were measured lately.

    Args:
        device: its number.
        say: takes what goes out.
    """

    def __init__(self, device: int, say: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.name, self.say = device, f"cuda:{device}", say
        torch.cuda.set_device(device)
        self.report("", "measuring the ceilings")
        self.ceilings = Ceilings(self.name)
        self.layers: dict[str, tuple[Weights, list[measure.Contender], dict[str, str]]] = {}

    def report(self, contender: str, what: str) -> None:
        """Before each step."""
        self.say({"at": contender, "what": what})

    def cell(self, cell: Cell, artifacts: list[Artifact], without: Mapping[str, str]) -> dict[str, Any]:
        """Measures a cell, with the ceilings and clocks around it."""
        weights, contenders, absent = self._layer(cell.layer, artifacts, without)
        taken = [one for one in contenders if one.name not in without]
        before = state(self.device)
        ceilings = [self.ceilings.sample()]
        seed = SEED + zlib.crc32(str(cell).encode()) % 100_000
        result = measure.measure(cell, weights, taken, {**absent, **without}, self.name, seed, self.report)
        ceilings.append(self.ceilings.sample())
        torch.cuda.empty_cache()
        return result | {"ceilings": ceilings, "clocks": [before, state(self.device)]}

    def _layer(
        self, name: str, artifacts: list[Artifact], without: Mapping[str, str]
    ) -> tuple[Weights, list[measure.Contender], dict[str, str]]:
        if name in self.layers:
            return self.layers[name]
        self.report("", f"drawing the weights of {name}")
        manifest = artifacts[0].manifest
        free, total = torch.cuda.mem_get_info(self.device)
        if free - int(manifest["packed_bytes"]) < _ROOM * total:
            self.layers.clear()
            torch.cuda.empty_cache()
        weights = draw_weights(artifacts[0].config, manifest, self.name, SEED)
        contenders: list[measure.Contender] = []
        absent: dict[str, str] = {}
        for contender, make in _makers(weights, artifacts, self.device):
            if contender in without:
                continue
            self.report(contender, "loading")
            try:
                contenders.append(make())
            except Exception as error:  # of whatever kind: it is named as absent, with the reason
                absent[contender] = f"{type(error).__name__}: {error}"
        self.layers[name] = weights, contenders, absent
        return self.layers[name]


def _makers(weights: Weights, artifacts: list[Artifact], device: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Contenders by name, the first artifact being `moegen`, others of the same layer `moegen@` and the end of their names."""
    for index, artifact in enumerate(artifacts):
        name = OURS if index == 0 else f"{OURS}@{artifact.name[-10:]}"
        if artifact.manifest["segments"] == artifacts[0].manifest["segments"]:
            yield name, functools.partial(Own, weights, artifact, name, device)
    yield torch_experts.Grouped.name, functools.partial(torch_experts.Grouped, weights)
    yield torch_experts.Loop.name, functools.partial(torch_experts.Loop, weights)
    yield "triton-fused", functools.partial(_late, "fused_experts", "Fused", weights)
    for way in ("grouped_mm", "eager"):
        yield f"transformers-{way.removesuffix('_mm')}", functools.partial(_late, "hf_experts", "Transformers", weights, way)


def _late(module: str, name: str, *given: Any) -> Any:
    """A contender whose library takes seconds to import, or is not there."""
    return getattr(importlib.import_module(f".{module}", __package__), name)(*given)


def main(given: TextIO, out: TextIO, device: int) -> None:
    """Answers until no more lines come."""

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    bench = Bench(device, say)
    for line in given:
        asked = json.loads(line)
        try:
            artifacts = [open_artifact(path) for path in asked["artifacts"]]
            say({"result": bench.cell(Cell(**asked["cell"]), artifacts, asked["without"])})
        except MoegenError as error:
            say({"refused": str(error)})


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    main(sys.stdin, answers, int(sys.argv[1]))
