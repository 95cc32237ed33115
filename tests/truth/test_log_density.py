"""Physics-informed training of log-densities: the equation holds for exact ones on every manifold, and the loss finds them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dig_scale.batch import Batch, Context, State, fields_of
from dig_scale.config import Diffusion, PhysicsInformed
from dig_scale.diffusion import rotation
from dig_scale.diffusion.composition import Composition
from dig_scale.diffusion.euclidean import per_sample
from dig_scale.diffusion.periodic import wrapped_normal_density
from dig_scale.geometry import rotations
from dig_scale.objectives.log_density import (
    LogDensityFn,
    energy_loss,
    log_density_informed_loss,
    log_density_residual,
    log_partition,
    score_of,
)
from dig_scale.objectives.physics_informed import (
    Candidates,
    PhysicsDraws,
    exact_probes,
    random_probes,
)
from dig_scale.toy_states import ToySystem, toy_system
from dig_scale.toys import DoubleWell
from tests.kinds import noise_of
from tests.truth.test_physics_informed import TIMES, small_case

DOUBLE_WELL = DoubleWell(barrier=4.0, width=1.5)


@dataclass(frozen=True)
class FrameMixtureDensity:
    """Exact log-density of equally likely clean states, noised: normalised in every field."""

    composition: Composition
    states: State

    def __call__(self, state: State, context: Context, t: Tensor) -> Tensor:
        count = len(next(iter(fields_of(self.states).values())))
        logs = [self._log_kernel(k, state, context, t) for k in range(count)]
        return torch.logsumexp(torch.stack(logs), dim=0) - math.log(count)

    def _log_kernel(self, k: int, state: State, context: Context, t: Tensor) -> Tensor:
        total, sites = torch.zeros_like(t), int(context.present.sum(1)[0])
        for name, values in fields_of(self.states).items():
            process, x, value = self.composition.fields[name].process, getattr(state, name), values[k]
            level = process.coefficients(t)
            if name == "rotations":
                angle = rotations.log(value.mT @ x).norm(dim=-1)
                total = total + rotation.log_density(angle, process.eps(t).unsqueeze(-1)).sum(1)
            elif name == "fractional":
                width = per_sample(level.sigma, x).expand_as(x)
                total = total + torch.log(wrapped_normal_density(x - value, width)).flatten(1).sum(1)
            else:
                degrees = 6 if name == "lattice" else 3 * sites - 3 * int(context.free[0])
                square = ((x - per_sample(level.alpha, x) * value) ** 2).flatten(1).sum(1)
                total = total - square / (2 * level.sigma**2) - degrees * torch.log(level.sigma)
        return total


@pytest.mark.parametrize("kind", ["molecule", "protein", "crystal"])
def test_an_exact_log_density_obeys_the_equation_and_others_do_not(kind: str) -> None:
    """Free molecules, rotations with positions, and the torus with a cell; the constant of each t counts."""
    found = small_case(kind)
    states = found.composition.state(found.frames, found.context)
    t = torch.tensor([0.0, 0.05, 0.1], dtype=torch.float64) + TIMES[kind]
    noised = found.composition.perturb(states, t, noise_of(found))
    exact = FrameMixtureDensity(found.composition, states)
    probes = exact_probes(found.composition, noised, found.context)
    first = next(iter(found.composition.fields.values())).process.coefficients(t)

    def residual(log_density: LogDensityFn) -> float:
        value = log_density_residual(log_density, found.composition, noised, found.context, t, probes)
        return float((value * 2 * first.sigma**2 / first.diffusion).detach().abs().max())

    assert residual(exact) < 1e-6
    assert residual(lambda s, c, time: 1.05 * exact(s, c, time)) > 1e-3
    if kind == "molecule":
        assert residual(lambda s, c, time: exact(s, c, time) + 3.0) < 1e-6
        assert residual(lambda s, c, time: exact(s, c, time) + 0.1 * time) > 1e-3


def double_well() -> tuple[ToySystem, LogDensityFn]:
    """The double well as a system, and its exact log-density."""
    system = toy_system(DOUBLE_WELL, Diffusion(schedule="log-linear", noise_min=1e-3, noise_max=1e3))

    def log_density(state: State, context: Context, t: Tensor) -> Tensor:
        level = system.composition.fields["positions"].process.coefficients(t.double())
        return system.toy.noised_log_density(state.positions.flatten(1), level.alpha, level.sigma)

    return system, log_density


def candidates_with_energies(system: ToySystem, rows: int) -> Candidates:
    x = torch.randn(rows, 1, 3, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    energy = system.reduced_energy(x)
    gradient = torch.autograd.grad(energy.sum(), x)[0]
    return Candidates(Batch(State(x.detach()), system.context, ("toy",)), State(gradient), energy.detach())


def test_the_loss_is_zero_for_the_exact_log_density_and_its_constant_is_the_partition_function() -> None:
    system, exact = double_well()
    candidates = candidates_with_energies(system, 16)
    shifted = lambda s, c, t: exact(s, c, t) + system.log_z  # noqa: E731
    settings = PhysicsInformed(probes=None, length=0.1)
    generator = torch.Generator().manual_seed(4)
    noise = State(torch.randn(16, 1, 3, generator=generator).double())
    t = torch.linspace(0.3, 1.0, 16, dtype=torch.float64)
    state = candidates.batch.state
    draws = PhysicsDraws(t, noise, exact_probes(system.composition, state, system.context))

    def loss(log_density: LogDensityFn) -> Tensor:
        return log_density_informed_loss(log_density, system.composition, candidates, draws, settings).detach()

    # the first noise level is not none: its width times the curvature of the well is what remains
    assert loss(shifted).max() < 1e-4
    assert loss(lambda s, c, t: shifted(s, c, t) + 0.3).min() > 0.08
    tilted = lambda s, c, t: shifted(s, c, t) + 0.2 * torch.sign(s.positions[:, 0, 0])  # noqa: E731
    assert loss(tilted).min() > 0.03, "a wrong weight of two wells must show although no score does"
    prior = system.composition.prior(noise)
    found = log_partition(shifted, system.composition, prior, system.context)
    assert torch.allclose(found, torch.full_like(found, system.log_z), atol=1e-4)


def test_the_score_of_a_log_density_is_its_gradient_with_and_without_grad() -> None:
    system, exact = double_well()
    state, t = system.state(torch.tensor([[-1.0], [0.3], [2.0]]).double()), torch.tensor([0.2, 0.5, 0.8]).double()
    wanted = system.score_fn(state, system.context, t).positions
    score_fn = score_of(exact, system.composition)
    assert torch.allclose(score_fn(state, system.context, t).positions, wanted)
    with torch.no_grad():
        found = score_fn(state, system.context, t).positions
    assert torch.allclose(found, wanted)
    assert not found.requires_grad


def test_random_probes_are_unbiased_for_log_densities() -> None:
    system, exact = double_well()
    mixed = lambda s, c, t: exact(s, c, t) + torch.sin(s.positions.flatten(1).prod(1))  # noqa: E731
    state, t = system.state(torch.tensor([[-1.0], [0.3]]).double()), torch.tensor([0.4, 0.6]).double()
    state = replace(state, positions=state.positions + 0.5)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3).unsqueeze(1).expand(8, 2, 3)

    def residual(probes: tuple[State, ...]) -> Tensor:
        return log_density_residual(mixed, system.composition, state, system.context, t, probes).detach()

    whole = residual(exact_probes(system.composition, state, system.context))
    assert torch.allclose(residual(random_probes(system.composition, system.context, signs)), whole)
    assert not torch.allclose(residual(random_probes(system.composition, system.context, signs[1:2])), whole, rtol=0.01)


def test_candidates_without_energies_are_refused() -> None:
    system, exact = double_well()
    bare = replace(candidates_with_energies(system, 4), reduced_energy=None)
    with pytest.raises(ValueError, match="need their reduced energies"):
        energy_loss(exact, system.composition, bare, PhysicsInformed())
