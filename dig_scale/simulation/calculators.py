"""Energies and forces by name: effective medium theory, GFN-xTB through tblite, density functional theory through PySCF.

In: a CalculatorSpec. Out: an ASE calculator, and what it is in words for the origin of its numbers. A slab, periodic in
two directions, is computed as a crystal with its vacuum. Packages are imported by the calculator that needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.units import Bohr, Hartree

from dig_scale.config import CalculatorSpec
from dig_scale.simulation.engine import SimulationError
from dig_scale.system import System


@dataclass(frozen=True)
class Method:
    """What computes: its name as in "PySCF PBE/gth-szv gamma", and the versions of its programs."""

    name: str
    versions: dict[str, str]

    @property
    def origin(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"method": self.name, "versions": self.versions}


def calculator_named(spec: CalculatorSpec) -> Calculator:
    """The ASE calculator of a spec; raises SimulationError when its package is not installed."""
    try:
        if spec.name == "tblite":
            from tblite.ase import TBLite

            return TBLite(method=spec.method, electronic_temperature=spec.electronic_temperature, verbosity=0)
        if spec.name == "pyscf":
            import pyscf

            return PySCFCalculator(spec, pyscf.__version__)
    except ImportError as error:
        raise SimulationError(
            f"calculator {spec.name!r} is not installed ({error}); pip install {spec.name}"
        ) from error
    from ase.calculators.emt import EMT

    return EMT()


def method_of(spec: CalculatorSpec, system: System) -> Method:
    """The method that a spec means for a system."""
    ase = {"ase": version("ase")}
    if spec.name == "emt":
        return Method("ASE EMT", ase)
    if spec.name == "tblite":
        return Method(f"tblite {spec.method}", ase | {"tblite": version("tblite")})
    mesh = "gamma" if max(spec.kpoints) == 1 else "k" + "x".join(str(k) for k in spec.kpoints)
    basis = f"{spec.basis} {mesh}" if any(system.periodic) else spec.molecule_basis
    return Method(f"PySCF {spec.functional.upper()}/{basis}", ase | {"pyscf": version("pyscf")})


def atoms_of(system: System, positions: np.ndarray) -> Atoms:
    """ASE atoms of a system at positions [N, 3] Å; raises SimulationError for beads and residues."""
    if (system.elements == 0).any():
        raise SimulationError(f"system {system.name!r}: its sites are no atoms; no calculator knows them")
    return Atoms(numbers=system.elements, positions=positions, cell=system.cell, pbc=system.periodic)


class PySCFCalculator(Calculator):
    """Kohn-Sham energy and forces by PySCF: all electrons for molecules, pseudopotentials for periodic systems.

    Restricted for an even number of electrons, else unrestricted with one unpaired. Raises SimulationError when the
    self-consistent field does not converge, PropertyNotImplementedError where PySCF has no gradient.
    """

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012 - as ASE declares it

    def __init__(self, spec: CalculatorSpec, pyscf_version: str) -> None:
        super().__init__()
        self._spec = spec
        self.program = f"PySCF {pyscf_version}"

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """As ASE calls it."""
        super().calculate(atoms, properties, system_changes)
        given = self.atoms
        if given is None:
            raise SimulationError(f"{self.program}: asked for energies of no atoms")
        field = self._periodic_field(given) if np.any(given.pbc) else self._molecular_field(given)
        field.kernel()
        if not field.converged:
            raise SimulationError(
                f"{self.program}: the self-consistent field of {given.get_chemical_formula()} does not converge; give "
                f"calculator.smearing_ev (metals), a finer cutoff, or another starting structure"
            )
        # forces belong to the free energy of smeared occupations
        energy = float(field.e_free if self._spec.smearing_ev else field.e_tot) * Hartree
        self.results = {"energy": energy, "free_energy": energy}
        if "forces" in (properties or ()):
            self.results["forces"] = -self._gradient(field) * Hartree / Bohr

    def _gradient(self, field: Any) -> np.ndarray:
        try:
            return np.asarray(field.nuc_grad_method().kernel())
        except (NotImplementedError, AttributeError) as error:
            raise PropertyNotImplementedError(
                f"{self.program} has no gradient for {type(field).__name__} ({error}); ask for energies alone, or use "
                f"another calculator for forces"
            ) from error

    def _molecular_field(self, atoms: Atoms) -> Any:
        from pyscf import dft, gto

        spin = int(atoms.numbers.sum()) % 2
        molecule = gto.M(atom=_geometry(atoms), basis=self._spec.molecule_basis, spin=spin, verbose=0)
        return self._smeared((dft.UKS if spin else dft.RKS)(molecule, xc=self._spec.functional))

    def _periodic_field(self, atoms: Atoms) -> Any:
        from pyscf.pbc import dft

        cell = self._unit_cell(atoms)
        if max(self._spec.kpoints) == 1:
            # at gamma the multigrid integrator is the fast one, and the one with gradients
            field = (dft.UKS if cell.spin else dft.RKS)(cell, xc=self._spec.functional).multigrid_numint()
        else:
            points = cell.make_kpts(self._spec.kpoints)
            field = (dft.KUKS if cell.spin else dft.KRKS)(cell, points, xc=self._spec.functional)
        return self._smeared(field)

    def _unit_cell(self, atoms: Atoms) -> Any:
        from pyscf.pbc import gto

        cell = gto.Cell()
        cell.atom, cell.a = _geometry(atoms), np.array(atoms.cell)
        cell.basis, cell.pseudo, cell.verbose = self._spec.basis, self._spec.pseudopotential, 0
        cell.ke_cutoff = self._spec.cutoff_hartree
        cell.spin = None
        cell.build()
        # with several k-points, electrons of all cells count
        cells = int(np.prod(self._spec.kpoints))
        cell.spin = cell.nelectron * cells % 2
        return cell

    def _smeared(self, field: Any) -> Any:
        if self._spec.smearing_ev is None:
            return field
        from pyscf.pbc.scf.addons import smearing

        return smearing(field, sigma=self._spec.smearing_ev / Hartree, method="fermi")


def _geometry(atoms: Atoms) -> list[tuple[str, np.ndarray]]:
    return list(zip(atoms.get_chemical_symbols(), atoms.positions, strict=True))
