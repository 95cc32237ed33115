"""Properties known of some structures alone: kept as missing from file to batch, hidden from the model, all missing refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dig_scale.config import Recipe
from dig_scale.errors import TrainingError, UserError
from dig_scale.importers.crystal import CrystalOptions, import_crystals, load_crystals
from dig_scale.importers.stores import imported, write_store
from dig_scale.model.score_model import ScoreModel
from dig_scale.objectives.denoising import denoising_loss
from dig_scale.recipe_files import parse_recipe
from dig_scale.records import find_trajectories, pack_dataset, read_trajectory_frames
from dig_scale.training.data import TrainingData, noise_rows, open_split
from tests.kinds import SMALL

GAPS = (1.0, None, 2.0, None, 3.0, None)


def crystals(folder: Path, gaps: tuple[float | None, ...]) -> Path:
    """Copper atoms in cells of several shapes; a gap that is None is not in the file, or NaN."""
    text = ""
    for k, gap in enumerate(gaps):
        said = ("" if k % 4 == 1 else " gap=nan") if gap is None else f" gap={gap}"
        text += f'2\nLattice="3 0 0 0 {3.2 + 0.3 * k} 0 0 0 {4.0 + 0.5 * k}" Properties=species:S:1:pos:R:3{said}'
        text += ' pbc="T T T"\nC 0 0 0\nC 1.5 1.6 2.0\n'
    path = folder / "crystals.extxyz"
    path.write_text(text)
    return path


def recipe(sites: str = "crystal") -> Recipe:
    condition = {"name": "gap", "centre": 2.0, "spread": 0.5}
    content = {
        "name": "gaps",
        "model": SMALL | {"sites": sites, "conditions": [condition]},
        "pack": {"validation_fraction": 0.0},
        "train": {},
    }
    return parse_recipe(content, "here")


def dataset(folder: Path, gaps: tuple[float | None, ...], *labels: str) -> Path:
    import_crystals([crystals(folder, gaps)], folder / "stores", CrystalOptions(labels=labels or None, similarity=None))
    pack_dataset(recipe(), [folder / "stores"], folder / "dataset")
    return folder / "dataset"


def opened(folder: Path) -> TrainingData:
    found = open_split(folder, "train", recipe(), torch.device("cpu"))
    assert found is not None
    return found


def test_labels_that_are_missing_stay_missing_in_stores(tmp_path: Path) -> None:
    dataset(tmp_path, GAPS)
    dataset(tmp_path, GAPS)  # the same import again is the same
    _, frames = read_trajectory_frames(find_trajectories(tmp_path / "stores")[0])
    np.testing.assert_array_equal(frames.labels["gap"], [np.nan if gap is None else gap for gap in GAPS])


def test_missing_labels_are_unknown_to_the_model_and_the_rest_trains(tmp_path: Path) -> None:
    data = opened(dataset(tmp_path, GAPS))
    ids = np.arange(6)
    micro = data.micro_batch(ids, torch.full((6,), 0.5), noise_rows(data, ids, 1, "test", range(6)))
    context = micro.batch.context
    assert context.known[:, 0].sum() == 3
    assert sorted(context.condition[context.known].tolist()) == [-2.0, 0.0, 2.0]
    assert (context.condition[~context.known] == 0).all()
    model = ScoreModel(recipe().model)
    loss = denoising_loss(model, micro.composition, micro.batch, micro.t, micro.noise).mean()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.isfinite(loss) and gradients and all(torch.isfinite(one).all() for one in gradients)


def test_labels_that_no_structure_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"crystals\.extxyz: no structure has a number 'gap'; labels there: none"):
        load_crystals([crystals(tmp_path, (None, None))], CrystalOptions(labels=("gap",)))


def test_training_on_a_label_that_is_missing_of_every_frame_is_refused(tmp_path: Path) -> None:
    groups, _ = load_crystals([crystals(tmp_path, GAPS)])
    system, frames = groups[0]
    without = replace(frames, labels={"gap": np.full(6, np.nan)})
    write_store(tmp_path / "stores" / "C2" / "C2.zarr", system, without, imported([]))
    pack_dataset(recipe(), [tmp_path / "stores"], tmp_path / "dataset")
    with pytest.raises(TrainingError, match=r"dataset: label 'gap', .* is missing of every training frame"):
        opened(tmp_path / "dataset")
