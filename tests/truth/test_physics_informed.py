"""Physics-informed pre-training with exact scores: the Fokker-Planck residual vanishes for them on every manifold, and only
for them.

The exact distributions are mixtures of the frames of a small system of every kind, noised: sums over frames of products of
the processes' own kernels, whose fields depend on each other through the mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dig_scale.batch import Batch, Context, Score, ScoreFn, State, fields_of
from dig_scale.config import Diffusion, PhysicsInformed
from dig_scale.diffusion import rotation
from dig_scale.diffusion.composition import Composition, composition_for
from dig_scale.diffusion.euclidean import per_sample
from dig_scale.diffusion.periodic import wrapped_normal_density
from dig_scale.diffusion.process import Coefficients
from dig_scale.geometry import rotations
from dig_scale.objectives.physics_informed import (
    Candidates,
    PhysicsDraws,
    accepted_candidates,
    boundary_loss,
    draw_physics_times,
    exact_probes,
    fokker_planck_loss,
    fokker_planck_residual,
    physics_informed_loss,
    random_probes,
    random_signs,
    rigid_gradient,
)
from dig_scale.system import SystemKind
from tests.kinds import KINDS, Case, case, doubled, lively_model, noise_of
from tests.truth.test_solvers import anchored_context

TIMES = {"molecule": 0.6, "protein": 0.9, "pocket": 0.6, "catalyst": 0.6, "crystal": 0.8}
"""Where the frames of a kind overlap, so that no one component rules."""
WRONG = {"protein": ("rotations",)}
"""Fields whose scores are made wrong, if not all of them: positions are those of molecules."""


@dataclass(frozen=True)
class FrameMixture:
    """Exact noised distribution of equally likely clean states: its score, by Bayes' rule over the states."""

    composition: Composition
    states: State

    def __call__(self, state: State, context: Context, t: Tensor) -> Score:
        """Scores of all fields."""
        rows, logs, targets = len(t), [], []
        for k in range(len(next(iter(fields_of(self.states).values())))):
            clean = {n: v[k].expand(rows, *v[k].shape) for n, v in fields_of(self.states).items()}
            logs.append(self._log_kernel(clean, state, t))
            targets.append(self._targets(clean, state, t))
        share = torch.softmax(torch.stack(logs), dim=0)
        mixed = {
            n: sum(per_sample(w, one[n]) * one[n] for w, one in zip(share, targets, strict=True)) for n in targets[0]
        }
        return Score(**mixed)

    def share_of_first(self, state: State, context: Context, t: Tensor) -> Tensor:
        clean = [{n: v[k].expand(len(t), *v[k].shape) for n, v in fields_of(self.states).items()} for k in range(3)]
        return torch.softmax(torch.stack([self._log_kernel(one, state, t) for one in clean]), dim=0)[0]

    def _targets(self, clean: dict[str, Tensor], state: State, t: Tensor) -> dict[str, Tensor]:
        fields = self.composition.fields
        return {n: fields[n].process.target(value, getattr(state, n), t) for n, value in clean.items()}

    def _log_kernel(self, clean: dict[str, Tensor], state: State, t: Tensor) -> Tensor:
        total = torch.zeros_like(t)
        for name, value in clean.items():
            process, x = self.composition.fields[name].process, getattr(state, name)
            level = process.coefficients(t)
            if name == "rotations":
                angle = rotations.log(value.mT @ x).norm(dim=-1)
                total = total + rotation.log_density(angle, process.eps(t).unsqueeze(-1)).sum(1)
            elif name == "fractional":
                width = per_sample(level.sigma, x).expand_as(x)
                total = total + torch.log(wrapped_normal_density(x - value, width)).flatten(1).sum(1)
            else:
                square = (x - per_sample(level.alpha, x) * value) ** 2
                total = total - square.flatten(1).sum(1) / (2 * level.sigma**2)
        return total


def small_case(kind: str) -> Case:
    """The case of a kind, of a protein two residues and of a molecule five atoms alone: derivatives take their time."""
    found, kept = case(kind), {"protein": 2, "molecule": 5}.get(kind)
    if kept is None:
        return found
    frames = {name: values[:, :kept] for name, values in found.frames.items()}
    return replace(found, system=found.system.select(np.arange(kept)), frames=frames)


