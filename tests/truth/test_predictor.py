"""Predictors of a property from noised structures: distributions, symmetries and gradients of every kind, exact posteriors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm, vonmises
from torch import Tensor
from torch.nn.functional import pad

from dig_scale.batch import Batch, Context, Geometry, State, fields_of, padded_to
from dig_scale.config import Diffusion, Model, Train
from dig_scale.diffusion.composition import Composition, positions_alone
from dig_scale.model.features import featurise
from dig_scale.model.predictor import Predictor
from dig_scale.objectives.denoising import draw_times
from dig_scale.objectives.regression import Labels, regression_loss
from dig_scale.predictions import (
    AnglePrediction,
    Family,
    NormalPrediction,
    Predicted,
    Prediction,
    prediction_from,
)
from dig_scale.sampling.collective_variables import Dihedral
from dig_scale.sampling.guidance import predicted_guide, property_guided
from dig_scale.sampling.integrate import time_grid
from dig_scale.sampling.solvers import SOLVERS, Step
from dig_scale.toy_states import anchored_context, toy_system
from dig_scale.toys import GaussianMixture
from dig_scale.training.trainer import learning_rate_at
from dig_scale.tree import tree_map
from tests.kinds import KINDS, SMALL, Case, case, doubled, lively_model, noise_of
from tests.truth.test_kinds import ROTATION, SHIFT, moved, on_positions

LEVEL = torch.tensor([0.15, 0.5, 0.85], dtype=torch.float64)


def lively_predictor(sites: str, family: Family = Family.NORMAL) -> Predictor:
    """An fp64 predictor whose answer is of order 1."""
    torch.manual_seed(5)
    model = Predictor(Model.model_validate(SMALL | {"sites": sites}), family)
    with torch.no_grad():
        model.pooled.out.weight.normal_(std=0.3)
        for embedding in (model.pair_bias.gain, model.pair_bias.shift):
            embedding.weight.add_(0.1 * torch.randn_like(embedding.weight))
    return model.double().eval()


def told(found: Case, noise: State, context: Context | None = None, clean: State | None = None) -> Tensor:
    """Mean and logarithm of the variance [B, 2] of the case's frames, noised to three levels."""
    composition, context = found.composition, context or found.context
    clean = clean or composition.state(found.frames, context)
    seen = composition.seen(composition.perturb(clean, LEVEL, noise), context, LEVEL)
    with torch.no_grad():
        answer = lively_predictor(found.sites)(seen, context, composition.noise_level(LEVEL))
    return torch.stack([answer.mean, answer.variance.log()], dim=1)


# --- distributions ----------------------------------------------------------------------------------------------------


def test_densities_are_those_of_the_textbook() -> None:
    numbers = torch.tensor([[0.4, -1.0], [1.5, 2.0], [-8.0, 4.0]], dtype=torch.float64)
    values = torch.tensor([0.3, -2.9, 2.6], dtype=torch.float64)
    normal = prediction_from(Family.NORMAL, numbers)
    assert isinstance(normal, NormalPrediction)
    expected = norm.logpdf(values, normal.mean, normal.variance.sqrt())
    np.testing.assert_allclose(normal.log_density(values), expected, rtol=1e-10)
    angle = prediction_from(Family.VON_MISES, numbers)
    assert isinstance(angle, AnglePrediction)
    expected = vonmises.logpdf(values, angle.concentration, loc=angle.mean)
    np.testing.assert_allclose(angle.log_density(values), expected, rtol=1e-9)
    assert float(angle.concentration.max()) > 100


def test_zeros_are_the_prior_and_the_uniform_distribution() -> None:
    zeros, values = torch.zeros(4, 2), torch.linspace(-3, 3, 4)
    np.testing.assert_allclose(
        prediction_from(Family.NORMAL, zeros).log_density(values), norm.logpdf(values), rtol=1e-5
    )
    uniform = prediction_from(Family.VON_MISES, zeros).log_density(values)
    np.testing.assert_allclose(uniform, -math.log(2 * math.pi), atol=1e-5)


def test_an_error_of_the_wish_widens_a_prediction() -> None:
    normal = NormalPrediction(torch.tensor([1.0]), torch.tensor([0.25])).widened(1.2)
    assert float(normal.variance) == pytest.approx(0.25 + 1.44)
    narrow = AnglePrediction(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([400.0]).double()).widened(0.1)
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    density = torch.exp(AnglePrediction(narrow.direction, narrow.concentration).log_density(grid))
    spread = math.sqrt(float((density * grid**2).sum() / density.sum()))
    assert spread == pytest.approx(math.sqrt(1 / 400 + 0.01), rel=0.01)


