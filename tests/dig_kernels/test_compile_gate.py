"""Every kernel in its chosen configurations compiles for Ampere and Hopper without spills, with tensor cores where claimed.

Compilation needs Triton without its interpreter, so it runs in one process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "kernels"
MATRIX_INSTRUCTIONS = {80: {"mma.sync"}, 90: {"mma.sync", "wgmma.mma_async"}}

PROGRAM = """
import importlib, json, sys
from concurrent.futures import ThreadPoolExecutor
from dig_kernels.compiling import compile_case

jobs = [
    (module, case, capability)
    for module in sys.argv[1:]
    for case in importlib.import_module(f"dig_kernels.{module}").compile_cases()
    for capability in case.capabilities
]

def report(job):
    module, case, capability = job
    try:
        found = compile_case(case, capability)
    except Exception as error:
        return dict(name=f"{module}: {case.name}", capability=capability, error=repr(error)[:2000])
    return dict(
        name=f"{module}: {case.name}", capability=capability, registers=found.registers, spills=found.spills_bytes,
        shared=found.shared_bytes, claimed=case.needs_tensor_cores, instructions=sorted(found.tensor_core_instructions),
    )

with ThreadPoolExecutor(2) as pool:
    print(json.dumps(list(pool.map(report, jobs))))
"""


def modules() -> list[str]:
    """Modules of the package that offer compile cases."""
    offering = [path.stem for path in (FOLDER / "dig_kernels").glob("*.py") if "def compile_cases(" in path.read_text()]
    return sorted(offering)


@pytest.mark.timeout(900)
def test_no_kernel_spills_and_tensor_cores_are_used_where_claimed() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(FOLDER)
    command = [sys.executable, "-c", PROGRAM, *modules()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = json.loads(done.stdout.splitlines()[-1])
    assert {"attention_launch", "deferred_kernels"} <= {each["name"].split(":")[0] for each in reports}
    failed = [each for each in reports if "error" in each or each["spills"]]
    assert not failed, "\n".join(map(str, failed))
    for each in reports:
        used = set(each["instructions"]) & MATRIX_INSTRUCTIONS[each["capability"]]
        assert used or not each["claimed"], f"no tensor cores in {each}"


def test_the_gate_sees_spills_and_tensor_cores() -> None:
    from dig_kernels.compiling import tensor_core_instructions

    text = "wgmma.mma_async.sync.aligned.m64n64k16 {}; mma.sync.aligned.m16n8k16 {};"
    assert tensor_core_instructions(text) == {"wgmma.mma_async", "mma.sync"}
    assert tensor_core_instructions("fma.rn.f32 a, b, c;") == frozenset()
