"""PTX inside CUDA C: what an asm statement does, as calls of the emulator's functions (templates/cuda/emulator/ptx.h)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import EmulationError

_TYPES = {
    **{f"b{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"u{n}": f"uint{n}_t" for n in (8, 16, 32, 64)},
    **{f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
_T = f"(?P<T>{'|'.join(_TYPES)})"
_INT = f"(?P<T>{'|'.join(name for name in _TYPES if name[0] in 'bus')})"
_ELEMENTS = {"f16": "Element::kHalf", "bf16": "Element::kBFloat", "tf32": "Element::kTensorFloat"}
_FORMATS = {"f16": "Half", "bf16": "BFloat"}
_SHARED = r"shared(?:::cta)?"
_HINTS = r"(?:\.L1::\w+)?(?:\.L2::cache_hint)?(?:\.L2::(?:64|128|256)B)?"
_CACHED = rf"(?:\.(?:nc|ca|cg|cs|lu|cv|wb|wt|volatile|relaxed|acquire|release|weak|gpu|cta|sys|cluster))*{_HINTS}"
_BULK = r"shared::(?:cluster|cta)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes(?:\.L2::cache_hint)?"
_FLOAT = r"(?:\.(?:rn|rz|approx|full|ftz|sat))*"

# (instruction, function, is the address the last operand?). `{T}` and such are what the pattern's groups have found.
_RULES: tuple[tuple[str, str, bool], ...] = (
    (rf"mov\.{_T}", "Mov<{T}>", False),
    (rf"add{_FLOAT}\.{_T}", "Add<{T}>", False),
    (rf"sub{_FLOAT}\.{_T}", "Sub<{T}>", False),
    (rf"mul(?:\.lo)?{_FLOAT}\.{_T}", "Mul<{T}>", False),
    (rf"div{_FLOAT}\.{_T}", "Div<{T}>", False),
    (rf"rem\.{_INT}", "Rem<{T}>", False),
    (rf"mad\.lo\.{_INT}", "Mad<{T}>", False),
    (rf"fma{_FLOAT}\.f32", "Fma", False),
    (rf"min(?:\.NaN)?\.{_T}", "Min<{T}>", False),
    (rf"max(?:\.NaN)?\.{_T}", "Max<{T}>", False),
    (rf"and\.{_T}", "And<{T}>", False),
    (rf"or\.{_T}", "Or<{T}>", False),
    (rf"xor\.{_T}", "Xor<{T}>", False),
    (r"not\.pred", "NotPredicate", False),
    (rf"not\.{_INT}", "Not<{T}>", False),
    (rf"shl\.{_INT}", "Shl<{T}>", False),
    (rf"shr\.{_INT}", "Shr<{T}>", False),
    (rf"selp\.{_T}", "Selp<{T}>", False),
    (rf"setp\.(?P<op>eq|ne|lt|le|gt|ge)\.{_T}", "Setp{op}<{T}>", False),
    (r"ex2\.approx(?:\.ftz)?\.f32", "Ex2", False),
    (r"lg2\.approx(?:\.ftz)?\.f32", "Lg2", False),
    (r"rcp\.(?:approx|rn)(?:\.ftz)?\.f32", "Rcp", False),
    (r"sqrt\.(?:approx|rn)(?:\.ftz)?\.f32", "Sqrt", False),
    (r"rsqrt\.approx(?:\.ftz)?\.f32", "Rsqrt", False),
    (r"tanh\.approx\.f32", "Tanh", False),
    (r"neg(?:\.ftz)?\.f32", "Neg", False),
    (r"abs(?:\.ftz)?\.f32", "Abs", False),
    (r"cvt\.rna\.tf32\.f32", "CvtTensorFloat", False),
    (r"cvt\.rn\.(?P<format>f16|bf16)x2\.f32", "CvtNarrowPair<{format}>", False),
    (r"cvt\.rn\.(?P<format>f16|bf16)\.f32", "CvtNarrow<{format}>", False),
    (r"cvt\.f32\.(?P<format>f16|bf16)", "CvtWiden<{format}>", False),
    (rf"cvt\.(?P<to>[us](?:8|16|32|64))\.{_INT}", "CvtInteger<{to}, {T}>", False),
    (rf"cvta\.to\.{_SHARED}\.u64", "ToShared", False),
    (r"cvta(?:\.to)?\.global\.u64", "ToGlobal", False),
    (rf"ld\.global{_CACHED}(?:\.v[248])?\.{_T}", "LoadGlobal<{T}>", True),
    (rf"ld{_CACHED}\.global{_CACHED}(?:\.v[248])?\.{_T}", "LoadGlobal<{T}>", True),
    (rf"ld{_CACHED}\.{_SHARED}(?:\.v[24])?\.{_T}", "LoadShared<{T}>", True),
    (rf"st{_CACHED}\.global{_CACHED}(?:\.v[248])?\.{_T}", "StoreGlobal<{T}>", False),
    (rf"st{_CACHED}\.{_SHARED}(?:\.v[24])?\.{_T}", "StoreShared<{T}>", False),
    (rf"red{_CACHED}\.global{_CACHED}\.add{_FLOAT}\.{_T}", "RedGlobalAdd<{T}>", False),
    (rf"atom{_CACHED}\.global{_CACHED}\.add{_FLOAT}\.{_T}", "AtomGlobalAdd<{T}>", False),
    (rf"cp\.async\.c[ag]\.{_SHARED}\.global{_HINTS}", "CpAsync", False),
    (r"cp\.async\.commit_group", "CpAsyncCommitGroup", False),
    (r"cp\.async\.wait_group", "CpAsyncWaitGroup", False),
    (r"cp\.async\.wait_all", "CpAsyncWaitAll", False),
    (rf"ldmatrix\.sync\.aligned\.m8n8\.x[124]\.{_SHARED}\.b16", "LdMatrix<false>", True),
    (rf"ldmatrix\.sync\.aligned\.m8n8\.x[124]\.trans\.{_SHARED}\.b16", "LdMatrix<true>", True),
    (rf"stmatrix\.sync\.aligned\.m8n8\.x[124]\.{_SHARED}\.b16", "StMatrix<false>", False),
    (rf"stmatrix\.sync\.aligned\.m8n8\.x[124]\.trans\.{_SHARED}\.b16", "StMatrix<true>", False),
    (
        r"mma\.sync\.aligned\.m16n8k(?P<k>16|8)\.row\.col\.f32\.(?P<element>f16|bf16)\.(?P=element)\.f32",
        "Mma<{element}, {k}>",
        False,
    ),
    (r"mma\.sync\.aligned\.m16n8k(?P<k>8|4)\.row\.col\.f32\.(?P<element>tf32)\.tf32\.f32", "Mma<{element}, {k}>", False),
    (rf"mbarrier\.init\.{_SHARED}\.b64", "MbarrierInit", False),
    (rf"mbarrier\.inval\.{_SHARED}\.b64", "MbarrierInval", False),
    (rf"mbarrier\.arrive{_CACHED}\.{_SHARED}\.b64", "Arrive", False),
    (rf"mbarrier\.arrive\.expect_tx{_CACHED}\.{_SHARED}\.b64", "ArriveExpect", False),
    (rf"mbarrier\.expect_tx{_CACHED}\.{_SHARED}\.b64", "MbarrierExpect", False),
    (rf"mbarrier\.try_wait(?:\.parity)?{_CACHED}\.{_SHARED}\.b64", "TryWait", False),
    (rf"mbarrier\.test_wait(?:\.parity)?{_CACHED}\.{_SHARED}\.b64", "TestWait", False),
    (rf"cp\.async\.mbarrier\.arrive\.noinc\.{_SHARED}\.b64", "CpAsyncArriveNoInc", False),
    (rf"cp\.async\.mbarrier\.arrive\.{_SHARED}\.b64", "CpAsyncArriveInc", False),
    (rf"cp\.async\.bulk\.tensor\.(?P<rank>[123])d\.{_BULK}", "TensorCopy{rank}", False),
    (rf"cp\.async\.bulk\.{_BULK}", "BulkCopy", False),
    (r"wgmma\.fence\.sync\.aligned", "WgmmaFence", False),
    (r"wgmma\.commit_group\.sync\.aligned", "WgmmaCommitGroup", False),
    (r"wgmma\.wait_group\.sync\.aligned", "WgmmaWaitGroup", False),
    (r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32", "SetMaxRegisters", False),
    (r"elect\.sync", "Elect", False),
    (r"(?:bar|barrier\.cta|barrier)\.sync(?:\.aligned)?", "BarSync", False),
    (r"(?:bar|barrier\.cta|barrier)\.arrive(?:\.aligned)?", "BarArrive", False),
    (r"barrier\.cluster\.arrive(?:\.release|\.relaxed)?(?:\.aligned)?", "Nothing", False),
    (r"barrier\.cluster\.wait(?:\.acquire)?(?:\.aligned)?", "ClusterWait", False),
    (r"mapa\.shared::cluster\.u32", "MapRank", False),
    (r"bar\.warp\.sync", "BarWarpSync", False),
    (r"(?:membar|fence|prefetchu?|applypriority|discard|griddepcontrol)(?:\.[\w:]+)*", "Nothing", False),
    (r"createpolicy\.fractional\.L2::\w+\.b64", "CreatePolicy", False),
    (r"nanosleep\.u32", "Sleep", False),
    (r"trap", "Trap", False),
)
_COMPILED = tuple((re.compile(pattern), function, last) for pattern, function, last in _RULES)

_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?:16|8)\.f32\.(?P<element>f16|bf16|tf32)\.(?P=element)")

_SPECIAL = {
    **{f"tid.{d}": f"threadIdx.{d}" for d in "xyz"},
    **{f"ntid.{d}": f"blockDim.{d}" for d in "xyz"},
    **{f"ctaid.{d}": f"blockIdx.{d}" for d in "xyz"},
    **{f"nctaid.{d}": f"gridDim.{d}" for d in "xyz"},
    "laneid": "::emulator::current->lane",
    "warpid": "::emulator::current->index / 32",
    "lanemask_lt": "((1u << ::emulator::current->lane) - 1)",
    "lanemask_eq": "(1u << ::emulator::current->lane)",
    "smid": "0u",
    "nsmid": "1u",
    "clock": "0u",
    "clock64": "uint64_t{0}",
    "globaltimer": "uint64_t{0}",
    "cluster_ctarank": "0u",
    "cluster_nctarank": "1u",
}

_PIECE = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<brace>[{}])
    |(?P<label>[A-Za-z_$][\w$]*)\s*:(?!:)
    |(?P<statement>[^;{}]*(?:\{[^}]*\}[^;{}]*)*);""",
    re.VERBOSE | re.DOTALL,
)
_REGISTERS = re.compile(r"\.reg\s*\.(?P<type>\w+)\s+(?P<names>.*)", re.DOTALL)
_STATEMENT = re.compile(r"(?:@(?P<not>!?)\s*(?P<guard>[\w$%]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL)


@dataclass(frozen=True)
class Operand:
    """An operand of an asm statement: its constraint without `=` and `+`, its C++ expression, and whether it is written."""

    constraint: str
    expression: str
    written: bool


def statement(text: str, operands: tuple[Operand, ...], number: int) -> str:
    """One asm statement as a C++ block in one line.

    Args:
        text: the PTX between the quotes, escapes resolved.
        number: one that no other statement of the source has, for labels.

    Raises:
        EmulationError: an instruction, register or operand is not known to the emulator.
    """
    lines = [_declared(i, operand) for i, operand in enumerate(operands)]
    body = _Body(number)
    at = 0
    text = text.strip()
    while at < len(text):
        piece = _PIECE.match(text, at)
        if piece is None:
            raise EmulationError(f"asm statement {text!r}: {text[at:].strip()!r} does not end with a semicolon")
        at = piece.end()
        if piece["brace"]:
            lines.append(body.scope(piece["brace"]))
        elif piece["label"]:
            lines.append(f"{body.label(piece['label'])}:;")
        elif piece["statement"] and piece["statement"].strip():
            lines.append(body.line(piece["statement"].strip()))
    sink = ["uint64_t ptx_sink;"] if body.sinks else []
    return " ".join(["do {", "using namespace ::emulator; using namespace ::emulator::ptx;", *sink, *lines, "} while (0)"])


def _declared(index: int, operand: Operand) -> str:
    if operand.written:
        return f"auto&& ptx_{index} = ({operand.expression});"
    if operand.constraint not in "hrlfdn":
        raise EmulationError(
            f"asm operand {operand.expression}: constraint {operand.constraint!r} is not known, take one of h r l f d n"
        )
    return f"const auto ptx_{index} = ::emulator::ptx::Take{operand.constraint.upper()}({operand.expression});"


class _Body:
    """The statements of one asm block, with the registers that it has declared so far."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.scopes: list[dict[str, str]] = [{}]
        self.sinks = False

    def scope(self, brace: str) -> str:
        if brace == "{":
            self.scopes.append({})
        else:
            self.scopes.pop()
        return brace

    def label(self, name: str) -> str:
        return f"ptx_label_{self.number}_{name.replace('$', '_').replace('%', '_')}"

    def line(self, text: str) -> str:
        if registers := _REGISTERS.fullmatch(text):
            return self._declare(registers["type"], registers["names"])
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise EmulationError(f"PTX {text!r} cannot be read")
        call = self._call(found["opcode"], found["operands"])
        if found["guard"] is None:
            return call
        guard = self._value(found["guard"])
        return f"if ({found['not']}({guard})) {{ {call} }}"

    def _declare(self, kind: str, names: str) -> str:
        if kind not in _TYPES:
            raise EmulationError(f"PTX registers of type .{kind} are not emulated")
        made = []
        for name in (part.strip() for part in names.split(",")):
            many = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.scopes[-1][one] = f"ptx_r_{one.replace('$', '_').replace('%', '_')}"
                made.append(f"{_TYPES[kind]} {self.scopes[-1][one]};")
        return " ".join(made)

    def _call(self, opcode: str, operands: str) -> str:
        if opcode in ("bra", "bra.uni"):
            return f"goto {self.label(operands.strip())};"
        if product := _WGMMA.fullmatch(opcode):
            return self._wgmma(product["element"], _split(operands))
        values = [value for part in _split(operands) for value in self._values(part)]
        if ".L2::cache_hint" in opcode:
            values.pop()  # the policy
        for pattern, function, address_last in _COMPILED:
            if found := pattern.fullmatch(opcode):
                if address_last:
                    values = [values[-1], *values[:-1]]
                return f"{function.format_map(_named(found))}({', '.join(values)});"
        raise EmulationError(f"PTX instruction {opcode} is not emulated: add it to moegen/cuda/ptx.py")

    def _wgmma(self, element: str, operands: list[str]) -> str:
        """The accumulators are given by address: they change when `wgmma.wait_group` says so."""
        sums = ", ".join(f"&{value}" for value in self._values(operands[0]))
        rest = [self._values(operand) for operand in operands[1:]]
        made = f"float* const ptx_d[] = {{{sums}}};"
        function = "WgmmaShared"
        if len(rest[0]) > 1:
            function = "WgmmaRegisters"
            made += f" const uint32_t ptx_a[] = {{{', '.join(f'As<uint32_t>({value})' for value in rest[0])}}};"
            rest[0] = ["ptx_a"]
        others = ", ".join(value for values in rest for value in values)
        return f"{{ {made} {function}<{_ELEMENTS[element]}>(ptx_d, {others}); }}"

    def _values(self, text: str) -> list[str]:
        """An operand as C++ expressions: vectors and pairs are several, an address is one, with its offset."""
        text = text.strip()
        if text[:1] in "{[" and text[-1:] in "}]":
            return [value for part in _split(text[1:-1]) for value in self._values(part)]
        if "|" in text:
            return [self._value(part.strip()) for part in text.split("|")]
        if offset := re.fullmatch(r"([%\w$]+)\s*\+\s*(-?\w+)", text):
            return [f"({self._value(offset[1])} + {self._value(offset[2])})"]
        return [self._value(text)]

    def _value(self, text: str) -> str:
        if re.fullmatch(r"%\d+", text):
            return f"ptx_{text[1:]}"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+(\.\d+)?)U?", text):
            return text
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return f"::emulator::Bits<float>(0x{text[2:]}u)"
        if text == "_":
            self.sinks = True
            return "ptx_sink"
        if text.startswith("!"):
            return f"!{self._value(text[1:])}"
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text.startswith("%") and text.lstrip("%") in _SPECIAL:
            return _SPECIAL[text.lstrip("%")]
        raise EmulationError(f"PTX operand {text!r} is not known to the emulator")


def _named(found: re.Match[str]) -> dict[str, str]:
    """The groups of a rule as C++ has them."""
    names = {name: value for name, value in found.groupdict().items() if value is not None}
    translated = {"T": _TYPES, "to": _TYPES, "element": _ELEMENTS, "format": _FORMATS}
    return {name: translated[name][value] if name in translated else value.capitalize() for name, value in names.items()}


def _split(text: str) -> list[str]:
    """Parts between the commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]
