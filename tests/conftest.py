"""Shared fixtures. Real data is read where it stands and tests that need it skip loudly where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real reference data, from DIG_SCALE_SHARED; the test skips where it is absent."""
    folder = Path(os.environ.get("DIG_SCALE_SHARED", "../shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"real data absent: {folder} (set DIG_SCALE_SHARED to the folder that holds data/)")
    return folder
