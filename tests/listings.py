"""Reading assembly: functions, their loops, and what the loops of a product do; x86-64 (AT&T) and AArch64, as LLVM prints them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

LABEL = re.compile(r"^([.\w$]+):")
X86_KEEPS = re.compile(r"cmp|test|bt[lqw]?$|prefetch|call|jmp|i?mul[lq]$|i?div[lq]$")  # does not write its last operand


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its name, its operands as written."""

    name: str
    operands: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> Instruction:
        name, _, rest = re.split(r"\s#\s|//", line)[0].strip().partition("\t")
        return cls(name.strip(), tuple(part.strip() for part in re.split(r",(?![^(\[{]*[)\]}])", rest)) if rest else ())

    @property
    def text(self) -> str:
        return f"{self.name} {', '.join(self.operands)}"

    @property
    def is_arm(self) -> bool:
        return any(re.fullmatch(r"[vqsdxwbh]\d+(\.\w+)?(\[\d+\])?|\[.*\]!?|\{.*\}|[xw]zr", o) for o in self.operands)

    @property
    def target(self) -> str | None:
        """The label that it may jump to."""
        jump = self.name[0] == "j" or re.match(r"b(\.|$)|cbn?z|tbn?z", self.name)
        label = re.fullmatch(r"\.L\w+", self.operands[-1]) if jump and self.operands else None
        return label[0] if label else None

    @property
    def falls_through(self) -> bool:
        return self.name not in ("jmp", "jmpq", "b", "br", "ret", "retq", "ud2")

    @property
    def memory(self) -> str | None:
        """Its memory operand."""
        if self.name.startswith(("lea", "nop")):
            return None
        return next((o for o in self.operands if re.search(r"\((%|,)|\[(x|sp)|\(%rip\)", o)), None)

    @property
    def on_stack(self) -> bool:
        return bool(self.memory and re.search(r"\(%rsp|\[sp", self.memory))

    @property
    def stores(self) -> bool:
        if self.is_arm:
            return self.name.startswith("st") and self.memory is not None
        return self.memory is not None and self.memory == self.operands[-1] and not X86_KEEPS.match(self.name)

    @property
    def is_vector(self) -> bool:
        return any(re.search(r"%[xyz]mm\d|\b[qv]\d", operand) for operand in self.operands)

    @property
    def spills(self) -> bool:
        """It moves a vector register to or from the stack."""
        return self.on_stack and self.is_vector

    @property
    def multiply_adds(self) -> int:
        """Vectors of products that it adds to sums; of SSE, which adds them by an instruction of its own, the products."""
        return int(bool(re.fullmatch(r"vfmadd\d+ps|vdpbf16ps|mulps|fmla", self.name)))

    @property
    def weights_loaded(self) -> int:
        """Whole vectors that it reads from memory; elements that are broadcast are the rows'."""
        if self.memory is None or self.stores or self.on_stack or self.name.startswith(("prefetch", "prfm")):
            return 0
        if self.is_arm:
            return sum(bool(re.fullmatch(r"[qd]\d+", operand)) for operand in self.operands)
        element = r"v?p?broadcast|v?movs[sd]$|v?movd$|v?pinsr|v?insertps"
        broadcast = "{1to" in self.memory or re.match(element, self.name)
        return int(self.is_vector and not broadcast)

    @property
    def asks_ahead(self) -> bool:
        return self.name in ("prefetcht0", "prfm")


@dataclasses.dataclass(frozen=True)
class Block:
    """Instructions without a jump in or out, but at the ends; `after` are the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    after: tuple[int, ...]


def functions(text: str) -> dict[str, list[str]]:
    """Lines of each function of a listing."""
    found: dict[str, list[str]] = {}
    names = set(re.findall(r"\.type\s+([.\w$]+),[@%]function", text))
    lines: list[str] = []
    for line in text.splitlines():
        label = LABEL.match(line)
        if label and label[1] in names:
            lines = found.setdefault(label[1], [])
        elif re.match(r"\s*\.size\s", line):
            lines = []
        else:
            lines.append(line)
    return found


def kernel(text: str, stage: str) -> list[str]:
    """What does a stage's work: the body of its parallel loop where it has one, which `<stage>_compute_` hands to the threads."""
    found = functions(text)
    work = found.get(f"{stage}_compute_") or found[f"__tvm_ffi_{stage}"]
    bodies = set(re.findall(r"\.L__tvm_parallel_lambda[.\w]*", "\n".join(work)))
    return found[bodies.pop()] if bodies else work


