"""MMFF94 and MMFF94s for drug-like molecules, with or without the protein pocket around them, as an OpenMM System.

In: an RDKit molecule with all hydrogens. Out: an OpenMM System whose energy
is that of RDKit's MMFF, term by term: RDKit assigns types, charges and parameters, OpenMM evaluates. Knows no
constraints, masses other than the elements', solvent or cutoff (the dielectric is constant, all pairs interact).

Notation and units of T. A. Halgren, J. Comput. Chem. 17 (1996) 490-641 (papers I-V): Å, kcal/mol, degrees, md/Å. Every
expression below computes them from OpenMM's nm and radians and gives kJ/mol. MMFF94s: T. A. Halgren, J. Comput. Chem.
20 (1999) 720. Where RDKit's constants differ from the papers' in the last digits, RDKit's stand here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import openmm

from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import Variant

_KJ_PER_KCAL = 4.184
_MDYNE_ANGSTROM = 143.9325
"""kcal/mol per md Å."""
_COULOMB = 332.0716
"""kcal/mol Å per e²."""
_DEGREE = np.pi / 180
_LINEAR_TYPES = frozenset({4, 53, 61})
"""Types with the property "linear" in MMFFPROP: sp carbon, the middle N of an azide, N of an isonitrile or diazonium."""

_ANGLE_DEGREES = f"theta/{_DEGREE:.17g}"
_BOND = f"{_KJ_PER_KCAL * _MDYNE_ANGSTROM / 2}*kb*d^2*(1-2*d+7/3*d^2); d=10*r-r0"
_ANGLE = f"{_KJ_PER_KCAL * _MDYNE_ANGSTROM * _DEGREE**2 / 2:.17g}*ka*d^2*(1-0.006981317*d); d={_ANGLE_DEGREES}-theta0"
_LINEAR_ANGLE = f"{_KJ_PER_KCAL * _MDYNE_ANGSTROM}*ka*(1+cos(theta))"
_STRETCH_BEND = (
    f"{_KJ_PER_KCAL * _MDYNE_ANGSTROM * _DEGREE:.17g}*(kij*(10*distance(p1,p2)-rij)+kkj*(10*distance(p2,p3)-rkj))"
    f"*(angle(p1,p2,p3)/{_DEGREE:.17g}-theta0)"
)
# Wilson's angle of the bond p2-p4 out of the plane p1-p2-p3. With the bond moved to start at p3 it is the sine of the
# bond's angle with p2-p3 times the sine of its torsion about p2-p3.
_OUT_OF_PLANE = (
    f"{_KJ_PER_KCAL * _MDYNE_ANGSTROM / 2}*koop*chi^2; chi=asin(sin(angle(p3,p2,p4))*sin(turn));"
    "turn=pointdihedral(x1,y1,z1,x2,y2,z2,x3,y3,z3,x3+x4-x2,y3+y4-y2,z3+z4-z2)"
)
_BUFFERED_14_7 = "depth*(1.07/(q+0.07))^7*(1.12/(q^7+0.12)-2)"
_PAIR = f"{_KJ_PER_KCAL}*({_BUFFERED_14_7}+{_COULOMB}*charges/(10*r+0.05)); q=10*r/minimum"
_PAIR_1_4 = f"{_KJ_PER_KCAL}*({_BUFFERED_14_7}+{0.75 * _COULOMB}*charges/(10*r+0.05)); q=10*r/minimum"


@dataclass(frozen=True)
class MMFF:
    """A molecule with its MMFF atom types and charges; made by `parametrised`."""

    name: str
    molecule: Any
    properties: Any

    def openmm_system(self) -> openmm.System:
        """System with one force per term, masses of the elements, no constraints; raises SimulationError if one fails."""
        model = openmm.System()
        for atom in self.molecule.GetAtoms():
            model.addParticle(atom.GetMass())
        builders = (
            _bonds,
            _angles,
            _linear_angles,
            _stretch_bends,
            _out_of_planes,
            _torsions,
            _far_pairs,
            _close_pairs,
        )
        for build in builders:
            model.addForce(build(self))
        return model

    def charges(self) -> np.ndarray:
        """Partial charges [N] in e."""
        return np.array([self.properties.GetMMFFPartialCharge(i) for i in range(self.molecule.GetNumAtoms())])

    def rest_length(self, i: int, j: int) -> float:
        """Rest length in Å of the bond between atoms i and j."""
        return float(self.bond(i, j)[1])

    def bond(self, i: int, j: int) -> tuple[float, float]:
        """Force constant md/Å and rest length Å of a bond."""
        found = self.properties.GetMMFFBondStretchParams(self.molecule, i, j)
        return self._required(found, "bond", i, j)[1:]

    def angle(self, i: int, j: int, k: int) -> tuple[float, float]:
        """Force constant md Å/rad² and rest angle in degrees of an angle centred on j."""
        found = self.properties.GetMMFFAngleBendParams(self.molecule, i, j, k)
        return self._required(found, "angle", i, j, k)[1:]

    def neighbours(self, j: int) -> list[int]:
        """Atoms bonded to j."""
        return [atom.GetIdx() for atom in self.molecule.GetAtomWithIdx(j).GetNeighbors()]

    def bends(self) -> Iterator[tuple[int, int, int, Literal["bent", "linear"]]]:
        """All (i, j, k) centred on j, and whether the type of j is linear."""
        for j in range(self.molecule.GetNumAtoms()):
            shape: Literal["bent", "linear"] = (
                "linear" if self.properties.GetMMFFAtomType(j) in _LINEAR_TYPES else "bent"
            )
            for i, k in combinations(self.neighbours(j), 2):
                yield i, j, k, shape

    def _required(self, found: Any, what: str, *atoms: int) -> Any:
        if found is None:
            raise SimulationError(f"system {self.name!r}: MMFF has no {what} for {_listed(self.molecule, atoms)}")
        return found


def parametrised(name: str, molecule: Any, variant: Variant = "MMFF94") -> MMFF:
    """MMFF types and charges of a sanitised RDKit molecule with all hydrogens; raises SimulationError naming the atom without."""
    from rdkit.Chem import rdForceFieldHelpers

    own = type(molecule)(molecule)
    open_valences = [atom for atom in own.GetAtoms() if atom.GetNumRadicalElectrons() or atom.GetNumImplicitHs()]
    if open_valences:
        raise SimulationError(
            f"system {name!r}: {_environment(open_valences[0])} has a free valence; MMFF needs all hydrogens, and does "
            f"not describe radicals: add the hydrogens or correct bond orders and charges"
        )
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(own, mmffVariant=variant)
    if properties is None:
        untyped = ", ".join(_environment(own.GetAtomWithIdx(i)) for i in _untyped_atoms(own, variant)) or "an atom"
        raise SimulationError(
            f"system {name!r}: {variant} has no atom type for {untyped}; correct its bonds or charges, or simulate it "
            f"with a program of your own and use `dig-scale import`"
        )
    return MMFF(name, own, properties)


# --- one function per term ------------------------------------------------------------------------------------------


def _bonds(field: MMFF) -> openmm.Force:
    """Quartic stretching, paper I eq. 2."""
    force = _named(openmm.CustomBondForce(_BOND), "bond")
    for parameter in ("kb", "r0"):
        force.addPerBondParameter(parameter)
    for bond in field.molecule.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        force.addBond(i, j, field.bond(i, j))
    return force


def _angles(field: MMFF) -> openmm.Force:
    """Cubic bending, paper I eq. 3."""
    force = _named(openmm.CustomAngleForce(_ANGLE), "angle")
    for parameter in ("ka", "theta0"):
        force.addPerAngleParameter(parameter)
    for i, j, k, shape in field.bends():
        if shape == "bent":
            force.addAngle(i, j, k, field.angle(i, j, k))
    return force


def _linear_angles(field: MMFF) -> openmm.Force:
    """Bending of linear atoms, paper I eq. 4."""
    force = _named(openmm.CustomAngleForce(_LINEAR_ANGLE), "linear angle")
    force.addPerAngleParameter("ka")
    for i, j, k, shape in field.bends():
        if shape == "linear":
            force.addAngle(i, j, k, field.angle(i, j, k)[:1])
    return force


def _stretch_bends(field: MMFF) -> openmm.Force:
    """Coupling of an angle with its two bonds, paper I eq. 5; linear atoms have none."""
    force = _named(openmm.CustomCompoundBondForce(3, _STRETCH_BEND), "stretch-bend")
    for parameter in ("kij", "kkj", "rij", "rkj", "theta0"):
        force.addPerBondParameter(parameter)
    for i, j, k, shape in field.bends():
        found = field.properties.GetMMFFStretchBendParams(field.molecule, i, j, k)
        if shape == "bent" and found is not None:
            lengths = field.rest_length(i, j), field.rest_length(j, k)
            force.addBond((i, j, k), (*found[1:], *lengths, field.angle(i, j, k)[1]))
    return force


def _out_of_planes(field: MMFF) -> openmm.Force:
    """Bending out of plane at atoms with three neighbours, each neighbour in turn; paper I eq. 6."""
    force = _named(openmm.CustomCompoundBondForce(4, _OUT_OF_PLANE), "out-of-plane")
    force.addPerBondParameter("koop")
    for j in range(field.molecule.GetNumAtoms()):
        around = field.neighbours(j)
        if len(around) != 3:
            continue
        a, b, c = around
        constant = field.properties.GetMMFFOopBendParams(field.molecule, a, j, b, c)
        if constant:
            for i, k, out in ((a, b, c), (a, c, b), (b, c, a)):
                force.addBond((i, j, k, out), (constant,))
    return force


def _torsions(field: MMFF) -> openmm.Force:
    """V1 (1 + cos φ) + V2 (1 - cos 2φ) + V3 (1 + cos 3φ), halved; paper I eq. 7."""
    force = _named(openmm.PeriodicTorsionForce(), "torsion")
    for i, j, k, end in _proper_torsions(field):
        found = field.properties.GetMMFFTorsionParams(field.molecule, i, j, k, end)
        if found is None:
            continue
        for period, height in enumerate(found[1:], 1):
            phase = np.pi if period == 2 else 0.0
            if height:
                force.addTorsion(i, j, k, end, period, phase, 0.5 * _KJ_PER_KCAL * height)
    return force


def _proper_torsions(field: MMFF) -> Iterator[tuple[int, int, int, int]]:
    """Torsions about bonds between sp2 or sp3 atoms, as RDKit chooses them."""
    for bond in field.molecule.GetBonds():
        j, k = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        if _can_turn(bond.GetBeginAtom()) and _can_turn(bond.GetEndAtom()):
            for i in field.neighbours(j):
                for end in field.neighbours(k):
                    if i != k and end != j and i != end:
                        yield i, j, k, end


def _can_turn(atom: Any) -> bool:
    from rdkit.Chem import BondType, HybridizationType

    is_planar_or_tetrahedral = atom.GetHybridization() in (HybridizationType.SP2, HybridizationType.SP3)
    return is_planar_or_tetrahedral and not any(bond.GetBondType() == BondType.TRIPLE for bond in atom.GetBonds())


def _far_pairs(field: MMFF) -> openmm.Force:
    """Buffered 14-7 and buffered Coulomb between atoms more than three bonds apart; paper I eqs. 8 and 13."""
    first, kinds = _kinds(field)
    expression = f"{_PAIR}; charges=charge1*charge2; minimum=minima(kind1,kind2); depth=depths(kind1,kind2)"
    force = _named(openmm.CustomNonbondedForce(expression), "pairs")
    table = np.array([[_van_der_waals(field, i, j) for j in first] for i in first]).reshape(len(first), len(first), 2)
    for column, name in enumerate(("minima", "depths")):
        values = table[:, :, column].T.ravel().tolist()
        force.addTabulatedFunction(name, openmm.Discrete2DFunction(len(first), len(first), values))
    for parameter in ("charge", "kind"):
        force.addPerParticleParameter(parameter)
    for charge, kind in zip(field.charges(), kinds, strict=True):
        force.addParticle((charge, kind))
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in field.molecule.GetBonds()]
    force.createExclusionsFromBonds(bonds, 3)
    return force


def _close_pairs(field: MMFF) -> openmm.Force:
    """The same between atoms three bonds apart, with the Coulomb term scaled by 0.75."""
    force = _named(openmm.CustomBondForce(_PAIR_1_4), "1-4 pairs")
    for parameter in ("minimum", "depth", "charges"):
        force.addPerBondParameter(parameter)
    charges = field.charges()
    for i, j in _three_bonds_apart(field):
        force.addBond(i, j, (*_van_der_waals(field, i, j), charges[i] * charges[j]))
    return force


def _kinds(field: MMFF) -> tuple[list[int], list[int]]:
    """The first atom of every MMFF type that occurs, and the number [N] of each atom's type among these."""
    first: dict[int, int] = {}
    types = [field.properties.GetMMFFAtomType(i) for i in range(field.molecule.GetNumAtoms())]
    for i, kind in enumerate(types):
        first.setdefault(kind, i)
    number = {kind: n for n, kind in enumerate(first)}
    return list(first.values()), [number[kind] for kind in types]


