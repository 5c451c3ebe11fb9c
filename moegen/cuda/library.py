"""From an emitted module to a library: kernels compiled for each architecture, the host around them, linked together."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi.libinfo

from ..cuda_geometry import CudaGeometry
from ..errors import BuildError
from ..paths import package_folder
from ..schedules.cuda.hopper import ARCHITECTURE, SUFFIX
from ..target import Target
from ..toolchain import cxx_for, first_error
from . import compiler, embedding, emission, hopper, nvidia
from .architectures import KNOWN, Architecture, parse
from .emission import Image, RowBlocks
from .kernels import HopperProgram, Program

PTX, HOPPER = "ptx", "hopper"


@dataclasses.dataclass(frozen=True)
class Library:
    """What was made.

    Args:
        program: the kernels' source and their launches.
        compiled: their machine code.
        hopper: the kernels that Hopper has of its own, and their machine code; None without any.
    """

    program: Program
    compiled: nvidia.Compiled
    hopper: tuple[HopperProgram, nvidia.Cubin] | None


def make(
    stages: Mapping[str, Any],
    geometry: CudaGeometry,
    target: Target,
    knobs: Mapping[str, Any],
    regimes: Sequence[RowBlocks],
    few_tokens: int,
    route_tokens: int,
    work: pathlib.Path,
    out: pathlib.Path,
) -> Library:
    """Compiles and links everything.

    Args:
        stages: name -> tensors of the emitted module.
        knobs: stage -> its knobs, for those that have any.
        regimes, few_tokens, route_tokens: of `CudaPlan`.
        work: an empty folder.
        out: the library.

    Raises:
        BuildError: a compiler is missing or fails.
        ScheduleError: knobs are illegal.
    """
    toolchain = nvidia.find()
    architectures = parse(target.gpus)
    program = compiler.lower(stages, geometry, knobs, architectures, target.tf32, emission.unused(geometry.config, route_tokens))
    program = dataclasses.replace(program, source=program.source + emission.dispatch_source(geometry.config))
    own = hopper.lower(geometry, {name.removesuffix(SUFFIX): k for name, k in knobs.items() if name.endswith(SUFFIX)})
    oldest = min(architectures, key=lambda one: one.capability).plain
    images = [_image(one) for one in architectures]
    images += [Image(HOPPER, KNOWN[ARCHITECTURE].capability, hopper=True)] if own.kernels else []
    images.append(Image(PTX, oldest=oldest.capability))
    host = emission.host_source(geometry, target, program, images, regimes, few_tokens, route_tokens, own.kernels)
    (work / "host.cc").write_text(host, encoding="utf-8")
    for header in ("driver.h", "exports.h"):
        shutil.copy(package_folder("templates") / "cuda" / header, work)
    with concurrent.futures.ThreadPoolExecutor(2) as beside:
        building = beside.submit(_compile_host, work, target.arch, toolchain.include_folders)
        special = beside.submit(_compile_hopper, own, work, toolchain)
        compiled = nvidia.compile_kernels(program.source, architectures, work, ptx_for=oldest, toolchain=toolchain)
        codes = {one.architecture.name: one.code for one in compiled.cubins} | {PTX: compiled.ptx.encode()}
        made = special.result()
        embedding.embed(codes | ({HOPPER: made.code} if made else {}), work, target.arch)
        building.result()
    _link(work, out, target.arch)
    return Library(program, compiled, (own, made) if made else None)


def _compile_hopper(own: HopperProgram, work: pathlib.Path, toolchain: nvidia.Toolchain) -> nvidia.Cubin | None:
    """In an image of its own: what TVM puts in front of these kernels and of the others does not go together."""
    if not own.kernels:
        return None
    only = [KNOWN[ARCHITECTURE]]
    return nvidia.compile_kernels(own.source, only, work, fast_math=True, toolchain=toolchain, stem=HOPPER).cubins[0]


def _image(one: Architecture) -> Image:
    return Image(one.name, one.capability, specific=one.specific, tegra=one.tegra)


def _compile_host(work: pathlib.Path, arch: str, folders: Sequence[pathlib.Path]) -> None:
    includes = [f"-I{path}" for path in (*tvm_ffi.libinfo.include_paths(), *folders)]
    # It checks arguments and launches. -O2 takes twice as long, and makes no call shorter: 0.7 us where launching does nothing.
    options = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DTVM_FFI_CUBIN_LAUNCHER_USE_DRIVER_API=1"]
    _run([*cxx_for(arch), *options, *includes, "-c", "host.cc", "-o", "host.o"], work, "compiling the generated host")


def _link(work: pathlib.Path, out: pathlib.Path, arch: str) -> None:
    exports = package_folder("templates") / "llvm" / "exports.map"
    command = [*cxx_for(arch), "-shared", "host.o", "images.o", "-o", str(out.resolve()), "-Wl,-s", "-Wl,--no-undefined"]
    command += [f"-Wl,--version-script={exports}", f"-L{pathlib.Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}"]
    _run([*command, "-ltvm_ffi", "-static-libstdc++", "-static-libgcc", "-ldl", "-lpthread"], work, "linking the library")


def _run(command: list[str], work: pathlib.Path, what: str) -> None:
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{what} failed: {first_error(done.stdout)}")
