"""Where the stages of a run keep their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolders:
    """Where the stages of one run keep their files."""

    root: Path

    @property
    def trajectories(self) -> Path:
        """Zarr trajectories of the simulation."""
        return self.root / "trajectories"

    @property
    def dataset(self) -> Path:
        """Packed training shards."""
        return self.root / "dataset"

    @property
    def model(self) -> Path:
        """Training run with its model.safetensors."""
        return self.root / "model"

    @property
    def predictor(self) -> Path:
        """Training run of a predictor, by a recipe with [predict]."""
        return self.root / "predictor"

    @property
    def ensemble(self) -> Path:
        """Samples."""
        return self.root / "ensemble"

    @property
    def report(self) -> Path:
        """report.html, report.json and summary.png."""
        return self.root / "report"


def default_folders(name: str) -> RunFolders:
    """Where a recipe's run goes when nothing else is said: runs/NAME."""
    return RunFolders(Path("runs") / name)
