"""Which OpenMM System a System gets from a recipe: Amber for peptides and proteins, MMFF94 for other molecules.

In: a System with all atoms and config.Simulate. Out: a Model, the OpenMM System with a start and with the place of the
System's atoms in it (a solvated Model has more particles than the System has sites). Peptides are told by their residue
names; `force_field = ["mmff94"]` or `["mmff94s"]` gives MMFF to anything. Sites that are not mobile get mass 0 and stay
where they are. Knows no integrator. The nm and kJ/mol of OpenMM stay in the openmm.System; a Model's arrays are in Å.

Solvent: `implicit/obc2.xml` builds a CustomGBForce, many times slower on CPUs than OpenMM's native GBSAOBCForce, which
is the same model (Onufriev, Bashford, Case, Proteins 55 (2004) 383); the former is replaced by the latter. A molecule
with MMFF gets the same model with its MMFF charges and Amber's mbondi2 radii.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openmm
from dig_shards.durable import replace_durably
from openmm import app
from openmm.app.internal.customgbforces import GBSAOBC2Force

from dig_scale.config import Simulate
from dig_scale.importers.molecule import rdkit_molecule
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import LONGEST_MMFF_STEP_FS, PREPARED, Variant, mmff_variant, time_step_fs
from dig_scale.simulation.mmff import MMFF, parametrised
from dig_scale.system import SiteRole, System
from dig_scale.units import ANGSTROM_PER_NM

_OFFSET_NM = 0.009
_SOLVENT_DIELECTRIC = 78.5
_SOLUTE_DIELECTRIC = 1.0
_IMPLICIT_SOLVENT = {"obc2": ("implicit/obc2.xml",), "none": ()}
_MODEL_FILE = "model.npz"
PLATFORM_PROPERTIES = {"CPU": {"Threads": "1", "DeterministicForces": "true"}, "CUDA": {"Precision": "mixed"}}
"""How each platform is run: one thread per replica."""


@dataclass(frozen=True)
class Model:
    """What OpenMM simulates: its System, start positions [M, 3] Å of all particles, and the particle [N] of each site.

    A periodic box is in the openmm.System (its default box vectors).
    """

    openmm_system: openmm.System
    positions: np.ndarray
    solute: np.ndarray

    @property
    def box(self) -> np.ndarray | None:
        """Box vectors [3, 3] Å as rows, None without periodic boundaries."""
        if not self.openmm_system.usesPeriodicBoundaryConditions():
            return None
        return np.array([row._value for row in self.openmm_system.getDefaultPeriodicBoxVectors()]) * ANGSTROM_PER_NM

    def save(self, folder: Path) -> None:
        """Write the model into `folder`, all of it or nothing."""
        buffer = io.BytesIO()
        xml = openmm.XmlSerializer.serialize(self.openmm_system)
        np.savez_compressed(
            buffer, xml=np.frombuffer(xml.encode(), np.uint8), positions=self.positions, solute=self.solute
        )
        replace_durably(folder / _MODEL_FILE, buffer.getvalue())

    @classmethod
    def load(cls, folder: Path) -> Model:
        """The model that `save` wrote."""
        with np.load(folder / _MODEL_FILE, allow_pickle=False) as content:
            model = openmm.XmlSerializer.deserialize(content["xml"].tobytes().decode())
            return cls(model, content["positions"], content["solute"])


def build_model(system: System, simulate: Simulate) -> Model:
    """The Model of a System without explicit solvent; raises SimulationError as build_openmm_system does."""
    return Model(build_openmm_system(system, simulate), system.reference_positions, np.arange(system.n_sites))


def stored_or_built(folder: Path, system: System, simulate: Simulate) -> Model:
    """The model stored in `folder`, or a new one; raises SimulationError where a new one would be another."""
    if (folder / _MODEL_FILE).is_file():
        return Model.load(folder)
    has_more = simulate.explicit_solvent is not None or bool((system.roles == SiteRole.POCKET).any())
    if has_more or PREPARED in system.origin:
        raise SimulationError(f"{folder / _MODEL_FILE} is gone; restore it, or remove {folder} and simulate again")
    return build_model(system, simulate)


def build_openmm_system(system: System, simulate: Simulate) -> openmm.System:
    """The OpenMM System of a peptide, protein or molecule; raises SimulationError if it has no parameters."""
    require_all_atoms(system)
    variant = mmff_variant(system, simulate)
    model = _from_files(system, simulate) if variant is None else _from_mmff(system, simulate, variant)
    return with_fixed_sites(model, system.mobile)


def require_all_atoms(system: System) -> None:
    """Raise SimulationError unless the System is a molecule with atoms for sites."""
    if (system.elements == 0).any():
        what = "coarse-grained beads"
    elif any(system.periodic):
        what = f"periodic (a {system.kind})"
    else:
        return
    raise SimulationError(
        f"system {system.name!r} is {what}: the force fields at hand describe peptides, proteins and molecules with all "
        f"atoms; simulate it with a program of your own and use `dig-scale import`"
    )


def openmm_topology(system: System) -> app.Topology:
    """Topology with the atoms, residues, chains and bonds of a System in the same order."""
    topology, atoms = app.Topology(), []
    chain, residue = None, None
    for i in range(system.n_sites):
        # A new object at every change of index, so that the order of atoms is the System's whatever its indices are.
        if i == 0 or system.chain_index[i] != system.chain_index[i - 1]:
            chain, residue = topology.addChain(), None
        if residue is None or system.residue_index[i] != system.residue_index[i - 1]:
            residue = topology.addResidue(system.residue_names[i], chain)
        element = app.Element.getByAtomicNumber(int(system.elements[i]))
        atoms.append(topology.addAtom(system.atom_names[i], element, residue))
    for i, j in system.bonds:
        topology.addBond(atoms[i], atoms[j])
    return topology


def with_fixed_sites(model: openmm.System, mobile: np.ndarray) -> openmm.System:
    """A copy in which particles that are not mobile [M] have mass 0 and no constraint."""
    if mobile.all():
        return model
    copy = openmm.XmlSerializer.clone(model)
    for index in reversed(range(copy.getNumConstraints())):
        i, j, _ = copy.getConstraintParameters(index)
        if not (mobile[i] and mobile[j]):
            copy.removeConstraint(index)
    for index in reversed(range(copy.getNumForces())):
        if isinstance(copy.getForce(index), openmm.CMMotionRemover):
            copy.removeForce(index)
    for particle in np.flatnonzero(~mobile).tolist():
        copy.setParticleMass(particle, 0.0)
    return copy


# --- force-field files ----------------------------------------------------------------------------------------------


def _from_files(system: System, simulate: Simulate) -> openmm.System:
    try:
        force_field = app.ForceField(*simulate.force_field, *_IMPLICIT_SOLVENT[simulate.implicit_solvent])
        model = force_field.createSystem(
            openmm_topology(system),
            nonbondedMethod=app.NoCutoff,
            constraints=app.HBonds if simulate.constraints == "h-bonds" else None,
            hydrogenMass=simulate.hydrogen_mass,
            removeCMMotion=True,
        )
    except (ValueError, OSError) as error:
        raise SimulationError(f"system {system.name!r}: force field {list(simulate.force_field)}: {error}") from error
    return with_native_obc2(model)


def with_native_obc2(model: openmm.System) -> openmm.System:
    """A copy in which each CustomGBForce of OBC2 is the equal GBSAOBCForce."""
    copy = openmm.XmlSerializer.clone(model)
    for index in reversed(range(copy.getNumForces())):
        force = copy.getForce(index)
        if isinstance(force, openmm.CustomGBForce):
            native = _native_obc2(force)
            copy.removeForce(index)
            copy.addForce(native)
    return copy


def _native_obc2(force: openmm.CustomGBForce) -> openmm.GBSAOBCForce:
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    native = _empty_obc2()
    for particle in range(force.getNumParticles()):
        values = dict(zip(names, force.getParticleParameters(particle), strict=True))
        # The radius is given less the dielectric offset, and the scaled radius, not the scale.
        native.addParticle(values["charge"], values["or"] + _OFFSET_NM, values["sr"] / values["or"])
    return native


def _empty_obc2() -> openmm.GBSAOBCForce:
    force = openmm.GBSAOBCForce()
    force.setSolventDielectric(_SOLVENT_DIELECTRIC)
    force.setSoluteDielectric(_SOLUTE_DIELECTRIC)
    force.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    return force


# --- MMFF -----------------------------------------------------------------------------------------------------------


def _from_mmff(system: System, simulate: Simulate, variant: Variant) -> openmm.System:
    _require_bond_orders(system)
    _require_short_step(system, simulate)
    field = parametrised(system.name, rdkit_molecule(system), variant)
    model = field.openmm_system()
    if simulate.implicit_solvent == "obc2":
        model.addForce(obc2(openmm_topology(system), field.charges()))
    _repartition_mass(model, system, simulate.hydrogen_mass)
    if simulate.constraints == "h-bonds":
        _constrain_hydrogens(model, system, field)
    model.addForce(openmm.CMMotionRemover())
    return model


def _require_bond_orders(system: System) -> None:
    unknown = np.flatnonzero(system.bond_orders == 0)
    if len(unknown):
        i, j = system.bonds[unknown[0]]
        raise SimulationError(
            f"system {system.name!r}: the bond of {system.site_label(int(i))} with {system.site_label(int(j))} has no "
            f"order, and MMFF needs it; give an SDF file or a SMILES, or prepare it with another force field"
        )


def _require_short_step(system: System, simulate: Simulate) -> None:
    chosen = time_step_fs(system, simulate)
    if chosen > LONGEST_MMFF_STEP_FS:
        raise SimulationError(
            f"system {system.name!r}: simulate.time_step_fs is {chosen:g}, too long for the anharmonic bonds "
            f"of MMFF; set simulate.time_step_fs = {LONGEST_MMFF_STEP_FS:g} or less, or leave it out"
        )


def obc2(topology: app.Topology, charges: np.ndarray) -> openmm.GBSAOBCForce:
    """OBC2 implicit solvent for `charges` [N] in e, with mbondi2 radii and Amber's screening factors."""
    force = _empty_obc2()
    for charge, (radius, scale) in zip(charges, GBSAOBC2Force.getStandardParameters(topology), strict=True):
        force.addParticle(charge, radius, scale)
    return force


def _hydrogen_bonds(system: System) -> list[tuple[int, int]]:
    """(hydrogen, heavy atom) of every bond between the two."""
    ends = [(i, j) if system.elements[i] == 1 else (j, i) for i, j in system.bonds.tolist()]
    return [(h, heavy) for h, heavy in ends if system.elements[h] == 1 and system.elements[heavy] > 1]


def _repartition_mass(model: openmm.System, system: System, hydrogen_mass: float) -> None:
    """In place, on a System this module has just built."""
    for h, heavy in _hydrogen_bonds(system):
        moved = hydrogen_mass - model.getParticleMass(h)._value
        model.setParticleMass(h, hydrogen_mass)
        model.setParticleMass(heavy, model.getParticleMass(heavy)._value - moved)


def _constrain_hydrogens(model: openmm.System, system: System, field: MMFF) -> None:
    """In place, on a System this module has just built. The stretching terms stay: they vanish at the rest length."""
    for h, heavy in _hydrogen_bonds(system):
        model.addConstraint(h, heavy, field.rest_length(h, heavy) / ANGSTROM_PER_NM)
