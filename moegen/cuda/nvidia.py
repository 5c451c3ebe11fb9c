"""NVIDIA's compilers, found and driven: nvcc where there is one, else NVRTC from PyPI; neither needs a GPU or a driver."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ..errors import BuildError
from ..target import usable_processors
from ..toolchain import first_error
from . import cubins, wheels
from .architectures import Architecture

OLDEST_NVCC = (12, 0)  # cuLibraryLoadData and sm_90a begin there

# -w: TVM's own preludes bring warnings along. ptxas reports what it spilled.
# ptxas spills a register or two for the sake of one more block on a multiprocessor, unless it is told to use them.
OPTIONS = ("--std=c++17", "-w", "--ptxas-options=-O3", "--ptxas-options=-v", "--ptxas-options=--register-usage-level=10")
# Wheel -> one of the headers that it is needed for, as kernels (and what they include) name it.
HEADERS = {"nvidia-cuda-runtime": "cuda_bf16.h", "nvidia-cuda-crt": "crt/mma.h", "nvidia-cuda-cccl": "cuda/std/cstdint"}


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """A compiler of CUDA C++ to machine code.

    Args:
        name: `nvcc` or `nvrtc`.
        version: of the compiler, `13.0.88`.
        command: what begins each compilation; the source, the output, the kind of output and options follow.
        include_folders: CUDA's headers, for the C++ compiler of the host as well.
    """

    name: str
    version: str
    command: tuple[str, ...]
    include_folders: tuple[pathlib.Path, ...]

    def compilation(self, source: str, output: str, arch: str, fast_math: bool) -> list[str]:
        """The command that compiles for `sm_80` (machine code) or `compute_80` (PTX)."""
        kind = "-cubin" if arch.startswith("sm_") else "-ptx"
        options = [*OPTIONS, f"-arch={arch}", *(["--use_fast_math"] if fast_math else [])]
        if self.name == "nvcc":
            return [*self.command, kind, *options, "-o", output, source]
        return [*self.command, source, output, kind, *options, *(f"-I{folder}" for folder in self.include_folders)]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclasses.dataclass(frozen=True)
class Cubin:
    """Machine code for one architecture.

    Args:
        code: an ELF image, as cuLibraryLoadData takes it.
        resources: what each kernel uses.
        log: what the compiler said.
    """

    architecture: Architecture
    code: bytes
    resources: Mapping[str, cubins.Resources]
    log: str

    @property
    def spilled_bytes(self) -> dict[str, int]:
        """Of each kernel: bytes that its spill stores and spill loads move, each counted once."""
        found = re.findall(r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", self.log)
        said = {kernel: int(stores) + int(loads) for kernel, stores, loads in found}
        return {kernel: said[kernel] for kernel in self.resources}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Kernels, compiled.

    Args:
        cubins: in the order of the architectures that were asked for.
        ptx: for devices that run none of the cubins; empty if not asked for.
        ptx_for: the oldest architecture that the PTX is for.
        compiler: name and version.
    """

    cubins: tuple[Cubin, ...]
    ptx: str
    ptx_for: Architecture | None
    compiler: str


def find() -> Toolchain:
    """The compiler: $MOEGEN_NVCC (a path, or `nvrtc`), nvcc on the path or in CUDA's usual places, or NVRTC from PyPI.

    Raises:
        BuildError: there is none, or the one that is named does not work.
    """
    named = os.environ.get("MOEGEN_NVCC")
    if named and named != "nvrtc":
        if not (path := shutil.which(named)):
            raise BuildError(f"$MOEGEN_NVCC names {named}, and there is no such program")
        return _nvcc(path)
    path = None if named else tool("nvcc")
    return _nvcc(path) if path else _nvrtc()