def test_wishes_are_in_the_users_units() -> None:
    assert Predicted("energy", centre=-3.0, spread=0.5).wanted(-2.0, 0.25) == pytest.approx((2.0, 0.5))
    angle = Predicted("dihedral:0,1,2,3", Family.VON_MISES, unit=math.pi / 180)
    assert angle.wanted(90.0, 18.0) == pytest.approx((math.pi / 2, math.pi / 10))


# --- symmetries of every kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_stay_when_space_turns_and_shifts(kind: str) -> None:
    found, noise = case(kind), noise_of(case(kind))
    turned = on_positions(noise, lambda vectors: vectors @ ROTATION.mT)
    wanted = told(found, noise)
    assert wanted.std(0).min() > 1e-4  # it tells structures apart
    assert torch.allclose(told(moved(found, ROTATION, SHIFT), turned), wanted, rtol=1e-5, atol=1e-6)


def test_predictions_of_a_crystal_know_no_origin() -> None:
    found, noise = case("crystal"), noise_of(case("crystal"))
    positions, cell = found.frames["positions"], found.frames["cell"]
    across = positions.clone()
    across[:, 2] += cell[:, 0] - 2 * cell[:, 1]
    for other in (across, positions + SHIFT):
        frames: Mapping[str, Tensor] = {"positions": other, "cell": cell}
        assert torch.allclose(told(replace(found, frames=frames), noise), told(found, noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_sites_and_padding_change_nothing(kind: str) -> None:
    found, noise = case(kind), noise_of(case(kind))
    n, wanted = found.system.n_sites, told(found, noise)
    order = np.random.default_rng(1).permutation(n)
    frames = {name: value if name == "cell" else value[:, order] for name, value in found.frames.items()}
    pick = {name: value if name == "lattice" else value[:, order] for name, value in fields_of(noise).items()}
    relabelled = replace(found, system=found.system.select(order), frames=frames)
    assert torch.allclose(told(relabelled, State(**pick)), wanted, rtol=1e-5, atol=1e-6)
    longer = lambda name, value: (  # noqa: E731
        value if name in ("lattice", "cell") else pad(value, (0, 0) * (value.dim() - 2) + (0, 2))
    )
    context = doubled(padded_to([featurise(found.system)], n + 2)[0])
    clean = found.composition.state({name: longer(name, value) for name, value in found.frames.items()}, context)
    padded = State(**{name: longer(name, value) for name, value in fields_of(noise).items()})
    assert torch.allclose(told(found, padded, context, clean), wanted, rtol=1e-5, atol=1e-6)


def test_a_dihedral_and_its_mirror_image_are_told_apart() -> None:
    found, noise = case("molecule"), noise_of(case("molecule"))
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]).double())
    mirrored = told(moved(found, mirror, SHIFT), on_positions(noise, lambda vectors: vectors @ mirror))
    assert (mirrored - told(found, noise)).abs().max() > 1e-4  # those of turned structures agree to 1e-6


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_pushes_along_its_gradient_in_every_field(kind: str, family: Family) -> None:
    found = case(kind)
    composition, context, predictor = found.composition, found.context, lively_predictor(found.sites, family)
    score_fn = composition.as_score_fn(lively_model(found.sites))
    t = torch.full((found.batch,), 0.4, dtype=torch.float64)
    state = composition.perturb(composition.state(found.frames, context), t, noise_of(found))
    guided = property_guided(score_fn, composition, [predicted_guide(predictor, 1.3, 0.2)])(state, context, t)
    push = fields_of(tree_map(lambda a, b: a - b, guided, score_fn(state, context, t)))

    def log_q(name: str, tangent: Tensor) -> Tensor:
        x = getattr(state, name)
        other = replace(state, **{name: composition.fields[name].process.move(x, tangent)})
        answer = predictor(composition.seen(other, context, t), context, composition.noise_level(t))
        return answer.widened(0.2).log_density(torch.full_like(t, 1.3)).detach()

    for name, direction in fields_of(noise_of(found, seed=1)).items():
        slope = (log_q(name, 1e-5 * direction) - log_q(name, -1e-5 * direction)) / 2e-5
        assert float(slope.abs().max()) > 1e-5, name
        ours = (push[name] * direction).flatten(1).sum(1)
        assert torch.allclose(ours, slope, rtol=1e-4, atol=1e-7), name


# --- exact posteriors -------------------------------------------------------------------------------------------------


