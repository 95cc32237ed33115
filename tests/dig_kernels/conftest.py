"""Kernels run in Triton's interpreter here: the choice must stand before Triton is imported."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def products_of_bf16() -> None:
    """The interpreter keeps bf16 as 16-bit integers and multiplies those; widened to fp32 first, products are right."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    builder, language = interpreter.InterpreterBuilder, pytest.importorskip("triton.language")
    original = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype != language.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, language.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, widened(a), widened(b), *others)

    builder.create_dot = create_dot
