"""Periodic structures as the files that other tools read: extended XYZ for slabs and crystals, CIF for crystals.

In: a System and its Frames, whose cell is the frame's own or the System's. Out: one file of all structures, whole or absent,
atoms in the System's order. Roles are written as the tags of the Open Catalyst project (0 below the surface, 1 surface,
2 adsorbate) and fixed sites as ASE's `move_mask`, so that ASE reads them back as tags and as a constraint. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from dig_shards.durable import replace_durably

from dig_scale.errors import UserError
from dig_scale.system import Frames, SiteRole, System

TAGS: Mapping[int, int] = {SiteRole.SUBSURFACE: 0, SiteRole.SURFACE: 1, SiteRole.ADSORBATE: 2}
"""Tag of a site by its role."""


def write_extended_xyz(system: System, frames: Frames, path: Path) -> Path:
    """Write every structure with cell, periodic directions, energy (eV) and labels; tags and fixed sites where there are any.

    Raises UserError where neither the frames nor the System have a cell.
    """
    import gemmi

    symbols = [str(gemmi.Element(int(z)).name) for z in system.elements]
    properties, columns = _site_columns(system)
    energy = {} if frames.energy is None else {"energy": frames.energy}
    values = energy | dict(frames.labels)
    header = f'Properties=species:S:1:pos:R:3{properties} pbc="{" ".join("FT"[p] for p in system.periodic)}"'
    blocks = []
    for k, cell in enumerate(cells_of(system, frames)):
        known = "".join(f' "{name}"={float(column[k]):.12g}' for name, column in values.items())
        lattice = " ".join(f"{x:.10g}" for x in cell.ravel())
        sites = (
            f"{symbol} {x:.8f} {y:.8f} {z:.8f}{more}"
            for symbol, (x, y, z), more in zip(symbols, frames.positions[k], columns, strict=True)
        )
        blocks.append("\n".join([str(system.n_sites), f'Lattice="{lattice}" {header}{known}', *sites, ""]))
    return _written(path, "".join(blocks))


def write_cif(system: System, frames: Frames, path: Path) -> Path:
    """Write every structure as a block of space group P1 of one CIF file; raises UserError where there is no cell."""
    import gemmi

    document = gemmi.cif.Document()
    cells = cells_of(system, frames)
    places = np.asarray(frames.positions, np.float64) @ np.linalg.inv(cells)
    for number, (structure, cell) in enumerate(zip(places - np.floor(places), cells, strict=True)):
        small = gemmi.SmallStructure()
        small.name = f"{system.name}_{number}"
        small.cell = gemmi.UnitCell(*_lengths_and_angles(cell))
        small.spacegroup_hm = "P 1"
        for k, place in enumerate(structure):
            site = gemmi.SmallStructure.Site()
            site.label, site.type_symbol = f"{system.atom_names[k]}{k}", system.atom_names[k]
            site.element, site.fract, site.occ = gemmi.Element(int(system.elements[k])), gemmi.Fractional(*place), 1.0
            small.add_site(site)
        block = small.make_cif_block()
        block.init_loop("_symmetry_equiv_pos_", ["as_xyz"]).add_row(["'x, y, z'"])
        document.add_copied_block(block)
    return _written(path, document.as_string())


def cells_of(system: System, frames: Frames) -> np.ndarray:
    """Cells [F, 3, 3] Å of frames: their own, else the System's; raises UserError where there are none."""
    if frames.cell is not None:
        return np.asarray(frames.cell, np.float64)
    if system.cell is None:
        raise UserError(
            f"structures of {system.name!r} have no cell; expected one per frame, or one of the system, in Å"
        )
    return np.broadcast_to(system.cell, (frames.n_frames, 3, 3))


def _site_columns(system: System) -> tuple[str, list[str]]:
    """Declarations and, per site, the columns after its position: tag and whether it moves, where the system has such."""
    declared, columns = "", [""] * system.n_sites
    if np.isin(system.roles, list(TAGS)).any():
        declared += ":tags:I:1"
        columns = [f"{text} {TAGS.get(int(role), 0)}" for text, role in zip(columns, system.roles, strict=True)]
    if not system.mobile.all():
        declared += ":move_mask:L:1"
        columns = [f"{text} {'FT'[int(moves)]}" for text, moves in zip(columns, system.mobile, strict=True)]
    return declared, columns


def _lengths_and_angles(cell: np.ndarray) -> Sequence[float]:
    lengths = np.linalg.norm(cell, axis=1)
    unit = cell / lengths[:, None]
    cosines = np.clip([unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1]], -1, 1)
    return [*lengths.tolist(), *np.degrees(np.arccos(cosines)).tolist()]


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, text.encode())
    return path