def test_an_exact_prediction_samples_the_exact_conditional() -> None:
    """x ~ N(mean, s²), c = x: p(x | c = target within spread) is the product of two Gaussians."""
    mean, s, target, spread = 0.4, 0.7, 1.5, 0.4
    toy = toy_system(
        GaussianMixture(torch.tensor([[mean, 0.0, 0.0]]), torch.tensor([s]), torch.tensor([1.0])),
        Diffusion(schedule="power", noise_min=0.02, noise_max=1000),
    )

    def exact(geometry: Geometry, context: Context, level: Tensor) -> Prediction:
        noise = level.to(geometry.positions) ** 2
        centre = (s**2 * geometry.positions[:, 0, 0] + noise * mean) / (s**2 + noise)
        return NormalPrediction(centre, s**2 * noise / (s**2 + noise))

    score_fn = property_guided(toy.score_fn, toy.composition, [predicted_guide(exact, target, spread)])
    uniform = torch.quasirandom.SobolEngine(3, scramble=True, seed=1).draw(2048, dtype=torch.float64)
    noise = State(torch.special.ndtri(uniform).float().unsqueeze(1))
    state, memory, solver = toy.composition.prior(noise), None, SOLVERS["heun"]
    for t, t_next in itertools.pairwise(time_grid(60).tolist()):
        step = Step(state, toy.context, torch.full((2048,), t), torch.full((2048,), t_next), noise)
        state, memory = solver.step(score_fn, toy.composition, step, memory or solver.init(state))
    assert state.positions is not None
    x, weight = state.positions[:, 0, 0].double(), s**2 / (s**2 + spread**2)
    assert float(x.mean()) == pytest.approx(mean + weight * (target - mean), rel=0.01)
    assert float(x.var()) == pytest.approx(spread**2 * weight, rel=0.03)


SPREAD = 3.0
Draw = Callable[[int, torch.Generator], tuple[Batch, State, Labels]]
"""(number, generator) -> clean structures, noise, labels."""


def pair_of_sites() -> tuple[Composition, Context]:
    """Two sites, apart by a Gaussian vector of SPREAD Å per coordinate."""
    context = replace(
        anchored_context(2),
        free=torch.ones(1, dtype=torch.bool),
        element=torch.tensor([[6, 7]]),
        pair_segment=4 * (1 - torch.eye(2, dtype=torch.long)).unsqueeze(0),
        extent=torch.full((1, 2), SPREAD / 2),
    )
    return positions_alone(Diffusion(noise_min=0.5, noise_max=20.0)), context


def pairs(count: int, generator: torch.Generator) -> tuple[Batch, State, Labels]:
    """Clean pairs, their noise, and d²/s² less its mean over its standard deviation."""
    composition, context = pair_of_sites()
    apart = SPREAD * torch.randn(count, 3, generator=generator)
    noise = composition.noise(torch.randn(count, 6, generator=generator), context)
    labels = ((apart**2).sum(1) / SPREAD**2 - 3) / math.sqrt(6)
    clean = State(torch.stack([apart / 2, -apart / 2], dim=1))
    return Batch(clean, context, ("pair",)), noise, Labels(labels, torch.ones(count, dtype=torch.bool))


