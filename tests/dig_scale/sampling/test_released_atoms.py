"""DDPM, DDIM and flow of the released networks of atoms: published schedules, exact scores, fixed atoms, constraints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dig_scale.errors import UserError
from dig_scale.sampling.released import Walk
from dig_scale.sampling.released_atoms import (
    AtomDiffusion,
    AtomNetwork,
    Betas,
    catalyst_betas,
    ddim,
    ddim_steps,
    ddpm,
    flow,
    ligand_betas,
)

REFERENCE = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.0, 6.0], [0.0, 9.0, 0.0]])
MOVING = torch.tensor([True, False, True])
MEAN, SPREAD = 0.7, 0.4
WALKERS = 600


def walk(count: int = WALKERS) -> Walk:
    index = torch.arange(count)
    return Walk(torch.full_like(index, 5), index)


def exact(betas: Betas) -> AtomNetwork:
    """The noise that displacements N(MEAN, SPREAD^2) imply."""

    def network(positions: Tensor, step: Tensor) -> Tensor:
        kept = betas.kept[step][:, None, None]
        variance = kept * SPREAD**2 + 1 - kept
        return (1 - kept).sqrt() * (positions - REFERENCE - kept.sqrt() * MEAN) / variance

    return network


@pytest.mark.parametrize(
    ("betas", "beta", "kept"),
    [
        (catalyst_betas(), (5.04500e-6, 1.000650e-3, 1.995055e-3), (0.99999493, 0.56167603, 6.70819e-3)),
        (ligand_betas(), (4.95522e-5, 1.0060170e-2, 1.9950548e-2), (0.99995047, 0.55645168, 6.45915e-3)),
    ],
)
def test_schedules_are_the_published_ones(betas: Betas, beta: tuple[float, ...], kept: tuple[float, ...]) -> None:
    index = torch.tensor([0, betas.steps // 2, betas.steps - 1])
    assert betas.beta[index].tolist() == pytest.approx(beta, rel=1e-5)
    assert betas.kept[index].tolist() == pytest.approx(kept, rel=1e-5)


def moments(positions: Tensor) -> tuple[float, float]:
    moved = (positions - REFERENCE)[:, MOVING]
    return moved.mean().item(), moved.std().item()


def test_ddpm_draws_from_the_data_and_leaves_fixed_atoms_alone() -> None:
    of = AtomDiffusion(ligand_betas(), REFERENCE, MOVING)
    fixed = REFERENCE + 0.25
    final = ddpm(exact(of.betas), of.prior(fixed, walk()), of, walk())
    mean, spread = moments(final)
    assert mean == pytest.approx(MEAN, abs=0.03)  # 3,600 numbers: 0.007 of statistical error
    assert spread == pytest.approx(SPREAD, rel=0.06)
    assert torch.equal(final[:, 1], fixed[1].expand(WALKERS, 3))


@pytest.mark.parametrize("way", ["ddim", "flow"])
def test_deterministic_samplers_carry_the_prior_to_the_data(way: str) -> None:
    of = AtomDiffusion(ligand_betas(), REFERENCE, MOVING)
    start = of.prior(REFERENCE, walk())
    network = exact(of.betas)
    final = flow(network, start, of) if way == "flow" else ddim(network, start, of, ddim_steps(of.betas, 250, 1))
    first, last = (start - REFERENCE)[:, MOVING], (final - REFERENCE)[:, MOVING]
    kept = of.betas.kept[-1]
    expected = MEAN + SPREAD * (first - kept.sqrt() * MEAN) / (kept * SPREAD**2 + 1 - kept).sqrt()
    assert (last - expected).abs().max() < 0.06
    assert torch.equal(final[:, 1], REFERENCE[1].expand(WALKERS, 3))


def test_steps_of_ddim_rise_to_the_noisiest_and_repeat() -> None:
    betas = ligand_betas()
    steps = ddim_steps(betas, 50, 7)
    assert len(steps) == 50 and steps[-1] == 499 and (steps.diff() > 0).all() and steps[0] >= 1
    assert torch.equal(steps, ddim_steps(betas, 50, 7))
    with pytest.raises(UserError, match="1 steps of DDIM"):
        ddim_steps(betas, 1, 0)


def test_the_constraint_holds_after_every_step() -> None:
    def on_the_plane(positions: Tensor) -> Tensor:
        return positions * torch.tensor([1.0, 1.0, 0.0])

    of = AtomDiffusion(ligand_betas(), REFERENCE, torch.ones(3, dtype=torch.bool), on_the_plane)
    seen = []

    def network(positions: Tensor, step: Tensor) -> Tensor:
        seen.append(positions[..., 2].abs().max().item())
        return exact(of.betas)(positions, step)

    few = walk(2)
    final = ddpm(network, of.prior(REFERENCE, few), of, few)
    assert max(seen) == 0 and final[..., 2].abs().max() == 0 and len(seen) == 500


def test_a_walker_does_not_depend_on_its_batch() -> None:
    of = AtomDiffusion(ligand_betas(), REFERENCE, MOVING)
    together = ddpm(exact(of.betas), of.prior(REFERENCE, walk(3)), of, walk(3))
    last = Walk(walk(3).seed[2:], walk(3).index[2:])
    alone = ddpm(exact(of.betas), of.prior(REFERENCE, last), of, last)
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=1e-5)
