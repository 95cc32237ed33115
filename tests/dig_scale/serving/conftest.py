"""One tiny checkpoint for all tests of serving, and what offline sampling gives for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dig_scale.serving.fixtures import Offline, save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def offline(checkpoint_file: Path) -> Offline:
    """Offline sampling of the same checkpoint."""
    return Offline(checkpoint_file)
