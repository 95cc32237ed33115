"""Packing a subsystem: chosen rows of a field, under a name of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dig_shards import PackPlan, ShardError, ShardReader, TrajectorySource
from dig_shards.pack import pack

ROWS = (4, 0, 2)


def source(path: Path, rows: tuple[int, ...] = ROWS) -> TrajectorySource:
    return TrajectorySource(path, rows={"positions": rows}, system="part")


def plan() -> PackPlan:
    return PackPlan(name="rows", fields=("positions", "energy"), frames_per_member=8, seed=3)


def test_only_the_chosen_rows_are_packed_in_their_order(
    write_trajectory: Callable[..., Path], arrays: Callable[..., dict[str, np.ndarray]], tmp_path: Path
) -> None:
    pack([source(write_trajectory(tmp_path / "a.zarr", 40))], tmp_path / "out", plan())
    reader = ShardReader(tmp_path / "out", "train")
    expected = arrays(5, 0, 0, 40)["positions"][:, list(ROWS)]
    for number in range(40):
        record = reader.record(number)
        assert record.system_id == "part"
        assert np.abs(record.arrays["positions"] - expected[record.source.frame]).max() <= 0.5e-3 + 1e-5


def test_another_selection_is_another_dataset(write_trajectory: Callable[..., Path], tmp_path: Path) -> None:
    path = write_trajectory(tmp_path / "a.zarr", 40)
    pack([source(path)], tmp_path / "out", plan())
    with pytest.raises(ShardError):
        pack([source(path, (0, 1, 2))], tmp_path / "out", plan())


@pytest.mark.parametrize("rows", [(), (0, 5), (-1, 0), (1, 1)])
def test_rows_outside_the_field_are_refused(
    rows: tuple[int, ...], write_trajectory: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match=r"distinct indices in 0\.\.4"):
        pack([source(write_trajectory(tmp_path / "a.zarr", 20), rows)], tmp_path / "out", plan())
