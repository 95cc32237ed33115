"""Whole evaluations of real trajectories, and the page: self-contained, free of NaN, in step with report.json."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from dig_scale import config
from dig_scale.ensemble import MODEL, STRATA
from dig_scale.errors import UserError
from dig_scale.evaluation import Costs, Evaluation, evaluate, summary_picture, write_report
from dig_scale.evaluation.result import numbers
from dig_scale.evaluation.structure import dihedrals
from dig_scale.system import System
from dig_scale.units import EV_PER_KJ_MOL
from tests.dig_scale.evaluation.conftest import RealTrajectory, ensemble_of, reference_of
from tests.molecules import alanine_dipeptide_heavy

SETTINGS = config.Evaluate(bootstrap=60)
COSTS = Costs(
    md_cpu_seconds=1e5, training_cpu_seconds=3e4, sampling_cpu_seconds=200.0, network_evaluations_per_sample=40
)


@pytest.fixture(scope="module")
def halves(beads: tuple[System, np.ndarray]) -> Evaluation:
    """The first half of a real trajectory as ensemble, the second as reference: two trajectories, with costs."""
    system, positions = beads
    reference = reference_of(system, positions[5000:7500], positions[7500:], source="a.zarr")
    return evaluate(ensemble_of(system, positions[:5000]), reference, SETTINGS, COSTS)


@pytest.fixture(scope="module")
def everything(alanine: RealTrajectory) -> Evaluation:
    """Heavy atoms against all atoms, with energies, weights and a stereocentre: every section of the page."""
    heavy = alanine.system.heavy_sites()
    generator = np.random.default_rng(0)
    samples = alanine.positions[:, heavy] + generator.normal(0, 0.03, size=(501, 10, 3))
    energies = generator.normal(-5.0, 0.1, size=501)
    ensemble = ensemble_of(
        alanine.system.select(heavy), samples, energy=energies, log_weights=generator.normal(size=501)
    )
    reference = replace(reference_of(alanine.system, alanine.positions), energy=energies - 0.1)
    return evaluate(ensemble, reference, SETTINGS)


@pytest.fixture(scope="module")
def written(halves: Evaluation, everything: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the report of each, written once."""
    reports = {"halves": halves, "everything": everything}
    return {name: write_report(one, tmp_path_factory.mktemp(name)).parent for name, one in reports.items()}


def test_an_ensemble_equal_to_the_md_has_no_divergence(beads: tuple[System, np.ndarray]) -> None:
    system, positions = beads
    same = evaluate(ensemble_of(system, positions), reference_of(system, positions), SETTINGS)
    assert same.maps[0].divergence.model == 0.0
    assert same.maps[0].divergence.subsample > 0
    assert [torsion.divergence.model for torsion in same.torsions] == [0.0, 0.0]
    assert same.bonds is not None
    assert same.bonds.largest_shift["model"].value == 0.0
    assert "cannot be told apart" in same.verdict[0]
    row = same.maps[0].basins[2]
    assert row.population["md"].value == pytest.approx(0.0239)  # of these 10,000 frames, counted by hand
    assert row.model_minus_md_kt.value == 0.0


def test_halves_of_the_md_are_compared_as_the_model_is(beads: tuple[System, np.ndarray], halves: Evaluation) -> None:
    system, positions = beads
    whole = evaluate(ensemble_of(system, positions[::7]), reference_of(system, positions), SETTINGS)
    assert whole.maps[0].divergence.halves == pytest.approx(halves.maps[0].divergence.model)
    for inside, alone in (("first_half", "model"), ("second_half", "md")):
        expected = halves.maps[0].basins[0].population[alone].value
        assert whole.maps[0].basins[0].population[inside].value == pytest.approx(expected)


def test_rare_basin_is_warned_about(halves: Evaluation) -> None:
    text = "\n".join(halves.warnings)
    assert re.search(
        r"The MD arrived fewer than 5 times in ALA2 φ > 0 \(\d\): such a population is not converged", text
    )
    assert re.search(r"Fewer than 20 frames in ALA2 φ > 0 \(MD 239, model 0\)", text)
    assert halves.maps[0].basins[2].free_energy_kt["model"].value is None


def test_a_uniform_ensemble_is_not_called_a_good_one(beads: tuple[System, np.ndarray]) -> None:
    system, positions = beads
    noise = np.random.default_rng(0).normal(0, 1.0, size=(3000, 5, 3)) + positions[:3000]
    bad = evaluate(ensemble_of(system, noise), reference_of(system, positions), SETTINGS)
    assert "does not reproduce" in bad.verdict[0]
    assert bad.bonds is not None
    assert (bad.bonds.frames_off["model"].value or 0) > 0.99
    assert bad.bonds.frames_off["md"].value == 0.0


