"""nvcc compiles the CUDA C++ kernels for their architectures without spills, and torch's headers accept the binding."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from dig_kernels import cuda_extension

CSRC = Path(cuda_extension.__file__).parents[1] / "csrc"


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc on PATH: the CUDA sources are not compiled for a GPU here")
    return found


def disassembled(cubin: Path, ptx: Path) -> tuple[str, str]:
    """Text with one section per kernel, and the name of a tensor-core instruction in it: machine code if it can be read."""
    triton = find_spec("triton")
    shipped = Path(triton.origin).parent / "backends/nvidia/bin" if triton is not None and triton.origin else Path()
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(shipped))
    if tool is None:
        return ptx.read_text(), "wmma.mma"
    return subprocess.run([tool, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout, "HMMA"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("architecture", "options", "kernels"), [("90", (), 20), ("80", ("-DDIG_BF16_ONLY",), 10)])
def test_kernels_compile_without_spills_and_with_tensor_cores(
    tmp_path: Path, architecture: str, options: tuple[str, ...], kernels: int
) -> None:
    cubin = tmp_path / "kernels.cubin"
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    paths = ["--keep", "--keep-dir", str(tmp_path), str(CSRC / "instantiate.cu"), "-o", str(cubin)]
    command = ["nice", "-n", "19", nvcc(), "-std=c++17", "-O3", *options, *target, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = re.findall(
        r"Function properties for (\S+)\s+.*?(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert len(reports) == kernels
    assert {name: (stores, loads) for name, stores, loads in reports if (stores, loads) != ("0", "0")} == {}
    text, instruction = disassembled(cubin, next(tmp_path.glob("*.ptx")))
    sections = re.split(r"(?=Function : |\.entry )", text)
    for name in (name for name, *_ in reports if "bfloat16" in name):
        assert any(name in section[:200] and instruction in section for section in sections), (
            f"{name} has no {instruction}"
        )


@pytest.mark.timeout(1800)
def test_the_binding_is_valid_against_the_headers_of_this_torch(tmp_path: Path) -> None:
    """Syntax and types only. A CPU build of torch lacks one generated header, of build flags; an empty one stands in."""
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "c10/cuda/CUDAStream.h").is_file():
        pytest.skip("this torch ships no c10/cuda headers: binding.cpp is not checked here")
    if not (headers / "c10/cuda/impl/cuda_cmake_macros.h").is_file():
        (tmp_path / "c10/cuda/impl").mkdir(parents=True)
        (tmp_path / "c10/cuda/impl/cuda_cmake_macros.h").write_text("#pragma once\n")
    include = [f"-I{folder}" for folder in (tmp_path, headers, headers / "torch/csrc/api/include")]
    command = ["nice", "-n", "19", nvcc(), "-std=c++20", "-c", "-Xcompiler", "-fsyntax-only", *include]
    done = subprocess.run([*command, str(CSRC / "binding.cpp")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
