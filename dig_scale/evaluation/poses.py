"""Ligand poses against a known pose: symmetric RMSD, best of n, clashes, and the checks of PoseBusters.

In: a System with ligand (and pocket), samples [S, N, 3] Å and one true frame [N, 3] Å, all in the pocket's frame: poses are
compared where they stand, nothing is superposed unless a name says so. Out: numbers per sample. Atoms that the molecular
graph of elements and bonds cannot tell apart may be swapped, as in spyrmsd. PoseBusters (Buttenschoen et al. 2024) is
an optional package. Knows no model.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dig_scale.errors import UserError
from dig_scale.geometry.alignment import aligned_rmsd, centroid, rmsd
from dig_scale.outputs.molecules import ligand_sites, molecules_of, pdb_text, pocket_sites
from dig_scale.system import System

GOOD_POSE = 2.0
"""Å; a pose below this RMSD counts as found."""
CLASH_DISTANCE = 2.0
"""Å; a heavy atom of the ligand and one of the pocket clash below it."""
MAX_SYMMETRIES = 100_000
_TERMS_PER_CHUNK = 4_000_000


@dataclass(frozen=True)
class PoseAccuracy:
    """Samples of one ligand, each entry [S]: rmsd of the ligand in place, conformer_rmsd after superposition, distance of its
    centroid, pocket_rmsd of the pocket's atoms in place (0 without a pocket), all in Å, and clashes with the pocket.
    """

    rmsd: np.ndarray
    conformer_rmsd: np.ndarray
    centroid_distance: np.ndarray
    pocket_rmsd: np.ndarray
    clashes: np.ndarray

    def best_of(self, n: int) -> float:
        """Expected smallest RMSD in Å among n of the samples."""
        return expected_best(self.rmsd, n)

    def found(self, within: float = GOOD_POSE) -> float:
        """Fraction of samples below this RMSD in Å."""
        return float((self.rmsd < within).mean())


def pose_accuracy(system: System, positions: np.ndarray, truth: np.ndarray) -> PoseAccuracy:
    """Accuracy of samples [S, N, 3] Å against the true frame [N, 3] Å."""
    if positions.ndim != 3 or positions.shape[1:] != truth.shape or truth.shape != (system.n_sites, 3):
        raise UserError(
            f"{system.name!r}: samples {positions.shape} and true frame {truth.shape}, expected (S, {system.n_sites}, 3)"
            f" and ({system.n_sites}, 3) in Å"
        )
    ligand, pocket = ligand_sites(system), pocket_sites(system)
    permutations = symmetries(system)
    poses, true_pose = positions[:, ligand].astype(np.float64), truth[ligand].astype(np.float64)
    return PoseAccuracy(
        rmsd=pose_rmsd(poses, true_pose, permutations),
        conformer_rmsd=conformer_rmsd(poses, true_pose, permutations),
        centroid_distance=np.linalg.norm(centroid(poses) - centroid(true_pose), axis=-1),
        pocket_rmsd=rmsd(positions[:, pocket], truth[pocket]) if len(pocket) else np.zeros(len(positions)),
        clashes=pocket_clashes(system, positions),
    )


def symmetries(system: System) -> np.ndarray:
    """Permutations [A, n] of the ligand's atoms that keep elements and bonds; raises UserError above MAX_SYMMETRIES."""
    from rdkit import Chem

    alone = system.select(ligand_sites(system))
    # Neither orders nor charges: resonance forms of one group are one group.
    graph = Chem.RWMol()
    for element in alone.elements.tolist():
        graph.AddAtom(Chem.Atom(element))
    for i, j in alone.bonds.tolist():
        graph.AddBond(i, j, Chem.BondType.SINGLE)
    found = graph.GetSubstructMatches(graph, uniquify=False, maxMatches=MAX_SYMMETRIES + 1)
    if len(found) > MAX_SYMMETRIES:
        raise UserError(f"{system.name!r}: more than {MAX_SYMMETRIES} symmetries; compare its heavy atoms alone")
    return np.array(found, dtype=np.int64)


