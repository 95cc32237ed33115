"""Offline sampling of models of several systems and of conditioned models, by the stage that the command line runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dig_scale.cli import app
from dig_scale.config import Condition, Model, Recipe, Sample
from dig_scale.ensemble import read_ensemble
from dig_scale.errors import UserError
from dig_scale.importers.crystal import crystal_system
from dig_scale.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dig_scale.sampling.integrate import sample
from dig_scale.sampling.solvers import solver_named
from dig_scale.serving.offline import Draws, sample_ensemble, sample_ensembles
from dig_scale.serving.served import ServedModel, Wanted, build_bench, load_served_model
from dig_scale.stages.sample import sample_stage, shared_out
from tests.kinds import SMALL, lively_model

QUICK = Sample(steps=2, batch=8, workers=1, num=10)
CRYSTALS = (crystal_system(np.full(2, 6)), crystal_system(np.full(3, 6)), crystal_system(np.full(4, 6)))
GAP = Condition(name="gap", centre=2.0, spread=0.5)


def saved(folder: Path, conditions: tuple[Condition, ...] = (), frames: tuple[int, ...] = (70, 30, 1)) -> Path:
    """A checkpoint of random weights, of three compositions."""
    model = Model.model_validate(SMALL | {"sites": "crystal", "radial_knots": 0, "conditions": conditions})
    network = lively_model("crystal", radial_knots=0, conditions=conditions).float()
    weights, averaged = ({name: tensor.clone() for name, tensor in network.state_dict().items()} for _ in range(2))
    recipe = Recipe(name="random", model=model)
    content = Checkpoint(weights, averaged, recipe, CRYSTALS, step=0, frames=frames)
    return save_checkpoint(folder / "model.safetensors", content)


def test_samples_are_shared_as_the_training_frames_are(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    wanted = shared_out(checkpoint, None, QUICK, tmp_path / "out")
    assert [(one.system.name, one.settings.num, one.out.name) for one in wanted] == [("C2", 7, "C2"), ("C3", 3, "C3")]
    for draws, ensemble in zip(wanted, sample_stage(wanted), strict=True):
        assert ensemble.n_samples == draws.settings.num and ensemble.cell is not None
        alone = sample_ensemble(
            Draws(checkpoint, draws.system, draws.settings, tmp_path / f"alone-{draws.system.name}")
        )
        np.testing.assert_allclose(ensemble.positions, alone.positions, atol=1e-4)
        assert (draws.out / "samples.cif").is_file() and not any((draws.out / "parts").iterdir())
    grown = shared_out(checkpoint, None, QUICK.model_copy(update={"num": 14}), tmp_path / "out")
    assert sum(one.n_samples for one in sample_stage(grown)) == 14


@pytest.mark.parametrize("conditions", [{}, {"gap": 3.0}])
def test_systems_of_one_size_share_batches_and_get_the_samples_they_get_alone(
    tmp_path: Path, conditions: dict[str, float]
) -> None:
    checkpoint = saved(tmp_path, (GAP,))
    settings = QUICK.model_copy(update={"num": 3, "conditions": conditions, "guidance": 2.0})
    systems = [crystal_system(np.array(numbers)) for numbers in ((6, 6), (6, 14), (14, 32), (6, 6, 6))]
    calls: list[int] = []
    together = sample_ensembles(
        [Draws(checkpoint, one, settings, tmp_path / one.name) for one in systems], lambda done, _: calls.append(done)
    )
    assert sorted(np.diff([0, *calls])) in ([3, 3, 6], [3, 9]), "8 rows hold two systems of three samples"
    for system, ensemble in zip(systems, together, strict=True):
        alone = sample_ensemble(Draws(checkpoint, system, settings, tmp_path / f"alone-{system.name}"))
        assert ensemble.system.system_id == system.system_id and ensemble.cell is not None and alone.cell is not None
        np.testing.assert_allclose(ensemble.positions, alone.positions, atol=1e-4)
        np.testing.assert_allclose(ensemble.cell, alone.cell, atol=1e-4)
        assert ensemble.provenance["cpu_seconds"] > 0


def test_a_lost_file_is_written_again_without_drawing(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    draws = shared_out(checkpoint, "C3", QUICK, tmp_path / "out")
    before = sample_stage(draws)[0]
    (tmp_path / "out" / "samples.cif").unlink()
    calls: list[int] = []
    after = sample_ensemble(draws[0], lambda done, total: calls.append(done))
    assert not calls and (tmp_path / "out" / "samples.cif").is_file()
    np.testing.assert_array_equal(before.positions, after.positions)


def test_frames_are_kept_by_the_checkpoint_and_missed_where_they_are_not_there(tmp_path: Path) -> None:
    assert load_checkpoint(saved(tmp_path / "a")).frames == (70, 30, 1)
    with pytest.raises(UserError, match="name one with --system"):
        shared_out(saved(tmp_path / "b", frames=()), None, QUICK, tmp_path / "out")


def drawn(model: ServedModel, wanted: Wanted) -> Tensor:
    """Cells of four samples with wanted properties."""
    bench, solver = build_bench(model, CRYSTALS[1], wanted), solver_named("dpm-solver++2m-ode")
    with torch.inference_mode():
        state = sample(bench.score_fn, bench.composition, bench.context, solver, 2, 1, torch.arange(4))
    return bench.composition.arrays(state, bench.context)["cell"]


def test_conditions_and_guidance_change_samples(tmp_path: Path) -> None:
    model = load_served_model(saved(tmp_path, (GAP,)), torch.device("cpu"))
    free, low, high = drawn(model, Wanted()), drawn(model, Wanted({"gap": 1.0})), drawn(model, Wanted({"gap": 4.0}))
    assert (low - high).abs().max() > 1e-4 and (low - free).abs().max() > 1e-4
    torch.testing.assert_close(drawn(model, Wanted({"gap": 4.0}, 0.0)), free)
    assert (drawn(model, Wanted({"gap": 4.0}, 3.0)) - high).abs().max() > 1e-4
    assert (Wanted().evaluations, Wanted({"gap": 4.0}).evaluations, Wanted({"gap": 4.0}, 3.0).evaluations) == (1, 1, 2)


def test_conditions_are_numbers_of_spreads_from_the_centre(tmp_path: Path) -> None:
    model = load_served_model(saved(tmp_path, (GAP,)), torch.device("cpu"))
    asked, free = (build_bench(model, CRYSTALS[0], wanted).context for wanted in (Wanted({"gap": 3.0}), Wanted()))
    assert (asked.condition.tolist(), asked.known.tolist()) == ([[2.0]], [[True]])
    assert free.known.tolist() == [[False]]


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, str(done.exception or done.output)


def test_conditions_are_part_of_the_run(tmp_path: Path) -> None:
    words = ("sample", saved(tmp_path, (GAP,)), "--system", "C3", "--num", 3, "--steps", 2, "--workers", 1)
    out = ("--out", tmp_path / "high")
    assert run(*words, "--condition", "gap=4", "--guidance", 3, *out)[0] == 0
    assert read_ensemble(tmp_path / "high").provenance["network_evaluations_per_sample"] == 4
    assert json.loads((tmp_path / "high" / "run.json").read_text())["conditions"] == {"gap": 4.0}
    for more in ((), ("--condition", "gap=1", "--guidance", 3), ("--condition", "gap=4")):
        code, said = run(*words, *more, *out)
        assert code == 1 and "another run" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--condition", "colour=1"), "'colour'.*its properties are gap"),
        (("--condition", "gap"), "expected NAME=VALUE"),
        (("--condition", "gap=nan"), "not a finite number"),
        (("--guidance", "2"), "ask for a property"),
    ],
)
def test_what_a_model_cannot_be_asked_is_said(tmp_path: Path, more: tuple[str, ...], words: str) -> None:
    checkpoint = saved(tmp_path, (GAP,))
    code, said = run("sample", checkpoint, "--system", "C3", *more, "--out", tmp_path / "out")
    assert code == 1
    with pytest.raises(UserError, match=words):
        raise UserError(said)