def overlapping(kind: str) -> tuple[FrameMixture, State, Tensor]:
    """The mixture of the frames of a kind's case, noised states of it, and their times."""
    found = small_case(kind)
    states = found.composition.state(found.frames, found.context)
    t = torch.tensor([0.0, 0.05, 0.1], dtype=torch.float64) + TIMES[kind]
    return FrameMixture(found.composition, states), found.composition.perturb(states, t, noise_of(found)), t


def largest(residual: State, composition: Composition, t: Tensor) -> float:
    """Largest residual per unit of log sigma, in units of 1/sigma."""
    worst = 0.0
    for name, value in fields_of(residual).items():
        level = composition.fields[name].process.coefficients(t)
        worst = max(
            worst, float((per_sample(2 * level.sigma**3 / level.diffusion, value) * value.detach()).abs().max())
        )
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_score_obeys_the_equation_in_all_fields_and_others_do_not(kind: str) -> None:
    found = small_case(kind)
    exact, noised, t = overlapping(kind)
    probes = exact_probes(found.composition, noised, found.context)

    def residual(score_fn: ScoreFn) -> float:
        parts = fokker_planck_residual(score_fn, found.composition, noised, found.context, t, probes)
        return largest(parts, found.composition, t)

    share = exact.share_of_first(noised, found.context, t)
    assert ((share > 0.01) & (share < 0.99)).any(), "components do not overlap: the test would be of one Gaussian"
    assert residual(exact) < 1e-6
    if kind == "molecule":
        assert residual(lambda s, c, time: exact(s, c, 0.97 * time)) > 1e-3
    for name in WRONG.get(kind, tuple(fields_of(noised))):
        assert residual(scaled(exact, name)) > 1e-3, name


def scaled(exact: ScoreFn, name: str) -> ScoreFn:
    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        score = exact(state, context, t)
        return replace(score, **{name: 1.05 * getattr(score, name)})

    return score_fn


@dataclass(frozen=True)
class VarianceExploding:
    """x_t = x_0 + sigma noise with sigma = 0.05 · 200^t, as DiG has C-alpha positions."""

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return x0 + per_sample(self.coefficients(t).sigma, x0) * noise

    def target(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return (x0 - xt) / per_sample(self.coefficients(t).sigma ** 2, x0)

    def coefficients(self, t: Tensor) -> Coefficients:
        sigma = 0.05 * 200**t
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), 2 * sigma**2 * math.log(200))

    def move(self, x: Tensor, tangent: Tensor) -> Tensor:
        return x + tangent

    def sample_prior(self, noise: Tensor) -> Tensor:
        return 10 * noise

    def prior_log_density(self, x: Tensor, degrees: Tensor) -> Tensor:
        return -0.005 * (x**2).flatten(1).sum(-1) - 0.5 * degrees * math.log(200 * math.pi)


def test_the_exact_score_obeys_the_equation_where_variance_explodes() -> None:
    found = small_case("molecule")
    field = replace(found.composition.fields["positions"], process=VarianceExploding())
    composition = replace(found.composition, fields={"positions": field})
    states = composition.state(found.frames, found.context)
    t = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
    noised, exact = composition.perturb(states, t, noise_of(found)), FrameMixture(composition, states)
    probes = exact_probes(composition, noised, found.context)
    residual = fokker_planck_residual(exact, composition, noised, found.context, t, probes)
    assert largest(residual, composition, t) < 1e-6
    wrong = fokker_planck_residual(scaled(exact, "positions"), composition, noised, found.context, t, probes)
    assert largest(wrong, composition, t) > 1e-3


@pytest.mark.parametrize("schedule", ["dig-sigmoid", "log-linear", "power"])
def test_a_gaussian_obeys_the_equation_under_every_schedule(schedule: str) -> None:
    composition = composition_for(SystemKind.MOLECULE, Diffusion(schedule=schedule))
    context, t = doubled(anchored_context(2)), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0)).double()

    def gaussian(variance: float) -> ScoreFn:
        def score_fn(state: State, context: Context, t: Tensor) -> Score:
            level = composition.fields["positions"].process.coefficients(t)
            return Score(-state.positions / per_sample(level.alpha**2 * variance + level.sigma**2, state.positions))

        return score_fn

    probes = exact_probes(composition, State(x), context)
    assert len(probes) == 6
    residual = fokker_planck_residual(gaussian(0.4), composition, State(x), context, t, probes)
    assert largest(residual, composition, t) < 1e-9
    stretched = lambda s, c, time: Score(positions=1.1 * gaussian(0.4)(s, c, time).positions)  # noqa: E731
    wrong = fokker_planck_residual(stretched, composition, State(x), context, t, probes)
    assert largest(wrong, composition, t) > 1e-3


