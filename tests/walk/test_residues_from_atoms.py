"""All-atom trajectories become residue frames when they are packed, and train a model of residues."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dig_scale.config import Model, Pack, Recipe
from dig_scale.importers.protein import system_from_sequence
from dig_scale.importers.stores import imported, write_store
from dig_scale.stages.data import pack_stage
from dig_scale.system import Frames
from dig_scale.training.data import noise_rows, open_split


def test_packed_residues_have_positions_and_frames(tmp_path: Path) -> None:
    system = system_from_sequence("peptide", "ACE-ALA-GLY-SER-ALA-NME")
    jitter = np.random.default_rng(1).normal(0, 0.02, (12, system.n_sites, 3))
    frames = Frames(system.reference_positions + jitter, np.arange(12.0))
    write_store(tmp_path / "trajectories" / "peptide" / "one.zarr", system, frames, imported([Path(__file__)]))
    recipe = Recipe(
        name="residues", pack=Pack(atoms="residues", split_by="frame"), model=Model(sites="residues", width=32, heads=4)
    )
    pack_stage(recipe, [tmp_path / "trajectories"], tmp_path / "dataset")
    data = open_split(tmp_path / "dataset", "train", recipe, torch.device("cpu"))
    assert data is not None
    ids = np.arange(4)
    micro = data.micro_batch(ids, torch.rand(4), noise_rows(data, ids, 1, "train", range(4)))
    assert micro.batch.state.positions is not None and micro.batch.state.rotations is not None
    assert micro.batch.state.positions.shape == (4, 4, 3) and micro.batch.state.rotations.shape == (4, 4, 3, 3)
