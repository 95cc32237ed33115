"""What a slab's atoms are: layers along the surface normal, roles from tags, constraints or layers, whole adsorbates.

In: a Snapshot, one structure of a file. Out: roles [N] of SiteRole and where they come from, the structure with its
vacuum at the top of the cell, the bonds inside adsorbates. Lengths in Å. Knows no file formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dig_scale.errors import UserError
from dig_scale.system import SiteRole

_LAYER_GAP = 0.6
_SMALLEST_VACUUM = 4.0
_BOND_STRETCH = 1.25
_CELL_DIGITS = 3


@dataclass(frozen=True)
class Snapshot:
    """One structure: elements [N], positions [N, 3] Å, cell [3, 3] Å, its place in words, and what else the file says.

    tags [N]; fixed [N] by constraints; energy in eV; forces [N, 3] eV/Å; initial [N, 3] Å of a relaxation; group: what it
    says of the surface's identity.
    """

    elements: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    place: str
    tags: np.ndarray | None = None
    fixed: np.ndarray | None = None
    energy: float | None = None
    forces: np.ndarray | None = None
    initial: np.ndarray | None = None
    group: str = ""
    tags_are_oc20: bool = False

    def identity(self) -> tuple[str, bytes, bytes]:
        """Equal for structures of one surface: group, elements, cell to 1e-3 Å."""
        # adding zero makes -0 and 0 the same bytes
        return self.group, self.elements.tobytes(), (np.round(self.cell, _CELL_DIGITS) + 0.0).tobytes()


@dataclass(frozen=True)
class Roles:
    """SiteRole [N] of every atom, and what they were told by."""

    values: np.ndarray
    source: str


def heights(positions: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Heights [..., N] Å of positions [..., N, 3] along the surface normal, which points to the side of the third vector."""
    return np.asarray(positions @ surface_normal(cell))


def surface_normal(cell: np.ndarray) -> np.ndarray:
    """Unit vector [3] normal to the first two cell vectors, to the side of the third."""
    normal = np.cross(cell[0], cell[1])
    return np.asarray(normal / np.linalg.norm(normal) * np.sign(normal @ cell[2]))


def layers(height: np.ndarray) -> np.ndarray:
    """Layer [N] of every atom, 0 at the bottom: a gap of more than 0.6 Å in heights [N] begins another."""
    order = np.argsort(height, kind="stable")
    number = np.cumsum(np.r_[0, np.diff(height[order]) > _LAYER_GAP])
    result = np.empty(len(height), np.int64)
    result[order] = number
    return result


def with_vacuum_on_top(snapshot: Snapshot) -> Snapshot:
    """The snapshot with its atoms wrapped along the third vector so that its largest gap is the one at the top.

    Raises UserError when there is no gap of 4 Å, as in bulk crystals.
    """
    fractional = snapshot.positions @ np.linalg.inv(snapshot.cell)
    wrapped = fractional[:, 2] - np.floor(fractional[:, 2])
    order = np.sort(wrapped)
    gaps = np.diff(np.r_[order, order[0] + 1])
    largest = int(np.argmax(gaps))
    thickness = abs(float(snapshot.cell[2] @ surface_normal(snapshot.cell)))
    if gaps[largest] * thickness < _SMALLEST_VACUUM:
        raise UserError(
            f"{snapshot.place}: no vacuum along the third cell vector (largest gap {gaps[largest] * thickness:.1f} Å, "
            f"expected {_SMALLEST_VACUUM:g} Å); a surface is periodic in the first two directions only"
        )
    bottom = order[(largest + 1) % len(order)]
    moved = np.where(wrapped < bottom, wrapped + 1, wrapped)
    cells = np.round(moved - fractional[:, 2])
    if len(set(cells.tolist())) == 1:
        return snapshot
    return replace(snapshot, positions=snapshot.positions + cells[:, None] * snapshot.cell[2])


def roles_of(snapshot: Snapshot, meaning: str, fixed_layers: int | None, adsorbate: Sequence[int] | None) -> Roles:
    """Roles by tags of this meaning ("auto", "oc20", "layers", "none"), else by constraints and layers; raises UserError."""
    tags = None if meaning == "none" else snapshot.tags
    if tags is None:
        guest, told = _guest_without_tags(snapshot, fixed_layers, adsorbate)
        return _with_fixed(snapshot, guest, fixed_layers, told)
    kind = _tag_kind(snapshot, tags) if meaning == "auto" else meaning
    if kind == "layers":
        return _with_fixed(snapshot, tags == 0, fixed_layers, "tags of layers")
    unknown = np.flatnonzero(~np.isin(tags, (0, 1, 2)))
    if len(unknown):
        raise UserError(f"{snapshot.place}: atom {unknown[0]} has tag {tags[unknown[0]]}, expected 0, 1 or 2")
    known = np.array([SiteRole.SUBSURFACE, SiteRole.SURFACE, SiteRole.ADSORBATE], np.int64)
    return Roles(known[tags], "tags 0, 1, 2")


