"""The denoising objective against exact answers."""

from __future__ import annotations

import torch

from dig_scale.batch import Batch, Score, State
from dig_scale.config import Diffusion
from dig_scale.diffusion.composition import composition_for
from dig_scale.model.features import featurise
from dig_scale.objectives.denoising import denoising_loss, draw_times
from dig_scale.system import SystemKind
from tests.molecules import alanine_dipeptide_heavy

SYSTEM = alanine_dipeptide_heavy()
COMPOSITION = composition_for(SystemKind.MOLECULE, Diffusion())


def clean_batch(size: int) -> Batch:
    x = torch.as_tensor(SYSTEM.reference_positions, dtype=torch.float32).expand(size, -1, -1)
    return Batch(State(x), featurise(SYSTEM), (SYSTEM.name,) * size)


def test_antithetic_times_mirror_each_other_and_cover_the_interval() -> None:
    t = draw_times(1001, "antithetic", torch.Generator().manual_seed(0))
    assert len(t) == 1001
    assert torch.allclose(t[:500] + t[501:1001], torch.ones(500))
    assert t.min() < 0.01
    assert t.max() > 0.99


def test_the_perfect_network_has_no_loss_and_a_silent_one_a_loss_of_order_one() -> None:
    batch = clean_batch(64)
    context = batch.context
    clean = COMPOSITION.centred(batch.state, context).positions

    def perfect(state: State, context_, noise_std):
        ratio = context_.extent / torch.sqrt(context_.extent**2 + noise_std**2)
        skip, out = ratio**2, noise_std * ratio
        return Score(positions=(clean - skip[:, None, None] * state.positions) / out[:, None, None])

    def silent(state: State, context_, noise_std):
        return Score(positions=torch.zeros_like(state.positions))

    t = torch.linspace(0, 1, 64)
    noise = COMPOSITION.standard_normal(batch.state, context, torch.Generator().manual_seed(0))
    assert denoising_loss(perfect, COMPOSITION, batch, t, noise).max() < 1e-6
    loss = denoising_loss(silent, COMPOSITION, batch, t, noise)
    assert 0.5 < float(loss.mean()) < 1.5
    assert loss.min() > 0.1


def test_noise_of_a_free_molecule_has_no_centre_of_mass_and_unit_variance_per_degree_of_freedom() -> None:
    state = State(torch.zeros(4000, SYSTEM.n_sites, 3))
    noise = COMPOSITION.standard_normal(state, featurise(SYSTEM), torch.Generator().manual_seed(1)).positions
    assert noise.mean(1).abs().max() < 1e-5
    # 27 of 30 coordinates are free: the mean square has a standard error of about sqrt(2/(27*4000)) = 0.4 %
    assert abs(float((noise**2).sum((1, 2)).mean()) / 27 - 1) < 0.02