def tool(name: str) -> str | None:
    """A program of CUDA's toolkit: on the path, in $CUDA_HOME or where CUDA is usually installed."""
    roots = [root for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    return shutil.which(name) or next((found for root in roots if (found := shutil.which(f"{root}/bin/{name}"))), None)


def _nvcc(path: str) -> Toolchain:
    matched = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", _said_by([path, "--version"]))
    if not matched:
        raise BuildError(f"{path} does not say which version of nvcc it is")
    if (int(matched[1]), int(matched[2])) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise BuildError(f"{path} is nvcc {matched[0][1:]}, and the oldest that serves is {oldest}: set MOEGEN_NVCC to a newer one")
    # A wrapper says nothing of where its toolkit is, a rehearsal does.
    rehearsal = _said_by([path, "--dryrun", "-x", "cu", os.devnull])
    settings = "\n".join(line for line in rehearsal.splitlines() if "INCLUDES=" in line)
    folders = [
        pathlib.Path(first or second).resolve() for first, second in re.findall(r'"-I([^"]+)"|"-isystem" "([^"]+)"', settings)
    ]
    return Toolchain("nvcc", matched[0][1:], (path,), tuple(folder for folder in folders if folder.is_dir()))


def _said_by(command: list[str]) -> str:
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error


def _nvrtc() -> Toolchain:
    library = wheels.find("nvidia-cuda-nvrtc", "libnvrtc.so.*")
    builtins = wheels.find("nvidia-cuda-nvrtc", "libnvrtc-builtins.so.*")
    headers = {name: wheels.find(name, pattern) for name, pattern in HEADERS.items()}
    missing = [] if library and builtins else ["nvidia-cuda-nvrtc"]
    missing += [name for name, path in headers.items() if path is None]
    if missing:
        why = f"compiling for CUDA needs nvcc, or NVRTC and its headers ({', '.join(missing)} missing)"
        raise BuildError(f"{why}: {wheels.ADVICE}")
    folders = {path.parents[HEADERS[name].count("/")] for name, path in headers.items() if path}
    command = (sys.executable, "-I", str(pathlib.Path(__file__).with_name("nvrtc_program.py")), str(library), str(builtins))
    return Toolchain("nvrtc", wheels.version("nvidia-cuda-nvrtc"), command, tuple(sorted(folders)))


def compile_kernels(
    source: str,
    architectures: Sequence[Architecture],
    folder: pathlib.Path,
    *,
    ptx_for: Architecture | None = None,
    fast_math: bool = False,
    toolchain: Toolchain | None = None,
    stem: str = "kernels",
) -> Compiled:
    """Compiles CUDA C++ for several architectures, as many at once as there are processors.

    Args:
        source: of kernels, which are `extern "C"`.
        folder: gets the source and what is made of it: `kernels.cu`, `kernels.sm_80.cubin`, `kernels.ptx`.
        ptx_for: also makes PTX, for the devices of this architecture and of later ones.
        fast_math: allows approximate division, roots and transcendental functions, and flushes denormal numbers.
        toolchain: the compiler, where it is not the one that `find` finds.
        stem: what the names of files begin with.

    Raises:
        BuildError: there is no compiler, or it refuses the source.
    """
    compiler = toolchain or find()
    (folder / f"{stem}.cu").write_text(source, encoding="utf-8")
    outputs = {one.name: f"{stem}.{one.name}.cubin" for one in architectures}
    if ptx_for:
        outputs[ptx_for.virtual] = f"{stem}.ptx"
    same = ptx_for and compiler.name == "nvcc" and next((one for one in architectures if one.virtual == ptx_for.virtual), None)
    sources = dict.fromkeys(outputs, f"{stem}.cu")
    turns = [[arch] for arch in outputs]
    if ptx_for and same:  # its machine code is made from this PTX in any case: the first half of compiling is done once
        sources[same.name] = outputs[ptx_for.virtual]
        turns = [[ptx_for.virtual, same.name], *(turn for turn in turns if turn[0] not in (ptx_for.virtual, same.name))]

    def compile_one(arch: str) -> tuple[str, str]:
        return arch, _run(compiler, arch, compiler.compilation(sources[arch], outputs[arch], arch, fast_math), folder)

    with concurrent.futures.ThreadPoolExecutor(usable_processors()) as pool:
        logs = dict(one for done in pool.map(lambda turn: list(map(compile_one, turn)), turns) for one in done)
    codes = {one.name: (folder / outputs[one.name]).read_bytes() for one in architectures}
    made = tuple(Cubin(one, codes[one.name], cubins.resources(codes[one.name]), logs[one.name]) for one in architectures)
    return Compiled(made, (folder / f"{stem}.ptx").read_text("utf-8") if ptx_for else "", ptx_for, str(compiler))


def _run(compiler: Toolchain, arch: str, command: list[str], folder: pathlib.Path) -> str:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{compiler} does not compile the kernels for {arch}: {first_error(done.stdout)}")
    return done.stdout
