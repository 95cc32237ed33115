"""A process killed at any moment loses at most its unfinished chunk, and its successor ends where it would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import killer  # the program beside this test
import pytest
from dig_shards import TrajectoryReader
from dig_shards.verify import verify

PROGRAM = Path(__file__).with_name("killer.py")


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder in memory where there is such a place: hundreds of runs flush every file to disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def kill_many_times(mode: str, root: Path) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, PROGRAM, mode, root], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_trajectory_killed_at_any_operation_ends_bit_equal_to_an_uninterrupted_one(folder):
    killer.append(folder / "reference.zarr")
    expected = contents(folder / "reference.zarr")
    assert TrajectoryReader(folder / "reference.zarr").n_frames == killer.FRAMES
    kills = kill_many_times("append", folder)
    assert min(kills["whole"], kills["torn"]) > 60
    assert kills["random"] > 10
    stores = list(folder.glob("*/target.zarr"))
    assert len(stores) > kills["whole"] + kills["torn"]
    for store in stores:
        assert contents(store) == expected, store


def test_pack_killed_at_any_operation_and_run_again_is_clean_and_identical(folder):
    for name in "ab":
        killer.append(folder / f"{name}.zarr")
    (folder / "reference").mkdir()
    killer.pack_two(folder / "reference" / "target.zarr")
    expected = contents(folder / "reference" / "target.zarr")
    kills = kill_many_times("pack", folder)
    assert kills["torn"] > 50
    assert kills["random"] > 10
    for dataset in folder.glob("*/target.zarr"):
        assert verify(dataset).is_clean
        found = contents(dataset)
        assert found.pop("manifest.json")  # holds the time of its making
        assert found == {name: data for name, data in expected.items() if name != "manifest.json"}
