"""Counter-based noise and the independence of samples from their batch."""

from __future__ import annotations

import torch

from dig_scale.config import Diffusion
from dig_scale.diffusion.composition import composition_for
from dig_scale.model.features import featurise
from dig_scale.sampling.integrate import Walkers, advance, finished, sample, time_grid, walkers_at_start
from dig_scale.sampling.noise import counter_normal, philox
from dig_scale.sampling.solvers import SOLVERS, solver_named
from dig_scale.system import SystemKind
from dig_scale.tree import tree_cat, tree_select
from tests.molecules import alanine_dipeptide_heavy
from tests.truth.test_score_model import lively_model

SYSTEM = alanine_dipeptide_heavy()
COMPOSITION, CONTEXT = composition_for(SystemKind.MOLECULE, Diffusion()), featurise(SYSTEM)


def test_philox_gives_the_published_words() -> None:
    """Known-answer vectors of the Random123 distribution for philox4x32-10."""
    words = lambda *values: tuple(torch.tensor([v]) for v in values)  # noqa: E731
    hexes = lambda out: [f"{int(w):08x}" for w in out]  # noqa: E731
    assert hexes(philox(words(0, 0, 0, 0), words(0, 0))) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    full = 0xFFFFFFFF
    assert hexes(philox(words(full, full, full, full), words(full, full))) == [
        "408f276d",
        "41c83b0e",
        "a20bc7c6",
        "6d5451fd",
    ]


def test_normals_are_normal_and_depend_on_seed_index_and_step() -> None:
    index = torch.arange(20_000)
    x = counter_normal(torch.full_like(index, 7), index, torch.full_like(index, 3), 30)
    assert abs(float(x.mean())) < 0.006  # standard error 1/sqrt(600,000) = 0.0013
    assert abs(float(x.std()) - 1) < 0.005
    assert abs(float((x**4).mean()) - 3) < 0.06
    one = lambda s, i, k: counter_normal(*(torch.tensor([v]) for v in (s, i, k)), 12)  # noqa: E731
    assert torch.equal(one(7, 5, 3), one(7, 5, 3))
    for other in (one(8, 5, 3), one(7, 6, 3), one(7, 5, 4), one(7, 5 + 2**32, 3)):
        assert (one(7, 5, 3) - other).abs().min() > 0
    assert abs(float((x[:, 0] * x[:, 1]).mean())) < 0.03


def test_time_grid_runs_from_noise_to_clean() -> None:
    assert time_grid(5).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0, -1.0]


def test_a_sample_depends_on_seed_and_index_only() -> None:
    """To 1e-3 Å, alone or among others, in any order, for every solver."""
    score_fn = COMPOSITION.as_score_fn(lively_model())
    for solver in SOLVERS.values():
        many = sample(score_fn, COMPOSITION, CONTEXT, solver, 12, 1, torch.arange(17)).positions
        few = sample(score_fn, COMPOSITION, CONTEXT, solver, 12, 1, torch.tensor([11, 3])).positions
        assert (few - many[[11, 3]]).abs().max() < 1e-3
        assert (many[0] - many[1]).abs().max() > 0.1


def test_rows_at_different_steps_give_the_same_samples() -> None:
    score_fn, solver = COMPOSITION.as_score_fn(lively_model()), solver_named("dpm-solver++2m-sde")
    index = torch.arange(4)
    expected = sample(score_fn, COMPOSITION, CONTEXT, solver, 9, 5, index).positions

    def start(rows: list[int]) -> Walkers:
        picked = torch.tensor(rows)
        full = torch.full_like
        return walkers_at_start(COMPOSITION, CONTEXT, solver, full(picked, 5), picked, full(picked, 9))

    walkers = start([0, 1])
    for _ in range(4):
        walkers = advance(score_fn, COMPOSITION, CONTEXT, solver, walkers)
    walkers, done = tree_cat([walkers, start([2, 3])]), {}
    while len(walkers.index):
        walkers = advance(score_fn, COMPOSITION, CONTEXT, solver, walkers)
        over = finished(walkers)
        for row in torch.nonzero(over).flatten().tolist():
            done[int(walkers.index[row])] = walkers.state.positions[row]
        walkers = tree_select(walkers, ~over)
    for k in range(4):
        assert (done[k] - expected[k]).abs().max() < 1e-3
