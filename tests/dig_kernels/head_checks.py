"""Checks shared by the tests of the read-outs: an operator against its fp64 oracle, and mutants of its kernels."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import dig_kernels
import pytest
import torch
from dig_kernels.dispatch import Backend
from torch import Tensor

OUTPUT, GRADIENT = 1e-5, 1e-4
BF16_FLOOR = 2e-3
"""Relative to the largest element."""
NOTHING, TERMS = 1e-6, 0.1
"""What the oracle has below `NOTHING` are terms that cancel, which are larger than `TERMS` and keep their rounding."""

Operator = Callable[[Sequence[Tensor], Backend], tuple[Tensor, ...]]


def evaluate(
    operator: Operator, inputs: Sequence[Tensor], backend: Backend, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and the gradients of all inputs under fixed cotangents."""
    leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in inputs]
    outputs = [y for y in operator(leaves, backend) if y.numel()]
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, cotangents)
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [y.detach() for y in outputs], grads


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected element, or over `TERMS` where that is nothing; 0 of an empty one."""
    if not expected.numel():
        return 0.0
    largest = float(expected.abs().max())
    return float((found.double() - expected).abs().max()) / (largest if largest > NOTHING else TERMS)


def worst_errors(operator: Operator, inputs: Sequence[Tensor], backend: Backend) -> tuple[float, float]:
    """Worst relative errors of outputs and of gradients against the reference in fp64."""
    expected, expected_grads = evaluate(operator, inputs, Backend.REFERENCE, torch.float64)
    found, grads = evaluate(operator, inputs, backend)
    outputs = [error(a, b) for a, b in zip(found, expected, strict=True)]
    return max(outputs, default=0.0), max(error(a, b) for a, b in zip(grads, expected_grads, strict=True))


def passes(operator: Operator, inputs: Sequence[Tensor], backend: Backend) -> bool:
    """The gate: outputs within 1e-5 and gradients within 1e-4 of the fp64 oracle."""
    outputs, grads = worst_errors(operator, inputs, backend)
    return outputs <= OUTPUT and grads <= GRADIENT


def bf16_is_no_worse_than_eager(operator: Operator, inputs: Sequence[Tensor]) -> bool:
    """Whether each error of the kernels is within twice that of the reference in the same dtypes, plus a floor."""
    exact = [y for part in evaluate(operator, inputs, Backend.REFERENCE, torch.float64) for y in part]
    eager = [y for part in evaluate(operator, inputs, Backend.REFERENCE) for y in part]
    fused = [y for part in evaluate(operator, inputs, Backend.TRITON) for y in part]
    return all(error(f, x) <= 2 * error(e, x) + BF16_FLOOR for f, e, x in zip(fused, eager, exact, strict=True))


def second_derivative(operator: Operator, inputs: Sequence[Tensor], backend: Backend) -> list[Tensor]:
    """Gradients of the squared norm of the gradients of a scalar of the outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    scalar = sum((y.sin().sum() for y in operator(leaves, backend)), torch.zeros(()))
    first = torch.autograd.grad(scalar, leaves, create_graph=True)
    return list(torch.autograd.grad(sum(((g**2).sum() for g in first), torch.zeros(())), leaves))


def mutant(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, original: str, changed: str) -> None:
    """Puts a copy of a kernel module with one expression changed in the module's place, for the rest of the test."""
    path = Path(str(importlib.import_module(f"dig_kernels.{module}").__file__))
    text = path.read_text()
    assert original in text, f"{module} no longer contains {original!r}"
    copy = folder / f"{module}_mutant.py"
    copy.write_text(text.replace(original, changed))
    monkeypatch.setattr(dig_kernels, module, _imported(copy))


def _imported(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module
