"""Log-densities by the probability-flow ODE against exact ones: toys, subspaces, curved spaces, networks; encode and decode."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dig_scale.batch import Context, Score, State, fields_of
from dig_scale.config import Diffusion
from dig_scale.diffusion.composition import composition_for, constrain, positions_alone
from dig_scale.diffusion.periodic import WrappedNormal
from dig_scale.diffusion.rotation import RotationProcess
from dig_scale.errors import UserError
from dig_scale.geometry import rotations
from dig_scale.geometry.lattice import symmetric_coordinates
from dig_scale.geometry.rotations import nearest_rotations
from dig_scale.sampling.flow import Integration, from_latent, to_latent
from dig_scale.sampling.likelihood import (
    Exact,
    Hutchinson,
    LikelihoodSettings,
    LogDensity,
    degrees_of_freedom,
    log_density,
    symmetric_cell_log_volume,
)
from dig_scale.sampling.reweighting import boltzmann_log_weights, log_partition
from dig_scale.toy_curved import CurvedToy, rotation_mixture, wrapped_mixture
from dig_scale.toy_states import ToySystem, anchored_context, toy_system
from dig_scale.toys import DoubleWell, GaussianMixture, MuellerBrown, Toy
from tests.kinds import KINDS, case, lively_model

FINE = Integration(rtol=1e-6, atol=1e-6)
EXACTING = LikelihoodSettings(FINE, tolerance=1e-4)
WIDE = Diffusion(schedule="log-linear", noise_min=1e-4, noise_max=1e6)
"""What is left of the noise at t = 0 and of the data at t = 1 shows in no density at 1e-5."""
MODERATE = Diffusion(schedule="log-linear", noise_min=0.02, noise_max=50)
MIXTURE = GaussianMixture(
    torch.tensor([[2.0, 0, 0, 0, 0, 0], [-1.0, 1, 0, 0, 0, 0]]).double(),
    torch.tensor([0.3, 0.5]).double(),
    torch.tensor([0.1, 0.9]).double(),
)


def gaussian(dimension: int) -> GaussianMixture:
    means = torch.linspace(-0.7, 0.7, dimension).double() if dimension > 1 else torch.full((1,), 0.7).double()
    return GaussianMixture(means.unsqueeze(0), torch.tensor([0.6]).double(), torch.ones(1).double())


def drawn(toy: ToySystem, n: int, seed: int = 1) -> State:
    return toy.state(toy.toy.sample(n, torch.Generator().manual_seed(seed)))


def density_of(toy: ToySystem | CurvedToy, state: State, settings: LikelihoodSettings) -> LogDensity:
    return log_density(toy.score_fn, toy.composition, state, toy.context, settings)


def largest_error(toy: Toy, settings: LikelihoodSettings, n: int = 4) -> float:
    system = toy_system(toy, WIDE)
    state = drawn(system, n)
    found = density_of(system, state, settings)
    assert (found.standard_error == 0).all()
    return float((found.log_density - system.log_density(state.positions)).abs().max())


@pytest.mark.parametrize("dimension", [1, 2, 12, 66])
def test_gaussian_densities_are_right_to_a_hundred_thousandth(dimension: int) -> None:
    settings = LikelihoodSettings(Integration(rtol=1e-8, atol=1e-8), tolerance=1e-6)
    assert largest_error(gaussian(dimension), settings) < 1e-5


@pytest.mark.parametrize(
    "toy",
    [MIXTURE, DoubleWell(4.0, 1.0), MuellerBrown(10), MuellerBrown(15), MuellerBrown(20)],
    ids=["mixture", "double-well", "mueller-brown-10", "mueller-brown-15", "mueller-brown-20"],
)
def test_toy_densities_are_right_to_a_thousandth(toy: Toy) -> None:
    assert largest_error(toy, EXACTING, n=8) < 1e-3


@pytest.mark.parametrize(("method", "order", "steps"), [("rk4", 4, 30), ("heun", 2, 60)])
def test_fixed_steps_converge_with_their_order(method: str, order: int, steps: int) -> None:
    system = toy_system(MIXTURE, MODERATE)
    state = drawn(system, 4)
    exact = density_of(system, state, LikelihoodSettings(Integration(rtol=1e-8, atol=1e-8), tolerance=1e-7)).log_density
    errors = []
    for count in (steps, 2 * steps):
        found = density_of(system, state, LikelihoodSettings(Integration(method, steps=count)))
        errors.append(float((found.log_density - exact).abs().mean()))
    assert math.log2(errors[0] / errors[1]) > order - 0.5, errors
    assert errors[1] < 2e-3


@pytest.mark.parametrize("toy", [DoubleWell(4.0, 1.0), MuellerBrown(15)], ids=["double-well", "mueller-brown"])
def test_log_partition_from_densities_and_energies_is_right_to_a_hundredth(toy: Toy) -> None:
    """Every weight is Z when the densities are right, so that the mean of few suffices."""
    system = toy_system(toy, WIDE)
    state = drawn(system, 8, seed=2)
    found = density_of(system, state, LikelihoodSettings(Integration(rtol=1e-4, atol=1e-4), tolerance=1e-3))
    weights = boltzmann_log_weights(system.reduced_energy(state.positions).numpy(), found.log_density.numpy())
    assert log_partition(weights, seed=0).value == pytest.approx(system.log_z, abs=0.01)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_agree_with_the_exact_trace_within_three_standard_errors(distribution: str) -> None:
    """Of 12 rows, with 32 probes each, all are within 4 and the mean of all within 3."""
    system = toy_system(MIXTURE, MODERATE)
    state = drawn(system, 12)
    coarse = Integration("rk4", steps=15)
    exact = density_of(system, state, LikelihoodSettings(coarse, Exact(chunk=4)))
    estimate = density_of(system, state, LikelihoodSettings(coarse, Hutchinson(32, distribution, seed=5)))
    z = (estimate.log_density - exact.log_density) / estimate.standard_error
    assert (estimate.standard_error > 0).all()
    assert z.abs().max() < 4
    total = estimate.standard_error.square().sum().sqrt()
    assert ((estimate.log_density - exact.log_density).sum() / total).abs() < 3
    assert torch.allclose(estimate.latent.positions, exact.latent.positions, atol=1e-10)


def test_a_batch_gives_what_single_frames_give() -> None:
    system = toy_system(MIXTURE, MODERATE)
    state = drawn(system, 3)
    settings = LikelihoodSettings(Integration("rk4", steps=8))
    together = density_of(system, state, settings).log_density
    alone = [density_of(system, State(row.unsqueeze(0)), settings).log_density for row in state.positions]
    assert torch.allclose(together, torch.cat(alone), atol=1e-12)


def test_rows_are_refined_until_their_integrals_stay_and_no_longer() -> None:
    """The last change is an error that is not exceeded, and what a row gets does not depend on its company."""
    system = toy_system(DoubleWell(4.0, 1.0), WIDE)
    state = State(torch.tensor([[[0.0, 0, 0]], [[1.0, 0, 0]], [[1.5, 0, 0]]]).double())
    truth = system.log_density(state.positions)
    costs = []
    for tolerance in (1.0, 1e-2, 1e-4):
        settings = LikelihoodSettings(FINE, tolerance=tolerance)
        found = density_of(system, state, settings)
        assert (found.last_change <= tolerance).all()
        assert ((found.log_density - truth).abs() <= found.last_change + 1e-5).all()
        alone = [density_of(system, State(row.unsqueeze(0)), settings) for row in state.positions]
        assert torch.allclose(torch.cat([one.log_density for one in alone]), found.log_density, atol=1e-4)
        assert torch.allclose(torch.cat([one.last_change for one in alone]), found.last_change, atol=1e-4)
        costs.append(found.evaluations)
    assert costs[0] < costs[1] < costs[2]


def test_probes_stay_with_their_rows_where_others_are_done() -> None:
    system = toy_system(MIXTURE, MODERATE)
    state = drawn(system, 6)
    fine = LikelihoodSettings(FINE, Hutchinson(4, seed=3), tolerance=1e-5)
    rough = density_of(system, state, replace(fine, tolerance=0.008))
    assert len(set((rough.last_change > 0.002).tolist())) == 2, "all rows stopped at once"
    assert torch.allclose(rough.log_density, density_of(system, state, fine).log_density, atol=0.008)


SPREAD = 0.6


def subspace_case(free: bool) -> tuple[Context, Tensor]:
    """Three sites: a free molecule, or the middle one fixed; standard normals restricted to what moves, [5, 3, 3]."""
    context = anchored_context(3)
    mobile = context.mobile if free else torch.tensor([[True, False, True]])
    context = replace(context, free=torch.tensor([free]), mobile=mobile)
    noise = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    return context, constrain(noise, context)


@pytest.mark.parametrize("free", [True, False], ids=["centre-of-mass-free", "fixed-site"])
def test_densities_are_those_of_the_subspace_that_moves(free: bool) -> None:
    """An isotropic Gaussian in 6 dimensions, whatever the score says of the centre, or of a fixed site, which is far away."""
    context, noise = subspace_case(free)
    composition = positions_alone(WIDE)
    process = composition.fields["positions"].process

    def score_fn(state: State, context: Context, t: Tensor) -> Score:
        level = process.coefficients(t.double())
        variance = (level.alpha**2 * SPREAD**2 + level.sigma**2)[:, None, None]
        nonsense = 3.0 * state.positions.mean(1, keepdim=True) + 1.0
        where = torch.ones(1, 3, 1) if free else (~context.mobile).unsqueeze(-1)
        return Score(positions=-state.positions / variance + nonsense * where)

    still = 0.0 if free else 7.0
    offsets = SPREAD * noise + still * (~context.mobile).unsqueeze(-1)
    found = log_density(score_fn, composition, State(offsets), context, EXACTING)
    expected = -0.5 * (noise**2).sum((1, 2)) - 6 * math.log(SPREAD) - 3 * math.log(2 * math.pi)
    assert degrees_of_freedom(composition, context)["positions"].tolist() == [6]
    assert torch.allclose(found.log_density, expected, atol=1e-4)
    kept = found.latent.positions[:, 1] if not free else found.latent.positions.mean(1)
    assert kept.abs().max() < 1e-4


AXES = torch.tensor([[0.2, -0.4, 1.0], [0.9, 1.1, -0.5]], dtype=torch.float64)
HALVES = torch.tensor([0.3, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("integration", [FINE, Integration("rk4", steps=40)], ids=["adaptive", "fixed"])
def test_densities_on_rotations_are_right_against_haar(integration: Integration) -> None:
    process = RotationProcess(eps_min=0.02, eps_max=3.0)
    toy = rotation_mixture(rotations.exp(AXES), torch.tensor([0.25, 0.4]).double(), HALVES, process)
    state = toy.sample(8, torch.Generator().manual_seed(3))
    found = density_of(toy, state, LikelihoodSettings(integration, tolerance=1e-3))
    expected = toy.log_density(state, torch.zeros(8))
    assert expected.std() > 0.5
    assert torch.allclose(found.log_density, expected, atol=1e-3)
    latent = found.latent.rotations
    assert torch.allclose(latent @ latent.mT, torch.eye(3).double().expand_as(latent), atol=1e-12)


def test_densities_on_rotations_sum_to_one() -> None:
    """Over uniform rotations the mean of the exact density is 1: the measure is Haar's of mass 1."""
    toy = rotation_mixture(rotations.exp(AXES), torch.tensor([0.25, 0.4]).double(), HALVES)
    normals = torch.randn(40_000, 1, 4, generator=torch.Generator().manual_seed(0)).double()
    uniform = State(rotations=rotations.random_rotations(normals))
    assert float(torch.exp(toy.log_density(uniform, None)).mean()) == pytest.approx(1, abs=0.1)


