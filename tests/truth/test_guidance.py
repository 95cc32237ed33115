"""Guidance against exact answers: tilted mixtures and Gaussians, gradients of every kind of field, collective variables."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dig_scale.batch import Context, Geometry, State, fields_of
from dig_scale.config import Diffusion
from dig_scale.errors import UserError
from dig_scale.evaluation.structure import bend_angles, dihedrals
from dig_scale.geometry.alignment import aligned_rmsd
from dig_scale.sampling import collective_variables as cv
from dig_scale.sampling.clean_estimate import clean_estimate, geometry_of
from dig_scale.sampling.guidance import (
    Bins,
    Guide,
    Normal,
    Property,
    Seen,
    Window,
    clean_guide,
    noised_guide,
    property_guided,
)
from dig_scale.sampling.integrate import sample, time_grid
from dig_scale.sampling.solvers import SOLVERS, Step
from dig_scale.toy_states import ToySystem, toy_system
from dig_scale.toys import GaussianMixture
from dig_scale.tree import tree_map
from tests.kinds import KINDS, case, lively_model, noise_of

SCHEDULE = Diffusion(schedule="power", noise_min=0.02, noise_max=1000)
MIXTURE = GaussianMixture(
    torch.tensor([[1.5, 0.0, 0.0], [-1.0, 0.5, 0.0]]), torch.tensor([0.4, 0.6]), torch.tensor([0.3, 0.7])
)
SLOPE = torch.tensor([0.8, 0.0, 0.0])
GAUSSIAN = GaussianMixture(torch.tensor([[0.4, 0.0, 0.0]]), torch.tensor([0.7]), torch.tensor([1.0]))


def expected_tilt(geometry: Geometry, context: Context, level: Tensor) -> Tensor:
    """log E[exp(slope·x_0) | x_t] [B]: every component's posterior is a Gaussian."""
    y = geometry.positions.flatten(1)
    noise = level.to(y)[:, None] ** 2
    total = MIXTURE.std**2 + noise
    share = torch.log(MIXTURE.weights) - 1.5 * torch.log(total)
    share = share - ((y[:, None] - MIXTURE.means) ** 2).sum(-1) / (2 * total)
    mean = (MIXTURE.std[:, None] ** 2 * y[:, None] + noise[:, None] * MIXTURE.means) / total[..., None]
    variance = MIXTURE.std**2 * noise / total
    gained = mean @ SLOPE + 0.5 * variance * (SLOPE @ SLOPE)
    return torch.logsumexp(torch.log_softmax(share, 1) + gained, 1)


def first_coordinate(geometry: Geometry, context: Context) -> Tensor:
    return geometry.positions[:, 0, 0]


def drawn(toy: ToySystem, guide: Guide, count: int, steps: int) -> Tensor:
    """First coordinates [count] of guided samples by the ODE from evenly spread (Sobol) noise."""
    score_fn, solver = property_guided(toy.score_fn, toy.composition, [guide]), SOLVERS["heun"]
    uniform = torch.quasirandom.SobolEngine(3, scramble=True, seed=1).draw(count, dtype=torch.float64)
    noise = State(torch.special.ndtri(uniform).float().unsqueeze(1))
    state, memory, times = toy.composition.prior(noise), None, time_grid(steps).tolist()
    for t, t_next in itertools.pairwise(times):
        step = Step(state, toy.context, torch.full((count,), t), torch.full((count,), t_next), noise)
        state, memory = solver.step(score_fn, toy.composition, step, memory or solver.init(state))
    return state.positions[:, 0, 0].double()


def moments(mixture: GaussianMixture) -> tuple[float, float]:
    means, variances = mixture.means[:, 0].double(), mixture.std.double() ** 2
    mean = mixture.weights.double() @ means
    return float(mean), float(mixture.weights.double() @ (variances + means**2) - mean**2)


def test_a_mixture_with_the_exact_tilt_has_the_tilted_mean_and_variance() -> None:
    x = drawn(toy_system(MIXTURE, SCHEDULE), noised_guide(expected_tilt, lambda value: value), 8192, 50)
    mean, variance = moments(MIXTURE.tilted(SLOPE))
    plain, _ = moments(MIXTURE)
    assert abs(mean - plain) > 0.5
    assert float(x.mean()) == pytest.approx(mean, rel=0.02)
    assert float(x.var()) == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_clean_estimate_guides_a_gaussian_exactly_along_a_slope(scale: float) -> None:
    """The open part of x_0 has one variance everywhere, so the estimate is all that the gradient needs."""
    guide = replace(clean_guide(first_coordinate, lambda value: SLOPE[0] * value), scale=scale)
    x = drawn(toy_system(GAUSSIAN, SCHEDULE), guide, 1024, 120)
    mean, variance = moments(GAUSSIAN.tilted(scale * SLOPE))
    assert float(x.mean()) == pytest.approx(mean, rel=0.02)
    assert float(x.var()) == pytest.approx(variance, rel=0.02)