def _tag_kind(snapshot: Snapshot, tags: np.ndarray) -> str:
    if tags.max() > 2:
        return "layers"
    height = heights(snapshot.positions, snapshot.cell)
    mean = {int(tag): float(height[tags == tag].mean()) for tag in np.unique(tags)}
    if 2 in mean:
        return "oc20" if mean[2] > mean.get(1, mean.get(0, mean[2])) else "layers"
    return "oc20" if mean.get(0, np.inf) < mean[1] else "layers"


def _with_fixed(snapshot: Snapshot, guest: np.ndarray, fixed_layers: int | None, told: str) -> Roles:
    fixed, how = _fixed(snapshot, ~guest, fixed_layers)
    values = np.where(fixed, int(SiteRole.SUBSURFACE), int(SiteRole.SURFACE))
    return Roles(np.where(guest, int(SiteRole.ADSORBATE), values), f"{told}; {how}")


def _fixed(snapshot: Snapshot, slab: np.ndarray, fixed_layers: int | None) -> tuple[np.ndarray, str]:
    """Atoms [N] of the slab that do not move, and by what it is known."""
    if fixed_layers is None and snapshot.fixed is not None:
        return snapshot.fixed & slab, "fixed by constraints"
    number = np.full(len(slab), np.iinfo(np.int64).max)
    number[slab] = layers(heights(snapshot.positions, snapshot.cell)[slab])
    total = int(number[slab].max()) + 1
    if fixed_layers is not None and fixed_layers > total:
        raise UserError(f"{snapshot.place}: fixed_layers {fixed_layers}, but the slab has {total} layers")
    count = total // 2 if fixed_layers is None else fixed_layers
    return number < count, f"the lower {count} of {total} layers fixed"


def _guest_without_tags(
    snapshot: Snapshot, fixed_layers: int | None, adsorbate: Sequence[int] | None
) -> tuple[np.ndarray, str]:
    """Adsorbate atoms [N]: those given, else those of elements that the fixed part lacks, above the slab's top layer."""
    guest = np.zeros(len(snapshot.elements), bool)
    if adsorbate is not None:
        if any(not 0 <= index < len(guest) for index in adsorbate):
            raise UserError(f"{snapshot.place}: adsorbate atoms {list(adsorbate)}, but it has {len(guest)} atoms")
        guest[list(adsorbate)] = True
        return guest, "adsorbate as given"
    fixed, _ = _fixed(snapshot, ~guest, fixed_layers)
    strange = ~np.isin(snapshot.elements, snapshot.elements[fixed]) if fixed.any() else guest
    height = heights(snapshot.positions, snapshot.cell)
    top = height[~strange].max()
    guest = strange & (height > top - _LAYER_GAP)
    if not guest.any():
        raise UserError(
            f"{snapshot.place}: no tags, and no atoms above the slab of an element that it lacks; give tags 0, 1, 2, or say "
            f"which atoms are the adsorbate (none for a clean slab)"
        )
    return guest, "no tags: adsorbate by elements above the slab"


def whole_adsorbates(snapshot: Snapshot, guest: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions [N, 3] with adsorbates not cut by walls, their bonds [E, 2], and the part [N] each atom is of (0: slab)."""
    positions, part = np.array(snapshot.positions, float), np.zeros(len(guest), np.int64)
    members = np.flatnonzero(guest)
    bonds = _bonds(snapshot, members)
    neighbours: dict[int, list[tuple[int, np.ndarray]]] = {int(i): [] for i in members}
    for i, j, vector in bonds:
        neighbours[i].append((j, vector))
        neighbours[j].append((i, -vector))
    for start in members:
        if part[start]:
            continue
        part[start] = part.max() + 1
        frontier = [int(start)]
        while frontier:
            i = frontier.pop()
            for j, vector in neighbours[i]:
                if not part[j]:
                    part[j], positions[j] = part[start], positions[i] + vector
                    frontier.append(j)
    pairs = np.array(sorted({(i, j) for i, j, _ in bonds}), np.int64).reshape(-1, 2)
    return positions, pairs, part


def _bonds(snapshot: Snapshot, members: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(i, j, vector from i to the nearest image of j) of adsorbate atoms within 1.25 times their covalent radii."""
    from ase.data import covalent_radii

    steps = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 2, [0], indexing="ij"), axis=-1).reshape(-1, 3)
    found = []
    for row, i in enumerate(members):
        for j in members[row + 1 :]:
            images = snapshot.positions[j] - snapshot.positions[i] + steps @ snapshot.cell
            length = np.linalg.norm(images, axis=1)
            limit = _BOND_STRETCH * covalent_radii[snapshot.elements[[i, j]]].sum()
            if length.min() < limit:
                found.append((int(i), int(j), images[np.argmin(length)]))
    return found
