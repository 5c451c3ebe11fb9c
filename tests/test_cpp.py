"""The README's C++ and C programs, compiled by its commands: bitwise what Python computes, and errors instead of crashes."""

from __future__ import annotations

import os
import pathlib
import re
import struct
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT, SMALL

import moegen
from moegen import reference
from moegen.pack import pack

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = {re.match(r"/[/*] ([\w.]+):", text)[1]: text for text in re.findall(r"^```c(?:pp)?\n(.*?)^```$", README, re.M | re.S)}  # type: ignore[index]
COMMANDS = re.findall(r"^g(?:\+\+|cc) .*$", README, re.M)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder with `layer` and `layer_c`."""
    folder = tmp_path_factory.mktemp("programs")
    tool = folder / "tvm-ffi-config"  # as on the path of an environment in which moegen is installed
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tvm_ffi.config "$@"\n')
    tool.chmod(0o755)
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    assert sorted(SOURCES) == ["layer.c", "layer.cc"]
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    for command in COMMANDS:
        strict = f"{command} -Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers"
        done = subprocess.run(strict, shell=True, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
    return folder


def run(*command: object, given: bytes = b"", code: int = 0) -> bytes:
    done = subprocess.run([str(part) for part in command], input=given, capture_output=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_is_pythons(
    dtype: str, programs: pathlib.Path, built: Any, tmp_path: pathlib.Path, rng: np.random.Generator
) -> None:
    artifact = built(verify=False, **SMALL, **({"dtype": dtype} if dtype != "float32" else {}))
    weights = reference.random_weights(artifact.config, rng)
    path = pack(weights, tmp_path / "layer.moepack", artifact).path
    layer = moegen.load(artifact.path).bind(weights)
    for count in (0, 1, 37):
        x = rng.standard_normal((count, 64), dtype=np.float32)
        x = x.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else x
        expected = layer(x).tobytes()
        assert run(programs / "layer", artifact.path, path, given=x.tobytes()) == expected
        assert run(programs / "layer_c", artifact.library, path, count, given=x.tobytes()) == expected


def test_errors(programs: pathlib.Path, built: Any, tmp_path: pathlib.Path, rng: np.random.Generator) -> None:
    artifact, other = built(verify=False, **SMALL), built(verify=False, **SMALL, dtype="bfloat16")
    path = tmp_path / "layer.moepack"
    pack(reference.random_weights(artifact.config, rng), path, artifact)
    content = path.read_bytes()
    program, in_c = programs / "layer", programs / "layer_c"
    assert b"packed for another artifact" in run(program, other.path, path, code=1)
    assert b"cannot read the artifact's manifest.json" in run(program, tmp_path, path, code=1)
    assert b"usage" in run(program, code=1)
    assert b"cannot read the packed weights" in run(program, artifact.path, tmp_path / "nothing", code=1)
    for damaged, said in (
        (content[:-1], b"truncated"),
        (content[:50], b"cannot read"),
        (b"x" + content[1:], b"not packed for a processor"),
        (content[:8] + struct.pack("<I", 2) + content[12:], b"not packed for a processor"),
        (content[:48] + struct.pack("<I", 2) + content[52:], b"not packed for a processor"),
        (content[:16] + struct.pack("<qq", -64, len(content) + 64) + content[32:], b"truncated"),
    ):
        path.write_bytes(damaged)
        assert said in run(program, artifact.path, path, code=1)
        assert b"no sound .moepack" in run(in_c, artifact.library, path, 1, code=1)
    path.write_bytes(content)
    assert b"moe.so: cannot open shared object" in run(in_c, tmp_path / "moe.so", path, 1, code=1)
    assert b"No such file" in run(in_c, artifact.library, tmp_path / "nothing", 1, code=1)
    assert b"too few tokens" in run(in_c, artifact.library, path, 2, given=bytes(300), code=1)
    assert b"moe_forward: " in run(in_c, other.library, path, 1, given=bytes(256), code=1)
    assert b"T=-1 must be between" in run(in_c, artifact.library, path, -1, code=1)
