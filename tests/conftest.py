"""Shared fixtures. Real data is read where it stands and tests that need it skip loudly where it is absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import numpy as np
import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real reference data, from DIG_SCALE_SHARED; the test skips where it is absent."""
    folder = Path(os.environ.get("DIG_SCALE_SHARED", "../shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"real data absent: {folder} (set DIG_SCALE_SHARED to the folder that holds data/)")
    return folder


@pytest.fixture(scope="session")
def products_of_bf16() -> None:
    """Triton's interpreter keeps bf16 as 16-bit integers and multiplies those; widened to fp32 first, products are right."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
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
