"""The denoising objective against exact answers."""

from __future__ import annotations

import torch
from torch import Tensor

from dig_scale.batch import Batch, Context, Geometry, Score, State
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
    context = featurise(SYSTEM)
    return Batch(COMPOSITION.state({"positions": x}, context), context, (SYSTEM.name,) * size)


def drawn_noise(size: int, context: Context, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return COMPOSITION.noise(torch.randn(size, COMPOSITION.normals(context), generator=generator), context)


def test_antithetic_times_mirror_each_other_and_cover_the_interval() -> None:
    t = draw_times(1001, "antithetic", torch.Generator().manual_seed(0))
    assert len(t) == 1001
    assert torch.allclose(t[:500] + t[501:1001], torch.ones(500))
    assert t.min() < 0.01
    assert t.max() > 0.99


def test_the_perfect_network_has_no_loss_and_a_silent_one_a_loss_of_order_one() -> None:
    batch = clean_batch(64)
    context = batch.context
    clean = batch.state.positions

    def perfect(seen: Geometry, context: Context, noise_std: Tensor) -> Score:
        extent, noise_std = context.extent.unsqueeze(-1), noise_std[:, None, None]
        ratio = extent / torch.sqrt(extent**2 + noise_std**2)
        return Score(positions=(clean - ratio**2 * seen.positions) / (noise_std * ratio))

    def silent(seen: Geometry, context: Context, noise_std: Tensor) -> Score:
        return Score(positions=torch.zeros_like(seen.positions))

    t = torch.linspace(0, 1, 64)
    noise = drawn_noise(64, context, seed=0)
    assert denoising_loss(perfect, COMPOSITION, batch, t, noise).max() < 1e-6
    loss = denoising_loss(silent, COMPOSITION, batch, t, noise)
    assert 0.5 < float(loss.mean()) < 1.5
    assert loss.min() > 0.1


def test_noise_of_a_free_molecule_has_no_centre_of_mass_and_unit_variance_per_degree_of_freedom() -> None:
    noise = drawn_noise(4000, featurise(SYSTEM), seed=1).positions
    assert noise.mean(1).abs().max() < 1e-5
    # 27 of 30 coordinates are free: the mean square has a standard error of about sqrt(2/(27*4000)) = 0.4 %
    assert abs(float((noise**2).sum((1, 2)).mean()) / 27 - 1) < 0.02
