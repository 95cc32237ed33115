"""The OpenMM System of MMFF has RDKit's energy and gradient, as a whole and term by term."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openmm
import pytest
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers

from dig_scale.importers.molecule import rdkit_molecule, read_molecules, system_from_smiles, systems_from_file
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.mmff import Variant, parametrised

ENERGY_TOLERANCE = 1e-4
"""kcal/mol."""
GRADIENT_TOLERANCE = 1e-3
"""kcal/mol/Å."""
TARGETS = ("cdk2", "cdk8", "cmet", "eg5", "hif2a", "mcl1", "pfkfb3", "ptp1b", "syk", "thrombin")
SWITCHES = {
    "bond": ("Bond",),
    "angle": ("Angle",),
    "linear angle": ("Angle",),
    "stretch-bend": ("StretchBend",),
    "out-of-plane": ("Oop",),
    "torsion": ("Torsion",),
    "pairs": ("VdW", "Ele"),
    "1-4 pairs": ("VdW", "Ele"),
}
ALL_SWITCHES = ("Bond", "Angle", "StretchBend", "Oop", "Torsion", "VdW", "Ele")


def molecule(smiles: str) -> Any:
    """RDKit molecule of a SMILES through its System, with the System's geometry."""
    system = system_from_smiles("m", smiles)
    return with_positions(rdkit_molecule(system), system.reference_positions)


def with_positions(bare: Any, positions: np.ndarray) -> Any:
    solid = Chem.Mol(bare)
    solid.RemoveAllConformers()
    conformer = Chem.Conformer(solid.GetNumAtoms())
    conformer.SetPositions(np.ascontiguousarray(positions))
    solid.AddConformer(conformer)
    return solid


