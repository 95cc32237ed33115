"""Systems that another program prepared, simulated as they are: AMBER, GROMACS, or OpenMM's own XML.

In: a topology file (.prmtop/.parm7, .top, or .xml of an openmm.System) and a coordinate file (.inpcrd/.rst7, .gro, .pdb,
.cif). Out: the System of what is not water or ions, and the Model of everything. Parameters are the files'. What an AMBER
or GROMACS topology leaves open (constraints, mass of hydrogen, implicit solvent, cutoff) is the recipe's; an OpenMM System
leaves nothing open. Periodic boxes come from the coordinate file, or the XML, and stay as they are; an AMBER topology
without a box stays without one, whatever its coordinate file says.

An atom of a residue that is no amino acid gets bond orders 0 (unknown): topologies do not tell them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app

from dig_scale.config import Simulate
from dig_scale.importers import residues
from dig_scale.importers.atoms import system_of_atoms
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import PREPARED
from dig_scale.simulation.openmm_systems import Model, obc2, with_native_obc2
from dig_scale.simulation.whole import Whole
from dig_scale.system import System
from dig_scale.units import ANGSTROM_PER_NM

_AMBER = (".prmtop", ".parm7")
_GROMACS = (".top",)
_XML = (".xml",)
_AMBER_COORDINATES = (".inpcrd", ".rst7", ".crd", ".rst", ".restrt")
_PDBX = (".cif", ".mmcif", ".pdbx")
_CUTOFF_NM = 1.0
_SMALLEST_BOX_NM3 = 1e-6
_OTHER_ENSEMBLES = (
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloFlexibleBarostat,
    openmm.MonteCarloMembraneBarostat,
    openmm.AndersenThermostat,
)


@dataclass(frozen=True)
class _Coordinates:
    """Positions [M, 3] Å, box vectors in nm or None, and the topology where the file holds one."""

    positions: np.ndarray
    box_nm: Any
    topology: app.Topology | None


def prepared_system(name: str, paths: Sequence[Path], simulate: Simulate) -> tuple[System, Model]:
    """The System and Model of two files made by another program; raises SimulationError naming the file."""
    topology_file, coordinate_file = _sorted_out(name, paths)
    try:
        coordinates = _read_coordinates(coordinate_file)
        read = {_AMBER: _amber, _GROMACS: _gromacs, _XML: _openmm_xml}
        suffix = topology_file.suffix.lower()
        reader = next(reader for suffixes, reader in read.items() if suffix in suffixes)
        topology, model = reader(topology_file, coordinates, simulate)
    except SimulationError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OSError, AssertionError, openmm.OpenMMException) as error:
        raise SimulationError(f"system {name!r}: {topology_file} with {coordinate_file}: {error}") from error
    _require_same_atoms(name, topology, model, coordinates, (topology_file, coordinate_file))
    _require_no_ensemble(name, model, topology_file)
    return _system_and_model(name, topology, model, coordinates.positions, (topology_file, coordinate_file))


def _sorted_out(name: str, paths: Sequence[Path]) -> tuple[Path, Path]:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise SimulationError(f"system {name!r}: no file at {', '.join(missing)}")
    topologies = [path for path in paths if path.suffix.lower() in _AMBER + _GROMACS + _XML]
    others = [path for path in paths if path not in topologies]
    if len(topologies) != 1 or len(others) != 1:
        raise SimulationError(
            f"system {name!r}: prepared = {[path.name for path in paths]}: expected one topology (.prmtop, .parm7, .top, or "
            f".xml) and one coordinate file (.inpcrd, .rst7, .gro, .pdb, .cif)"
        )
    return topologies[0], others[0]


def _read_coordinates(path: Path) -> _Coordinates:
    suffix = path.suffix.lower()
    if suffix in _AMBER_COORDINATES:
        content: Any = app.AmberInpcrdFile(str(path))
        return _Coordinates(_angstrom(content.positions), content.boxVectors, None)
    if suffix == ".gro":
        content = app.GromacsGroFile(str(path))
        return _Coordinates(_angstrom(content.positions), _real_box(content.getPeriodicBoxVectors()), None)
    content = app.PDBxFile(str(path)) if suffix in _PDBX else app.PDBFile(str(path))
    box = _real_box(content.topology.getPeriodicBoxVectors())
    return _Coordinates(_angstrom(content.positions), box, content.topology)


def _angstrom(positions: Any) -> np.ndarray:
    return np.array(positions.value_in_unit(openmm.unit.nanometer)) * ANGSTROM_PER_NM


def _real_box(vectors: Any) -> Any:
    """None for the box of nothing that formats write for a system without boundaries."""
    if vectors is None:
        return None
    lengths = np.array(vectors.value_in_unit(openmm.unit.nanometer))
    return vectors if abs(np.linalg.det(lengths)) > _SMALLEST_BOX_NM3 else None


# --- one reader per format: topology and openmm.System --------------------------------------------------------------


def _amber(path: Path, coordinates: _Coordinates, simulate: Simulate) -> tuple[app.Topology, openmm.System]:
    content = app.AmberPrmtopFile(str(path))
    is_periodic = content.topology.getPeriodicBoxVectors() is not None
    if is_periodic and coordinates.box_nm is not None:
        content = app.AmberPrmtopFile(str(path), periodicBoxVectors=coordinates.box_nm)
    implicit = app.OBC2 if simulate.implicit_solvent == "obc2" and not is_periodic else None
    model = content.createSystem(implicitSolvent=implicit, **_open_settings(simulate, content.topology))
    return content.topology, with_native_obc2(model)


def _gromacs(path: Path, coordinates: _Coordinates, simulate: Simulate) -> tuple[app.Topology, openmm.System]:
    content = app.GromacsTopFile(str(path), periodicBoxVectors=coordinates.box_nm)
    model = content.createSystem(**_open_settings(simulate, content.topology))
    if coordinates.box_nm is None and simulate.implicit_solvent == "obc2":
        model.addForce(obc2(content.topology, _charges(model)))
    return content.topology, model


def _openmm_xml(path: Path, coordinates: _Coordinates, _: Simulate) -> tuple[app.Topology, openmm.System]:
    model = openmm.XmlSerializer.deserialize(path.read_text())
    if not isinstance(model, openmm.System):
        raise SimulationError(f"{path}: holds a {type(model).__name__}, expected an openmm.System")
    if coordinates.topology is None:
        raise SimulationError(f"{path}: an OpenMM System does not name its atoms; give a .pdb or .cif file with it")
    return coordinates.topology, model


def _open_settings(simulate: Simulate, topology: app.Topology) -> dict[str, Any]:
    """What a topology leaves to the program that simulates it."""
    explicit = getattr(simulate, "explicit_solvent", None)
    return {
        "nonbondedMethod": app.NoCutoff if topology.getPeriodicBoxVectors() is None else app.PME,
        "nonbondedCutoff": (explicit.cutoff_nm if explicit else _CUTOFF_NM) * openmm.unit.nanometer,
        "constraints": app.HBonds if simulate.constraints == "h-bonds" else None,
        "hydrogenMass": simulate.hydrogen_mass * openmm.unit.dalton,
        "rigidWater": True,
        "removeCMMotion": True,
    }


def _charges(model: openmm.System) -> np.ndarray:
    force = next(force for force in model.getForces() if isinstance(force, openmm.NonbondedForce))
    return np.array([force.getParticleParameters(i)[0]._value for i in range(force.getNumParticles())])


def _require_same_atoms(
    name: str, topology: app.Topology, model: openmm.System, coordinates: _Coordinates, files: tuple[Path, Path]
) -> None:
    counts = topology.getNumAtoms(), model.getNumParticles(), len(coordinates.positions)
    if len(set(counts)) != 1:
        raise SimulationError(
            f"system {name!r}: {files[0]} has {counts[1]} particles, {files[1]} has positions of {counts[2]} and names of "
            f"{counts[0]}: they are not files of one system"
        )


def _require_no_ensemble(name: str, model: openmm.System, path: Path) -> None:
    """A barostat would change the box, which no checkpoint keeps; a thermostat would be a second one."""
    for force in model.getForces():
        if isinstance(force, _OTHER_ENSEMBLES):
            raise SimulationError(
                f"system {name!r}: {path} holds a {type(force).__name__}; simulations run at constant volume with a "
                f"Langevin thermostat: equilibrate the box first, and write the System without it"
            )


# --- the System of the solute ---------------------------------------------------------------------------------------


def _system_and_model(
    name: str, topology: app.Topology, model: openmm.System, positions: np.ndarray, files: tuple[Path, Path]
) -> tuple[System, Model]:
    atoms = list(topology.atoms())
    solute = np.array([a.index for a in atoms if a.residue.name.upper() not in residues.WATER | residues.IONS])
    if not len(solute):
        raise SimulationError(f"system {name!r}: {files[1]} holds nothing but water and ions")
    unknown = [atoms[i] for i in solute if atoms[i].element is None]
    if unknown:
        raise SimulationError(f"system {name!r}: {unknown[0]} in {files[1]} has no element; only atoms are simulated")
    start = Model(model, positions, solute)
    if start.box is not None:
        # OpenMM computes bonds and constraints without images: every molecule must be whole, water too.
        joined = Whole.of(_links(topology, model), len(positions)).joined(positions, start.box)
        bonds = _solute_bonds(topology, solute)
        joined[solute] = Whole.of(bonds, len(solute))(joined[solute], start.box)
        start = Model(model, joined, solute)
    return _solute_system(name, topology, solute, start.positions[solute], files), start


def _links(topology: app.Topology, model: openmm.System) -> np.ndarray:
    """Pairs [E, 2] of particles that bonds or constraints hold together."""
    pairs = [(a.index, b.index) for a, b in topology.bonds()]
    pairs += [tuple(model.getConstraintParameters(k)[:2]) for k in range(model.getNumConstraints())]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _solute_bonds(topology: app.Topology, solute: np.ndarray) -> np.ndarray:
    """Bonds [E, 2] among the solute's atoms, numbered as sites, i < j."""
    place = {int(index): site for site, index in enumerate(solute)}
    pairs = [
        sorted((place[a.index], place[b.index])) for a, b in topology.bonds() if a.index in place and b.index in place
    ]
    return np.unique(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=0)


def _solute_system(
    name: str, topology: app.Topology, solute: np.ndarray, positions: np.ndarray, files: tuple[Path, Path]
) -> System:
    chosen = set(solute.tolist())
    atoms = [atom for atom in topology.atoms() if atom.index in chosen]
    centred = np.round(positions - positions.mean(axis=0), 3)
    origin = {"source": files[1].name, PREPARED: [file.name for file in files]}
    return system_of_atoms(name, atoms, _solute_bonds(topology, solute), centred, origin)