def blocks(lines: Iterable[str]) -> list[Block]:
    """The control flow graph; the first block is the entry."""
    parts: list[list[Instruction]] = [[]]
    place: dict[str, int] = {}
    for line in lines:
        if label := LABEL.match(line):
            if parts[-1]:
                parts.append([])
            place[label[1]] = len(parts) - 1
        elif re.match(r"\s+[a-z]", line):
            parts[-1].append(Instruction.parse(line))
            if parts[-1][-1].target or not parts[-1][-1].falls_through:
                parts.append([])
    graph = []
    for i, part in enumerate(parts):
        last = part[-1] if part else None
        after = [place[last.target]] if last and last.target else []
        if (last is None or last.falls_through) and i + 1 < len(parts):
            after.append(i + 1)
        graph.append(Block(tuple(part), tuple(after)))
    return graph


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop: its blocks' instructions, those of loops inside it included."""

    members: frozenset[int]
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def multiply_adds(self) -> int:
        return sum(i.multiply_adds for i in self.instructions)

    @functools.cached_property
    def weights_loaded(self) -> int:
        return sum(i.weights_loaded for i in self.instructions)

    @functools.cached_property
    def asks_ahead(self) -> bool:
        return any(i.asks_ahead for i in self.instructions)


def loops(graph: list[Block]) -> list[Loop]:
    """All natural loops, smaller ones first: the targets of backward jumps with everything that leads back there."""
    everything = (1 << len(graph)) - 1
    before: list[list[int]] = [[] for _ in graph]
    for i, block in enumerate(graph):
        for j in block.after:
            before[j].append(i)
    over = [1] + [everything] * (len(graph) - 1)  # the blocks that dominate each one, as bits
    changed = True
    while changed:
        changed = False
        for i in range(1, len(graph)):
            mask = functools.reduce(int.__and__, (over[p] for p in before[i]), everything) | 1 << i
            changed, over[i] = changed or mask != over[i], mask
    found: dict[int, set[int]] = {}
    for i, block in enumerate(graph):
        for head in block.after:
            if over[i] >> head & 1 and over[i] != everything:
                members, waiting = found.setdefault(head, {head}), [i]
                while waiting:
                    if (at := waiting.pop()) not in members:
                        members.add(at)
                        waiting += before[at]
    return sorted(
        (Loop(frozenset(m), tuple(x for b in sorted(m) for x in graph[b].instructions)) for m in found.values()),
        key=lambda loop: len(loop.members),
    )


@dataclasses.dataclass(frozen=True)
class Product:
    """The loops along the dot product: over chunks, which asks memory ahead, and in it over steps (none if unrolled)."""

    chunks: Loop
    steps: tuple[Loop, ...]

    @property
    def innermost(self) -> Loop:
        return self.steps[0] if self.steps else self.chunks


def products(lines: Iterable[str]) -> list[Product]:
    """The products in a tile kernel: the innermost loops that both multiply and ask ahead, and the multiplying loops in them.

    There may be several: LLVM writes a loop twice to decide a condition before it.
    """
    multiplying = [loop for loop in loops(blocks(lines)) if loop.multiply_adds]
    asking = [loop for loop in multiplying if loop.asks_ahead]
    chunks = [loop for loop in asking if not any(other.members < loop.members for other in asking)]
    return [Product(loop, tuple(inner for inner in multiplying if inner.members < loop.members)) for loop in chunks]


def complaints(lines: Iterable[str], rows: int) -> list[str]:
    """What is wrong with the products of a kernel of `rows` rows and two vectors, as sentences."""
    found = products(lines)
    wrong = [] if found else ["no loop multiplies and asks memory ahead"]
    for product in found:
        wrong += _complaints(product.chunks, rows, "chunks")
        for loop in product.steps:
            wrong += _complaints(loop, rows, "steps")
    return wrong


def _complaints(loop: Loop, rows: int, over: str) -> list[str]:
    wrong, names = [], [i.name for i in loop.instructions]
    if spilled := [i for i in loop.instructions if i.spills]:
        wrong.append(f"the loop over {over} moves vectors to or from the stack {len(spilled)} times: {spilled[0].text}")
    if stored := [i for i in loop.instructions if i.stores]:
        wrong.append(f"the loop over {over} stores {len(stored)} times: {stored[0].text}")
    if loop.multiply_adds % (2 * rows) or loop.multiply_adds != rows * loop.weights_loaded:
        wrong.append(f"the loop over {over} has {loop.multiply_adds} multiply-adds for {loop.weights_loaded} vectors of weights")
    if names.count("mulps") != names.count("addps"):
        wrong.append(f"the loop over {over} has {names.count('mulps')} products and {names.count('addps')} sums")
    return wrong