def exact_moments(seen: Geometry, level: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of the label: given y, d is normal about m = w y with variance v = 2 n² w per coordinate,
    w = s²/(s² + 2 n²), so d² has mean m² + 3 v and variance 6 v² + 4 v m²."""
    weight = SPREAD**2 / (SPREAD**2 + 2 * level**2)
    squared = ((weight * (seen.positions[:, 0] - seen.positions[:, 1])) ** 2).sum(1)
    each = 2 * level**2 * weight
    mean, variance = squared + 3 * each, 6 * each**2 + 4 * each * squared
    return (mean / SPREAD**2 - 3) / math.sqrt(6), variance / (6 * SPREAD**4)


def trained(composition: Composition, draw: Draw, family: Family, layers: int, steps: int) -> Predictor:
    """A small predictor of free atoms after `steps` batches of 128."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    shape = {"layers": layers, "width": 32, "heads": 2, "feed_forward": 32, "vector_channels": 8, "radial_knots": 0}
    predictor = Predictor(Model.model_validate(shape | {"radial_kernels": 32}), family)
    settings = Train(steps=steps, learning_rate=3e-3, warmup_steps=50)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(step, settings))
    for _ in range(steps):
        batch, noise, labels = draw(128, generator)
        t = draw_times(128, "antithetic", generator)
        loss = regression_loss(predictor, composition, batch, t, noise, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return predictor


def test_a_trained_predictor_has_the_moments_of_the_exact_posterior() -> None:
    """Of pairs of sites and their squared distance, to a few hundredths of its spread and of a nat; what 300 steps leave."""
    composition, context = pair_of_sites()
    predictor, generator = trained(composition, pairs, Family.NORMAL, 1, 300), torch.Generator().manual_seed(2)
    times = torch.linspace(0, 1, 10001)
    for wanted in (1.0, 2.0, 4.0, 12.0):
        t = times[(composition.noise_level(times) - wanted).abs().argmin()].expand(4000)
        level = float(composition.noise_level(t[:1]))
        batch, noise, _ = pairs(4000, generator)
        seen = composition.seen(composition.perturb(batch.state, t, noise), context, t)
        with torch.no_grad():
            told = predictor(seen, context, composition.noise_level(t))
        assert isinstance(told, NormalPrediction)
        mean, variance = exact_moments(seen, level)
        off = float((told.mean - mean).abs().mean())
        assert off < 0.06, f"at noise {level} means are off by {off}"
        assert float(told.variance.mean() / variance.mean()) == pytest.approx(1.0, abs=0.1), f"at noise {level}"
        surplus = torch.log(told.variance / variance) + (variance + (told.mean - mean) ** 2) / told.variance - 1
        assert float(surplus.mean() / 2) < 0.02, f"at noise {level}: nat from the Normal of the exact moments"


def chain_of_four() -> tuple[Composition, Context]:
    """Four different atoms in a chain with bonds of 1.5 Å."""
    apart = [[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]]
    context = replace(
        anchored_context(4),
        free=torch.ones(1, dtype=torch.bool),
        element=torch.tensor([[6, 7, 8, 9]]),
        pair_segment=torch.tensor([apart]),
        pair_reference=torch.tensor([0.0, 1.5, 2.46, 0.0])[torch.tensor([apart])],
        extent=torch.full((1, 4), 1.2),
    )
    return positions_alone(Diffusion()), context


def chains(count: int, generator: torch.Generator) -> tuple[Batch, State, Labels]:
    """Chains of which the dihedral alone varies, uniformly."""
    composition, context = chain_of_four()
    angle, zeros = (2 * torch.rand(count, generator=generator) - 1) * math.pi, torch.zeros(count)
    along, across = 1.5 * math.cos(math.radians(70)), 1.5 * math.sin(math.radians(70))
    sites = [(zeros + across, zeros, zeros - along), (zeros, zeros, zeros), (zeros, zeros, zeros + 1.5)]
    sites.append((across * torch.cos(angle), across * torch.sin(angle), zeros + 1.5 + along))
    x = torch.stack([torch.stack(site, dim=1) for site in sites], dim=1)
    noise = composition.noise(torch.randn(count, 12, generator=generator), context)
    labels = Labels(Dihedral((0, 1, 2, 3))(Geometry(x), context), torch.ones(count, dtype=torch.bool))
    return Batch(State(x - x.mean(1, keepdim=True)), context, ("chain",)), noise, labels


def test_a_predictor_learns_a_dihedral_with_its_sign_and_says_where_it_cannot_know() -> None:
    composition, context = chain_of_four()
    predictor = trained(composition, chains, Family.VON_MISES, 2, 400)
    batch, noise, labels = chains(1000, torch.Generator().manual_seed(2))
    for time, largest in ((0.0, -1.0), (0.3, 1.0), (1.0, math.log(2 * math.pi) + 0.02)):
        t = torch.full((1000,), time)
        seen = composition.seen(composition.perturb(batch.state, t, noise), context, t)
        with torch.no_grad():
            told = predictor(seen, context, composition.noise_level(t))
        assert float(-told.log_density(labels.values).mean()) < largest, f"at t = {time}"
        assert isinstance(told, AnglePrediction)
        apart = torch.remainder(told.mean - labels.values + math.pi, 2 * math.pi) - math.pi
        assert time > 0 or math.degrees(float((apart**2).mean().sqrt())) < 5
    assert float(told.concentration.max()) < 0.5


def test_structures_without_a_label_count_for_nothing() -> None:
    predictor = Predictor(Model.model_validate(SMALL), Family.NORMAL)
    batch, noise, _ = pairs(2, torch.Generator().manual_seed(3))
    labels = Labels(torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    composition, t = pair_of_sites()[0], torch.full((2,), 0.5)
    losses = regression_loss(predictor, composition, batch, t, noise, labels)
    assert losses[1] == 0 and losses[0] > 0.5
    losses.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in predictor.parameters() if p.grad is not None)
