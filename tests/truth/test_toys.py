"""Toys against independent numbers: quadrature of another kind, derivatives, and moments of their samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from dig_scale.diffusion.rotation import RotationProcess
from dig_scale.geometry import rotations
from dig_scale.toy_curved import rotation_mixture
from dig_scale.toy_states import toy_system
from dig_scale.toys import DoubleWell, GaussianMixture, HarmonicCrystal, MuellerBrown, Toy

STIFFNESS = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 4.0]]).double()
MIXTURE = GaussianMixture(
    torch.tensor([[1.0, -0.5], [-1.0, 0.3]]).double(),
    torch.tensor([0.4, 0.7]).double(),
    torch.tensor([0.3, 0.7]).double(),
)
TOYS = {
    "mixture": MIXTURE,
    "double-well": DoubleWell(4.0, 1.0, dimension=2),
    "harmonic-crystal": HarmonicCrystal(STIFFNESS),
    "mueller-brown-10": MuellerBrown(10),
    "mueller-brown-20": MuellerBrown(20),
}
NOISES = (1e-3, 0.02, 0.029, 0.031, 0.1, 1.0, 30.0)
"""sigma/alpha, on both sides of where quadratures change."""


def drawn(toy: Toy, n: int) -> torch.Tensor:
    return toy.sample(n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", list(TOYS))
@pytest.mark.parametrize("noise", NOISES)
def test_the_noised_score_is_the_gradient_of_the_noised_log_density(name: str, noise: float) -> None:
    toy = TOYS[name]
    clean = drawn(toy, 20)
    alpha = torch.full((20,), 1 / math.sqrt(1 + noise**2)).double()
    generator = torch.Generator().manual_seed(1)
    x = alpha[:, None] * (clean + noise * torch.randn(clean.shape, generator=generator).double())
    x.requires_grad_()
    (slope,) = torch.autograd.grad(toy.noised_log_density(x, alpha, noise * alpha).sum(), x)
    assert torch.allclose(toy.noised_score(x, alpha, noise * alpha), slope, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", list(TOYS))
def test_without_noise_the_density_is_that_of_the_energy(name: str) -> None:
    toy = TOYS[name]
    x = drawn(toy, 20)
    found = toy.noised_log_density(x, torch.ones(20).double(), torch.full((20,), 1e-5).double())
    assert torch.allclose(found, -toy.reduced_energy(x) - toy.log_z, atol=1e-5)


def test_log_z_of_the_double_well_is_that_of_an_adaptive_quadrature() -> None:
    for barrier, width in ((1.0, 2.0), (8.0, 0.5)):
        value = integrate.quad(lambda x, b=barrier, w=width: math.exp(-b * ((x / w) ** 2 - 1) ** 2), -6, 6, limit=400)[
            0
        ]
        assert DoubleWell(barrier, width).log_z == pytest.approx(math.log(value), abs=1e-8)


@pytest.mark.parametrize("kt", [10.0, 15.0, 20.0])
def test_log_z_of_mueller_brown_is_that_of_an_independent_sum(kt: float) -> None:
    """Gauss-Legendre panels in another box."""
    toy = MuellerBrown(kt)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(400))
    x, y = -0.9 + 2.9 * nodes, 0.9 + 2.8 * nodes
    points = torch.cartesian_prod(x, y)
    area = (2.9 * weights[:, None] * 2.8 * weights).flatten()
    total = torch.logsumexp(torch.log(area) - toy.reduced_energy(points), 0)
    assert toy.log_z == pytest.approx(float(total), abs=1e-6)


def test_mueller_brown_has_its_published_minima() -> None:
    toy = MuellerBrown(1.0)
    minima = torch.tensor([[-0.558, 1.442], [0.623, 0.028], [-0.050, 0.467]]).double().requires_grad_()
    energy = toy.reduced_energy(minima)
    assert torch.allclose(energy, torch.tensor([-146.70, -108.17, -80.77]).double(), atol=0.01)
    assert torch.autograd.grad(energy.sum(), minima)[0].abs().max() < 3


@pytest.mark.parametrize("kt", [10.0, 20.0])
def test_samples_of_mueller_brown_have_the_exact_populations_and_energy(kt: float) -> None:
    """The mean energy of 20,000 samples is that of a derivative of log Z, within four standard errors."""
    toy = MuellerBrown(kt)
    energy = toy.reduced_energy(drawn(toy, 20_000))
    step = 1e-3
    # log Z of u times 1 ± step, as temperatures: mean u = -d log Z/d scale
    slope = (MuellerBrown(kt / (1 + step)).log_z - MuellerBrown(kt / (1 - step)).log_z) / (2 * step)
    assert abs(float(energy.mean()) + slope) < 4 * float(energy.std()) / math.sqrt(20_000)


def test_a_tilted_mixture_is_the_mixture_times_an_exponential() -> None:
    slope = torch.tensor([0.8, -0.4]).double()
    tilted, x = MIXTURE.tilted(slope), drawn(MIXTURE, 10)
    ratio = -tilted.reduced_energy(x) + MIXTURE.reduced_energy(x) - x @ slope
    assert torch.allclose(ratio, ratio[:1].expand(10), atol=1e-10)


def test_padding_adds_standard_normals_alone() -> None:
    system = toy_system(MIXTURE)
    state = system.state(drawn(MIXTURE, 5))
    assert state.positions.shape == (5, 1, 3)
    alone = -MIXTURE.reduced_energy(state.positions.flatten(1)[:, :2]) - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(system.log_density(state.positions), alone, atol=1e-12)
    t = torch.linspace(0, 1, 5)
    score = system.score_fn(state, system.context, t).positions.flatten(1)
    assert torch.isfinite(score).all() and (score[:, 2] == 0).all()


def test_the_score_of_a_rotation_mixture_is_the_derivative_along_local_turns() -> None:
    axes = torch.tensor([[0.2, -0.4, 1.0], [0.9, 1.1, -0.5]]).double()
    toy = rotation_mixture(
        rotations.exp(axes), torch.tensor([0.25, 0.4]).double(), torch.tensor([0.3, 0.7]).double(), RotationProcess()
    )
    state, t = toy.sample(6, torch.Generator().manual_seed(2)), torch.full((6,), 0.6).double()
    turn = torch.zeros(6, 1, 3).double().requires_grad_()
    moved = type(state)(rotations=state.rotations @ rotations.exp(turn))
    (slope,) = torch.autograd.grad(toy.log_density(moved, t).sum(), turn)
    assert torch.allclose(toy.score_fn(state, toy.context, t).rotations, slope, atol=1e-6)
