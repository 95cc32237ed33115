"""A potential's energies are the engine's, its gradient is that of the energy, and what has no density is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dig_scale.config import CalculatorSpec, ExplicitSolvent, Simulate, SurfaceSpec, SystemSpec
from dig_scale.ensemble import Ensemble
from dig_scale.errors import UserError
from dig_scale.importers import system_from_spec
from dig_scale.importers.catalyst import surface_system
from dig_scale.simulation.ase_engine import ASEEngine, engines_at
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.openmm_engine import OpenMMEngine
from dig_scale.simulation.openmm_systems import build_model
from dig_scale.simulation.potential import (
    AnalyticPotential,
    EnginePotential,
    Potential,
    PotentialOptions,
    density_space_check,
    label_ensemble,
    potential_for,
    regularised,
)
from dig_scale.system import System
from dig_scale.toys import DoubleWell, HarmonicCrystal
from tests.kinds import case
from tests.molecules import five_beads

FLEXIBLE = Simulate(constraints="none", time_step_fs=1.0, friction_per_ps=10.0)
ENGINES = ("peptide", "molecule", "slab", "analytic")
KCAL_MOL_PER_KT_AT_300_K = 0.5961612775922


@pytest.fixture(scope="module")
def dipeptide() -> System:
    return system_from_spec(SystemSpec(name="ala2", sequence="ACE-ALA-NME"))


@pytest.fixture(scope="module")
def potentials(dipeptide: System) -> dict[str, Potential]:
    """One of every engine, at 300 K."""
    ester = system_from_spec(SystemSpec(name="ester", smiles="CC(=O)OC"))
    slab = surface_system("cu-o", SurfaceSpec(metal="Cu", size=(1, 1, 3)))
    return {
        "peptide": potential_for(dipeptide, FLEXIBLE, PotentialOptions(threads=1)),
        "molecule": potential_for(ester, FLEXIBLE, PotentialOptions(threads=1)),
        "slab": potential_for(slab, FLEXIBLE),
        "analytic": AnalyticPotential(five_beads(), 300.0, _springs),
    }


def _springs(x: torch.Tensor) -> torch.Tensor:
    """Neighbours 1.5 Å apart, 40 kT/Å² with a quartic part."""
    stretch = (x[:, 1:] - x[:, :-1]).norm(dim=-1) - 1.5
    return (20 * stretch**2 + stretch**4).sum(1)


def _shaken(system: System, count: int, size: float = 0.04) -> np.ndarray:
    noise = np.random.default_rng(1).normal(scale=size, size=(count, system.n_sites, 3))
    return system.reference_positions + noise


def _frames(system: System, simulate: Simulate, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, energies and forces that the engine stores in a short run."""
    engine = OpenMMEngine(system, simulate, simulate.temperature, "Reference")
    engine.restore(engine.minimised(3), 3)
    frames = [engine.advance(20) for _ in range(count)]
    positions, energy, forces = (
        np.concatenate([getattr(one, name) for one in frames]) for name in ("positions", "energy", "forces")
    )
    return positions, energy, forces


# --- energies, forces, gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_forces_are_the_slope_of_the_energy(name: str, potentials: dict[str, Potential]) -> None:
    potential = potentials[name]
    start = _shaken(potential.system, 1)
    _, forces = potential.energy_and_forces(start)
    sites = np.random.default_rng(2).integers(0, potential.system.n_sites, 4)
    places = [(int(site), axis) for site, axis in zip(sites, (0, 1, 2, 0), strict=True)]
    steps = np.zeros((len(places), *start.shape[1:]))
    for number, (site, axis) in enumerate(places):
        steps[number, site, axis] = 1e-4
    slope = (potential.energy_and_forces(start + steps)[0] - potential.energy_and_forces(start - steps)[0]) / 2e-4
    measured = np.array([forces[0, site, axis] for site, axis in places])
    np.testing.assert_allclose(-slope, measured, rtol=1e-5, atol=1e-5)
    assert np.abs(measured).max() > 0.1


