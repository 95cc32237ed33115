"""Geometry of conformations: torsions, angles, bond lengths, signed volumes, clashes. Pure numpy, no statistics.

In: positions [F, N, 3] Å and index arrays. Out: one number per frame and term, float32, angles in radians on [-pi, pi].
Frames are worked through in chunks, so memory is bounded by the result. Torsions, angles and clash rules are derived from
the bonds and names of a System, nothing else: no topology file, no residue library, no periodic images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array, eye_array
from scipy.spatial import cKDTree

from dig_scale.system import COARSE_GRAINED_BEAD, System

CLASH_FACTOR = 0.6
"""Two atoms clash below this fraction of the sum of their van der Waals radii."""
BEAD_CLASH_DISTANCE = 2.0
"""Å; two coarse-grained beads clash below it."""
CLASH_MIN_BONDS = 4
"""Pairs closer than this many bonds are not tested for clashes."""

# Bondi 1964, B and Se from Mantina et al. 2009; Å.
_VDW_RADII = {
    5: 1.92,
    6: 1.70,
    7: 1.55,
    8: 1.52,
    9: 1.47,
    14: 2.10,
    15: 1.80,
    16: 1.80,
    17: 1.75,
    34: 1.90,
    35: 1.85,
    53: 1.98,
}
_VDW_DEFAULT = 2.0
_BACKBONE = ("N", "CA", "C", "CH3")
_GREEK_ORDER = "ABGDEZ"
_TERMS_PER_CHUNK = 400_000


@dataclass(frozen=True)
class Torsion:
    """A proper torsion: sites i-j-k-l, `label` for people ('φ ALA2'), `symbol` one of φ ψ ω χ1.. or '' if it has none."""

    label: str
    symbol: str
    sites: tuple[int, int, int, int]


@dataclass(frozen=True)
class TorsionPair:
    """Two torsions around neighbouring bonds; `first`, `second` index the torsion list."""

    label: str
    first: int
    second: int
    is_ramachandran: bool
    """(φ, ψ) of one residue; else neighbouring rotors without backbone names."""


def bond_lengths(positions: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Distances [F, E] in Å of `pairs` [E, 2]."""

    def distances(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x[:, pairs[:, 1]] - x[:, pairs[:, 0]], axis=-1)

    return _by_chunks(distances, positions, len(pairs))


def bend_angles(positions: np.ndarray, triples: np.ndarray) -> np.ndarray:
    """Angles [F, A] in radians at the middle site of `triples` [A, 3]."""

    def angles(x: np.ndarray) -> np.ndarray:
        u = x[:, triples[:, 0]] - x[:, triples[:, 1]]
        v = x[:, triples[:, 2]] - x[:, triples[:, 1]]
        # atan2 stays accurate near 0 and pi, where arccos does not.
        return np.arctan2(np.linalg.norm(np.cross(u, v), axis=-1), (u * v).sum(axis=-1))

    return _by_chunks(angles, positions, len(triples))


def dihedrals(positions: np.ndarray, quadruples: np.ndarray) -> np.ndarray:
    """Torsion angles [F, T] in radians of `quadruples` [T, 4], IUPAC sign (trans = pi, clockwise positive)."""

    def torsions(x: np.ndarray) -> np.ndarray:
        i, j, k, m = (x[:, quadruples[:, column]] for column in range(4))
        b1, b2, b3 = j - i, k - j, m - k
        normal_1, normal_2 = np.cross(b1, b2), np.cross(b2, b3)
        sine = np.linalg.norm(b2, axis=-1) * (b1 * normal_2).sum(axis=-1)
        return np.arctan2(sine, (normal_1 * normal_2).sum(axis=-1))

    return _by_chunks(torsions, positions, len(quadruples))


