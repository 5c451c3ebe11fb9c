"""Checksums of moegen's own templates and schedules, which decide compiled code as much as choices do."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import pathlib
import tokenize
from collections.abc import Sequence

from .paths import package_folder


def digest(patterns: Sequence[str]) -> str:
    """SHA-256 of the files that the patterns match, each below `templates` or `schedules`; comments in Python do not count."""
    found = hashlib.sha256()
    for pattern in patterns:
        top, _, rest = pattern.partition("/")
        for path in sorted(package_folder(top).glob(rest)):
            if path.is_file():
                now = path.stat()
                found.update(path.name.encode() + b"\0" + _code(path, now.st_mtime_ns, now.st_size))
    return found.hexdigest()


@functools.cache
def _code(path: pathlib.Path, mtime_ns: int, size: int) -> bytes:
    """Python without docstrings, comments and empty lines, the same text whatever Python reads it; other files as they are."""
    source = path.read_bytes()
    if path.suffix != ".py":
        return source
    lines = source.decode().splitlines()
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            said = node.body[0]
            lines[said.lineno - 1 : said.end_lineno] = [""] * ((said.end_lineno or said.lineno) - said.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip()).encode()
