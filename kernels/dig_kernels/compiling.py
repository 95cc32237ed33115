"""Compile a Triton kernel for a named GPU on a machine without one, and read what the assembler says of it.

In: a CompileCase (a kernel, the types of its arguments, a launch configuration) and a compute capability. Out: registers,
spills, shared memory and the tensor-core instructions in use. Each module with Triton kernels offers its own cases as
`compile_cases()`. Runs no kernel and knows none. Not under Triton's interpreter (TRITON_INTERPRET must be unset).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARP_SIZE = 32
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one launch configuration.

    `signature` names each argument's type in order, as Triton writes it ("*bf16", "i32", "fp32", "constexpr", or a tuple
    of these); `constexprs` gives the values of the constexpr arguments. Pointers count as 16-byte aligned, and so do the
    integer arguments named in `divisible_by_16`. `capabilities` are the GPUs on which this configuration is chosen.
    """

    name: str
    function: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    needs_tensor_cores: bool = False
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)
    capabilities: tuple[int, ...] = (80, 90)


@dataclass(frozen=True)
class CompileReport:
    """What the assembler says: registers a thread, bytes spilled (stores + loads), shared bytes, tensor-core instructions."""

    registers: int
    spills_bytes: int
    shared_bytes: int
    tensor_core_instructions: frozenset[str]


def compile_case(case: CompileCase, capability: int) -> CompileReport:
    """Report of `case` compiled for compute capability 80, 90, ...; raises RuntimeError where the assembler fails."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.function, dict(case.signature), constexprs=dict(case.constexprs), attrs=_alignment(case))
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP_SIZE), options=options)
    ptx = compiled.asm["ptx"]
    log = _assemble(ptx, case.name)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    used = re.search(r"Used (\d+) registers", log)
    if used is None:
        raise RuntimeError(f"{case.name}: the assembler's report names no registers:\n{log}")
    return CompileReport(int(used[1]), sum(map(int, spilled)), compiled.metadata.shared, tensor_core_instructions(ptx))


def tensor_core_instructions(ptx: str) -> frozenset[str]:
    """Families of matrix instructions in PTX text: "wgmma.mma_async", "mma.sync"."""
    return frozenset(re.findall(r"\b(wgmma\.mma_async|mma\.sync)", ptx))


def assembler() -> Path:
    """The ptxas that Triton ships."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def _alignment(case: CompileCase) -> dict[tuple[int, ...], list[list[Any]]]:
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (name, kind) in enumerate(case.signature.items()):
        if isinstance(kind, tuple):
            attributes |= {(place, inner): ALIGNED for inner, each in enumerate(kind) if each.startswith("*")}
        elif kind.startswith("*") or name in case.divisible_by_16:
            attributes[(place,)] = ALIGNED
    return attributes


def _assemble(ptx: str, name: str) -> str:
    target = re.search(r"\.target\s+(\w+)", ptx)
    if target is None:
        raise RuntimeError(f"{name}: PTX without a target")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(assembler()), "-v", f"--gpu-name={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: ptxas failed:\n{done.stderr}")
    return done.stderr
