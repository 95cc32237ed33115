"""Which implementation runs: the fused kernel, the CPU's fast form, or the differentiable reference.

Fused kernels have first derivatives only. Where more is asked of an operator (forward-mode derivatives, a functorch
transform, create_graph=True) the reference in plain PyTorch runs instead and one log line says so.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from enum import Enum

import torch
from torch import Tensor
from torch.autograd import forward_ad

logger = logging.getLogger("dig_kernels")


class Backend(Enum):
    """Implementations of an operator."""

    REFERENCE = "reference"
    """Plain PyTorch from the formula; differentiable any number of times."""
    CPU = "cpu"
    """Fast form for processors."""
    TRITON = "triton"
    """Fused kernels in Triton (on the CPU: Triton's interpreter, for tests)."""


@functools.cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def backend_for(tensor: Tensor) -> Backend:
    """Fused kernels on a GPU with Triton, the fast form on a CPU, the reference anywhere else."""
    if tensor.device.type == "cuda" and triton_is_installed():
        return Backend.TRITON
    return Backend.CPU if tensor.device.type == "cpu" else Backend.REFERENCE


def wants_reference(operator: str, *tensors: Tensor | None) -> bool:
    """Whether forward-mode derivatives or a functorch transform are active for these tensors; logs once per operator."""
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or any(tensor is not None and _has_tangent(tensor) for tensor in tensors):
        log_slow_path(operator, "a forward-mode derivative or functorch transform")
        return True
    return False


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


@functools.cache
def log_slow_path(operator: str, reason: str) -> None:
    """One warning per operator and reason that the differentiable reference is in use."""
    logger.warning("dig_kernels.%s: %s needs the differentiable reference; this path is slower", operator, reason)