def test_random_probes_are_unbiased() -> None:
    """The mean over all 64 sign vectors of six coordinates is the exact residual, to rounding; that over one is not."""
    composition, context = composition_for(SystemKind.MOLECULE, Diffusion()), doubled(anchored_context(2))
    generator = torch.Generator().manual_seed(1)
    x, mixing = (torch.randn(*shape, generator=generator).double() for shape in ((2, 2, 3), (6, 6)))
    t = torch.tensor([0.4, 0.6], dtype=torch.float64)

    def bent(state: State, context: Context, t: Tensor) -> Score:
        return Score(torch.tanh((1 + t).unsqueeze(1) * state.positions.flatten(1) @ mixing).view_as(state.positions))

    def residual(probes: tuple[State, ...]) -> Tensor:
        return flat(fokker_planck_residual(bent, composition, State(x), context, t, probes))

    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6).unsqueeze(1).expand(64, 2, 6)
    exact = residual(exact_probes(composition, State(x), context))
    assert torch.allclose(residual(random_probes(composition, context, signs)), exact)
    assert not torch.allclose(residual(random_probes(composition, context, signs[5:6])), exact, rtol=0.01)


def flat(tangents: State) -> Tensor:
    return torch.cat([value.detach().flatten(1) for value in fields_of(tangents).values()], dim=1)


def boundary_candidates(found: Case) -> tuple[Candidates, ScoreFn]:
    """Candidates with an invented gradient, and the score that agrees with it at any t."""
    states = found.composition.state(found.frames, found.context)
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(3, found.composition.normals(found.context), generator=generator).double()
    gradient = found.composition.noise(drawn, found.context)

    def agreeing(state: State, context: Context, t: Tensor) -> Score:
        fields = found.composition.fields
        alpha = {n: fields[n].process.coefficients(t).alpha for n in fields}
        return Score(**{n: -value / per_sample(alpha[n], value) for n, value in fields_of(gradient).items()})

    return Candidates(Batch(states, found.context, (found.system.name,)), gradient), agreeing


@pytest.mark.parametrize("boundary", ["force", "direction"])
@pytest.mark.parametrize("kind", ["molecule", "protein", "pocket"])
def test_the_boundary_term_is_zero_for_the_force_alone(kind: str, boundary: str) -> None:
    found = case(kind)
    candidates, agreeing = boundary_candidates(found)
    settings = PhysicsInformed(boundary=boundary, boundary_time=0.2)
    tripled = lambda s, c, t: Score(**{n: 3 * v for n, v in fields_of(agreeing(s, c, t)).items()})  # noqa: E731
    against = lambda s, c, t: Score(**{n: -v for n, v in fields_of(agreeing(s, c, t)).items()})  # noqa: E731
    losses = [boundary_loss(fn, found.composition, candidates, settings) for fn in (agreeing, tripled, against)]
    assert losses[0].abs().max() < 1e-10
    assert losses[2].min() > 1e-3
    assert (losses[1].max() < 1e-10) == (boundary == "direction")


def test_huber_losses_count_small_errors_as_squares_and_large_ones_linearly() -> None:
    found = case("molecule")
    t, context = torch.full((3,), 0.5, dtype=torch.float64), found.context
    residual = State(torch.ones(3, found.system.n_sites, 3).double())
    losses = {
        (size, delta): fokker_planck_loss(
            State(size * residual.positions), found.composition, context, t, PhysicsInformed(fokker_planck_huber=delta)
        )
        for size in (1e-3, 1e6)
        for delta in (None, 1.0)
    }
    assert torch.allclose(losses[1e-3, None], losses[1e-3, 1.0])
    assert (losses[1e6, 1.0] < 1e-2 * losses[1e6, None]).all()


def test_rescaling_divides_by_rho_and_less_after_the_first_times() -> None:
    found = case("molecule")
    t = torch.tensor([0.0, 0.05, 0.9], dtype=torch.float64)
    residual = State(torch.ones(3, found.system.n_sites, 3).double())
    plain, rescaled = (
        fokker_planck_loss(residual, found.composition, found.context, t, PhysicsInformed(rescaling=rho))
        for rho in (1.0, 100.0)
    )
    assert torch.allclose(plain / rescaled, torch.tensor([100.0, 100**0.95, 100**0.95]).double())


