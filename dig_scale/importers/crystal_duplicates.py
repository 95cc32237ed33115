"""Which crystals are one structure: pymatgen's StructureMatcher behind cheap fingerprints.

In: crystals of one composition, as elements, places and cells. Out: for each, the first among them that it repeats. Two are
the same when volume and energy per atom agree within tolerances, their primitive cells have as many atoms, and the matcher
maps one onto the other (Ong et al. 2013) - so a structure under strain, or another minimum close by, stays. Knows no files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pymatgen.analysis.structure_matcher import StructureMatcher


@dataclass(frozen=True)
class Similarity:
    """What counts as the same structure.

    length_tolerance (relative), site_tolerance (of the cube root of the volume per atom) and angle_tolerance (degrees) are
    the matcher's ltol, stol and angle_tol; volume_tolerance is relative, energy_tolerance in eV/atom (used where both
    energies are known).
    """

    length_tolerance: float = 0.2
    site_tolerance: float = 0.3
    angle_tolerance: float = 5.0
    volume_tolerance: float = 0.03
    energy_tolerance: float = 0.01


@dataclass(frozen=True)
class Shape:
    """A crystal as the matcher sees it: elements [N], fractional [N, 3], cell [3, 3] Å, energy of the cell in eV if known."""

    elements: np.ndarray
    fractional: np.ndarray
    cell: np.ndarray
    energy: float | None = None


@dataclass(frozen=True)
class Entry:
    """A Shape made ready: its primitive Niggli cell as a pymatgen Structure, Å³ and eV per atom."""

    structure: Any
    volume_per_atom: float
    energy_per_atom: float | None


def matcher(similarity: Similarity) -> StructureMatcher:
    """The StructureMatcher of these tolerances; it compares primitive cells scaled to one volume."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(
        ltol=similarity.length_tolerance, stol=similarity.site_tolerance, angle_tol=similarity.angle_tolerance
    )


def entry(shape: Shape) -> Entry:
    """The Entry of a Shape; a few milliseconds."""
    from pymatgen.core import Structure

    n, energy = len(shape.elements), shape.energy
    full = Structure(shape.cell, shape.elements.tolist(), shape.fractional)
    primitive = full.get_reduced_structure("niggli").get_primitive_structure()
    volume = abs(float(np.linalg.det(shape.cell))) / n
    return Entry(primitive, volume, None if energy is None else energy / n)


@dataclass
class Distinct:
    """A growing list of structures no two of which are the same."""

    similarity: Similarity
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._matcher = matcher(self.similarity)

    def find(self, new: Entry) -> int | None:
        """The place of the first structure that `new` repeats, or None."""
        return next((k for k, known in enumerate(self.entries) if self._same(known, new)), None)

    def add(self, new: Entry) -> None:
        """Append a structure."""
        self.entries.append(new)

    def _same(self, one: Entry, other: Entry) -> bool:
        return alike(one, other, self.similarity) and bool(
            self._matcher.fit(one.structure, other.structure, skip_structure_reduction=True)
        )


def alike(one: Entry, other: Entry, similarity: Similarity) -> bool:
    """Whether fingerprints allow two entries to be the same: primitive size, volume and energy."""
    if len(one.structure) != len(other.structure):
        return False
    if abs(np.log(one.volume_per_atom / other.volume_per_atom)) > similarity.volume_tolerance:
        return False
    if one.energy_per_atom is None or other.energy_per_atom is None:
        return True
    return abs(one.energy_per_atom - other.energy_per_atom) <= similarity.energy_tolerance


def first_of_each(shapes: Sequence[Shape], similarity: Similarity) -> list[int]:
    """For each crystal the index of the first that it repeats, or its own; all of one composition."""
    if len(shapes) == 1:
        return [0]
    distinct, owners, result = Distinct(similarity), [], []
    for number, shape in enumerate(shapes):
        new = entry(shape)
        found = distinct.find(new)
        if found is None:
            distinct.add(new)
            owners.append(number)
        result.append(number if found is None else owners[found])
    return result


def first_of_each_group(groups: Sequence[Sequence[Shape]], similarity: Similarity, workers: int = 1) -> list[list[int]]:
    """first_of_each of every composition, on `workers` processes."""
    if workers <= 1 or len(groups) <= 1:
        return [first_of_each(shapes, similarity) for shapes in groups]
    # a fresh interpreter for each: the caller may hold threads, which a fork would cut off
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(first_of_each, groups, itertools.repeat(similarity)))
