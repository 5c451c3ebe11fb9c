"""Two of TVM's kernels as one launch, in the CUDA C++ that TVM made of them: what a schedule, of one function, cannot express.

Either the thread blocks of a token do one and then the other, or the two have thread blocks of their own in one grid.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from ..errors import BuildError, ScheduleError
from .kernels import Kernel, Parameter


@dataclasses.dataclass(frozen=True)
class _Definition:
    """A kernel in a source.

    Args:
        text: all of it.
        parameters: each as the source has it, by its name there.
        body: the statements.
    """

    text: str
    parameters: dict[str, str]
    body: str

    def renamed(self, names: Mapping[str, str]) -> _Definition:
        """With other names for some parameters."""
        by_name = {f"{old}_ptr": f"{new}_ptr" for old, new in names.items()}
        swap = re.compile(rf"\b({'|'.join(by_name)})\b") if by_name else re.compile(r"(?!)")

        def new(text: str) -> str:
            return swap.sub(lambda found: by_name[found[0]], text)

        return _Definition(self.text, {new(name): new(text) for name, text in self.parameters.items()}, new(self.body))


def with_blocks(source: str, kernel: Kernel, blocks: int) -> str:
    """The source with the registers of a multiprocessor shared out among so many thread blocks of `kernel`.

    Told nothing, the compiler saves registers for as many blocks as there could be: it begins few loads together, and even spills.
    """
    bounds = f"__launch_bounds__({kernel.threads}"
    return source.replace(f"{bounds}) {kernel.symbol}(", f"{bounds}, {blocks}) {kernel.symbol}(")


def in_turn(source: str, symbol: str, first: Kernel, second: Kernel, tiles: int, names: Mapping[str, str]) -> tuple[str, Kernel]:
    """`second` after `first`, where thread block t of `second` needs only what the blocks (t, *) of `first` made.

    A thread block is all of these in turn; what it wrote to global memory it sees after a barrier.

    Args:
        symbol: name of the kernel that takes the place of the two.
        tiles: blocks (t, *) that there is anything to do for.
        names: other names for parameters of `first`: those of `second` for the same array.

    Returns:
        The source with one kernel instead of the two, and that kernel.

    Raises:
        ScheduleError: they have other numbers of threads.
    """
    if second.threads not in (1, first.threads) or second.block[1:] != (1, 1):
        raise ScheduleError(f"{first.symbol} has {first.threads} threads and {second.symbol} {second.threads}: not as many")
    before, after = _definition(source, first.symbol).renamed(names), _definition(source, second.symbol)
    body = f"""\
  for (int moegen_tile = 0; moegen_tile < {tiles}; ++moegen_tile) {{
{_indented(before.body.replace("blockIdx.y", "moegen_tile"))}
    __syncthreads();
  }}
  const int moegen_thread = threadIdx.y * {first.block[0]} + threadIdx.x;
  {"if (moegen_thread == 0) " if second.threads == 1 else ""}{{
{_indented(re.sub(r"threadIdx[.]x", "moegen_thread", after.body))}
  }}"""
    return _joined(source, symbol, (first, before, names), (second, after, {}), body, (first.grid[0], "1", "1"))


def side_by_side(source: str, first: Kernel, second: Kernel, names: Mapping[str, str]) -> tuple[str, Kernel]:
    """`first` and `second`, which have nothing to do with one another, in one grid: along x first the blocks of the one.

    Args:
        first: of its name is the kernel that takes the place of the two.
        names: other names for parameters of `second`, so that those of one name are the same.

    Returns:
        As `in_turn`.

    Raises:
        ScheduleError: they have thread blocks of other sizes.
    """
    if first.block != second.block:
        raise ScheduleError(f"thread blocks of {first.symbol} are {first.block}, of {second.symbol} {second.block}: not one size")
    ours, theirs = _definition(source, first.symbol), _definition(source, second.symbol).renamed(names)
    body = f"""\
  if (blockIdx.x < {first.grid[0]}) {{
    if (blockIdx.y >= {first.grid[1]}) return;
{_indented(ours.body)}
  }} else {{
    if (blockIdx.y >= {second.grid[1]}) return;
    const int64_t moegen_block = blockIdx.x - {first.grid[0]};
{_indented(theirs.body.replace("blockIdx.x", "moegen_block"))}
  }}"""
    grid = (f"({first.grid[0]} + {second.grid[0]})", f"std::max<int64_t>({first.grid[1]}, {second.grid[1]})", "1")
    return _joined(source, first.symbol, (first, ours, {}), (second, theirs, names), body, grid)


_Part = tuple[Kernel, _Definition, Mapping[str, str]]


def _joined(source: str, symbol: str, one: _Part, other: _Part, body: str, grid: tuple[str, str, str]) -> tuple[str, Kernel]:
    if one[0].shared_bytes or other[0].shared_bytes:
        raise BuildError(f"{one[0].symbol} or {other[0].symbol} has dynamic shared memory: they cannot be joined")
    texts = one[1].parameters | other[1].parameters
    known: dict[str, Parameter] = {}
    for kernel, definition, names in (one, other):
        for name, parameter in zip(definition.parameters, kernel.parameters, strict=True):
            known.setdefault(name, dataclasses.replace(parameter, name=names.get(parameter.name, parameter.name)))
    made = f'extern "C" __global__ void __launch_bounds__({one[0].threads}) {symbol}({", ".join(texts.values())}) {{\n{body}\n}}\n'
    source = source.replace(other[1].text, "").replace(one[1].text, made)
    for kernel in (one[0], other[0]):  # what was declared ahead
        source = re.sub(rf'extern "C" __global__ void [^;{{]*\b{kernel.symbol}\([^;{{]*\);\n', "", source)
    return source, Kernel(symbol, tuple(known[name] for name in texts), grid, one[0].block)


def _definition(source: str, symbol: str) -> _Definition:
    form = rf'^extern "C" __global__ void [^;{{\n]*\b{symbol}\(([^;{{]*)\) \{{\n(.*?)\n\}}\n'
    found = re.search(form, source, re.DOTALL | re.MULTILINE)
    if found is None:
        raise BuildError(f"TVM's source has no kernel {symbol} of the form that moegen knows: apache-tvm is not the pinned one")
    parameters = {text.rpartition(" ")[2]: text for text in found[1].split(", ")}
    return _Definition(found[0], parameters, found[2])


def _indented(body: str) -> str:
    return "\n".join(f"  {line}" if line else line for line in body.splitlines())