def pose_rmsd(poses: np.ndarray, truth: np.ndarray, permutations: np.ndarray) -> np.ndarray:
    """RMSD [S] in Å of poses [S, n, 3] from truth [n, 3] as they stand, the smallest over permutations [A, n]."""
    squared = ((poses[:, :, None] - truth[None, None]) ** 2).sum(axis=-1)
    sites = np.arange(len(truth))
    smallest = np.full(len(poses), np.inf)
    size = max(1, _TERMS_PER_CHUNK // max(1, len(poses) * len(truth)))
    for start in range(0, len(permutations), size):
        sums = squared[:, sites, permutations[start : start + size]].sum(axis=-1)
        smallest = np.minimum(smallest, sums.min(axis=-1))
    return np.sqrt(smallest / len(truth))


def conformer_rmsd(poses: np.ndarray, truth: np.ndarray, permutations: np.ndarray) -> np.ndarray:
    """RMSD [S] in Å of poses [S, n, 3] from truth [n, 3] after superposition, the smallest over permutations [A, n]."""
    smallest = np.full(len(poses), np.inf)
    size = max(1, _TERMS_PER_CHUNK // max(1, len(poses) * len(truth) * 6))
    for start in range(0, len(permutations), size):
        images = truth[permutations[start : start + size]]
        smallest = np.minimum(smallest, aligned_rmsd(poses[:, None], images[None]).min(axis=1))
    return smallest


def expected_best(values: np.ndarray, n: int) -> float:
    """Expected smallest of n values drawn from `values` [S] without replacement; raises ValueError unless 1 <= n <= S."""
    total = len(values)
    if not 1 <= n <= total:
        raise ValueError(f"best of {n} from {total} samples: expected a number from 1 to {total}")
    # The k-th smallest is the best of n where the other n - 1 come from those above it.
    log_all = _log_binomial(total, n)
    chances = [math.exp(_log_binomial(total - k - 1, n - 1) - log_all) for k in range(total - n + 1)]
    return float(np.sort(values)[: len(chances)] @ np.array(chances))


def pocket_clashes(system: System, positions: np.ndarray, distance: float = CLASH_DISTANCE) -> np.ndarray:
    """Number [S] of pairs of heavy atoms, one of the ligand and one of the pocket, closer than `distance` Å."""
    from scipy.spatial.distance import cdist

    heavy = system.elements != 1
    ligand = ligand_sites(system)[heavy[ligand_sites(system)]]
    pocket = pocket_sites(system)[heavy[pocket_sites(system)]]
    if not len(pocket):
        return np.zeros(len(positions), np.int64)
    return np.array([int((cdist(sample[ligand], sample[pocket]) < distance).sum()) for sample in positions], np.int64)


class CheckDepth(enum.StrEnum):
    """How much PoseBusters does per pose."""

    FAST = "fast"
    """Without the energy of the conformer, which takes seconds."""
    FULL = "full"


@dataclass(frozen=True)
class PoseChecks:
    """Outcome [S, C] of the checks `names` [C] on samples [S]; a check that could not be made counts as failed."""

    names: tuple[str, ...]
    passed: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        """Which samples [S] pass all checks."""
        return np.asarray(self.passed.all(axis=1))

    def fractions(self) -> dict[str, float]:
        """Fraction of samples that pass, by check."""
        return dict(zip(self.names, self.passed.mean(axis=0).tolist(), strict=True))


def posebusters_checks(
    system: System, positions: np.ndarray, truth: np.ndarray | None = None, depth: CheckDepth = CheckDepth.FULL
) -> PoseChecks:
    """PoseBusters' checks of samples [S, N, 3] Å against the pocket; with the true frame [N, 3] Å, those of redocking too.

    Raises UserError where the package is not installed.
    """
    try:
        from posebusters import PoseBusters
    except ImportError as error:
        raise UserError("PoseBusters is not installed: pip install posebusters") from error
    pocket = pocket_sites(system)
    mode = "mol" if not len(pocket) else "dock" if truth is None else "redock"
    buster = PoseBusters(config=mode if depth is CheckDepth.FULL else f"{mode}_fast")
    true_pose = molecules_of(system, truth[None])[0] if mode == "redock" and truth is not None else None
    rows = [
        buster.bust([molecule], true_pose, _pocket_molecule(system, sample) if len(pocket) else None)
        for molecule, sample in zip(molecules_of(system, positions), positions, strict=True)
    ]
    names = tuple(str(name) for name in rows[0].columns) if rows else ()
    passed = np.array([[value is True or value == 1 for value in row.iloc[0].tolist()] for row in rows], bool)
    return PoseChecks(names, passed.reshape(len(rows), len(names)))


def _pocket_molecule(system: System, sample: np.ndarray) -> Any:
    from rdkit import Chem

    pocket = pocket_sites(system)
    text = pdb_text(system.select(pocket), sample[pocket])
    return Chem.MolFromPDBBlock(text, sanitize=False, removeHs=False, proximityBonding=False)


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
