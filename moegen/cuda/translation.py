"""CUDA C as C++ that the emulator's runtime understands.

Three things of CUDA C are no C++: asm statements of PTX, `__shared__` variables, and kernels that are found by name. They are
rewritten token by token after the preprocessor has run, so that macros and conditions of the source mean what they mean to nvcc.
Lines stay where they were.
"""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import dataclass

from ..errors import EmulationError
from .ptx import Operand, statement

# Headers whose declarations the emulator's own headers have. Any other one is an error when it is reached.
_PROVIDED = {
    *("cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_fp16.hpp", "cuda_bf16.h", "cuda_bf16.hpp", "mma.h", "cudaTypedefs.h"),
    *("cstdint", "cstddef", "cstring", "cmath", "climits", "cfloat", "cassert", "type_traits", "math_constants.h"),
    *("stdint.h", "stddef.h", "string.h", "math.h", "limits.h", "float.h", "assert.h", "stdio.h", "cstdio", "utility"),
}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"](?P<name>[^>"\n]+)[>"][^\n]*$', re.MULTILINE)
_TOKEN = re.compile(
    r"""(?P<directive>(?<![^\n])[ \t]*\#[^\n]*)
    |(?P<space>\s+)
    |(?P<raw>(?:u8|[uUL])?R"(?P<tag>[^\s()\\]*)\(.*?\)(?P=tag)")
    |(?P<string>(?:u8|[uUL])?"(?:[^"\\\n]|\\.)*")
    |(?P<char>'(?:[^'\\\n]|\\.)+')
    |(?P<word>[A-Za-z_]\w*)
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.]|'(?=\w))*)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_OPEN, _CLOSE = "([{", ")]}"
_ALIGN = ("alignas", "__align__")


@dataclass(frozen=True)
class Translation:
    """C++ text, and the names of the kernels that it defines."""

    text: str
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


def translate(source: str, cxx: list[str], arch: str) -> Translation:
    """Rewrites CUDA C.

    Args:
        source: CUDA C as nvcc takes it.
        cxx: the command of the C++ compiler, whose preprocessor is used.
        arch: what `__CUDA_ARCH__` says, for example `sm_80` or `sm_90a`.

    Raises:
        EmulationError: the source does something that is not emulated, or is not CUDA C.
    """
    return _Rewriter(_tokens(_preprocessed(source, cxx, arch))).run()


def _preprocessed(source: str, cxx: list[str], arch: str) -> str:
    found = re.fullmatch(r"sm_(\d+)([a-z]?)", arch)
    if found is None:
        raise EmulationError(f"arch is {arch!r}: take a name such as sm_80 or sm_90a")
    defined = {
        "__CUDACC__": "1",
        "__CUDACC_VER_MAJOR__": "13",
        "__CUDACC_VER_MINOR__": "0",
        "__NVCC__": "1",
        "__CUDA_ARCH__": f"{found[1]}0",
    }
    defined["MOEGEN_EMULATED"] = "1"
    if found[2] == "a":
        defined[f"__CUDA_ARCH_FEAT_SM{found[1]}_ALL"] = "1"
    body = _INCLUDE.sub(lambda line: "" if line["name"] in _PROVIDED else line[0], source)
    command = [*cxx, "-E", "-x", "c++", "-std=c++17", "-nostdinc", *(f"-D{name}={value}" for name, value in defined.items()), "-"]
    done = subprocess.run(command, input=body, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmulationError(f"the preprocessor refuses the source: {done.stderr.strip()[:2000]}")
    return done.stdout


def _tokens(text: str) -> list[_Token]:
    return [_Token(str(found.lastgroup if found.lastgroup != "tag" else "raw"), found[0]) for found in _TOKEN.finditer(text)]


class _Rewriter:
    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.made: list[str] = []
        self.count = 0  # of things that need a number of their own
        self.kernels: list[tuple[str, str]] = []  # name, bounds
        self.within: tuple[int, int] | None = None  # the kernel whose body is open, and the depth outside of it
        self.depth = 0

    def run(self) -> Translation:
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if token.kind == "word" and token.text in ("asm", "__asm__", "__asm"):
                self._asm()
            elif token.kind == "word" and self._begins_shared(self.at):
                self._shared()
            else:
                if token.kind == "word" and token.text == "__global__":
                    self._kernel()
                self._follow(token)
                self.made.append(token.text)
                self.at += 1
        entries = [f"MOEGEN_KERNEL({name}, {i}, {bounds})\n" for i, (name, bounds) in enumerate(self.kernels)]
        return Translation("".join([*self.made, "\n", *entries]), tuple(name for name, _ in self.kernels))

    # ------------------------------------------------------------ tokens

    def _skip_space(self, at: int) -> int:
        while at < len(self.tokens) and self.tokens[at].kind in ("space", "directive"):
            at += 1
        return at

    def _after(self, at: int) -> _Token:
        at = self._skip_space(at + 1)
        return self.tokens[at] if at < len(self.tokens) else _Token("other", "")

    def _closing(self, at: int) -> int:
        """Where the bracket that opens at `at` closes."""
        depth = 0
        for i in range(at, len(self.tokens)):
            if self.tokens[i].kind == "other":
                depth += (self.tokens[i].text in _OPEN) - (self.tokens[i].text in _CLOSE)
                if depth == 0:
                    return i
        raise EmulationError(f"the source ends inside the bracket {self._text(at, min(at + 20, len(self.tokens)))!r}")

    def _text(self, begin: int, end: int) -> str:
        """The tokens' text in one line."""
        return "".join(" " if t.kind == "space" else t.text for t in self.tokens[begin:end] if t.kind != "directive").strip()

    def _replace(self, text: str, end: int) -> None:
        """Puts `text` in the place of the tokens before `end`, with as many line ends as they had."""
        lines = sum(token.text.count("\n") for token in self.tokens[self.at : end])
        self.made.append(text + "\n" * lines)
        self.at = end

    # ------------------------------------------------------------ kernels

    def _kernel(self) -> None:
        """Notes the name and bounds of the kernel whose `__global__` is here; its body opens later, unless this declares it."""
        at, bounds = self.at + 1, "0"
        while True:
            at = self._skip_space(at)
            word = self.tokens[at]
            if word.text in (";", "{"):
                raise EmulationError("after __global__ comes no function")
            if word.kind == "word" and self._after(at).text == "(":
                opening = self._skip_space(at + 1)
                closing = self._closing(opening)
                if word.text not in ("__launch_bounds__", "__cluster_dims__", "__maxnreg__", "__attribute__", "alignas"):
                    break
                if word.text == "__launch_bounds__":
                    bounds = f"::emulator::First({self._text(opening + 1, closing)})"
                at = closing
            at += 1
        if self._after(closing).text == "{":
            self.kernels.append((word.text, bounds))
            self.within = (len(self.kernels) - 1, self.depth)

    def _follow(self, token: _Token) -> None:
        if token.kind != "other":
            return
        if token.text == "{":
            self.depth += 1
        elif token.text == "}":
            self.depth -= 1
            if self.within is not None and self.within[1] == self.depth:
                self.within = None

    # ------------------------------------------------------------ shared memory

    def _begins_shared(self, at: int) -> bool:
        """Is this word the first of a declaration of shared memory?"""
        while self.tokens[at].text in ("extern", "static", *_ALIGN):
            if self.tokens[at].text in _ALIGN:
                at = self._closing(self._skip_space(at + 1))
            at = self._skip_space(at + 1)
        return self.tokens[at].text == "__shared__"

    def _shared(self) -> None:
        """`__shared__ float a[4], b;` becomes a struct with these members, and references to them in the block's memory."""
        end = begin = self.at
        external = False
        while self.tokens[end].text != ";":
            external |= self.tokens[end].text == "extern"
            end = self._closing(end) if self.tokens[end].kind == "other" and self.tokens[end].text in _OPEN else end
            end += 1
        if self.depth == 0:
            raise EmulationError(f"shared memory outside of a function is not emulated: {self._text(begin, end)}")
        self.count += 1
        words = [t for t in self.tokens[begin:end] if t.text not in ("extern", "static", "__shared__") and t.kind != "directive"]
        declaration = "".join({"alignas": "__align__"}.get(t.text, t.text) for t in words).replace("\n", " ")
        names = self._declared(begin, end)
        if external:
            text = self._external(names[0], declaration)
        else:
            kind, kernel = f"moegen_shared_{self.count}", -1 if self.within is None else self.within[0]
            where = f"::emulator::Shared<{kind}, {kernel}>()"
            text = f"struct {kind} {{ {declaration}; }}; " + " ".join(f"auto& {name} = {where}.{name};" for name in names)
        self._replace(text, end + 1)

    def _external(self, name: str, declaration: str) -> str:
        """An array without a size: declared by another name, for its type and alignment, and a reference to dynamic memory."""
        other = f"moegen_extern_{self.count}"
        declaration = re.sub(rf"\b{name}\b", other, declaration)
        return f"extern {declaration}; auto& {name} = ::emulator::Dynamic<decltype({other}), __alignof__({other})>();"

    def _declared(self, begin: int, end: int) -> list[str]:
        """Names that the declaration between `begin` and `end` declares: the last words before a bracket, a comma or its end."""
        names, last, angle, at = [], "", 0, begin
        while at < end:
            token = self.tokens[at]
            if token.text == "[" and last:
                names.append(last)
                last = ""
            if token.kind == "other" and token.text in _OPEN:
                at = self._closing(at)
            elif token.text in "<>":
                angle += 1 if token.text == "<" else -1
            elif token.text == "=":
                raise EmulationError(f"shared memory cannot be initialised: {self._text(begin, end)}")
            elif token.text == "," and angle == 0:
                names += [last] if last else []
                last = ""
            elif token.kind == "word" and angle == 0:
                last = token.text
            at += 1
        return names + ([last] if last else [])

    # ------------------------------------------------------------ asm

    def _asm(self) -> None:
        at = self._skip_space(self.at + 1)
        while self.tokens[at].text in ("volatile", "__volatile__", "__volatile"):
            at = self._skip_space(at + 1)
        if self.tokens[at].text != "(":
            raise EmulationError(f"an asm statement begins with {self._text(self.at, at + 1)!r}")
        closing = self._closing(at)
        parts = self._parts(at + 1, closing, ":")
        text = self._string(*parts[0])
        listed = [part for section in parts[1:3] for part in self._parts(*section, ",")]
        operands = [self._operand(*part) for part in listed if self._text(*part)]
        self.count += 1
        made = statement(self._numbered(text, operands), tuple(operand for _, operand in operands), self.count)
        self._replace(made, closing + 1)

    def _parts(self, begin: int, end: int, separator: str) -> list[tuple[int, int]]:
        parts, start, at = [], begin, begin
        while at < end:
            token = self.tokens[at]
            if token.kind == "other" and token.text in _OPEN:
                at = self._closing(at)
            elif token.kind == "other" and token.text == separator:
                parts.append((start, at))
                start = at + 1
            at += 1
        return [*parts, (start, end)]

    def _string(self, begin: int, end: int) -> str:
        texts = []
        for token in self.tokens[begin:end]:
            if token.kind == "string":
                texts.append(str(ast.literal_eval(token.text)))
            elif token.kind == "raw":
                texts.append(token.text[token.text.index("(") + 1 : token.text.rindex(")")])
            elif token.kind not in ("space", "directive"):
                raise EmulationError(f"an asm statement's text is {self._text(begin, end)!r}, which is no string")
        return "".join(texts)

    def _operand(self, begin: int, end: int) -> tuple[str | None, Operand]:
        """`[name] "=r"(expression)`: the name and the operand."""
        name, at = None, self._skip_space(begin)
        if self.tokens[at].text == "[":
            closing = self._closing(at)
            name = self._text(at + 1, closing)
            at = self._skip_space(closing + 1)
        opening = self._skip_space(at + 1)
        if self.tokens[at].kind != "string" or self.tokens[opening].text != "(":
            raise EmulationError(f"an asm operand is {self._text(begin, end)!r}")
        constraint = str(ast.literal_eval(self.tokens[at].text))
        expression = self._text(opening + 1, self._closing(opening))
        return name, Operand(constraint.lstrip("=+&"), expression, constraint[:1] in "=+")

    def _numbered(self, text: str, operands: list[tuple[str | None, Operand]]) -> str:
        """Operands that the text calls by name, by number."""
        for i, (name, _) in enumerate(operands):
            if name is not None:
                text = text.replace(f"%[{name}]", f"%{i}")
        return text
