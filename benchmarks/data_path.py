"""How much faster frames are read from shards than training consumes them.

    python benchmarks/data_path.py --json FILE [--recipe NAME] [--frames N] [--steps N]

Packs synthetic frames of the recipe's first system, reads them as the trainer does (frame ids -> positions, one process)
and runs a short real training of the recipe's model. `step input` adds diffusion times and noise to the reading.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from dig_shards import Cursor, ShardReader, TrajectoryWriter, batch_ids
from dig_shards.manifest import TRAIN

from benchmarks.rows import Row, at_least, note, publish
from dig_scale.config import Recipe, Train
from dig_scale.importers import system_from_spec
from dig_scale.recipe_files import load_recipe
from dig_scale.records import POSITIONS, field_specs, pack_dataset, trajectory_attributes
from dig_scale.training.data import open_split, step_input
from dig_scale.training.launch import launch_ranks
from dig_scale.training.metrics import read_metrics
from dig_scale.training.zero import Ranks

BAR = 10.0
BATCHES = 200


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--frames", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    overrides = [f"train.steps={given.steps}", "train.log_every=5", "train.warmup_steps=1"]
    recipe = load_recipe(given.recipe, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        publish(rows_of(recipe, given.frames, Path(scratch)), given.json)


def rows_of(recipe: Recipe, frames: int, scratch: Path) -> list[Row]:
    """Rows for one recipe on synthetic frames."""
    assert recipe.train is not None
    write_synthetic(recipe, frames, scratch / "trajectories")
    pack_dataset(recipe, [scratch / "trajectories"], scratch / "dataset")
    reading = read_speed(scratch / "dataset", recipe.train)
    inputs = step_input_speed(scratch / "dataset", recipe, recipe.train)
    launch_ranks(recipe, scratch / "dataset", scratch / "run")
    found = [row for row in read_metrics(scratch / "run") if row["kind"] == "train"]
    # The first rows hold start-up; the median of the rest stands for the run.
    consumed = float(np.median([row["samples_per_s"] for row in found[1:]]))
    waiting = float(np.mean([row["data_wait_share"] for row in found[1:]]))
    return [
        note("frames read from shards, one process", reading, "frames/s"),
        note("step input (read, times, noise), one process", inputs, "frames/s"),
        note("frames consumed by training, all ranks", consumed, "frames/s"),
        at_least("reading over training", reading / consumed, "x", BAR),
        note("share of training time spent waiting for data", waiting, ""),
    ]


def write_synthetic(recipe: Recipe, frames: int, folder: Path) -> None:
    """One trajectory: the system's reference geometry with 0.3 Å of noise."""
    system = system_from_spec(recipe.systems[0], recipe.simulate)
    kelvin = recipe.simulate.temperature if recipe.simulate else 300.0
    origin = {"temperature_K": kelvin, "first_frame_ps": 0.0, "frame_spacing_ps": 1.0, "engine": "synthetic"}
    attributes, fields = trajectory_attributes(system, origin), field_specs(system.n_sites, [POSITIONS])
    random = np.random.default_rng(0)
    with TrajectoryWriter.create(folder / "synthetic.zarr", fields, attributes, chunk_frames=1000) as writer:
        for _ in range(frames // 1000):
            noise = random.normal(0, 0.3, (1000, system.n_sites, 3))
            writer.append_chunk({POSITIONS: (system.reference_positions + noise).astype(np.float32)})
        writer.finish()


def read_speed(dataset: Path, train: Train) -> float:
    """Frames per second from ids to tensors, in the order of training."""
    reader = ShardReader(dataset, TRAIN)
    cursor = Cursor(train.seed)

    def read() -> None:
        nonlocal cursor
        ids, cursor = batch_ids(cursor, reader.n_frames, train.global_batch)
        torch.from_numpy(reader.read_batch(ids, POSITIONS))

    return train.global_batch / seconds_per_call(read)


def step_input_speed(dataset: Path, recipe: Recipe, train: Train) -> float:
    """Frames per second of complete step inputs."""
    alone = Ranks(0, 1, torch.device("cpu"))
    data = open_split(dataset, TRAIN, recipe, alone.device)
    assert data is not None
    cursor = Cursor(train.seed)

    def make() -> None:
        nonlocal cursor
        cursor = step_input(data, train, alone, 0, cursor).next_cursor

    return train.global_batch / seconds_per_call(make)


def seconds_per_call(function: Callable[[], None]) -> float:
    """Mean over BATCHES calls after one to warm up."""
    function()
    start = time.perf_counter()
    for _ in range(BATCHES):
        function()
    return (time.perf_counter() - start) / BATCHES


if __name__ == "__main__":
    main()
