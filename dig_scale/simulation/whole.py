"""Molecules made whole: atoms moved by box vectors so that no bond crosses a periodic boundary.

In: bonds, box vectors (rows, Å) and positions (Å) in which molecules may be broken or apart. Out: positions in which
bonded atoms are next to each other, and every molecule is at its image nearest to the first one's centre. Knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

_NEAR_IMAGES = np.array(list(product((-1, 0, 1), repeat=3)), dtype=np.float64)


@dataclass(frozen=True)
class Whole:
    """A walk over the bonds of N atoms: levels of (atoms, their neighbours nearer to the start), molecule number [N]."""

    levels: tuple[tuple[np.ndarray, np.ndarray], ...]
    molecules: np.ndarray

    @classmethod
    def of(cls, bonds: np.ndarray, n_sites: int) -> Whole:
        """The walk for `bonds` [E, 2]; every molecule starts at its first atom."""
        around: list[list[int]] = [[] for _ in range(n_sites)]
        for i, j in bonds.tolist():
            around[i].append(j)
            around[j].append(i)
        molecules, levels = np.full(n_sites, -1), []
        roots = []
        for atom in range(n_sites):
            if molecules[atom] < 0:
                roots.append(atom)
                _mark(atom, len(roots) - 1, around, molecules)
        seen = np.zeros(n_sites, dtype=bool)
        seen[roots] = True
        front = roots
        while front:
            step = {new: old for old in front for new in around[old] if not seen[new]}
            seen[list(step)] = True
            front = list(step)
            if step:
                levels.append((np.array(list(step)), np.array(list(step.values()))))
        return cls(tuple(levels), molecules)

    def joined(self, positions: np.ndarray, box: np.ndarray) -> np.ndarray:
        """Positions [N, 3] Å with every molecule whole where its first atom is."""
        whole = positions.copy()
        inverse = np.linalg.inv(box)
        for atoms, neighbours in self.levels:
            apart = whole[atoms] - whole[neighbours]
            whole[atoms] -= np.round(apart @ inverse) @ box
        return whole

    def __call__(self, positions: np.ndarray, box: np.ndarray) -> np.ndarray:
        """Whole positions [N, 3] Å, molecules near the first, in a box [3, 3] Å whose vectors are rows."""
        whole = self.joined(positions, box)
        inverse = np.linalg.inv(box)
        first = whole[self.molecules == 0].mean(axis=0)
        for number in range(1, int(self.molecules.max()) + 1):
            members = self.molecules == number
            whole[members] -= _nearest_shift(whole[members].mean(axis=0) - first, box, inverse)
        return whole


def _mark(start: int, number: int, around: list[list[int]], molecules: np.ndarray) -> None:
    """Write `number` for every atom that bonds join with `start`, in place."""
    pending = [start]
    while pending:
        atom = pending.pop()
        if molecules[atom] < 0:
            molecules[atom] = number
            pending += around[atom]


def _nearest_shift(apart: np.ndarray, box: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """The box vector [3] Å to take from `apart` [3] Å for the shortest rest; rounding alone errs in skewed boxes."""
    shifts = (np.round(apart @ inverse) + _NEAR_IMAGES) @ box
    return shifts[np.argmin(np.linalg.norm(apart - shifts, axis=1))]