def signed_volumes(positions: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Signed volumes [F, C] in Å^3 of `centres` [C, 4] (centre, a, b, c): (a-centre)·((b-centre)×(c-centre))."""

    def volumes(x: np.ndarray) -> np.ndarray:
        a, b, c = (x[:, centres[:, column]] - x[:, centres[:, 0]] for column in (1, 2, 3))
        return (a * np.cross(b, c)).sum(axis=-1)

    return _by_chunks(volumes, positions, len(centres))


def clash_counts(positions: np.ndarray, system: System) -> np.ndarray:
    """Number of clashes [F] per frame: heavy atoms at least CLASH_MIN_BONDS bonds apart, closer than clash_radii allow."""
    heavy = system.heavy_sites()
    radii = clash_radii(system)[heavy]
    near = _within_bonds(system, CLASH_MIN_BONDS - 1)[heavy][:, heavy].toarray()
    frames_per_chunk = max(1, _TERMS_PER_CHUNK // max(1, len(heavy)))
    counts = np.zeros(len(positions), np.int64)
    for start in range(0, len(positions), frames_per_chunk):
        chunk = positions[start : start + frames_per_chunk, heavy]
        counts[start : start + len(chunk)] = _clashes_of_chunk(chunk.astype(np.float64), radii, near)
    return counts


def clash_radii(system: System) -> np.ndarray:
    """Radii [N] in Å whose pairwise sums are the clash distances (CLASH_FACTOR included)."""
    vdw = np.array([_VDW_RADII.get(int(element), _VDW_DEFAULT) for element in system.elements])
    return np.where(system.elements == COARSE_GRAINED_BEAD, BEAD_CLASH_DISTANCE / 2, CLASH_FACTOR * vdw)


def angles_of(system: System) -> np.ndarray:
    """All bond angles [A, 3] as site triples (end, middle, end)."""
    triples = [
        (ends[a], middle, ends[b])
        for middle, ends in enumerate(_neighbours(system))
        for a in range(len(ends))
        for b in range(a + 1, len(ends))
    ]
    return np.array(triples, dtype=np.int64).reshape(-1, 3)


def torsions_of(system: System) -> tuple[Torsion, ...]:
    """One torsion for every bond outside rings that has heavy atoms on both sides, and every backbone φ, ψ, ω.

    Rotors that end in hydrogens only (methyl groups) are left out: their wells are equal by symmetry.
    """
    neighbours, in_ring = _neighbours(system), ring_bonds(system)
    found = []
    for (j, k), ring in zip(system.bonds.tolist(), in_ring, strict=True):
        i, m = _reference_neighbour(system, neighbours, j, k), _reference_neighbour(system, neighbours, k, j)
        if i is None or m is None or i == m:
            continue
        torsion = _named_torsion(system, _oriented(system, (i, j, k, m)))
        if not ring or torsion.symbol in ("φ", "ψ", "ω"):
            found.append(torsion)
    return tuple(found)


def torsion_pairs(torsions: tuple[Torsion, ...]) -> tuple[TorsionPair, ...]:
    """(φ, ψ) of every residue that has both; where no torsion has a backbone name, neighbouring rotors instead."""
    by_centre = {t.sites[:3]: index for index, t in enumerate(torsions) if t.symbol == "ψ"}
    backbone = [
        TorsionPair(t.label.removeprefix("φ "), index, by_centre[t.sites[1:]], True)
        for index, t in enumerate(torsions)
        if t.symbol == "φ" and t.sites[1:] in by_centre
    ]
    if backbone:
        return tuple(backbone)
    return tuple(
        TorsionPair(f"{first.label} / {second.label}", a, b, False)
        for a, first in enumerate(torsions)
        for b, second in enumerate(torsions)
        if a < b and set(first.sites[1:3]) & set(second.sites[1:3])
    )


def ring_bonds(system: System) -> np.ndarray:
    """Which bonds [E] lie in a ring: every bond that is not in the spanning forest closes one with the tree path."""
    parent, depth = _spanning_forest(_neighbours(system))
    in_ring: set[tuple[int, int]] = set()
    for i, j in system.bonds.tolist():
        if parent[i] == j or parent[j] == i:
            continue
        in_ring.add((i, j))
        while i != j:
            if depth[i] < depth[j]:
                i, j = j, i
            in_ring.add((min(i, parent[i]), max(i, parent[i])))
            i = parent[i]
    return np.array([tuple(bond) in in_ring for bond in system.bonds.tolist()], dtype=bool)


def _by_chunks(function: Callable[[np.ndarray], np.ndarray], positions: np.ndarray, n_terms: int) -> np.ndarray:
    result = np.empty((len(positions), n_terms), np.float32)
    if n_terms == 0:
        return result
    size = max(1, _TERMS_PER_CHUNK // n_terms)
    for start in range(0, len(positions), size):
        result[start : start + size] = function(positions[start : start + size].astype(np.float64))
    return result


def _clashes_of_chunk(chunk: np.ndarray, radii: np.ndarray, near: np.ndarray) -> np.ndarray:
    n_frames, n_sites, _ = chunk.shape
    if n_frames == 0 or n_sites < 2:
        return np.zeros(n_frames, np.int64)
    # The frame is a fourth coordinate, spaced wider than the cutoff: one tree finds the close pairs of all frames.
    cutoff = 2 * float(radii.max())
    frame = np.repeat(np.arange(n_frames) * 2.0 * cutoff, n_sites)
    points = np.column_stack([chunk.reshape(-1, 3), frame])
    pairs = cKDTree(points).query_pairs(cutoff, output_type="ndarray")
    first, second = pairs[:, 0] % n_sites, pairs[:, 1] % n_sites
    distance = np.linalg.norm(points[pairs[:, 0], :3] - points[pairs[:, 1], :3], axis=-1)
    clash = (distance < radii[first] + radii[second]) & ~near[first, second]
    return np.bincount(pairs[clash, 0] // n_sites, minlength=n_frames)


def _within_bonds(system: System, n_bonds: int) -> csr_array:
    """Sparse [N, N], true where two sites are at most `n_bonds` bonds apart (or the same)."""
    n = system.n_sites
    i, j = system.bonds[:, 0], system.bonds[:, 1]
    step = csr_array((np.ones(len(i)), (i, j)), shape=(n, n))
    step = (step + step.T + eye_array(n, format="csr")).astype(bool)
    reach = eye_array(n, format="csr").astype(bool)
    for _ in range(n_bonds):
        reach = (reach @ step).astype(bool)
    return csr_array(reach)


def _neighbours(system: System) -> list[list[int]]:
    neighbours: list[list[int]] = [[] for _ in range(system.n_sites)]
    for i, j in system.bonds.tolist():
        neighbours[i].append(j)
        neighbours[j].append(i)
    return [sorted(ends) for ends in neighbours]


def _spanning_forest(neighbours: list[list[int]]) -> tuple[list[int], list[int]]:
    parent, depth = [-1] * len(neighbours), [-1] * len(neighbours)
    for root in range(len(neighbours)):
        if depth[root] >= 0:
            continue
        depth[root], queue = 0, [root]
        for site in queue:
            for other in neighbours[site]:
                if depth[other] < 0:
                    parent[other], depth[other] = site, depth[site] + 1
                    queue.append(other)
    return parent, depth


def _reference_neighbour(system: System, neighbours: list[list[int]], site: int, partner: int) -> int | None:
    """The site that defines a torsion beyond `site`: backbone first, then heaviest, then by name, as IUPAC-IUB does."""
    heavy = [other for other in neighbours[site] if other != partner and system.elements[other] != 1]

    def rank(other: int) -> tuple[bool, int, str, int]:
        name = system.atom_names[other]
        return name not in _BACKBONE, -int(system.elements[other]), name, other

    return min(heavy, key=rank, default=None)


def _oriented(system: System, sites: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The same torsion, read from the N terminus when its names are a backbone's."""
    names = tuple(system.atom_names[site] for site in sites)
    backwards = names[::-1] in (("C", "N", "CA", "C"), ("N", "CA", "C", "N")) or names[1:3] == ("N", "C")
    return (sites[3], sites[2], sites[1], sites[0]) if backwards else sites


def _named_torsion(system: System, sites: tuple[int, int, int, int]) -> Torsion:
    names = tuple(system.atom_names[site] for site in sites)
    symbol = _symbol(system, sites, names)
    residues = [f"{system.residue_names[site]}{int(system.residue_index[site]) + 1}" for site in sites[1:3]]
    where = residues[0] if residues[0] == residues[1] else f"{residues[0]}–{residues[1]}"
    return Torsion(f"{symbol} {where}" if symbol else f"{'–'.join(names)} {where}", symbol, sites)


def _symbol(system: System, sites: tuple[int, int, int, int], names: tuple[str, ...]) -> str:
    if names == ("C", "N", "CA", "C"):
        return "φ"
    if names == ("N", "CA", "C", "N"):
        return "ψ"
    if (
        names[1:3] == ("C", "N")
        and _spans_two_residues(system, sites)
        and names[0] in _BACKBONE
        and names[3] in _BACKBONE
    ):
        return "ω"
    levels = sorted(_GREEK_ORDER.find(name[1:2]) if len(name) > 1 else -1 for name in names[1:3])
    if "CA" in _names_of_residue(system, sites[1]) and levels[0] >= 0 and levels[1] == levels[0] + 1:
        return f"χ{levels[0] + 1}"
    return ""


def _spans_two_residues(system: System, sites: tuple[int, int, int, int]) -> bool:
    return bool(system.residue_index[sites[1]] != system.residue_index[sites[2]])


def _names_of_residue(system: System, site: int) -> set[str]:
    same = (system.residue_index == system.residue_index[site]) & (system.chain_index == system.chain_index[site])
    return {system.atom_names[other] for other in np.flatnonzero(same)}
