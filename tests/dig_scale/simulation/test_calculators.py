"""Calculators by name: forces are the slopes of energies, methods are said, failures name the next step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms

from dig_scale.config import CalculatorSpec, SurfaceSpec
from dig_scale.importers.catalyst import surface_system
from dig_scale.simulation.ase_engine import CalculatorPotential
from dig_scale.simulation.calculators import calculator_named, method_of
from dig_scale.simulation.engine import SimulationError
from dig_scale.system import System, SystemKind

STEP = 5e-3


def _molecule(elements: list[int], positions: list[list[float]], cell: np.ndarray | None = None) -> System:
    n = len(elements)
    return System(
        name="tiny",
        kind=SystemKind.MOLECULE,
        elements=np.array(elements),
        atom_names=tuple(f"A{k}" for k in range(n)),
        residue_names=("LIG",) * n,
        residue_index=np.zeros(n),
        chain_index=np.zeros(n),
        bonds=np.zeros((0, 2), np.int64),
        bond_orders=np.zeros(0, np.int64),
        formal_charges=np.zeros(n),
        stereocentres=np.zeros((0, 4), np.int64),
        mobile=np.ones(n, bool),
        reference_positions=np.array(positions),
        cell=cell,
        periodic=(cell is not None,) * 3,
    )


def _hydrogen(cell: np.ndarray | None = None) -> System:
    return _molecule([1, 1], [[0, 0, 0], [0, 0, 0.85]], cell)


@pytest.mark.parametrize(
    ("spec", "cell", "method"),
    [
        ({"name": "tblite"}, None, "tblite GFN1-xTB"),
        ({"name": "tblite", "method": "GFN2-xTB"}, None, "tblite GFN2-xTB"),
        ({"name": "tblite"}, 5.0, "tblite GFN1-xTB"),
        ({"name": "pyscf", "molecule_basis": "sto-3g"}, None, "PySCF PBE/sto-3g"),
        ({"name": "pyscf", "cutoff_hartree": 40.0}, 3.5, "PySCF PBE/gth-szv gamma"),
    ],
)
def test_forces_are_the_slope_of_the_energy(spec: dict[str, Any], cell: float | None, method: str) -> None:
    calculator = CalculatorSpec.model_validate(spec)
    system = _hydrogen(None if cell is None else cell * np.eye(3))
    start = system.reference_positions
    moved = np.zeros_like(start)
    moved[1, 2] = STEP
    energy, forces = CalculatorPotential(system, calculator).energy_and_forces(
        np.stack([start, start + moved, start - moved])
    )
    # a real-space grid of 40 Hartree lets the energy ripple
    tolerance = 0.02 if calculator.cutoff_hartree else 3e-3
    assert forces[0, 1, 2] == pytest.approx(-(energy[1] - energy[2]) / (2 * STEP), rel=tolerance)
    assert abs(forces[0, 1, 2]) > 1.0
    origin = method_of(calculator, system).origin
    assert origin["method"] == method and origin["versions"]["ase"] and origin["versions"][calculator.name]


def test_kpoints_and_smearing_are_taken_and_named() -> None:
    spec = CalculatorSpec(name="pyscf", cutoff_hartree=25.0, kpoints=(2, 1, 1), smearing_ev=0.2)
    system = _molecule([1], [[0, 0, 0]], 2.0 * np.eye(3))
    at_gamma = spec.model_copy(update={"kpoints": (1, 1, 1)})
    energies = [
        CalculatorPotential(system, one).energy_and_forces(system.reference_positions[None])[0][0]
        for one in (spec, at_gamma)
    ]
    assert abs(energies[0] - energies[1]) > 0.1
    assert method_of(spec, system).name == "PySCF PBE/gth-szv k2x1x1"


def test_slab_of_two_directions_is_computed_by_tight_binding() -> None:
    system = surface_system("cu-h", SurfaceSpec(metal="Cu", size=(1, 1, 2), fixed_layers=1, adsorbate="H", height=1.0))
    energy, forces = CalculatorPotential(system, CalculatorSpec(name="tblite")).energy_and_forces(
        system.reference_positions[None]
    )
    assert np.isfinite(energy).all() and np.abs(forces.sum(axis=1)).max() < 1e-3


def test_emt_is_the_embedded_default_with_ases_name() -> None:
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 2.3]])
    atoms.calc = calculator_named(CalculatorSpec())
    assert np.isfinite(atoms.get_potential_energy())
    assert method_of(CalculatorSpec(), _hydrogen()).origin["method"] == "ASE EMT"


def test_failing_calculation_names_the_system() -> None:
    close = np.zeros((1, 2, 3))
    with pytest.raises(SimulationError, match="'tiny'"):
        CalculatorPotential(_hydrogen(), CalculatorSpec(name="tblite")).energy_and_forces(close)


def test_beads_have_no_calculator() -> None:
    with pytest.raises(SimulationError, match="no atoms"):
        CalculatorPotential(_molecule([0, 0], [[0, 0, 0], [0, 0, 3.8]]), CalculatorSpec())