def test_a_soft_window_holds_the_samples() -> None:
    x = drawn(toy_system(MIXTURE, SCHEDULE), clean_guide(first_coordinate, Window(0.9, 1.7, 0.05)), 512, 50)
    assert float(((x > 0.85) & (x < 1.75)).double().mean()) > 0.9


def test_it_acts_between_its_times_alone_and_calls_the_score_once() -> None:
    toy = toy_system(MIXTURE, SCHEDULE)
    guide = replace(clean_guide(first_coordinate, Normal(3.0, 0.5)), start=0.7, end=0.3)
    t = torch.tensor([0.9, 0.5, 0.1])
    state = State(torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(1)))
    plain = toy.score_fn(state, toy.context, t).positions
    calls = []

    def counted(state: State, context: Context, t: Tensor):
        calls.append(t)
        return toy.score_fn(state, context, t)

    guided = property_guided(counted, toy.composition, [guide])(state, toy.context, t).positions
    assert len(calls) == 1
    assert torch.equal(guided[[0, 2]], plain[[0, 2]])
    assert (guided[1] - plain[1]).abs().max() > 0.01
    assert not guided.requires_grad


def test_a_clip_bounds_the_push_in_units_of_the_noise() -> None:
    toy = toy_system(MIXTURE, SCHEDULE)
    guide = replace(clean_guide(first_coordinate, Normal(50.0, 0.1)), clip=0.5)
    t, state = torch.tensor([0.6, 0.2]), State(torch.zeros(2, 1, 3))
    push = property_guided(toy.score_fn, toy.composition, [guide])(state, toy.context, t).positions
    push = push - toy.score_fn(state, toy.context, t).positions
    sigma = toy.composition.fields["positions"].process.coefficients(t).sigma
    assert torch.allclose(push[:, 0, 0] * sigma, torch.full((2,), 0.5), rtol=1e-4)


def test_it_works_within_inference_mode() -> None:
    toy = toy_system(GAUSSIAN, SCHEDULE)
    score_fn = property_guided(toy.score_fn, toy.composition, [clean_guide(first_coordinate, Normal(2.0, 0.3))])
    index = torch.arange(100)
    with torch.inference_mode():
        x = sample(score_fn, toy.composition, toy.context, SOLVERS["ancestral"], 20, 5, index).positions[:, 0, 0]
    assert abs(float(x.mean()) - 2.0) < 0.5


def spread(geometry: Geometry, context: Context) -> Tensor:
    """A number that depends on all fields of a structure."""
    value = torch.sin(geometry.positions).flatten(1).sum(1)
    if geometry.rotations is not None:
        weights = torch.arange(geometry.rotations[0].numel(), dtype=torch.float64).cos()
        value = value + geometry.rotations.flatten(1) @ weights
    return value if geometry.cell is None else value + 0.1 * (geometry.cell**2).flatten(1).sum(1)


@pytest.mark.parametrize("seen", list(Seen))
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_log_q_along_every_field(kind: str, seen: Seen) -> None:
    found = case(kind)
    composition, context, model = found.composition, found.context, lively_model(found.sites)
    score_fn = composition.as_score_fn(model)
    t = torch.full((found.batch,), 0.4, dtype=torch.float64)
    clean = composition.state(found.frames, context)
    state = composition.perturb(clean, t, noise_of(found))

    def log_q(state: State) -> Tensor:
        if seen is Seen.NOISED:
            return spread(composition.seen(state, context, t), context)
        estimate = clean_estimate(composition, state, score_fn(state, context, t), t)
        return spread(geometry_of(composition, estimate, context), context)

    guide = Guide(lambda geometry, context, level: spread(geometry, context), seen)
    guided = property_guided(score_fn, composition, [guide])(state, context, t)
    push = tree_map(lambda a, b: a - b, guided, score_fn(state, context, t))
    direction, h = noise_of(found, seed=1), 1e-5
    expected = []
    for sign in (1, -1):
        moved = {
            name: composition.fields[name].process.move(x, sign * h * fields_of(direction)[name])
            for name, x in fields_of(state).items()
        }
        expected.append(log_q(State(**moved)).detach())
    slope = (expected[0] - expected[1]) / (2 * h)
    ours = sum((fields_of(push)[name] * v).flatten(1).sum(1) for name, v in fields_of(direction).items())
    assert float(slope.abs().max()) > 0.1
    assert torch.allclose(ours, slope, rtol=1e-4, atol=1e-5)


