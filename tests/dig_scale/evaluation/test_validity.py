"""Physical filters of every kind, with their reasons; and drawing until there are enough valid samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dig_scale.cli import app
from dig_scale.config import Diffusion, Model, Recipe, Sample
from dig_scale.ensemble import Ensemble, read_ensemble
from dig_scale.errors import UserError
from dig_scale.evaluation.validity import (
    BOND,
    CHAIN_BREAK,
    CLASH,
    NO_ROOM,
    NOT_FINITE,
    STEREO,
    Validity,
    validity,
)
from dig_scale.geometry.rotations import frames_from_backbone
from dig_scale.importers.backbone import residue_chain
from dig_scale.importers.sequence import backbone
from dig_scale.model.checkpoint import Checkpoint, save_checkpoint
from dig_scale.serving.offline import Draws, sample_ensemble
from dig_scale.stages.valid_samples import ATTEMPTS, Accepted, attempts_needed, valid_samples
from dig_scale.system import System, SystemKind
from tests.kinds import case, system_of
from tests.molecules import alanine_dipeptide_heavy
from tests.truth.test_score_model import lively_model


def ensemble_of(system: System, samples: list[np.ndarray], **fields: np.ndarray) -> Ensemble:
    return Ensemble(system, np.stack(samples).astype(np.float32), np.arange(len(samples)), 1, **fields)


def reasons(found: Validity) -> list[set[str]]:
    """What is wrong with every sample."""
    return [{name for name, rows in found.failed.items() if rows[k]} for k in range(len(found.valid))]


def moved(positions: np.ndarray, site: int, by: list[float]) -> np.ndarray:
    changed = positions.copy()
    changed[site] += by
    return changed


def test_each_damage_to_a_molecule_has_its_reason() -> None:
    system = alanine_dipeptide_heavy()
    good = system.reference_positions
    onto = good[0] + np.array([0.0, 0.0, 0.9]) - good[9]
    broken = np.full_like(good, np.nan)
    samples = [good, moved(good, 0, [-0.5, 0, 0]), moved(good, 9, list(onto)), good * [1, 1, -1], broken]
    found = validity(ensemble_of(system, samples))
    assert reasons(found) == [set(), {BOND}, {BOND, CLASH}, {STEREO}, {NOT_FINITE}]
    assert found.valid.tolist() == [True, False, False, False, False]
    assert found.counts() == {NOT_FINITE: 1, BOND: 2, CLASH: 1, STEREO: 1}
    assert found.in_words() == ("1 of 5 valid (20.0 %); not finite 1, bond off 2, clash 1, stereochemistry inverted 1")


def test_each_damage_to_a_chain_of_residues_has_its_reason() -> None:
    names = ("ALA",) * 6
    atoms = {(name, residue): place for name, residue, place in backbone(names)}
    n, ca, c = (torch.as_tensor(np.stack([atoms[name, k] for k in range(6)])) for name in ("N", "CA", "C"))
    turns, places = (value.numpy() for value in frames_from_backbone(n, ca, c))
    torn, pressed, folded = places.copy(), places.copy(), places.copy()
    torn[3:] += 8 * (places[1] - places[0]) / 3.8
    pressed[1:] += 0.5 * (places[0] - places[1])
    folded[5] = places[0] + 0.1
    system = residue_chain("chain", names)
    rotations = np.repeat(turns[None], 4, axis=0)
    found = reasons(validity(ensemble_of(system, [places, torn, pressed, folded], rotations=rotations)))
    assert found[0] == set()
    assert found[1] == {CHAIN_BREAK}
    assert BOND in found[2]
    assert {CLASH, CHAIN_BREAK} <= found[3]


def test_each_damage_to_a_crystal_has_its_reason() -> None:
    system = system_of("pair", SystemKind.CRYSTAL, [6, 14], np.zeros((2, 3)), periodic=(True, True, True))
    cell = 3.2 * np.eye(3)
    apart, together = np.array([[0.0, 0, 0], [1.6, 1.6, 1.6]]), np.array([[0.0, 0, 0], [0.1, 0, 0]])
    cells = np.stack([cell, cell, 0.2 * np.eye(3), cell])
    # the last pair meets through the wall
    samples = [apart, together, apart, np.array([[0.05, 0, 0], [3.15, 0, 0]])]
    found = reasons(validity(ensemble_of(system, samples, cell=cells)))
    assert found == [set(), {CLASH}, {NO_ROOM}, {CLASH}]


def test_a_slab_may_bind_its_adsorbate_but_not_swallow_it() -> None:
    system = case("catalyst").system
    good = system.reference_positions
    sunk = good.copy()
    sunk[8:] += good[4] - good[8] + np.array([0.3, 0.3, 0.3])
    # 0.4 Å from an image of its neighbour across the wall
    across = moved(good, 5, list(good[4] + system.cell[1] - good[5] + np.array([0.4, 0, 0])))
    found = reasons(validity(ensemble_of(system, [good, sunk, across, moved(good, 9, [0, 0, 0.6])])))
    assert found[0] == set()
    assert CLASH in found[1]
    assert CLASH in found[2]
    assert found[3] == {BOND}


def test_a_ligand_may_not_clash_with_its_pocket() -> None:
    system = case("pocket").system
    good = system.reference_positions
    hit = good.copy()
    hit[:4] += good[5] - good[0] + np.array([0.5, 0.5, 0.5])
    found = reasons(validity(ensemble_of(system, [good, hit])))
    assert found[0] == set()
    assert found[1] == {CLASH}


@pytest.mark.parametrize(
    ("valid", "drawn", "expected"), [(0, 0, 100), (100, 120, 120), (50, 100, 228), (0, 100, 1000), (99, 999, 1000)]
)
def test_as_many_are_drawn_next_as_the_acceptance_asks_for(valid: int, drawn: int, expected: int) -> None:
    assert attempts_needed(valid, drawn, wanted=100, cap=1000) == pytest.approx(expected, abs=2)


def beads() -> System:
    """Two beads that nothing holds together: a random network lets some of its samples clash."""
    return system_of("loose", SystemKind.MOLECULE, [0] * 2, 3.0 * np.arange(6.0).reshape(2, 3) / 4)


TINY = Model(layers=1, width=16, heads=2, feed_forward=16, radial_kernels=16, vector_channels=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = lively_model(TINY).state_dict()
    averaged = {name: tensor.clone() for name, tensor in weights.items()}
    recipe = Recipe(name="random", model=TINY, diffusion=Diffusion(noise_min=0.2))
    content = Checkpoint(weights, averaged, recipe, (beads(),), 0, {})
    return save_checkpoint(tmp_path_factory.mktemp("model") / "model.safetensors", content)


def draws(checkpoint: Path, out: Path, valid: int) -> Draws:
    return Draws(checkpoint, beads(), Sample(steps=4, num=valid, batch=64, workers=1), out)


@pytest.fixture(scope="module")
def forty(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Accepted:
    (accepted,) = valid_samples([draws(checkpoint, tmp_path_factory.mktemp("forty"), 40)], cap=4000)
    return accepted


def test_draws_until_there_are_enough_and_says_what_was_left_out(checkpoint: Path, forty: Accepted) -> None:
    attempts, kept = read_ensemble(forty.out / ATTEMPTS), read_ensemble(forty.out)
    judged = validity(attempts)
    assert 40 < attempts.n_samples <= 4000
    assert kept.index.tolist() == np.flatnonzero(judged.valid)[:40].tolist()
    assert validity(kept).valid.all()
    told = kept.provenance["validity"]
    assert told["attempts"] == attempts.n_samples
    assert told["acceptance"] == pytest.approx(judged.acceptance)
    assert told["failed"][CLASH] == judged.counts()[CLASH] > 0
    assert forty.in_words().startswith("40 valid samples; of all drawn, ")
    (again,) = valid_samples([draws(checkpoint, forty.out, 20)], cap=4000)
    assert again.ensemble is not None
    assert again.ensemble.index.tolist() == kept.index[:20].tolist()


def test_fewer_and_the_reasons_where_the_cap_is_met(checkpoint: Path, tmp_path: Path) -> None:
    words = ["sample", str(checkpoint), "--valid", "20", "--attempts-cap", "20", "--steps", "4", "--workers", "1"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path)], catch_exceptions=False)
    kept = read_ensemble(tmp_path)
    assert kept.n_samples < 20
    assert f"{kept.n_samples} valid samples (20 were wanted); of all drawn, {kept.n_samples} of 20 valid" in done.output
    assert f"clash {kept.provenance['validity']['failed'][CLASH]}" in done.output


def test_chosen_samples_and_all_samples_do_not_mix(checkpoint: Path, forty: Accepted) -> None:
    with pytest.raises(UserError, match="another run"):
        sample_ensemble(draws(checkpoint, forty.out, 100))
    with pytest.raises(UserError, match="no filter has seen"):
        valid_samples([draws(checkpoint, forty.out / ATTEMPTS, 5)])
    other = replace(draws(checkpoint, forty.out, 5), settings=Sample(steps=5, num=5, workers=1))
    with pytest.raises(UserError, match="steps 4 -> 5"):
        valid_samples([other])
    assert json.loads((forty.out / "run.json").read_text())["filters"] == "physical"


def test_a_cap_below_what_is_wanted_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least as many"):
        valid_samples([draws(checkpoint, tmp_path, 10)], cap=5)