def test_mirrored_samples_fail_stereochemistry(alanine: RealTrajectory) -> None:
    samples = alanine.positions * np.where(np.arange(501) < 100, -1, 1)[:, None, None]
    result = evaluate(ensemble_of(alanine.system, samples), reference_of(alanine.system, alanine.positions), SETTINGS)
    assert result.stereo is not None
    assert result.stereo.all_correct["model"].value == pytest.approx(401 / 501)
    assert result.stereo.all_correct["md"].value == pytest.approx(1.0)
    assert result.stereo.centres[0].label == "ALA2:CA (atom 8)"


def test_samples_that_are_not_finite_are_left_out_and_counted(beads: tuple[System, np.ndarray]) -> None:
    system, positions = beads
    broken = positions[:1000].copy()
    broken[[3, 500], 2] = np.nan
    result = evaluate(ensemble_of(system, broken), reference_of(system, positions), SETTINGS)
    assert (result.subject.samples, result.subject.samples_left_out) == (998, 2)
    assert "2 of 1000 samples" in result.warnings[0]
    with pytest.raises(UserError, match="0 of 1000 samples have finite"):
        evaluate(ensemble_of(system, np.full_like(broken, np.inf)), reference_of(system, positions), SETTINGS)


def test_a_system_without_bonds_is_reported_with_a_warning(beads: tuple[System, np.ndarray], tmp_path: Path) -> None:
    system, positions = beads
    bare = replace(system, bonds=np.zeros((0, 2), int), bond_orders=np.zeros(0, int))
    result = evaluate(ensemble_of(bare, positions[:50]), reference_of(bare, positions[:100]), SETTINGS)
    assert result.headline is None
    assert result.bonds is None
    assert any("lists no bonds" in warning for warning in result.warnings)
    assert write_report(result, tmp_path).is_file()
    assert summary_picture(result, tmp_path / "summary.png").is_file()
    described = evaluate(ensemble_of(bare, positions[:50]), reference_of(system, positions[:100]), SETTINGS)
    assert described.bonds is not None  # the reference's bonds stand in


def test_costs_follow_from_the_slowest_torsion(halves: Evaluation) -> None:
    cost, reference = halves.cost, halves.reference
    assert cost is not None
    assert reference.independent_frames == pytest.approx(5000 / reference.statistical_inefficiency)
    assert reference.decorrelation_time_ps == pytest.approx(10 * reference.statistical_inefficiency)
    assert cost.model_samples_per_second == pytest.approx(25)
    assert cost.md_seconds_per_independent_sample == pytest.approx(1e5 / reference.independent_frames)
    assert cost.speed_up == pytest.approx(25 * 1e5 / reference.independent_frames)


def test_costs_that_were_not_recorded_are_left_open(beads: tuple[System, np.ndarray]) -> None:
    system, positions = beads
    ensemble, reference = ensemble_of(system, positions[:100]), reference_of(system, positions[:200])
    assert evaluate(ensemble, reference, SETTINGS).cost is None
    partly = evaluate(ensemble, reference, SETTINGS, Costs(sampling_cpu_seconds=4.0)).cost
    assert partly is not None
    assert (partly.speed_up, partly.model_seconds_per_sample) == (None, 0.04)


def test_energies_are_compared_in_kj_mol_when_both_have_them(everything: Evaluation) -> None:
    assert everything.energy is not None
    shift = everything.energy.mean["model"].value - everything.energy.mean["md"].value  # type: ignore[operator]
    assert shift == pytest.approx(0.1 / EV_PER_KJ_MOL)


def test_reweighted_numbers_stand_beside_their_effective_sample_size(
    everything: Evaluation, written: dict[str, Path]
) -> None:
    assert everything.reweighting is not None
    assert everything.maps[0].divergence.reweighted is not None
    page = (written["everything"] / "report.html").read_text()
    assert "Model, reweighted" in page
    assert re.search(r"effective sample size is\s+<data", page)


def test_samples_chosen_by_state_are_weighed_back_to_the_model(
    beads: tuple[System, np.ndarray], tmp_path: Path
) -> None:
    system, positions = beads
    whole = evaluate(ensemble_of(system, positions), reference_of(system, positions), SETTINGS)
    rare = dihedrals(positions, np.array([[0, 1, 2, 3]]))[:, 0] > 0
    rows = np.sort(np.concatenate([np.flatnonzero(rare), np.flatnonzero(~rare)[::10]]))
    chosen = ensemble_of(system, positions[rows], log_weights=np.where(rare[rows], 0, np.log(10.0)))
    chosen = replace(chosen, provenance=chosen.provenance | {"log_weights": MODEL, STRATA: []})
    found = evaluate(chosen, reference_of(system, positions), SETTINGS)
    for row, expected in zip(found.maps[0].basins, whole.maps[0].basins, strict=True):
        assert row.population["model"].value == pytest.approx(expected.population["model"].value, abs=0.02)
        assert "reweighted" not in row.population
    assert found.maps[0].basins[2].population["model"].value == pytest.approx(rare.mean(), rel=0.01)
    assert found.maps[0].divergence.model < 0.1
    page = write_report(found, tmp_path).read_text()
    assert "Model (ESS" in page and "Model, reweighted" not in page