def test_guides_that_answer_wrongly_are_refused() -> None:
    toy, t = toy_system(MIXTURE, SCHEDULE), torch.tensor([0.5, 0.5])
    state = State(torch.zeros(2, 1, 3))
    wrong: dict[str, Property] = {
        "one number per sample": lambda geometry, context: geometry.positions[:, 0],
        "no gradient": lambda geometry, context: geometry.positions[:, 0, 0].detach(),
    }
    for words, prop in wrong.items():
        with pytest.raises(UserError, match=words):
            property_guided(toy.score_fn, toy.composition, [clean_guide(prop, lambda v: v)])(state, toy.context, t)
    with pytest.raises(UserError, match="start >= end"):
        replace(clean_guide(first_coordinate, Normal(0, 1)), start=0.2, end=0.5)


def test_likelihoods_have_their_form() -> None:
    angles = torch.tensor([math.pi - 0.1, -math.pi + 0.1])
    assert Normal(math.pi, 0.1, 2 * math.pi)(angles).tolist() == pytest.approx([-0.5, -0.5], abs=1e-4)
    window = Window(2.9, 3.5, 0.01, 2 * math.pi)(torch.tensor([3.0, -3.0, 0.0, 2.5]))
    assert window[:2].abs().max() < 1e-3
    assert window[2:].max() < -30
    bins = Bins((0.0, 1.0, 2.0), 1, 2.0)(torch.tensor([0.0, 1.0, 2.0]))
    beside = -2 - math.log(1 + math.exp(-2) + math.exp(-4))
    assert bins.tolist() == pytest.approx([beside, -math.log(1 + 2 * math.exp(-2)), beside])


def test_collective_variables_agree_with_the_evaluation() -> None:
    x = torch.randn(6, 7, 3, generator=torch.Generator().manual_seed(2)).double()
    context = toy_system(GAUSSIAN).context
    context = replace(context, present=torch.ones(1, 7, dtype=torch.bool))
    seen, array = Geometry(x), x.numpy()
    assert cv.Dihedral((0, 2, 3, 6))(seen, context).numpy() == pytest.approx(
        dihedrals(array, np.array([[0, 2, 3, 6]]))[:, 0], abs=1e-5
    )
    assert cv.Angle((1, 4, 5))(seen, context).numpy() == pytest.approx(
        bend_angles(array, np.array([[1, 4, 5]]))[:, 0], abs=1e-5
    )
    reference = torch.randn(7, 3, generator=torch.Generator().manual_seed(3)).double()
    for sites in (None, (0, 1, 2, 5)):
        rows = slice(None) if sites is None else list(sites)
        expected = aligned_rmsd(array[:, rows], reference.numpy()[rows])
        assert cv.Rmsd(reference, sites)(seen, context).numpy() == pytest.approx(expected, abs=1e-9)
    gyration = np.sqrt(((array - array.mean(1, keepdims=True)) ** 2).sum(-1).mean(1))
    assert cv.RadiusOfGyration()(seen, context).numpy() == pytest.approx(gyration)
    r = np.linalg.norm(array[:, [0]] - array[:, [3, 4]], axis=-1)
    assert cv.Coordination((0,), (3, 4), 1.5)(seen, context).numpy() == pytest.approx((1 / (1 + (r / 1.5) ** 6)).sum(1))


@pytest.mark.parametrize(
    "prop",
    [
        cv.Distance((0, 3)),
        cv.Angle((0, 1, 2)),
        cv.Dihedral((0, 1, 2, 3)),
        cv.Coordination((0, 1), (1, 2, 3), 1.2),
        cv.RadiusOfGyration((0, 2, 3)),
        cv.Rmsd(torch.tensor([[0.0, 0, 0], [1, 0.2, 0], [1, 1.3, 0.4], [0, 1, 2]]).double()),
    ],
)
def test_collective_variables_have_the_gradients_of_their_values(prop: Property) -> None:
    context = replace(toy_system(GAUSSIAN).context, present=torch.ones(1, 4, dtype=torch.bool))
    x = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(4)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prop(Geometry(x), context), (x,), atol=1e-6)
    collapsed = torch.zeros(2, 4, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(prop(Geometry(collapsed), context).sum(), collapsed)
    assert torch.isfinite(gradient).all()


def test_properties_are_read_from_text(tmp_path: Path) -> None:
    assert cv.property_from("dihedral:4,6,8,10") == cv.Dihedral((4, 6, 8, 10))
    file = tmp_path / "mine.py"
    file.write_text("def height(geometry, context):\n    return geometry.positions[:, 0, 2]\n")
    height = cv.property_from(f"{file}:height")
    x = torch.randn(2, 3, 3)
    assert torch.equal(height(Geometry(x), toy_system(GAUSSIAN).context), x[:, 0, 2])
    for text, words in {
        "dihedral:1,2,3": "takes 4",
        "distance:a,b": "list of site numbers",
        "psi": "MODULE:FUNCTION",
        f"{file}:width": "no function 'width'",
        "no_such_module:f": "no_such_module",
        "absent.py:f": "no file",
    }.items():
        with pytest.raises(UserError, match=words):
            cv.property_from(text)
    with pytest.raises(UserError, match="sites 0 to 9"):
        cv.require_sites(cv.Distance((0, 12)), 10, "ala2")