@pytest.mark.parametrize("kind", ["molecule", "protein"])
def test_gradients_reach_every_used_parameter_of_the_network(kind: str) -> None:
    """Also with the fast operators of processors, which give way to the reference where more derivatives are asked for."""
    found = case(kind)
    candidates, _ = boundary_candidates(found)
    width = found.composition.normals(found.context)
    signs = random_signs(1, 3, width, torch.Generator().manual_seed(2)).double()
    t = torch.tensor([0.2, 0.4, 0.7], dtype=torch.float64)
    draws = PhysicsDraws(t, noise_of(found), random_probes(found.composition, found.context, signs))
    losses, gradients = [], []
    for kernels in ("reference", "auto"):
        model = lively_model(found.sites, kernels=kernels)
        loss = physics_informed_loss(
            found.composition.as_score_fn(model), found.composition, candidates, draws, PhysicsInformed()
        )
        assert loss.shape == (3,)
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.allclose(losses[0], losses[1], rtol=1e-3)
    moved = {name for name, grad in gradients[0].items() if grad is not None and float(grad.abs().max()) > 0}
    assert {"head.polar.weight", "noise.net.0.weight", "pair_bias.gain.weight"} <= moved
    for name in moved:
        size = float(gradients[0][name].abs().max())
        # the boundary term may read the radial table, which is exact to a few 1e-4
        assert torch.allclose(gradients[0][name], gradients[1][name], rtol=0, atol=5e-3 * size), name


def test_parameter_gradients_agree_with_finite_differences() -> None:
    found = case("molecule")
    candidates, _ = boundary_candidates(found)
    model = lively_model("atoms", kernels="reference")
    t = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    signs = random_signs(1, 3, found.composition.normals(found.context), torch.Generator().manual_seed(2)).double()
    draws = PhysicsDraws(t, noise_of(found), random_probes(found.composition, found.context, signs))

    def loss() -> Tensor:
        score_fn = found.composition.as_score_fn(model)
        return physics_informed_loss(score_fn, found.composition, candidates, draws, PhysicsInformed()).sum()

    parameter = model.head.polar.weight
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
    slope = float((torch.autograd.grad(loss(), parameter)[0] * direction).sum())
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.add_(step * direction)
        values.append(float(loss().detach()))
        with torch.no_grad():
            parameter.sub_(step * direction)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 6.0])
def test_times_follow_their_density_from_the_first_noise_level_on(decay: float) -> None:
    settings = PhysicsInformed(boundary_time=0.1, time_decay=decay)
    t = draw_physics_times(4000, settings, torch.Generator().manual_seed(0))
    assert t.min() >= 0.1
    assert t.max() <= 1.0
    below = 0.5 if decay == 0 else (1 - math.exp(-decay * 0.45)) / (1 - math.exp(-decay * 0.9))
    # stratified: the share below the middle is exact to one row
    assert float((t < 0.55).float().mean()) == pytest.approx(below, abs=1e-3)


def test_candidates_with_forces_beyond_the_smallest_decades_are_dropped() -> None:
    norms = torch.tensor([0.5, 40.0, 499.0, 501.0, float("inf"), float("nan")])
    assert accepted_candidates(norms, 3.0).tolist() == [True, True, True, False, False, False]


def test_the_gradient_of_a_rigid_residue_is_that_of_its_atoms() -> None:
    generator = torch.Generator().manual_seed(3)
    frames = rotations.random_rotations(torch.randn(2, 4, 4, generator=generator).double())
    centres = torch.randn(2, 4, 3, generator=generator).double()
    local = torch.randn(2, 4, 5, 3, generator=generator).double()

    def energy(atoms: Tensor) -> Tensor:
        return (torch.sin(atoms).sum(-1) * atoms[..., 0]).sum()

    shift = torch.zeros_like(centres).requires_grad_()
    turn = torch.zeros_like(centres).requires_grad_()
    atoms = rotations.to_global(frames @ rotations.exp(turn), centres + shift, local)
    gradient = torch.autograd.grad(energy(atoms), [atoms, shift, turn])
    found = rigid_gradient(frames, centres, atoms.detach(), gradient[0])
    assert torch.allclose(found[0], gradient[1])
    assert torch.allclose(found[1], gradient[2])
