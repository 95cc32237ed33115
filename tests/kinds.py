"""One small system of every kind with a few frames and the model that answers for it, written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dig_scale.batch import Context, State
from dig_scale.config import Diffusion, Model
from dig_scale.diffusion.composition import Composition, composition_for
from dig_scale.geometry.rotations import random_rotations
from dig_scale.model.features import featurise
from dig_scale.model.score_model import ScoreModel
from dig_scale.system import SiteRole, System, SystemKind
from dig_scale.tree import tree_map
from tests.molecules import alanine_dipeptide_heavy

SMALL = {"layers": 2, "width": 32, "heads": 4, "feed_forward": 48, "radial_kernels": 24, "vector_channels": 4}
KINDS = ("molecule", "protein", "pocket", "catalyst", "crystal")
"""Pockets are molecules whose noise reverts to anchors."""


@dataclass(frozen=True)
class Case:
    """A system, clean frames of it (fp64, by field name) and the model.sites that it needs."""

    system: System
    frames: Mapping[str, Tensor]
    sites: str

    @property
    def composition(self) -> Composition:
        """Its processes under the default schedules."""
        return composition_for(self.system.kind, Diffusion())

    @property
    def context(self) -> Context:
        """Its features in fp64."""
        return doubled(featurise(self.system))

    @property
    def batch(self) -> int:
        """Number of frames."""
        return len(self.frames["positions"])


@cache
def case(kind: str) -> Case:
    """The case of one of KINDS."""
    return {"molecule": molecule, "protein": protein, "pocket": pocket, "catalyst": catalyst, "crystal": crystal}[
        kind
    ]()


def doubled(tree: Context) -> Context:
    """A copy in fp64."""
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def lively_model(sites: str, seed: int = 0, **changes: object) -> ScoreModel:
    """An fp64 model whose every path matters: small initial weights are replaced by larger ones."""
    torch.manual_seed(seed)
    model = ScoreModel(Model.model_validate(SMALL | {"sites": sites} | changes))
    small = [model.head.polar, model.head.axial]
    small += [model.frame_head.out] if model.frame_head else []
    small += [model.strain_head.weights, model.strain_head.isotropic] if model.strain_head else []
    with torch.no_grad():
        for layer in small:
            layer.weight.normal_(std=0.3)
        for embedding in (model.pair_bias.gain, model.pair_bias.shift):
            embedding.weight.add_(0.1 * torch.randn_like(embedding.weight))
    return model.double().eval()


def noise_of(found: Case, seed: int = 0) -> State:
    """Noise of a state of its frames."""
    generator = torch.Generator().manual_seed(seed)
    width = found.composition.normals(found.context)
    return found.composition.noise(torch.randn(found.batch, width, generator=generator).double(), found.context)


def system_of(name: str, kind: str, elements: list[int], positions: np.ndarray, **changes: object) -> System:
    """A system of unlinked sites, with changes."""
    n = len(elements)
    plain: dict[str, object] = {
        "atom_names": tuple(f"X{i}" for i in range(n)),
        "residue_names": ("UNK",) * n,
        "residue_index": np.zeros(n),
        "chain_index": np.zeros(n),
        "bonds": np.zeros((0, 2)),
        "bond_orders": np.zeros(0),
        "formal_charges": np.zeros(n),
        "stereocentres": np.zeros((0, 4)),
        "mobile": np.ones(n, bool),
    }
    return System(name=name, kind=kind, elements=np.array(elements), reference_positions=positions, **plain | changes)


def shaken(positions: np.ndarray, moving: np.ndarray, size: float, seed: int) -> Tensor:
    """Three frames [3, N, 3] with Gaussian displacements (Å) of the moving sites."""
    noise = np.random.default_rng(seed).normal(0, size, (3, *positions.shape))
    return torch.as_tensor(positions + noise * moving[:, None])


def molecule() -> Case:
    """Ten heavy atoms of alanine dipeptide."""
    system = alanine_dipeptide_heavy()
    return Case(system, {"positions": shaken(system.reference_positions, system.mobile, 0.2, 1)}, "atoms")


def protein() -> Case:
    """Two chains of four and three residues, the first with a gap."""
    places, chains = np.array([0, 1, 2, 5, 0, 1, 2]), np.array([0, 0, 0, 0, 1, 1, 1])
    extended = np.stack([3.8 * np.arange(7), 2.0 * chains, 0.0 * chains], axis=1)
    system = system_of(
        "two-chains",
        SystemKind.PROTEIN,
        [0] * 7,
        extended,
        atom_names=("CA",) * 7,
        residue_names=("ALA", "GLY", "SER", "TRP", "ALA", "LYS", "MSE"),
        residue_index=places,
        chain_index=chains,
        bonds=[(0, 1), (1, 2), (4, 5), (5, 6)],
        bond_orders=np.ones(4),
    )
    folded = np.random.default_rng(2).normal(0, 4.0, (7, 3))
    frames = random_rotations(torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(3)).double())
    return Case(system, {"positions": shaken(folded, system.mobile, 0.5, 4), "rotations": frames}, "residues")


def pocket() -> Case:
    """A ligand of four atoms in a pocket of six, two of which move."""
    generator = np.random.default_rng(5)
    around = generator.normal(size=(6, 3))
    around = 5 * around / np.linalg.norm(around, axis=1, keepdims=True) + np.array([4.0, -2.0, 7.0])
    ligand = np.array([[0, 0, 0], [1.4, 0.2, 0], [2.0, 1.4, 0.3], [3.3, 1.5, 0.9]])
    placed = ligand - ligand.mean(0) + around.mean(0)
    system = system_of(
        "pocket",
        SystemKind.MOLECULE,
        [7, 6, 6, 8, 6, 6, 8, 7, 6, 16],
        np.concatenate([placed, around]),
        bonds=[(0, 1), (1, 2), (2, 3), (4, 5)],
        bond_orders=[1, 2, 1, 1],
        roles=[SiteRole.LIGAND] * 4 + [SiteRole.POCKET] * 6,
        mobile=[True] * 6 + [False] * 4,
    )
    pose = np.concatenate([placed[::-1] + np.array([1.0, 0.5, -0.5]), around])
    return Case(system, {"positions": shaken(pose, system.mobile, 0.2, 6)}, "anchored")


def catalyst() -> Case:
    """Two layers of four metal atoms, the lower one fixed, in a skewed cell with carbon monoxide on top."""
    cell = np.array([[5.2, 0.0, 0.0], [1.3, 4.9, 0.0], [0.2, -0.1, 14.0]])
    grid = np.array([[i / 2, j / 2, 0.0] for i in range(2) for j in range(2)])
    lower, upper = grid @ cell, (grid + 0.25) @ cell * np.array([1, 1, 0]) + np.array([0, 0, 2.1])
    top = upper[0] + np.array([0.1, 0.2, 1.9])
    positions = np.concatenate([lower, upper, [top, top + np.array([0.3, 0.0, 1.1])]])
    system = system_of(
        "slab",
        SystemKind.CATALYST,
        [29] * 8 + [6, 8],
        positions,
        bonds=[(8, 9)],
        bond_orders=[3],
        roles=[SiteRole.SUBSURFACE] * 4 + [SiteRole.SURFACE] * 4 + [SiteRole.ADSORBATE] * 2,
        mobile=[False] * 4 + [True] * 6,
        cell=cell,
        periodic=(True, True, False),
    )
    return Case(system, {"positions": shaken(positions, system.mobile, 0.2, 7)}, "anchored")


def crystal() -> Case:
    """Five atoms of two elements in skewed cells of three shapes."""
    generator = np.random.default_rng(8)
    cell = np.diag([3.6, 4.1, 4.4]) + generator.normal(0, 0.4, (3, 3, 3))
    inside = generator.uniform(0, 1, (3, 5, 3))
    zeros = np.zeros((5, 3))
    system = system_of("crystal", SystemKind.CRYSTAL, [6, 6, 6, 14, 14], zeros, periodic=(True, True, True))
    return Case(system, {"positions": torch.as_tensor(inside @ cell), "cell": torch.as_tensor(cell)}, "crystal")
