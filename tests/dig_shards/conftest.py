"""Small trajectories and datasets with known content: frame f of a trajectory is a pure function of (seed, f)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from dig_shards import FieldSpec, PackPlan, SplitBy, TrajectorySource, TrajectoryWriter
from dig_shards.pack import pack

Arrays = Callable[[int, int, int, int], dict[str, np.ndarray]]
WriteTrajectory = Callable[..., Path]


def fields_of(n_atoms: int) -> tuple[FieldSpec, ...]:
    return (
        FieldSpec("positions", (n_atoms, 3), "int32", 1e-3, "Å"),
        FieldSpec("energy", (), "float64", None, "eV"),
        FieldSpec("charge", (), "int8", None, "e"),
    )


def arrays_of(n_atoms: int, seed: int, start: int, stop: int) -> dict[str, np.ndarray]:
    frames = np.arange(start, stop)
    phase = frames[:, None, None] * 0.37 + np.arange(n_atoms * 3).reshape(1, n_atoms, 3) + seed
    return {
        "positions": (20 * np.sin(phase)).astype(np.float32),
        "energy": -1e3 * seed + frames / 7,
        "charge": (frames % 3 - 1).astype(np.int8),
    }


@pytest.fixture(scope="session")
def fields() -> Callable[[int], tuple[FieldSpec, ...]]:
    return fields_of


@pytest.fixture(scope="session")
def arrays() -> Arrays:
    return arrays_of


@pytest.fixture(scope="session")
def write_trajectory() -> WriteTrajectory:
    def write(
        path: Path, n_frames: int, system: str = "alanine", n_atoms: int = 5, seed: int = 0, chunk: int = 16
    ) -> Path:
        attributes = {"system_id": system, "origin": {"engine": "test", "seed": seed}, "topology": "ATOM Å"}
        with TrajectoryWriter.create(path, fields_of(n_atoms), attributes, chunk) as writer:
            whole = n_frames // chunk * chunk
            for start in range(0, whole, chunk):
                writer.append_chunk(arrays_of(n_atoms, seed, start, start + chunk))
            writer.finish(arrays_of(n_atoms, seed, whole, n_frames) if n_frames > whole else None)
        return path

    return write


@pytest.fixture(scope="session")
def sources(
    tmp_path_factory: pytest.TempPathFactory, write_trajectory: WriteTrajectory
) -> tuple[TrajectorySource, ...]:
    """Three trajectories of two systems of different sizes; the second is drawn with a slice."""
    folder = tmp_path_factory.mktemp("trajectories")
    return (
        TrajectorySource(write_trajectory(folder / "a.zarr", 100)),
        TrajectorySource(write_trajectory(folder / "b.zarr", 90, seed=1), start=5, stop=80, stride=3),
        TrajectorySource(write_trajectory(folder / "c.zarr", 70, system="benzene", n_atoms=7, seed=2)),
    )


@pytest.fixture(scope="session")
def sidecars() -> Mapping[str, str]:
    return {"alanine": '{"name": "Ala"}', "benzene": '{"name": "Benzene, Å"}'}


@pytest.fixture(scope="session")
def plan() -> PackPlan:
    return PackPlan(
        name="toy",
        fields=("positions", "energy"),
        frames_per_member=8,
        members_per_shard=5,
        validation_fraction=0.2,
        split_by=SplitBy.BLOCK,
        block_frames=10,
        seed=3,
    )


@pytest.fixture(scope="session")
def dataset(
    tmp_path_factory: pytest.TempPathFactory,
    sources: tuple[TrajectorySource, ...],
    plan: PackPlan,
    sidecars: Mapping[str, str],
) -> Path:
    """A finished dataset; tests that damage it copy it first."""
    out = tmp_path_factory.mktemp("datasets") / "toy"
    pack(sources, out, plan, sidecars)
    return out
