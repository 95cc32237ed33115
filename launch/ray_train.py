"""Train with Ray Train: the same loop, with Ray starting the ranks and starting them again when one is lost.

    python launch/ray_train.py RECIPE DATASET OUT --workers 4 [--gpus] [--max-failures 3]

DATASET and OUT must be on a file system that all workers share: checkpoints are written there by the ranks themselves and
found there again, so Ray copies none. Ray is imported in `main` and DeepSpeed in the workers only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def train_worker(arguments: dict[str, Any]) -> None:
    """One rank; Ray has set its environment and joined the process group."""
    from dig_scale.recipe_files import parse_recipe
    from dig_scale.training.trainer import train

    train(parse_recipe(arguments["recipe"], "recipe"), Path(arguments["dataset"]), Path(arguments["out"]))


def main() -> None:
    """Parse the command line and run until the model is trained."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from dig_scale.training.launch import read_recipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", action="store_true", help="one GPU per worker")
    parser.add_argument("--max-failures", type=int, default=3)
    given = parser.parse_args()
    out = given.out.resolve()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": read_recipe(given.recipe).model_dump(mode="json"),
            "dataset": str(given.dataset.resolve()),
            "out": str(out),
        },
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpus),
        torch_config=TorchConfig(backend="nccl" if given.gpus else "gloo"),
        run_config=RunConfig(
            name="ray", storage_path=str(out), failure_config=FailureConfig(max_failures=given.max_failures)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