def _van_der_waals(field: MMFF, i: int, j: int) -> tuple[float, float]:
    """Distance Å and depth kcal/mol of the minimum, scaled between hydrogen-bond donors and acceptors."""
    found = field.properties.GetMMFFVdWParams(i, j)
    if found is None:
        raise SimulationError(
            f"system {field.name!r}: MMFF has no van der Waals parameters for {_listed(field.molecule, (i, j))}"
        )
    return float(found[2]), float(found[3])


def _three_bonds_apart(field: MMFF) -> list[tuple[int, int]]:
    """Pairs i < j whose shortest path has three bonds."""
    pairs = []
    for i in range(field.molecule.GetNumAtoms()):
        one = set(field.neighbours(i))
        two = {k for j in one for k in field.neighbours(j)}
        three = {k for j in two for k in field.neighbours(j)}
        pairs += [(i, j) for j in sorted(three - two - one) if j > i]
    return pairs


def _named(force: Any, term: str) -> Any:
    force.setName(f"MMFF {term}")
    return force


# --- words for what is wrong ----------------------------------------------------------------------------------------


def _untyped_atoms(molecule: Any, variant: Variant) -> list[int]:
    """Atoms that RDKit gives type 0. RDKit tells them in its verbose table on standard output alone."""
    program = (
        "import sys; from rdkit import Chem; from rdkit.Chem import rdForceFieldHelpers as f;"
        "f.MMFFGetMoleculeProperties(Chem.Mol(bytes.fromhex(sys.stdin.read())), sys.argv[1], 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, variant],
        input=molecule.ToBinary().hex(),
        capture_output=True,
        text=True,
        check=False,
    )
    return list(_zero_types(done.stdout.splitlines()))


def _zero_types(lines: Iterable[str]) -> Iterator[int]:
    """Rows are `B  #2        0     0.000     0.000`: element, number from 1, type, charges."""
    for line in lines:
        _, mark, row = line.partition("#")
        fields = row.split()
        if mark and len(fields) == 4 and fields[1] == "0":
            yield int(fields[0]) - 1


def _environment(atom: Any) -> str:
    around = ", ".join(
        f"{bond.GetBondType().name.lower()} to {bond.GetOtherAtom(atom).GetSymbol()}" for bond in atom.GetBonds()
    )
    charge = f" with charge {atom.GetFormalCharge():+d}" if atom.GetFormalCharge() else ""
    return f"{_label(atom)}{charge} (bonds: {around or 'none'})"


def _label(atom: Any) -> str:
    return f"{atom.GetSymbol()} (atom {atom.GetIdx() + 1})"


def _listed(molecule: Any, atoms: Iterable[int]) -> str:
    return ", ".join(_label(molecule.GetAtomWithIdx(i)) for i in atoms)
