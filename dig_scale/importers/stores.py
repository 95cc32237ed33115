"""System and Frames -> a finished trajectory store, whole or not at all. Used by every importer that has its frames in memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from dig_shards.errors import ShardError
from dig_shards.trajectory import TrajectoryReader, TrajectoryWriter

from dig_scale import records
from dig_scale.errors import UserError
from dig_scale.system import Frames, System


def imported(sources: list[Path], temperature: float | None = None, frame_spacing_ps: float = 1.0) -> dict[str, Any]:
    """The origin of frames read from files; temperature in K, if known."""
    names = sorted(path.name for path in sources)
    times = {"first_frame_ps": 0.0, "frame_spacing_ps": frame_spacing_ps}
    return {"engine": "imported", "source": names, "temperature_K": temperature} | times


def write_store(store: Path, system: System, frames: Frames, origin: dict[str, Any], chunk_frames: int = 500) -> Path:
    """Write a finished store; one that is there with the same content is left. Returns its path.

    Raises UserError where another one stands.
    """
    attributes = records.trajectory_attributes(system, origin)
    arrays = records.frame_arrays(frames)
    specs = records.field_specs(system.n_sites, records.field_names(frames))
    try:
        if _is_there(store, attributes, frames):
            return store
        with TrajectoryWriter.create(store, specs, attributes, min(chunk_frames, frames.n_frames)) as writer:
            for start in range(0, frames.n_frames, chunk_frames):
                chunk = {name: values[start : start + chunk_frames] for name, values in arrays.items()}
                last = start + chunk_frames >= frames.n_frames
                (writer.finish if last else writer.append_chunk)(chunk)
    except ShardError as error:
        raise UserError(f"{store}: {error}") from error
    return store


def finished_store(store: Path, attributes: dict[str, Any]) -> TrajectoryReader | None:
    """The finished store of these attributes that is there, or None; a half-written one is removed.

    Raises UserError where another one stands.
    """
    if not store.is_dir():
        return None
    reader = TrajectoryReader(store)
    if not reader.is_finished:
        shutil.rmtree(store)
        return None
    if reader.attributes != attributes:
        raise _another(store)
    return reader


def _is_there(store: Path, attributes: dict[str, Any], frames: Frames) -> bool:
    reader = finished_store(store, attributes)
    if reader is None:
        return False
    held = records.frame_arrays(records.read_trajectory_frames(store)[1])
    given = records.frame_arrays(frames)
    same = held.keys() == given.keys() and reader.n_frames == frames.n_frames
    if not same or any(not np.allclose(held[k], given[k], atol=records.POSITION_GRID) for k in given):
        raise _another(store)
    return True


def _another(store: Path) -> UserError:
    return UserError(f"{store} holds another import (other files or options); choose another folder, or remove it")
