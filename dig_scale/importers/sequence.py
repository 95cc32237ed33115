"""A peptide's sequence -> backbone coordinates, from ideal internal coordinates.

In: `ACE-ALA-NME` or `GYDPETGTWG`. Out: residue names, and N, CA, C, O (and the caps' atoms) of a polyproline-II chain
with trans peptide bonds, in Å. Side chains and hydrogens are the business of importers.protein.
Bond lengths and angles: R. A. Engh and R. Huber, Acta Cryst. A47 (1991) 392.
"""

from __future__ import annotations

import numpy as np

from dig_scale.errors import UserError
from dig_scale.importers.residues import AMINO_ACIDS, CAPS, THREE_LETTER

_PHI, _PSI, _OMEGA = -75.0, 145.0, 180.0


def parse_sequence(sequence: str) -> tuple[str, ...]:
    """Three-letter residue names, caps included, of `ACE-GLY-TRP-NME` or of one-letter `GYDPETGTWG` (uncapped).

    Text without '-' is read as one-letter codes. Raises UserError naming the code and its place.
    """
    text = sequence.strip()
    if not text:
        raise UserError("the sequence is empty; write it as ACE-ALA-NME or GYDPETGTWG")
    if "-" not in text:
        return tuple(_from_one_letter(letter, place, text) for place, letter in enumerate(text, 1))
    names = tuple(text.upper().split("-"))
    for place, name in enumerate(names, 1):
        if name not in AMINO_ACIDS | CAPS:
            known = ", ".join(sorted(AMINO_ACIDS | CAPS))
            raise UserError(f"sequence {text!r}: residue {place} is {name!r}, expected one of {known}")
    _require_caps_at_ends(names, text)
    return names


def backbone(names: tuple[str, ...]) -> list[tuple[str, int, np.ndarray]]:
    """(atom name, 0-based residue, position [3] Å) of the heavy backbone atoms, in file order."""
    chain = _Chain()
    for residue, name in enumerate(names):
        if name == "ACE":
            chain.start_with_acetyl(residue)
        elif name == "NME":
            chain.end_with_methylamide(residue)
        else:
            chain.add_residue(residue)
    return chain.with_oxygens()


def _from_one_letter(letter: str, place: int, text: str) -> str:
    if letter.upper() not in THREE_LETTER:
        raise UserError(
            f"sequence {text!r}: residue {place} is {letter!r}, expected one of {''.join(THREE_LETTER)} "
            f"(or three-letter codes joined by '-')"
        )
    return THREE_LETTER[letter.upper()]


def _require_caps_at_ends(names: tuple[str, ...], text: str) -> None:
    if "ACE" in names[1:] or "NME" in names[:-1]:
        raise UserError(f"sequence {text!r}: ACE may only come first and NME only last")
    if not AMINO_ACIDS & set(names):
        raise UserError(f"sequence {text!r}: no amino acid between the caps")


class _Chain:
    """Grows N, CA, C one by one; oxygens follow once the next residue's N is known."""

    def __init__(self) -> None:
        self._atoms: list[tuple[str, int, np.ndarray]] = []
        self._path: list[np.ndarray] = []

    def start_with_acetyl(self, residue: int) -> None:
        self._put("CH3", residue, np.zeros(3))
        self._put("C", residue, np.array([1.52, 0.0, 0.0]))

    def end_with_methylamide(self, residue: int) -> None:
        self._put("N", residue, self._next(1.329, 116.6, _PSI))
        self._put("C", residue, self._next(1.458, 121.7, _OMEGA))

    def add_residue(self, residue: int) -> None:
        if not self._path:
            self._put("N", residue, np.zeros(3))
            self._put("CA", residue, np.array([1.458, 0.0, 0.0]))
        else:
            self._put("N", residue, self._next(1.329, 116.6, _PSI))
            self._put("CA", residue, self._next(1.458, 121.7, _OMEGA))
        self._put("C", residue, self._next(1.525, 111.0, _PHI))

    def with_oxygens(self) -> list[tuple[str, int, np.ndarray]]:
        """All atoms; a carbonyl oxygen lies opposite to the next N in the peptide plane."""
        tail = self._next(1.329, 116.6, _PSI)
        placed: list[tuple[str, int, np.ndarray]] = []
        path = [*self._path, tail]
        for k, (name, residue, position) in enumerate(self._atoms):
            placed.append((name, residue, position))
            if name == "C" and (k == 0 or self._atoms[k - 1][0] in ("CA", "CH3")):
                before, after = path[k - 1], path[k + 1]
                placed.append(("O", residue, _oxygen(before, position, after)))
        return placed

    def _put(self, name: str, residue: int, position: np.ndarray) -> None:
        self._atoms.append((name, residue, position))
        self._path.append(position)

    def _next(self, length: float, angle: float, torsion: float) -> np.ndarray:
        if len(self._path) == 2:
            # A virtual atom off the first bond's axis stands in for the missing third one: it only turns the whole chain.
            return _extend(np.array([0.0, 1.0, 0.0]), self._path[0], self._path[1], length, angle, torsion)
        return _extend(self._path[-3], self._path[-2], self._path[-1], length, angle, torsion)


def _extend(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle_deg: float, torsion_deg: float
) -> np.ndarray:
    """The atom d with |cd| = length, angle b-c-d and torsion a-b-c-d."""
    angle, torsion = np.deg2rad(angle_deg), np.deg2rad(torsion_deg)
    axis = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, axis)
    normal /= np.linalg.norm(normal)
    across = np.cross(normal, axis)
    local = np.array([-np.cos(angle), np.sin(angle) * np.cos(torsion), np.sin(angle) * np.sin(torsion)])
    return c + length * (local[0] * axis + local[1] * across + local[2] * normal)


def _oxygen(before: np.ndarray, carbon: np.ndarray, after: np.ndarray) -> np.ndarray:
    away = _unit(carbon - before) + _unit(carbon - after)
    return carbon + 1.231 * _unit(away)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
