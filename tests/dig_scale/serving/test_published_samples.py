"""From a published file to samples: protein networks, replay of start states, slabs and carbon."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dig_scale.batch import State
from dig_scale.errors import UserError
from dig_scale.importers.representations import Representation
from dig_scale.model.published.weights import PublishedModel, load_published
from dig_scale.sampling.released_atoms import sigmoid_betas
from dig_scale.serving.published import (
    PublishedSampler,
    init_state_arrays,
    published_score_fn,
    read_init_state,
    sample_carbon,
    sample_published,
    sample_slab,
)
from tests.dig_scale.model.published.published_files import (
    SMALL,
    bioemu_config,
    bioemu_table,
    carbon_table,
    catalyst_table,
    random_state,
    representation_arrays,
    save,
    structure_table,
    waves,
)
from tests.dig_scale.model.published.test_published_atoms import slab

RESIDUES = 4


def representation(residues: int = RESIDUES) -> Representation:
    return Representation("chain", **representation_arrays(residues))


def protein(folder: Path) -> PublishedModel:
    state = waves(structure_table(16, 8, 1, 2, 16), 0.1)
    return load_published(save({"state_dict": state}, folder / "protein.pth"))


def bioemu(folder: Path) -> PublishedModel:
    sizes = {"width": 16, "pair": 8, "hidden": 16, "heads": 2, "layers": 1}
    (folder / "config.yaml").write_text(bioemu_config("true", **sizes))
    shapes = bioemu_table(structure_table(16, 8, 1, 2, 16), 1, 16, 8, 1)
    return load_published(save(waves(shapes, 0.1), folder / "checkpoint.ckpt"))


def assert_rotations(rotations: np.ndarray | None, samples: int) -> None:
    assert rotations is not None and rotations.shape == (samples, RESIDUES, 3, 3)
    np.testing.assert_allclose(
        rotations @ rotations.swapaxes(-1, -2), np.broadcast_to(np.eye(3), rotations.shape), atol=1e-4
    )


def test_a_protein_sample_is_replayed_from_its_start_state(tmp_path: Path) -> None:
    model = protein(tmp_path)
    samples = sample_published(model, representation(), 3, seed=1)
    assert samples.positions.shape == (3, RESIDUES, 3)
    assert samples.index.tolist() == [0, 1, 2]
    assert_rotations(samples.rotations, 3)
    assert samples.start_positions is not None and samples.start_rotations is not None
    state = State(
        positions=torch.from_numpy(samples.start_positions), rotations=torch.from_numpy(samples.start_rotations)
    )
    np.savez(tmp_path / "chain_2_init_state.npz", **init_state_arrays(state, 2))
    start = read_init_state(tmp_path / "chain_2_init_state.npz")
    replayed = sample_published(model, representation(), 1, seed=99, start=start)
    np.testing.assert_allclose(replayed.positions[0], samples.positions[2], atol=1e-3)
    assert replayed.rotations is not None and samples.rotations is not None
    np.testing.assert_allclose(replayed.rotations[0], samples.rotations[2], atol=1e-4)


def test_bioemu_is_sampled_with_the_processes_of_its_configuration(tmp_path: Path) -> None:
    model = bioemu(tmp_path)
    samples = sample_published(model, representation(), 2, seed=0, sequence="GAVL")
    assert samples.positions.shape == (2, RESIDUES, 3) and np.isfinite(samples.positions).all()
    assert_rotations(samples.rotations, 2)
    other = sample_published(model, representation(), 2, seed=0, sampler=PublishedSampler.DPM, sequence="WWWW", batch=1)
    assert not np.allclose(samples.positions, other.positions, atol=1e-3)
    with pytest.raises(UserError, match="give the sequence"):
        sample_published(model, representation(), 1, seed=0)


def test_score_functions_of_both_networks_are_of_the_shape_of_a_state(tmp_path: Path) -> None:
    state = State(positions=torch.randn(2, RESIDUES, 3), rotations=torch.eye(3).expand(2, RESIDUES, 3, 3))
    for model in (protein(tmp_path), bioemu(tmp_path)):
        score_fn = published_score_fn(model, representation(), "GAVL")
        score = score_fn(state, None, torch.tensor([0.2, 0.9]))  # type: ignore[arg-type]
        assert score.positions is not None and score.rotations is not None
        assert score.positions.shape == score.rotations.shape == (2, RESIDUES, 3)
        assert score.positions[0].abs().max() > score.positions[1].abs().max()


def test_samplers_and_start_states_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = protein(tmp_path)
    with pytest.raises(UserError, match="dig-protein has no sampler 'dpm'; its own are"):
        sample_published(model, representation(), 1, seed=0, sampler=PublishedSampler.DPM)
    start = State(positions=torch.zeros(1, 3, 3), rotations=torch.eye(3).expand(1, 3, 3, 3))
    with pytest.raises(UserError, match=r"start states \(1, 3, 3\) for 1 samples of 4 residues"):
        sample_published(model, representation(), 1, seed=0, start=start)
    np.savez(tmp_path / "bad.npz", tr=np.zeros((3, 3)), rot_mat=np.zeros((2, 3, 3)))
    with pytest.raises(UserError, match=r"bad\.npz: arrays .* expected tr \(N, 3\)"):
        read_init_state(tmp_path / "bad.npz")
    with pytest.raises(UserError, match="not a readable _init_state"):
        read_init_state(tmp_path / "absent.npz")


def test_a_slab_keeps_its_subsurface_and_moves_the_rest(tmp_path: Path) -> None:
    model = load_published(save({"model": random_state(catalyst_table(**SMALL))}, tmp_path / "catalyst.pt"))
    samples = sample_slab(model, slab(), 3, seed=0, betas=sigmoid_betas(20, 0.3), batch=2)
    assert samples.positions.shape == (3, 5, 3) and np.isfinite(samples.positions).all()
    still = slab().reference_positions[0]
    np.testing.assert_allclose(samples.positions[:, 0], np.broadcast_to(still, (3, 3)), atol=1e-5)
    assert np.ptp(samples.positions[:, 1:], axis=0).min() > 1e-3
    with pytest.raises(UserError, match="it is no network of proteins"):
        sample_published(model, representation(), 1, seed=0, sampler=PublishedSampler.RELEASED)


def test_carbon_comes_with_its_cell(tmp_path: Path) -> None:
    model = load_published(save({"model": random_state(carbon_table(**SMALL))}, tmp_path / "carbon.pt"))
    samples = sample_carbon(model, 3, 2, seed=0, betas=sigmoid_betas(10, 0.3))
    assert samples.positions.shape == (2, 3, 3)
    assert samples.cell is not None and samples.cell.shape == (2, 3, 3)
    assert np.abs(np.linalg.det(samples.cell)).min() > 1.0
    with pytest.raises(UserError, match="expected DiG's catalyst network"):
        sample_slab(model, slab(), 1, seed=0)