def test_densities_on_the_torus_are_right() -> None:
    places = torch.tensor([[0.02, 0.98, 0.5], [0.45, 0.40, 0.05]], dtype=torch.float64)
    toy = wrapped_mixture(places, torch.tensor([0.06, 0.1]).double(), HALVES, WrappedNormal(0.005, 1.5))
    state = toy.sample(8, torch.Generator().manual_seed(4))
    found = density_of(toy, state, EXACTING)
    assert torch.allclose(found.log_density, toy.log_density(state, torch.zeros(8)), atol=1e-3)
    assert found.latent.fractional.min() >= 0 and found.latent.fractional.max() < 1


def test_the_volume_of_symmetric_cells_is_that_of_finite_differences() -> None:
    composition = case("crystal").composition
    context = anchored_context(5)
    lattice = torch.tensor([[0.3, -0.8, 0.5, 1.1, -0.2, 0.4], [0.0, 0, 0, 0, 0, 0], [0.5, 0, 1, 0, 0, 0]]).double()
    found = symmetric_cell_log_volume(composition, lattice, context)
    for row, value in zip(lattice, found, strict=True):
        matrix = torch.autograd.functional.jacobian(
            lambda x: symmetric_coordinates(composition.coordinates.cell(x.unsqueeze(0), context.present))[0], row
        )
        assert float(torch.linalg.slogdet(matrix)[1]) == pytest.approx(float(value), abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_of_a_network_is_that_of_finite_differences(kind: str) -> None:
    """One Heun step from t = 0 to 1 adds the mean of the divergences at both ends, whose trace is checked here."""
    found = case(kind)
    composition, context = found.composition, found.context
    score_fn = composition.as_score_fn(lively_model(found.sites).requires_grad_(False))
    state = composition.state(found.frames, context)
    one_step = Integration("heun", steps=1)
    exact = log_density(score_fn, composition, state, context, LikelihoodSettings(one_step, Exact(chunk=7)))
    expected = by_differences(score_fn, composition, context, state)
    scale = expected.abs().clamp(min=1)
    assert ((exact.log_density - expected) / scale).abs().max() < 1e-5
    assert exact.evaluations == 2


def by_differences(score_fn, composition, context: Context, state: State) -> Tensor:
    """The log-density of one Heun step, every divergence by central differences of the tangents along Process.move."""
    zero, one = (torch.tensor(t, dtype=torch.float64) for t in (0.0, 1.0))
    rows, width = len(next(iter(fields_of(state).values()))), composition.normals(context)
    processes = {name: field.process for name, field in composition.fields.items()}
    plain = [name for name in processes if name in ("positions", "lattice")]
    counts = degrees_of_freedom(composition, context)

    def rate(values: State, t: Tensor) -> State:
        scores = composition.constrained(State(**fields_of(score_fn(values, context, t.expand(rows)))), context)
        return State(**{n: -0.5 * processes[n].coefficients(t).diffusion * s for n, s in fields_of(scores).items()})

    def divergence(values: State, t: Tensor) -> Tensor:
        total = sum(processes[name].coefficients(t).drift * counts[name] for name in plain).expand(rows).clone()
        for k in range(width):
            step = 1e-5 * torch.nn.functional.one_hot(torch.tensor(k), width).double().expand(rows, -1)
            ends = []
            for signed in (step, -step):
                along = fields_of(composition.noise(signed, context))
                moved = {n: processes[n].move(x, along[n]) for n, x in fields_of(values).items()}
                tangent = rate(State(**moved), t)
                ends.append(torch.cat([x.flatten(1) for x in fields_of(tangent).values()], dim=1)[:, k])
            total += (ends[0] - ends[1]) / 2e-5
        return total

    def slopes(values: dict[str, Tensor], tangent: State, t: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, along in fields_of(tangent).items():
            if name in plain:
                found[name] = processes[name].coefficients(t).drift * values[name] + along
            else:
                turned = along.unsqueeze(-2).expand_as(values[name]) if name == "rotations" else along
                found[name] = torch.linalg.cross(values[name], turned) if name == "rotations" else along
        return found

    def seen(values: dict[str, Tensor]) -> State:
        shaped = {"rotations": nearest_rotations, "fractional": lambda x: x - torch.floor(x)}
        return State(**{name: shaped.get(name, lambda x: x)(x) for name, x in values.items()})

    start = {n: x * (processes[n].coefficients(zero).alpha if n in plain else 1.0) for n, x in fields_of(state).items()}
    first = slopes(start, rate(State(**start), zero), zero)
    predicted = {name: start[name] + first[name] for name in start}
    second = slopes(predicted, rate(seen(predicted), one), one)
    ended = {name: start[name] + 0.5 * (first[name] + second[name]) for name in start}
    total = 0.5 * (divergence(State(**start), zero) + divergence(seen(predicted), one))
    for name, value in fields_of(seen(ended)).items():
        kept = constrain(value, context) if name == "positions" else value
        total = total + processes[name].prior_log_density(kept, counts[name])
    return total + sum(counts[name] * torch.log(processes[name].coefficients(zero).alpha) for name in plain)


@pytest.mark.parametrize("integration", [FINE, Integration("rk4", steps=60)], ids=["adaptive", "fixed"])
def test_decoding_what_was_encoded_gives_it_back(integration: Integration) -> None:
    system = toy_system(MuellerBrown(15), MODERATE)
    state = drawn(system, 6)
    latent = to_latent(system.score_fn, system.composition, state, system.context, integration)
    back = from_latent(system.score_fn, system.composition, latent, system.context, integration)
    assert (latent.positions - state.positions).abs().max() > 0.3
    assert (back.positions - state.positions).abs().max() < 1e-3


def test_encoded_rotations_come_back() -> None:
    toy = rotation_mixture(rotations.exp(AXES), torch.tensor([0.25, 0.4]).double(), HALVES)
    state = toy.sample(6, torch.Generator().manual_seed(3))
    latent = to_latent(toy.score_fn, toy.composition, state, toy.context, FINE)
    back = from_latent(toy.score_fn, toy.composition, latent, toy.context, FINE)
    assert rotations.log(back.rotations.mT @ state.rotations).norm(dim=-1).max() < 1e-3


def test_latents_of_the_density_are_those_of_encoding() -> None:
    system = toy_system(MIXTURE, MODERATE)
    state = drawn(system, 3)
    settings = LikelihoodSettings(Integration("rk4", steps=10))
    latent = to_latent(system.score_fn, system.composition, state, system.context, settings.integration)
    assert torch.allclose(density_of(system, state, settings).latent.positions, latent.positions, atol=1e-12)


def test_a_network_in_single_precision_is_asked_in_its_own() -> None:
    """And gives the density of double precision to what single precision and steps this coarse allow."""
    found = case("molecule")
    composition, context = found.composition, found.context
    model = lively_model(found.sites)
    state = composition.state(found.frames, context)
    settings = LikelihoodSettings(Integration("heun", steps=10), Hutchinson(2))
    wide = log_density(composition.as_score_fn(model), composition, state, context, settings)
    narrow = log_density(
        composition_for(found.system.kind, Diffusion()).as_score_fn(model.float()),
        composition,
        State(state.positions.float()),
        Context(**{k: v.float() if v.is_floating_point() else v for k, v in vars(context).items()}),
        settings,
    )
    assert narrow.log_density.dtype is torch.float64 and narrow.latent.positions.dtype is torch.float32
    assert torch.allclose(narrow.log_density, wide.log_density, rtol=1e-3)


def test_nothing_that_moves_has_no_density() -> None:
    context = replace(anchored_context(2), mobile=torch.zeros(1, 2, dtype=torch.bool))
    system = toy_system(MIXTURE)
    with pytest.raises(UserError, match="no degree of freedom"):
        log_density(system.score_fn, system.composition, State(torch.zeros(1, 2, 3)), context)


def test_one_probe_is_refused_since_it_has_no_error_bar() -> None:
    with pytest.raises(UserError, match="2 probes"):
        Hutchinson(probes=1)
