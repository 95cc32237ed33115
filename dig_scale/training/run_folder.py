"""The folder of a training run: whose run it is, its checkpoints, and which one is the latest.

    run.json                        recipe and data of the run; another run is refused here
    checkpoints/step-00000500/      DeepSpeed's state, ema-*.safetensors (fragments), state.json (step, cursor, cost)
    checkpoints/latest              name of the newest complete one, written last
    model.safetensors               the consolidated model (see model.checkpoint)
    metrics.jsonl, tensorboard/, logs/

A checkpoint is written under a hidden name, flushed, renamed, and only then named in `latest`: a run killed at any moment
leaves the last complete one. Knows paths and JSON, no tensors.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from dig_shards import Cursor, ShardError, load_manifest
from dig_shards.durable import replace_durably

from dig_scale.config import Recipe
from dig_scale.errors import TrainingError

FORMAT_VERSION = 1
RunState = Literal["new", "begun", "complete"]
_FREE_SETTINGS = frozenset({"ranks", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints"})
"""Settings of [train] that may change when a run is carried on."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: finished steps, the data cursor, how it was split over ranks, and what it cost so far."""

    step: int
    cursor: Cursor
    world_size: int
    zero_stage: int
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    format_version: int = field(default=FORMAT_VERSION)


def model_file(out: Path) -> Path:
    """The consolidated model of a run."""
    # Imported late: a launcher asks without needing torch.
    from dig_scale.model.checkpoint import FILE_NAME

    return out / FILE_NAME


def claim_folder(out: Path, recipe: Recipe, dataset: Path) -> RunState:
    """Make `out` this run's folder and say whether the run is complete.

    Raises TrainingError naming the settings in which the run there differs, or a dataset that is not finished.
    """
    identity = _dataset_identity(dataset)
    wanted = {"format_version": FORMAT_VERSION, "recipe": recipe.model_dump(mode="json"), "dataset_sha256": identity}
    path = out / "run.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        replace_durably(path, json.dumps({**wanted, "dataset": str(dataset)}, indent=1).encode())
        return "new"
    differences = _differences(json.loads(path.read_text()), wanted)
    if differences:
        raise TrainingError(
            f"{out} holds a training run with other settings ({'; '.join(differences)}); "
            "give a new folder, or the recipe and the data of that run"
        )
    folder = latest_checkpoint(out)
    if folder is None:
        return "new"
    done = recipe.train is not None and read_progress(folder).step >= recipe.train.steps
    return "complete" if done and model_file(out).is_file() else "begun"


def lock_folder(out: Path) -> IO[str]:
    """Hold the folder while the returned file is open; raises TrainingError if another process trains there."""
    stream = (out / ".lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise TrainingError(f"{out}: another process is training here; wait for it or give another folder") from None
    return stream


def latest_checkpoint(out: Path) -> Path | None:
    """Folder of the newest complete checkpoint, if any."""
    pointer = out / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    folder = pointer.parent / pointer.read_text().strip()
    if not (folder / "state.json").is_file():
        raise TrainingError(f"{pointer} names {folder.name}, which is not there; write the name of another one into it")
    return folder


def read_progress(folder: Path) -> Progress:
    """Where the run stood at a checkpoint."""
    content = json.loads((folder / "state.json").read_text())
    if content.get("format_version") != FORMAT_VERSION:
        raise TrainingError(f"{folder}: format {content.get('format_version')!r}, this version reads {FORMAT_VERSION}")
    return Progress(**{**content, "cursor": Cursor(**content["cursor"])})


def begin_checkpoint(out: Path, step: int) -> Path:
    """An empty hidden folder to write a checkpoint into."""
    hidden = hidden_folder(out, step)
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    return hidden


def hidden_folder(out: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is published."""
    return out / "checkpoints" / f".step-{step:08d}.tmp"


def publish_checkpoint(out: Path, progress: Progress, keep: int) -> Path:
    """Complete the hidden checkpoint of progress.step, make it the latest, and remove all but the `keep` newest."""
    hidden = hidden_folder(out, progress.step)
    (hidden / "state.json").write_text(json.dumps(asdict(progress)))
    for file in hidden.rglob("*"):
        _flush(file)
    _flush(hidden)
    folder = hidden.with_name(f"step-{progress.step:08d}")
    shutil.rmtree(folder, ignore_errors=True)
    hidden.replace(folder)
    replace_durably(folder.parent / "latest", folder.name.encode())
    complete = sorted(folder.parent.glob("step-*"))
    for old in [*complete[:-keep], *folder.parent.glob(".step-*.tmp")]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _dataset_identity(dataset: Path) -> str:
    """SHA-256 of what a dataset was packed from."""
    try:
        return load_manifest(dataset).request_sha256
    except ShardError as error:
        raise TrainingError(str(error)) from error


def _differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    old, new = _fixed(there), _fixed(wanted)
    return [f"{key} is {old.get(key)} there, {new.get(key)} here" for key in new if old.get(key) != new.get(key)]


def _fixed(run: dict[str, Any]) -> dict[str, Any]:
    """What must not change while a run is carried on, by dotted name."""
    flat = {"data set": run["dataset_sha256"][:12], "predict.property": None}
    for section in ("model", "diffusion", "train", "predict"):
        values = (run["recipe"].get(section) or {}).items()
        flat |= {f"{section}.{key}": value for key, value in values if key not in _FREE_SETTINGS}
    return flat


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
