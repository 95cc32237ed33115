"""What the fast forms save on a processor: each beside the reference form of the same thing, alternating, in one run.

    python kernels/bench/bench_cpu.py --json FILE [--threads 2] [--repeats 7] [--only table,step,sampling]

table     radial channels of B L² pairs from the cubic table against Gaussians and MLP per pair, forward and backward
step      a training step (forward, loss, backward, AdamW) of the `paper` recipe (12 x 768) at B = 8, L = 128 sites
sampling  one solver step of the `quickstart` recipe's model, a batch of its size

A ratio is the median time of the reference over the median time of the fast form; repeats alternate, so that other load
on the machine meets both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from dig_kernels.radial_table import KnotGrid, evaluate_pieces, hermite_pieces

from benchmarks.rows import Row, at_least, note, publish
from dig_scale.batch import Batch
from dig_scale.config import Recipe
from dig_scale.diffusion.composition import composition_for
from dig_scale.importers.protein import system_from_sequence
from dig_scale.model.features import featurise
from dig_scale.model.pair_bias import U_STOP, RadialChannels
from dig_scale.model.score_model import ScoreModel
from dig_scale.objectives.denoising import denoising_loss, draw_times
from dig_scale.recipe_files import load_recipe
from dig_scale.records import packed_system
from dig_scale.sampling.integrate import advance, walkers_at_start
from dig_scale.sampling.solvers import solver_named
from dig_scale.system import System

BATCH, SITES, HEADS, KERNELS = 8, 128, 32, 128
SEQUENCE = "ACE-" + "-".join(["ALA"] * 6 + ["GLY"] * 8) + "-NME"
"""128 atoms."""


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default=",".join(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [note("threads", given.threads)]
    for part in given.only.split(","):
        rows += PARTS[part](given.repeats)
    publish(rows, given.json)


def side_by_side(
    name: str, reference: Callable[[], object], fast: Callable[[], object], repeats: int, bar: float
) -> list[Row]:
    """Rows of one comparison; a first call of each is left out."""
    times: dict[str, list[float]] = {"reference": [], "fast": []}
    for repeat in range(repeats + 1):
        for key, work in (("reference", reference), ("fast", fast)):
            begin = time.perf_counter()
            work()
            if repeat:
                times[key].append(time.perf_counter() - begin)
    middle = {key: statistics.median(values) for key, values in times.items()}
    return [
        *(note(f"{name}: {key}, median of {repeats}", 1e3 * value, "ms") for key, value in middle.items()),
        *(note(f"{name}: {key}, fastest", 1e3 * min(values), "ms") for key, values in times.items()),
        at_least(f"{name}: reference over fast", middle["reference"] / middle["fast"], "x", bar),
    ]


def table_rows(repeats: int) -> list[Row]:
    """Radial channels by table and directly, with gradients of the parameters and of u."""
    torch.manual_seed(0)
    radial, grid = RadialChannels(KERNELS, HEADS), KnotGrid(0.0, U_STOP, 1024)
    u = (U_STOP * torch.rand(BATCH * SITES * SITES)).requires_grad_()
    direction = torch.randn(len(u), HEADS)
    leaves = [u, *radial.parameters()]

    def direct() -> object:
        return torch.autograd.grad(radial(u)[0], leaves, direction)

    def table() -> object:
        pieces = hermite_pieces(*radial(grid.positions(u), 1), grid)
        return torch.autograd.grad(evaluate_pieces(pieces, u, grid), leaves, direction)

    return side_by_side("bias generation, B=8 L=128 H=32 K=128, fwd+bwd", direct, table, repeats, bar=15)


def step_rows(repeats: int) -> list[Row]:
    """A training step of the 12 x 768 model."""
    recipe, system = load_recipe("paper"), system_from_sequence("base", SEQUENCE)
    assert system.n_sites == SITES
    steps = [training_step(_with_kernels(recipe, kernels), system) for kernels in ("reference", "auto")]
    return side_by_side("training step, 12x768, B=8 L=128", *steps, repeats=repeats, bar=3)


def training_step(recipe: Recipe, system: System) -> Callable[[], object]:
    """One step of the recipe's model on noised copies of a system's reference structure."""
    torch.manual_seed(0)
    model, context = ScoreModel(recipe.model), featurise(system)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)
    composition = composition_for(system.kind, recipe.diffusion)
    positions = torch.as_tensor(system.reference_positions, dtype=torch.float32)
    state = composition.state({"positions": positions.expand(BATCH, -1, -1)}, context)
    batch = Batch(state, context, (system.name,) * BATCH)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        optimiser.zero_grad()
        t = draw_times(BATCH, "antithetic", generator)
        normals = torch.randn(BATCH, composition.normals(context), generator=generator)
        noise = composition.noise(normals, context)
        denoising_loss(model, composition, batch, t, noise).mean().backward()
        optimiser.step()

    return step


def sampling_rows(repeats: int) -> list[Row]:
    """A solver step of the quickstart's model (heavy atoms of alanine dipeptide) at the recipe's batch."""
    recipe = load_recipe("quickstart")
    steps = [sampling_step(_with_kernels(recipe, kernels)) for kernels in ("reference", "auto")]
    return side_by_side("sampling step, quickstart model", *steps, repeats=4 * repeats, bar=2)


def sampling_step(recipe: Recipe) -> Callable[[], object]:
    """One step of the recipe's solver from the prior."""
    torch.manual_seed(0)
    assert recipe.pack is not None
    system = packed_system(system_from_sequence("ala2", "ACE-ALA-NME"), recipe.pack)
    model, context = ScoreModel(recipe.model).eval(), featurise(system)
    composition, solver = composition_for(system.kind, recipe.diffusion), solver_named(recipe.sample.solver)
    index = torch.arange(recipe.sample.batch)
    counts = [torch.full_like(index, value) for value in (recipe.sample.seed, recipe.sample.steps)]
    walkers = walkers_at_start(composition, context, solver, counts[0], index, counts[1])
    score_fn = composition.as_score_fn(model)

    def step() -> None:
        with torch.no_grad():
            advance(score_fn, composition, context, solver, walkers)

    return step


def _with_kernels(recipe: Recipe, kernels: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"kernels": kernels})})


PARTS: dict[str, Callable[[int], list[Row]]] = {"table": table_rows, "step": step_rows, "sampling": sampling_rows}


if __name__ == "__main__":
    main()