@pytest.mark.parametrize("name", ENGINES)
def test_gradient_of_reduced_energy_is_minus_force_over_kt(name: str, potentials: dict[str, Potential]) -> None:
    potential = potentials[name]
    x = torch.tensor(_shaken(potential.system, 3), requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    reduced = potential.reduced_energy(x)
    (gradient,) = torch.autograd.grad(reduced @ upstream, x)
    energy, forces = potential.energy_and_forces(x.detach().numpy())
    np.testing.assert_allclose(reduced.detach(), energy / potential.kT_ev, rtol=1e-12)
    expected = -forces / potential.kT_ev * upstream.numpy()[:, None, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-9)


def test_kt_converts_energies_once() -> None:
    potential = AnalyticPotential(five_beads(), 300.0, _springs)
    assert potential.kT_ev == pytest.approx(0.025851999786435, rel=1e-12)
    assert potential.kT_ev * 23.0605478 == pytest.approx(KCAL_MOL_PER_KT_AT_300_K, rel=1e-6)
    x = _shaken(potential.system, 2)
    engine = EnginePotential(potential.system, 600.0, lambda positions, _: potential.energy_and_forces(positions))
    # the same energies at twice the temperature
    half = engine.reduced_energy(torch.tensor(x))
    np.testing.assert_allclose(2 * half, potential.reduced_energy(torch.tensor(x)), rtol=1e-12)


def test_single_precision_comes_back_from_double_precision_inside(potentials: dict[str, Potential]) -> None:
    for name in ("peptide", "analytic"):
        potential = potentials[name]
        x = torch.tensor(_shaken(potential.system, 2)).float().requires_grad_()
        reduced = potential.reduced_energy(x)
        (gradient,) = torch.autograd.grad(reduced.sum(), x)
        assert reduced.dtype == gradient.dtype == torch.float32
        assert torch.equal(reduced, potential.reduced_energy(x.double()).float())


def test_second_derivative_of_an_engine_is_refused_in_words(potentials: dict[str, Potential]) -> None:
    potential = potentials["peptide"]
    x = torch.tensor(_shaken(potential.system, 2), requires_grad=True)
    scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(potential.reduced_energy(x) @ scale, x, create_graph=True)
    (by_scale,) = torch.autograd.grad(gradient.square().sum() / 2, scale, retain_graph=True)
    # what comes from above is followed: d/ds |s g|²/2 = |g|² at s = 1
    torch.testing.assert_close(by_scale, gradient.detach().square().sum((1, 2)))
    with pytest.raises(UserError, match="no second derivatives: detach"):
        gradient.sum().backward()


def test_analytic_potential_is_differentiable_twice() -> None:
    crystal = HarmonicCrystal(torch.diag(torch.arange(1.0, 16.0, dtype=torch.float64)))
    potential = AnalyticPotential(five_beads(), 300.0, lambda x: crystal.reduced_energy(x.flatten(1)))
    x = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = torch.autograd.functional.hessian(lambda one: potential.reduced_energy(one[None])[0], x[0])
    torch.testing.assert_close(hessian.reshape(15, 15), crystal.stiffness)


# --- the same numbers as the engines --------------------------------------------------------------------------------


def test_pool_gives_the_energies_of_one_context_and_of_the_engine(dipeptide: System) -> None:
    positions, energy, forces = _frames(dipeptide, FLEXIBLE, 7)
    for threads in (1, 3, 9):
        found = potential_for(dipeptide, FLEXIBLE, PotentialOptions(threads=threads)).energy_and_forces(positions)
        np.testing.assert_allclose(found[0], energy, atol=1e-10)
        np.testing.assert_allclose(found[1], forces, atol=1e-8)


def test_constrained_frames_keep_their_energies_without_constraints(dipeptide: System) -> None:
    rigid = Simulate(friction_per_ps=10.0)
    positions, energy, _ = _frames(dipeptide, rigid, 5)
    potential = potential_for(dipeptide, rigid, PotentialOptions(threads=1))
    # bonds at their rest length within the constraint tolerance of 1e-5
    np.testing.assert_allclose(potential.energy_and_forces(positions)[0], energy, atol=1e-4)
    hydrogen = dipeptide.bonds[(dipeptide.elements[dipeptide.bonds] == 1).any(axis=1)][0]
    stretched = positions[:1].copy()
    stretched[0, hydrogen[1]] += 0.3 * (positions[0, hydrogen[1]] - positions[0, hydrogen[0]])
    assert potential.energy_and_forces(stretched)[0][0] > energy[0] + 0.5


def test_platform_of_single_precision_agrees(dipeptide: System) -> None:
    positions = _shaken(dipeptide, 4)
    double = potential_for(dipeptide, FLEXIBLE, PotentialOptions(threads=1)).energy_and_forces(positions)
    single = potential_for(dipeptide, FLEXIBLE, PotentialOptions(threads=2, platform="CPU")).energy_and_forces(
        positions
    )
    np.testing.assert_allclose(single[0], double[0], atol=1e-4)
    np.testing.assert_allclose(single[1], double[1], atol=1e-2)


def test_slab_has_the_energies_of_its_engine(potentials: dict[str, Potential]) -> None:
    system = potentials["slab"].system
    engine: ASEEngine = engines_at(system, FLEXIBLE, [300.0])[0]
    engine.restore(engine.minimised(5), 5)
    frame = engine.advance(10)
    energy, forces = potentials["slab"].energy_and_forces(frame.positions)
    assert frame.energy is not None and frame.forces is not None
    np.testing.assert_allclose(energy, frame.energy, rtol=1e-12)
    np.testing.assert_allclose(forces, frame.forces, atol=1e-12)


def test_named_calculator_takes_the_place_of_the_force_field() -> None:
    water = system_from_spec(SystemSpec(name="water", smiles="O"))
    field = potential_for(water, FLEXIBLE, PotentialOptions(threads=1))
    named = potential_for(water, FLEXIBLE, PotentialOptions(calculator=CalculatorSpec()))
    assert isinstance(field, EnginePotential) and field.origin["engine"] == "OpenMM"
    assert named.origin["method"] == "ASE EMT"
    x = _shaken(water, 3)
    both = named.energy_and_forces(x)
    np.testing.assert_allclose(both[0][1:], named.energy_and_forces(x[1:])[0])
    assert not np.allclose(both[0], field.energy_and_forces(x)[0])


def test_crystal_takes_a_cell_with_every_structure() -> None:
    crystal = replace(case("crystal").system, elements=np.array([6, 6, 6, 29, 29]))
    frames = case("crystal").frames
    positions, cells = frames["positions"].numpy(), frames["cell"].numpy()
    potential = potential_for(crystal, FLEXIBLE)
    energy, _ = potential.energy_and_forces(positions, cells)
    assert np.isfinite(energy).all() and len(set(energy)) == 3
    moved, _ = potential.energy_and_forces(positions + cells[:, :1], cells)
    np.testing.assert_allclose(moved, energy, rtol=1e-8)
    with pytest.raises(SimulationError, match=r"'crystal': its cell varies.*with cells"):
        potential.energy_and_forces(positions)


# --- structures without a number ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peptide", "molecule", "slab"])
def test_broken_structures_weigh_nothing_and_leave_others_alone(name: str, potentials: dict[str, Potential]) -> None:
    potential = potentials[name]
    x = _shaken(potential.system, 4)
    expected = potential.energy_and_forces(x)
    broken = x.copy()
    broken[1, 0] = broken[1, 1]
    broken[2, 0, 0] = np.nan
    energy, forces = potential.energy_and_forces(broken)
    assert np.isposinf(energy[1:3]).all() and (forces[1:3] == 0).all()
    np.testing.assert_allclose(energy[[0, 3]], expected[0][[0, 3]], rtol=1e-12)
    np.testing.assert_allclose(forces[[0, 3]], expected[1][[0, 3]], rtol=1e-9, atol=1e-12)
    positions = torch.tensor(broken, requires_grad=True)
    weights = torch.exp(-(potential.reduced_energy(positions) - expected[0].min() / potential.kT_ev))
    (gradient,) = torch.autograd.grad(weights.sum(), positions)
    assert (weights[1:3] == 0).all() and torch.isfinite(gradient).all() and (gradient[1:3] == 0).all()


def test_analytic_energy_that_overflows_is_infinite_without_gradient() -> None:
    potential = AnalyticPotential(five_beads(), 300.0, lambda x: (1 / x.square().sum((1, 2))) * 1e300)
    x = torch.ones(3, 5, 3, dtype=torch.float64)
    x[1], x[2, 0, 0] = 1e-30, torch.nan
    x.requires_grad_()
    reduced = potential.reduced_energy(x)
    (gradient,) = torch.autograd.grad(reduced.sum(), x)
    assert torch.isfinite(reduced).tolist() == [True, False, False] and torch.isposinf(reduced[1:]).all()
    assert torch.isfinite(gradient).all() and (gradient[1:] == 0).all() and (gradient[0] != 0).all()
    # what float64 holds and float32 does not
    assert torch.isposinf(potential.reduced_energy(x.detach().float())[0])


def test_calculator_that_fails_on_a_structure_says_so_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tblite", reason="tblite is not installed")
    water = system_from_spec(SystemSpec(name="water", smiles="O"))
    potential = potential_for(water, FLEXIBLE, PotentialOptions(calculator=CalculatorSpec(name="tblite")))
    x = _shaken(water, 3)
    x[1, 0] = x[1, 1]
    with caplog.at_level("WARNING", logger="dig_scale"):
        energy, _ = potential.energy_and_forces(x)
    assert np.isfinite(energy).tolist() == [True, False, True]
    assert "structure 1 of 3 has no energy: system 'water'" in caplog.text


def test_positions_of_another_system_are_refused(potentials: dict[str, Potential]) -> None:
    with pytest.raises(UserError, match=r"'ala2': positions have shape \(1, 21, 3\), expected \(B, 22, 3\) in Å"):
        potentials["peptide"].reduced_energy(torch.zeros(1, 21, 3))


def test_no_structures_have_no_energies(potentials: dict[str, Potential]) -> None:
    for potential in potentials.values():
        energy, forces = potential.energy_and_forces(np.zeros((0, potential.system.n_sites, 3)))
        assert energy.shape == (0,) and forces.shape == (0, potential.system.n_sites, 3)


# --- regularised ----------------------------------------------------------------------------------------------------


def test_regularised_energy_is_continuous_with_its_gradient_and_grows_as_the_logarithm() -> None:
    well = DoubleWell(barrier=5.0, width=1.0)
    potential = AnalyticPotential(five_beads(), 300.0, lambda x: well.reduced_energy(x.flatten(1)))
    tame = regularised(potential, 20.0 * potential.kT_ev)
    x = torch.zeros(401, 5, 3, dtype=torch.float64)
    x[:, 0, 0] = torch.linspace(1.5, 2.1, 401, dtype=torch.float64)
    x.requires_grad_()
    raw, kept = potential.reduced_energy(x), tame.reduced_energy(x)
    (slope,) = torch.autograd.grad(kept.sum(), x)
    below = raw <= 20.0
    assert 0 < below.sum() < 401 and torch.equal(kept[below], raw[below])
    torch.testing.assert_close(kept[~below], 20.0 + torch.log1p(raw[~below] - 20.0))
    # steps of 1.5e-3 Å; the slope is 69 kT/Å at the cutoff and bends by 4,600 kT/Å² beyond it, in place of a jump
    assert kept.detach().diff().abs().max() < 0.11 and slope[:, 0, 0].diff().abs().max() < 8.0
    numeric = torch.gradient(kept.detach(), spacing=(0.6 / 400,))[0][1:-1]
    assert (numeric - slope[1:-1, 0, 0]).abs().max() < 3.0


def test_regularised_force_is_that_of_its_energy_for_engines_too(potentials: dict[str, Potential]) -> None:
    potential = potentials["peptide"]
    x = _shaken(potential.system, 4, size=0.15)
    energy, _ = potential.energy_and_forces(x)
    tame = regularised(potential, float(np.sort(energy)[1:3].mean()))
    positions = torch.tensor(x, requires_grad=True)
    reduced = tame.reduced_energy(positions)
    (gradient,) = torch.autograd.grad(reduced.sum(), positions)
    values, forces = tame.energy_and_forces(x)
    np.testing.assert_allclose(reduced.detach() * tame.kT_ev, values, rtol=1e-12)
    np.testing.assert_allclose(-gradient * tame.kT_ev, forces, rtol=1e-9, atol=1e-12)
    assert (values < energy).sum() == 2 and (values == energy).sum() == 2


def test_regularised_clash_is_finite_without_force(potentials: dict[str, Potential]) -> None:
    potential = potentials["peptide"]
    x = _shaken(potential.system, 2)
    x[0, 0] = x[0, 1]
    tame = regularised(potential, 1.0)
    energy, forces = tame.energy_and_forces(x)
    assert energy[0] == pytest.approx(1.0 + tame.kT_ev * np.log(1e20)) and (forces[0] == 0).all()
    positions = torch.tensor(x, requires_grad=True)
    (gradient,) = torch.autograd.grad(tame.reduced_energy(positions).sum(), positions)
    assert torch.isfinite(gradient).all() and (gradient[0] == 0).all()
    with pytest.raises(UserError, match="finite energy"):
        regularised(potential, np.inf)


# --- whether there is a density -------------------------------------------------------------------------------------


def test_recipe_with_rigid_bonds_is_refused_with_what_to_set(dipeptide: System) -> None:
    with pytest.raises(
        UserError, match=r'simulate\.constraints = "h-bonds".*set simulate\.constraints = "none".*time_step_fs'
    ):
        density_space_check(dipeptide, Simulate())
    density_space_check(dipeptide, FLEXIBLE)


def test_sites_without_their_hydrogens_are_refused(dipeptide: System) -> None:
    ester = system_from_spec(SystemSpec(name="ester", smiles="CC(=O)OC"))
    for system in (dipeptide, ester):
        with pytest.raises(UserError, match=r'heavy atoms without their hydrogens.*pack\.atoms = "all"'):
            density_space_check(system.select(system.heavy_sites()), FLEXIBLE)
    density_space_check(ester, FLEXIBLE)
    # nothing is missing, and nothing is rigid
    density_space_check(system_from_spec(SystemSpec(name="carbon dioxide", smiles="O=C=O")), Simulate())


@pytest.mark.parametrize("kind", ["protein", "beads"])
def test_sites_that_are_no_atoms_have_no_energy(kind: str) -> None:
    system = five_beads() if kind == "beads" else case(kind).system
    for check in (density_space_check, potential_for):
        with pytest.raises(UserError, match=r'residues or beads.*pack\.atoms = "all"'):
            check(system, FLEXIBLE)


def test_water_that_is_not_among_the_sites_is_refused(dipeptide: System) -> None:
    wet = FLEXIBLE.model_copy(update={"explicit_solvent": ExplicitSolvent()})
    for check in (density_space_check, potential_for):
        with pytest.raises(UserError, match=r"simulate\.explicit_solvent.*implicit_solvent"):
            check(dipeptide, wet)


def test_held_layers_of_a_slab_have_no_density(potentials: dict[str, Potential]) -> None:
    slab = potentials["slab"].system
    with pytest.raises(UserError, match=r'simulate\.slab_layers = "held".*"free"'):
        density_space_check(slab, Simulate())
    density_space_check(slab, Simulate(slab_layers="free"))
    density_space_check(replace(slab, mobile=slab.roles == 3), Simulate())


def test_prepared_system_needs_its_force_field_and_flexible_bonds(dipeptide: System, tmp_path: Path) -> None:
    prepared = replace(dipeptide, origin={"prepared": ["peptide.xml", "peptide.pdb"]})
    with pytest.raises(SimulationError, match=r"'ala2' was prepared by another program; give the folder"):
        potential_for(prepared, FLEXIBLE)
    build_model(dipeptide, FLEXIBLE).save(tmp_path)
    found = potential_for(prepared, FLEXIBLE, PotentialOptions(threads=1, prepared=tmp_path))
    same = potential_for(dipeptide, FLEXIBLE, PotentialOptions(threads=1))
    x = _shaken(dipeptide, 2)
    np.testing.assert_allclose(found.energy_and_forces(x)[0], same.energy_and_forces(x)[0])
    build_model(dipeptide, Simulate()).save(tmp_path)
    with pytest.raises(SimulationError, match="12 distances are constrained"):
        potential_for(prepared, FLEXIBLE, PotentialOptions(prepared=tmp_path))


# --- ensembles ------------------------------------------------------------------------------------------------------


def _ensemble(system: System, positions: np.ndarray, **fields: Any) -> Ensemble:
    return Ensemble(system, positions.astype(np.float32), np.arange(len(positions)), seed=1, **fields)


def test_labelled_ensemble_has_every_energy_in_order(potentials: dict[str, Potential]) -> None:
    potential = potentials["peptide"]
    x = _shaken(potential.system, 7)
    x[4, 0] = x[4, 1]
    given = _ensemble(potential.system, x, provenance={"solver": "heun"})
    heard: list[tuple[int, int]] = []
    labelled = label_ensemble(given, potential, batch=3, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(3, 7), (6, 7), (7, 7)] and given.energy is None
    assert labelled.energy is not None and np.isposinf(labelled.energy[4])
    np.testing.assert_allclose(labelled.energy, potential.energy_and_forces(given.positions)[0], rtol=1e-12)
    assert labelled.provenance["solver"] == "heun" and labelled.provenance["energy"]["engine"] == "OpenMM"


def test_crystals_are_labelled_in_their_own_cells() -> None:
    crystal = replace(case("crystal").system, elements=np.array([6, 6, 6, 29, 29]))
    frames = case("crystal").frames
    positions, cells = frames["positions"].numpy(), frames["cell"].numpy()
    potential = potential_for(crystal, FLEXIBLE)
    labelled = label_ensemble(_ensemble(crystal, positions, cell=cells), potential, batch=2)
    assert labelled.energy is not None
    np.testing.assert_allclose(labelled.energy, potential.energy_and_forces(positions, cells)[0], rtol=1e-4)


def test_ensemble_of_another_system_or_of_clashes_alone_is_refused(potentials: dict[str, Potential]) -> None:
    potential = potentials["peptide"]
    other = potentials["molecule"].system
    with pytest.raises(UserError, match=r"'ester' with 11 sites, a potential of 'ala2' with 22"):
        label_ensemble(_ensemble(other, _shaken(other, 1)), potential)
    with pytest.raises(UserError, match="none of 2 samples has a finite energy"):
        label_ensemble(_ensemble(potential.system, np.zeros((2, 22, 3))), potential)