def of_openmm(model: openmm.System, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy kcal/mol and gradient kcal/mol/Å."""
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(model, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions / 10)
    state = context.getState(getEnergy=True, getForces=True)
    return state.getPotentialEnergy()._value / 4.184, -state.getForces(asNumpy=True)._value / 41.84


def of_rdkit(solid: Any, positions: np.ndarray, properties: Any) -> tuple[float, np.ndarray]:
    """Energy kcal/mol and gradient kcal/mol/Å, all pairs included."""
    field = rdForceFieldHelpers.MMFFGetMoleculeForceField(
        solid, properties, nonBondedThresh=1e9, ignoreInterfragInteractions=False
    )
    flat = positions.ravel().tolist()
    return field.CalcEnergy(flat), np.array(field.CalcGrad(flat)).reshape(-1, 3)


def require_equal(solid: Any, variant: Variant, seed: int) -> None:
    """At the molecule's geometry and at two that noise has perturbed."""
    model = parametrised("m", solid, variant).openmm_system()
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(solid, mmffVariant=variant)
    noise = np.random.default_rng(seed)
    start = np.array(solid.GetConformer().GetPositions())
    for amplitude in (0.01, 0.05, 0.2):
        positions = start + noise.normal(scale=amplitude, size=start.shape)
        energy, gradient = of_openmm(model, positions)
        expected_energy, expected_gradient = of_rdkit(solid, positions, properties)
        assert energy == pytest.approx(expected_energy, abs=ENERGY_TOLERANCE)
        np.testing.assert_allclose(gradient, expected_gradient, atol=GRADIENT_TOLERANCE)


@pytest.mark.parametrize(
    "smiles",
    [
        "CCO", "CC(=O)Oc1ccccc1C(=O)[O-]", "C=C=C", "CC#N", "CN=[N+]=[N-]", "C[N+]#[C-]", "CC#CC", "c1ccccc1[N+]#N",
        "NC(=[NH2+])NC", "Cc1c[nH]c[nH+]1", "C1CC1", "C1CCC1", "CS(=O)(=O)NC", "COP(=O)(OC)OC", "C[Si](C)(C)C", "c1ccsc1",
        "[O-][n+]1ccccc1", "Cn1cncc1", "CC(=S)N", "c1nn[n-]n1", "[Na+].CC(=O)[O-]", "O", "O=C(N)c1cc(Br)c(I)c(F)c1Cl",
    ],
)  # fmt: skip
@pytest.mark.parametrize("variant", ["MMFF94", "MMFF94s"])
def test_energy_and_gradient_of_every_kind_of_group_are_rdkits(smiles: str, variant: Variant) -> None:
    require_equal(molecule(smiles), variant, seed=1)


@pytest.mark.parametrize("target", TARGETS)
def test_ligand_rebuilt_from_its_system_has_the_energy_of_its_file(target: str, shared_data: Path) -> None:
    file = shared_data / "fep_pockets" / target / "02_ligands" / "ligands.sdf"
    original, system = read_molecules(file)[0], systems_from_file(file)[0]
    assert original.GetNumAtoms() == system.n_sites
    rebuilt = with_positions(rdkit_molecule(system), system.reference_positions)
    own = rdForceFieldHelpers.MMFFGetMoleculeProperties(original)
    energy, _ = of_openmm(parametrised("m", rebuilt).openmm_system(), system.reference_positions)
    assert energy == pytest.approx(of_rdkit(original, system.reference_positions, own)[0], abs=ENERGY_TOLERANCE)
    require_equal(rebuilt, "MMFF94", seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["MMFF94", "MMFF94s"])
@pytest.mark.parametrize("target", TARGETS)
def test_ligands_of_every_target_have_rdkits_energy(target: str, variant: Variant, shared_data: Path) -> None:
    systems = systems_from_file(shared_data / "fep_pockets" / target / "02_ligands" / "ligands.sdf")
    chosen = systems[:: max(1, len(systems) // 5)]
    assert len(chosen) >= 5
    for number, system in enumerate(chosen):
        require_equal(with_positions(rdkit_molecule(system), system.reference_positions), variant, seed=number)


@pytest.mark.parametrize(
    "terms", [("bond",), ("angle", "linear angle"), ("stretch-bend",), ("out-of-plane",), ("torsion",)]
)
@pytest.mark.parametrize("smiles", ["CC(=O)Nc1ccc(C#N)cc1", "CN=[N+]=[N-]", "CS(=O)(=O)N1CCC1"])
def test_each_term_is_rdkits_term(terms: tuple[str, ...], smiles: str) -> None:
    solid = molecule(smiles)
    positions = np.array(solid.GetConformer().GetPositions())
    positions += np.random.default_rng(3).normal(scale=0.05, size=positions.shape)
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(solid)
    wanted = {switch for term in terms for switch in SWITCHES[term]}
    for switch in ALL_SWITCHES:
        getattr(properties, f"SetMMFF{switch}Term")(switch in wanted)
    model = only(parametrised("m", solid).openmm_system(), terms)
    energy, gradient = of_openmm(model, positions)
    expected_energy, expected_gradient = of_rdkit(solid, positions, properties)
    assert energy == pytest.approx(expected_energy, abs=1e-8)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-8)


@pytest.mark.parametrize("switches", [("VdW",), ("Ele",)])
def test_van_der_waals_and_charges_are_rdkits_each_by_itself(switches: tuple[str, ...]) -> None:
    """Donors and acceptors of hydrogen bonds within one molecule, and pairs three bonds apart."""
    solid = molecule("OCCC(=O)NCCN")
    positions = np.array(solid.GetConformer().GetPositions())
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(solid)
    for switch in ALL_SWITCHES:
        getattr(properties, f"SetMMFF{switch}Term")(switch in switches)
    pairs = ("pairs", "1-4 pairs")
    both = of_openmm(only(parametrised("m", solid).openmm_system(), pairs), positions)[0]
    uncharged = of_openmm(without_charges(only(parametrised("m", solid).openmm_system(), pairs)), positions)[0]
    energy = uncharged if switches == ("VdW",) else both - uncharged
    assert energy == pytest.approx(of_rdkit(solid, positions, properties)[0], abs=1e-8)


def only(model: openmm.System, terms: tuple[str, ...]) -> openmm.System:
    names = {f"MMFF {term}" for term in terms}
    for index in reversed(range(model.getNumForces())):
        if model.getForce(index).getName() not in names:
            model.removeForce(index)
    assert model.getNumForces() == len(terms)
    return model


def without_charges(model: openmm.System) -> openmm.System:
    far, close = model.getForces()
    for i in range(far.getNumParticles()):
        far.setParticleParameters(i, (0.0, far.getParticleParameters(i)[1]))
    for k in range(close.getNumBonds()):
        i, j, (minimum, depth, _) = close.getBondParameters(k)
        close.setBondParameters(k, i, j, (minimum, depth, 0.0))
    return model


def test_long_chain_keeps_the_torsions_that_rdkit_drops() -> None:
    """RDKit's substructure search ends after 1000 bonds; a regular chain's energy is linear in its length."""
    chains = {carbons: planar_chain(carbons) for carbons in (100, 200, 1200)}
    energies = {
        carbons: of_openmm(
            only(parametrised("m", chain).openmm_system(), ("torsion",)), chain.GetConformer().GetPositions()
        )[0]
        for carbons, chain in chains.items()
    }
    per_hundred = energies[200] - energies[100]
    assert abs(per_hundred) > 50
    assert energies[1200] == pytest.approx(energies[100] + 11 * per_hundred, rel=1e-9)
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(chains[1200])
    for switch in set(ALL_SWITCHES) - {"Torsion"}:
        getattr(properties, f"SetMMFF{switch}Term")(False)
    truncated, _ = of_rdkit(chains[1200], chains[1200].GetConformer().GetPositions(), properties)
    assert truncated == pytest.approx(energies[1200] - 2 * per_hundred, rel=0.01)


def planar_chain(carbons: int) -> Any:
    """Polyethylene with all carbons anti and a regular, not relaxed, geometry."""
    solid = Chem.AddHs(Chem.MolFromSmiles("C" * carbons))
    k = np.arange(carbons)
    spine = np.stack([1.27 * k, 0.42 * (-1.0) ** k, np.zeros(carbons)], axis=1)
    places = [*spine]
    for atom in list(solid.GetAtoms())[carbons:]:
        owner = atom.GetNeighbors()[0]
        mine = [n.GetIdx() for n in owner.GetNeighbors() if n.GetAtomicNum() == 1].index(atom.GetIdx())
        side = np.array([[0, 0.5, 0.95], [0, 0.5, -0.95], [1.05 if owner.GetIdx() else -1.05, 0.3, 0]])[mine]
        places.append(spine[owner.GetIdx()] + side * [1, (-1.0) ** owner.GetIdx(), 1])
    return with_positions(solid, np.array(places))


@pytest.mark.parametrize(
    ("smiles", "complaint"),
    [
        ("CB(O)O", r"'m': MMFF94 has no atom type for B \(atom 2\) \(bonds: single to C, single to O, single to O\)"),
        ("C[Se]C", r"no atom type for Se \(atom 2\)"),
        ("CS(F)(F)(F)(F)F", r"no atom type for S \(atom 2\)"),
    ],
)
def test_atom_that_mmff_does_not_know_is_named_with_its_bonds(smiles: str, complaint: str) -> None:
    with pytest.raises(SimulationError, match=complaint):
        parametrised("m", molecule(smiles))


def test_missing_hydrogens_are_said() -> None:
    system = system_from_smiles("m", "CCO")
    heavy = system.select(system.heavy_sites())
    with pytest.raises(SimulationError, match=r"C \(atom 1\).*free valence.*hydrogens"):
        parametrised("m", rdkit_molecule(heavy))
