"""From packed shards to a trained model."""

from __future__ import annotations

from pathlib import Path

from dig_scale.config import Recipe
from dig_scale.progress import duration, stage


def train_stage(recipe: Recipe, dataset: Path, out: Path, ranks: int | None = None) -> None:
    """Train on this machine."""
    from dig_scale.training.launch import TrainingProgress, launch_ranks

    with stage("train") as report:

        def show(p: TrainingProgress) -> None:
            words = f"step {p.step} of {p.steps}, loss {p.loss:.4f}, {p.samples_per_s:.0f} frames/s"
            report(p.step, p.steps, f"{words}, {duration(p.seconds_left)} left")

        launch_ranks(recipe, dataset, out, ranks, show)
