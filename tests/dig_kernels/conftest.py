"""Kernels run in Triton's interpreter here: the choice must stand before Triton is imported."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def right_products(products_of_bf16: None) -> None:
    """Every test here multiplies as a GPU does."""
