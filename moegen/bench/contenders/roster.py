"""Who competes: moegen and what people would use instead, by family.

A family is one library with one copy of the weights, in a worker process of its own. Its module has a function
`open_family(settings)` that returns a `moegen.bench.contenders.family.Family`; no other process imports the library.
"""

from __future__ import annotations

import dataclasses
import importlib.util

from ...config import MoEConfig
from ...errors import ConfigError

OURS = "moegen"
DENSE = "moegen-dense"  # every token through every expert, by the same compiled experts


@dataclasses.dataclass(frozen=True)
class FamilyInfo:
    """What is known of a family without importing it.

    Args:
        module: dotted name of the module with `open_family`.
        contenders: their names, each with a line of description.
        needs: packages that have to be installed.
        copies: copies of the weights that its process holds, by the layer's dtype; 1 where it is not named, 0 where the
            family cannot run such layers.
    """

    module: str
    contenders: dict[str, str]
    needs: tuple[str, ...] = ()
    copies: dict[str, float] = dataclasses.field(default_factory=dict)

    def missing(self) -> str:
        """Why the family cannot run here at all, or nothing."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed: pip install 'moegen[bench]'" if absent else ""

    def copies_of(self, config: MoEConfig) -> float:
        """Copies of the layer's weights that the family's process holds."""
        return self.copies.get(config.dtype, 1.0)


FAMILIES: dict[str, FamilyInfo] = {
    OURS: FamilyInfo("moegen.bench.contenders.moegen_layer", {OURS: "the compiled layer"}),
    "numpy": FamilyInfo(
        "moegen.bench.contenders.numpy_layer",
        {
            "numpy-naive": "a token at a time, an expert at a time",
            "numpy-grouped": "tokens sorted by expert, one product per expert and projection",
        },
        copies={"bfloat16": 2.0, "float16": 2.0},  # widened to float32
    ),
    "torch": FamilyInfo(
        "moegen.bench.contenders.torch_layer",
        {
            "torch-loop": "a loop over the experts, each on the tokens that chose it",
            "torch-grouped": "tokens sorted by expert, torch.nn.functional.grouped_mm",
            "torch-compiled": "tokens sorted by expert, the expert's network through torch.compile",
        },
        needs=("torch",),
    ),
    "onednn": FamilyInfo(
        "moegen.bench.contenders.onednn_layer",
        {"torch-onednn": "tokens sorted by expert, torch's oneDNN products with weights packed in advance"},
        needs=("torch",),
    ),
    "onnxruntime": FamilyInfo(
        "moegen.bench.contenders.onnx_layer",
        {"onnxruntime": "the com.microsoft MoE operator, the router before it"},
        needs=("onnxruntime", "onnx"),
        copies={"bfloat16": 0.0, "float16": 0.0},
    ),
}


def chosen_families(against: str) -> dict[str, list[str]]:
    """Family -> contenders, always with moegen.

    Args:
        against: `all`, `none`, or names of families or contenders with commas between.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    if against in ("all", "none"):
        return {name: list(info.contenders) for name, info in FAMILIES.items() if against == "all" or name == OURS}
    wanted = {part.strip() for part in against.split(",") if part.strip()} | {OURS}
    chosen = {family: [name for name in info.contenders if family in wanted or name in wanted] for family, info in FAMILIES.items()}
    known = [*FAMILIES, *(name for info in FAMILIES.values() for name in info.contenders)]
    unknown = sorted(wanted - set(known))
    if unknown:
        raise ConfigError(f"unknown contender {unknown[0]!r}: known are all, none, {', '.join(dict.fromkeys(known))}")
    return {family: names for family, names in chosen.items() if names}


def weight_copies(families: dict[str, list[str]], config: MoEConfig) -> float:
    """Copies of the weights in memory at once: the file that all read, and those of the installed families."""
    return 1.0 + sum(FAMILIES[name].copies_of(config) for name in families if not FAMILIES[name].missing())