def test_unweighted_page_has_no_reweighted_column(written: dict[str, Path]) -> None:
    assert "reweighted" not in (written["halves"] / "report.html").read_text()


@pytest.mark.parametrize("which", ["halves", "everything"])
def test_page_numbers_are_those_of_the_json(which: str, written: dict[str, Path]) -> None:
    content = json.loads((written[which] / "report.json").read_text())
    shown = _numbers_of((written[which] / "report.html").read_text())
    assert len(shown) > 100
    for path, value, text in shown:
        found = _at(content, path)
        assert float(value) == found, path
        _assert_reads_as(text, found, path)


@pytest.mark.parametrize("which", ["halves", "everything"])
def test_page_is_self_contained_and_free_of_nan(which: str, written: dict[str, Path]) -> None:
    page = (written[which] / "report.html").read_text()
    bare = re.sub(r"data:image/(png|svg\+xml);base64,[A-Za-z0-9+/=]+", "picture", page)
    assert bare.count("picture") >= 4
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", bare)
    body = bare[bare.index("<body>") :]
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", body)
    assert sorted(path.name for path in written[which].iterdir()) == ["report.html", "report.json"]


def test_names_are_escaped_on_the_page(halves: Evaluation, tmp_path: Path) -> None:
    named = replace(halves, subject=replace(halves.subject, system="<b>A & B</b>"))
    assert "<h1>&lt;b&gt;A &amp; B&lt;/b&gt;" in write_report(named, tmp_path).read_text()


def test_same_seed_gives_the_same_numbers(beads: tuple[System, np.ndarray]) -> None:
    system, positions = beads

    def run(seed: int) -> dict[str, Any]:
        settings = config.Evaluate(bootstrap=20, seed=seed)
        content = numbers(evaluate(ensemble_of(system, positions[:500]), reference_of(system, positions), settings))
        return {name: content[name] for name in ("maps", "torsions", "bonds")}

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_one_bootstrap_replicate_gives_no_errors_and_no_nan(beads: tuple[System, np.ndarray], tmp_path: Path) -> None:
    system, positions = beads
    settings = config.Evaluate(bootstrap=1, bins=1)
    result = evaluate(ensemble_of(system, positions[:60]), reference_of(system, positions[:90]), settings)
    assert result.maps[0].divergence.model_error is None
    assert write_report(result, tmp_path).is_file()


def test_summary_picture_is_a_picture(halves: Evaluation, tmp_path: Path) -> None:
    picture = imread(summary_picture(halves, tmp_path / "figures" / "ala2.png"))
    assert picture.shape[0] > 500
    assert picture.std() > 0.05


@pytest.mark.slow
def test_ten_thousand_samples_take_less_than_a_minute(alanine: RealTrajectory, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frames = alanine.positions[generator.integers(501, size=30_000)] + generator.normal(0, 0.02, size=(30_000, 22, 3))
    start = time.process_time()
    reference = reference_of(alanine.system, frames[:10_000], frames[10_000:20_000])
    write_report(evaluate(ensemble_of(alanine.system, frames[20_000:]), reference, config.Evaluate()), tmp_path)
    assert time.process_time() - start < 60


def test_reference_without_the_ensembles_atoms_is_refused(beads: tuple[System, np.ndarray]) -> None:
    system, positions = beads
    heavy = alanine_dipeptide_heavy()
    ensemble = ensemble_of(heavy, heavy.reference_positions[None])
    with pytest.raises(UserError, match="lacks ACE1:CH3"):
        evaluate(ensemble, reference_of(system, positions[:10]), SETTINGS)


class _DataElements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self._open: dict[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = dict(attrs) if tag == "data" else None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.found.append((str(self._open["data-path"]), str(self._open["value"]), data))
            self._open = None


def _numbers_of(page: str) -> list[tuple[str, str, str]]:
    parser = _DataElements()
    parser.feed(page)
    return parser.found


def _at(content: Any, path: str) -> Any:
    for key in path.split("."):
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def _assert_reads_as(text: str, value: float, path: str) -> None:
    """The printed text is `value` to the digits that it shows."""
    printed = text.replace(",", "").replace("−", "-")
    if printed.endswith(" %"):
        printed, value = printed.removesuffix(" %"), 100 * value
    mantissa, _, exponent = printed.partition("e")
    decimals = len(mantissa.partition(".")[2])
    step = 10.0 ** (int(exponent or 0) - decimals)
    significant_loss = 0.05 * abs(value) if "." not in mantissa else 0  # 21,200 stands for 21,208.9
    assert abs(float(printed) - value) <= max(0.51 * step, significant_loss), (path, text, value)
