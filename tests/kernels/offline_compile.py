"""Compiles Triton kernels for every architecture without a GPU and reads what the assembler says of them.

The tests' process interprets kernels (tests/conftest.py), so it cannot compile them: compilation goes to worker
processes that never saw TRITON_INTERPRET, two at a time, and Triton's cache makes a repetition cheap. A kernel travels
by its module and name, so it has to be importable: `lmdserve.kernels.rms_norm._rms_norm_kernel`.
"""

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90)
# Shared memory one program may use, after the KiB that the driver keeps for itself (CUDA programming guide, "Compute
# Capabilities").
SHARED_BYTES_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
_NUM_WORKERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """What one architecture's binary needs. `local_bytes`: what a thread keeps outside registers, spills included."""

    name: str
    arch: int
    num_warps: int
    num_registers: int
    local_bytes: int
    shared_bytes: int
    ptx: str = field(repr=False)
    ttgir: str = field(repr=False)
    sass: str = field(repr=False)  # empty unless asked for

    def count(self, instruction: str) -> int:
        """Return how many SASS instructions have this opcode: "LDG" counts LDG.E.128 and all other LDG forms."""
        return len(re.findall(rf"\s{re.escape(instruction)}(?=[\s.;])", self.sass))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    module: str
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    arch: int
    options: Mapping[str, Any]
    wants_sass: bool


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    wants_sass: bool = False,
    **options: Any,
) -> CompiledKernel:
    """Compile a @triton.jit kernel for one architecture of ARCHITECTURES.

    signature: argument name -> type as Triton writes it ("*fp16", "*i32", "i32", "fp32"), for all arguments that are
    not constexprs. Pointers are taken to be aligned to 16 bytes, as torch's allocations are; ":1" after a pointer's
    type takes that back, and ":16" after an integer's type says that it is a multiple of 16, as Triton finds out at a
    launch. options go to the compiler (maxnreg=..., launch_pdl=True).
    """
    return _compile_all(
        [
            _job(
                kernel,
                signature,
                constexprs,
                arch,
                {"num_warps": num_warps, "num_stages": num_stages, **options},
                wants_sass,
            )
        ]
    )[0]


def compile_for_all(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    architectures: Iterable[int] = ARCHITECTURES,
    num_warps: int = 4,
    num_stages: int = 3,
    wants_sass: bool = False,
    **options: Any,
) -> dict[int, CompiledKernel]:
    """Compile for several architectures at once; arguments as in `compile_kernel`.

    A `PDL` constexpr that is not given is set as the launcher sets it: true from sm_90 on.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    jobs = [
        _job(kernel, signature, _with_pdl(kernel, constexprs, arch), arch, options, wants_sass)
        for arch in architectures
    ]
    return {compiled.arch: compiled for compiled in _compile_all(jobs)}


def assert_fits(compiled: CompiledKernel) -> None:
    """Fail when the kernel spills registers or needs more shared memory than the architecture has."""
    where = f"{compiled.name} for sm_{compiled.arch}, {compiled.num_warps} warps, {compiled.num_registers} registers"
    limit = SHARED_BYTES_LIMIT[compiled.arch]
    assert compiled.local_bytes == 0, f"{where}: {compiled.local_bytes} bytes a thread outside registers"
    assert compiled.shared_bytes <= limit, f"{where}: {compiled.shared_bytes} bytes of shared memory, limit {limit}"


def _with_pdl(kernel: Any, constexprs: Mapping[str, Any], arch: int) -> Mapping[str, Any]:
    if "PDL" in kernel.arg_names and "PDL" not in constexprs:
        return {**constexprs, "PDL": arch >= 90}
    return constexprs


def _job(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    options: Mapping[str, Any],
    wants_sass: bool,
) -> _Job:
    missing = [name for name in kernel.arg_names if name not in signature and name not in constexprs]
    unknown = [name for name in (*signature, *constexprs) if name not in kernel.arg_names]
    assert not missing, f"no type and no value for {missing}"
    assert not unknown, f"the kernel has no argument {unknown}"
    return _Job(
        module=kernel.fn.__module__,
        name=kernel.fn.__name__,
        signature=dict(signature),
        constexprs=dict(constexprs),
        arch=arch,
        options=dict(options),
        wants_sass=wants_sass,
    )


def _compile_all(jobs: list[_Job]) -> list[CompiledKernel]:
    return list(_workers().map(_compile, jobs))


@cache
def _workers() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(_NUM_WORKERS, mp_context=context, initializer=_forget_interpreter)


def _forget_interpreter() -> None:
    """In a worker, before anything there imports triton; saying that products and sums may fuse spares a warning."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def _compile(job: _Job) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = getattr(importlib.import_module(job.module), job.name)
    types = {name: job.signature.get(name, "constexpr") for name in kernel.arg_names}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        signature={name: kind.partition(":")[0] for name, kind in types.items()},
        constexprs={(kernel.arg_names.index(name),): value for name, value in job.constexprs.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if _is_divisible(kind)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options))
    usage = _resource_usage(compiled.asm["cubin"])
    return CompiledKernel(
        name=job.name,
        arch=job.arch,
        num_warps=job.options["num_warps"],
        num_registers=usage["REG"],
        local_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        ttgir=compiled.asm["ttgir"],
        sass=_on_cubin("nvdisasm", "-c", compiled.asm["cubin"]) if job.wants_sass else "",
    )


def _is_divisible(kind: str) -> bool:
    base, _, divisor = kind.partition(":")
    return divisor == "16" or (base.startswith("*") and divisor != "1")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return cuobjdump's numbers of the one function: REG, STACK (spills live there), SHARED, LOCAL."""
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _on_cubin("cuobjdump", "-res-usage", cubin))
    return {name: int(number) for name, number in found}


def _on_cubin(tool: str, flag: str, cubin: bytes) -> str:
    """Run one of the binary tools that come with triton."""
    from triton.backends import nvidia

    path = Path(nvidia.__path__[0]) / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, flag, file.name], check=True, capture_output=True, text=True, timeout=120).stdout
