"""Crystal structures -> one System per composition, with the structures as its Frames.

In: CIF, extended XYZ and POSCAR files, and tables (CSV) with a column `cif` whose other numeric columns are labels. Out:
Systems of kind CRYSTAL and their Frames, each structure in its Niggli-reduced cell (spglib), turned so that the cell is
symmetric, sites wrapped and sorted by atomic number; repeats are removed before anything can be split. Atoms and cell come
from gemmi (CIF, symmetry expanded) or ASE. A structure that cannot be used is rejected with its reason; a file that cannot
be read is an error. Labels keep the unit of their column, and are NaN where a structure has none; `energy_per_atom`, in eV,
also becomes the energy of the cell.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dig_shards.durable import replace_durably

from dig_scale.errors import UserError
from dig_scale.geometry import lattice
from dig_scale.importers.crystal_duplicates import Shape, Similarity, first_of_each_group
from dig_scale.importers.stores import write_store
from dig_scale.system import SMALLEST_CELL, Frames, System, SystemKind

REPORT_NAME = "import.json"
ENERGY_PER_ATOM = "energy_per_atom"
_IDENTIFIERS = ("material_id", "mp_id", "id", "")
_NO_LABELS = (*_IDENTIFIERS, "cif", "formula", "pretty_formula", "index", "spacegroup", "spacegroup.number")
_RESIDUE = "CRY"
_WRITERS = 8


@dataclass(frozen=True)
class CrystalOptions:
    """How crystals are imported.

    labels: columns to keep (None: all numeric ones); shortest_distance in Å, below which two sites are a mistake;
    similarity: what counts as a repeat, None to keep repeats; workers: processes for the comparison.
    """

    labels: tuple[str, ...] | None = None
    shortest_distance: float = 0.5
    similarity: Similarity | None = field(default_factory=Similarity)
    workers: int = 1
    chunk_frames: int = 250


@dataclass(frozen=True)
class Crystal:
    """One structure: elements [N], positions [N, 3] Å, cell [3, 3] Å (rows), the labels that it has, energy of the cell in eV
    if known; `source` is its file and row.
    """

    elements: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    labels: Mapping[str, float]
    energy: float | None
    source: str


@dataclass(frozen=True)
class Rejected:
    """A structure that was not taken, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class CrystalReport:
    """What an import did; counts are of structures, stores are relative to the output folder.

    volume_per_site (Å³, mean) and lattice_spread (standard deviation of a coordinate of the cells' logarithms about cubes
    of that volume) are what a recipe's diffusion needs to know of the data.
    """

    read: int
    kept: int
    duplicates: int
    rejected: tuple[Rejected, ...]
    compositions: tuple[str, ...]
    labels: tuple[str, ...]
    volume_per_site: float
    lattice_spread: float
    stores: tuple[str, ...] = ()


class _Unusable(ValueError):
    """Why one structure cannot be taken."""


def import_crystals(paths: Sequence[Path], out: Path, options: CrystalOptions | None = None) -> CrystalReport:
    """Write one store per composition, OUT/<formula>/<formula>.zarr, and OUT/import.json; returns the report.

    A store that is complete with the same content is left as it is; a half-written one is written again. Raises UserError
    for a file that cannot be read, an import without a single usable structure, or a folder that holds another one.
    """
    options = options or CrystalOptions()
    groups, report = load_crystals(paths, options)
    origin = {
        "engine": "imported",
        "source": sorted(path.name for path in paths),
        "first_frame_ps": 0.0,
        "frame_spacing_ps": 1.0,
    }
    # flushing to disk is all that many small stores cost, and the disk does several at a time
    with ThreadPoolExecutor(_WRITERS) as pool:
        stores = list(pool.map(lambda pair: _write_group(pair, out, origin, options), groups))
    report = replace(report, stores=tuple(store.relative_to(out).as_posix() for store in stores))
    replace_durably(out / REPORT_NAME, json.dumps(asdict(report), indent=1).encode())
    return report


def _write_group(group: tuple[System, Frames], out: Path, origin: dict[str, Any], options: CrystalOptions) -> Path:
    system, frames = group
    return write_store(out / system.name / f"{system.name}.zarr", system, frames, origin, options.chunk_frames)


def load_crystals(
    paths: Sequence[Path], options: CrystalOptions | None = None
) -> tuple[list[tuple[System, Frames]], CrystalReport]:
    """Systems with their Frames, sorted by size and formula, and the report; raises UserError as import_crystals does."""
    options = options or CrystalOptions()
    if not paths:
        raise UserError("no crystal file given: name at least one CIF, extended XYZ, POSCAR or CSV file")
    crystals: list[Crystal] = []
    rejected: list[Rejected] = []
    for source, make in (row for path in paths for row in _rows(path, options)):
        try:
            crystals.append(canonical(_checked(make(), options)))
        except (_Unusable, UserError) as error:
            rejected.append(Rejected(source, str(error)))
    if not crystals:
        first = f"; the first, {rejected[0].source}: {rejected[0].reason}" if rejected else ""
        raise UserError(f"{', '.join(map(str, paths))}: no usable crystal structure{first}")
    kept = _without_repeats(crystals, options)
    _require_labels(paths, kept, options)
    groups = grouped(kept)
    volume, spread = cell_statistics(kept)
    report = CrystalReport(
        read=len(crystals) + len(rejected),
        kept=len(kept),
        duplicates=len(crystals) - len(kept),
        rejected=tuple(rejected),
        compositions=tuple(system.name for system, _ in groups),
        labels=tuple(groups[0][1].labels),
        volume_per_site=volume,
        lattice_spread=spread,
    )
    return groups, report


def _require_labels(paths: Sequence[Path], crystals: Sequence[Crystal], options: CrystalOptions) -> None:
    known = {name for one in crystals for name in one.labels}
    missing = [name for name in options.labels or () if label_name(name) not in known]
    if missing:
        listed = ", ".join(sorted(known)) or "none"
        raise UserError(
            f"{', '.join(map(str, paths))}: no structure has a number {missing[0]!r}; labels there: {listed}"
        )


def canonical(crystal: Crystal) -> Crystal:
    """The same crystal in its Niggli-reduced cell, turned to symmetric form, wrapped, sites sorted by atomic number."""
    reduced = torch.from_numpy(lattice.niggli_reduced(crystal.cell))
    order = np.argsort(crystal.elements, kind="stable")
    places = lattice.wrap(lattice.fractional(torch.from_numpy(crystal.positions[order]), reduced))
    cell = lattice.cell_to_symmetric(reduced)
    positions = lattice.cartesian(places, cell).numpy()
    return replace(crystal, elements=crystal.elements[order], positions=positions, cell=cell.numpy())


def grouped(crystals: Sequence[Crystal]) -> list[tuple[System, Frames]]:
    """Canonical crystals by composition; Frames carry the labels that some have, NaN elsewhere, and the energy if all have."""
    names = list(dict.fromkeys(name for one in crystals for name in one.labels))
    with_energy = all(one.energy is not None for one in crystals)
    systems = []
    for members in _by_composition(crystals):
        frames = Frames(
            positions=np.stack([one.positions for one in members]),
            time_ps=np.arange(len(members), dtype=float),
            energy=np.array([one.energy for one in members], float) if with_energy else None,
            cell=np.stack([one.cell for one in members]),
            labels={name: np.array([one.labels.get(name, math.nan) for one in members]) for name in names},
        )
        systems.append((crystal_system(members[0].elements), frames))
    return sorted(systems, key=lambda pair: (pair[0].n_sites, pair[0].name))


def crystal_system(elements: np.ndarray) -> System:
    """The System of a composition: elements [N] sorted by atomic number; cell and places are its Frames' affair."""
    n, symbols = len(elements), [_symbol(int(z)) for z in elements]
    formula = "".join(f"{s}{symbols.count(s) if symbols.count(s) > 1 else ''}" for s in dict.fromkeys(symbols))
    return System(
        name=formula,
        kind=SystemKind.CRYSTAL,
        elements=np.asarray(elements),
        atom_names=tuple(symbols),
        residue_names=(_RESIDUE,) * n,
        residue_index=np.zeros(n, np.int64),
        chain_index=np.zeros(n, np.int64),
        bonds=np.zeros((0, 2), np.int64),
        bond_orders=np.zeros(0, np.int64),
        formal_charges=np.zeros(n, np.int64),
        stereocentres=np.zeros((0, 4), np.int64),
        mobile=np.ones(n, bool),
        reference_positions=np.zeros((n, 3)),
        periodic=(True, True, True),
        origin={"source": "composition"},
    )


def cell_statistics(crystals: Sequence[Crystal]) -> tuple[float, float]:
    """(mean volume per site in Å³, root-mean-square coordinate of log cells about cubes of that volume)."""
    cells = torch.from_numpy(np.stack([one.cell for one in crystals]))
    sites = torch.tensor([len(one.elements) for one in crystals], dtype=torch.float64)
    volume = float((torch.det(cells) / sites).mean())
    cubes = torch.eye(3, dtype=torch.float64) * ((sites * volume) ** (1 / 3))[:, None, None]
    spread = float(((lattice.log_cell(cells) - lattice.log_cell(cubes)) ** 2).mean().sqrt())
    return volume, spread


def _without_repeats(crystals: Sequence[Crystal], options: CrystalOptions) -> list[Crystal]:
    if options.similarity is None:
        return list(crystals)
    groups = _by_composition(crystals)
    found = first_of_each_group(
        [[shape_of(one) for one in group] for group in groups], options.similarity, options.workers
    )
    return [
        one
        for group, firsts in zip(groups, found, strict=True)
        for number, (one, first) in enumerate(zip(group, firsts, strict=True))
        if number == first
    ]


def shape_of(crystal: Crystal) -> Shape:
    """What the comparison of structures sees."""
    places = np.linalg.solve(crystal.cell.T, crystal.positions.T).T
    return Shape(crystal.elements, places, crystal.cell, crystal.energy)


def _by_composition(crystals: Sequence[Crystal]) -> list[list[Crystal]]:
    groups: dict[tuple[int, ...], list[Crystal]] = {}
    for crystal in crystals:
        groups.setdefault(tuple(crystal.elements.tolist()), []).append(crystal)
    return list(groups.values())


def _checked(crystal: Crystal, options: CrystalOptions) -> Crystal:
    if not len(crystal.elements):
        raise _Unusable("no atoms")
    if not np.isfinite(crystal.positions).all() or not np.isfinite(crystal.cell).all():
        raise _Unusable("positions or cell are not finite")
    if (crystal.elements < 1).any():
        raise _Unusable("a site has no known element")
    volume = abs(np.linalg.det(crystal.cell))
    if volume < SMALLEST_CELL:
        raise _Unusable(f"the cell has a volume of {volume:.3g} Å³, expected at least {SMALLEST_CELL:g}")
    shortest = _shortest_below(crystal, options.shortest_distance)
    if shortest is not None:
        limit = options.shortest_distance
        raise _Unusable(f"two sites are {shortest:.3f} Å apart, expected at least {limit:g}; is an atom listed twice?")
    return crystal


def _shortest_below(crystal: Crystal, limit: float) -> float | None:
    cell = torch.from_numpy(crystal.cell)[None]
    places = lattice.fractional(torch.from_numpy(crystal.positions)[None], cell)
    found = lattice.periodic_edges(places, cell, torch.ones(places.shape[:2], dtype=torch.bool), limit).distances
    return float(found.min()) if len(found) else None


_Row = tuple[str, Callable[[], Crystal]]
"""Where a structure stands, and what reads it; reading raises _Unusable."""


def _rows(path: Path, options: CrystalOptions) -> Iterator[_Row]:
    if not path.is_file():
        raise UserError(f"no file at {path}")
    name, suffix = path.name.upper(), path.suffix.lower()
    if suffix == ".csv":
        yield from _table_rows(path, options)
    elif suffix == ".cif":
        yield from _cif_rows(path)
    elif suffix in (".xyz", ".extxyz"):
        yield from _ase_rows(path, "extxyz", options)
    elif suffix in (".vasp", ".poscar") or name.startswith(("POSCAR", "CONTCAR")):
        yield from _ase_rows(path, "vasp", options)
    else:
        raise UserError(f"{path}: no known crystal format; expected .cif, .xyz, .extxyz, .vasp, POSCAR or .csv")


def _table_rows(path: Path, options: CrystalOptions) -> Iterator[_Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV table: {error}") from error
    columns = list(table[0]) if table else []
    if "cif" not in columns:
        raise UserError(f"{path}: no column 'cif'; it has {', '.join(columns) or 'no rows'}")
    names = _label_columns(path, table, options)
    identifier = next((name for name in _IDENTIFIERS if name in columns), None)
    for number, row in enumerate(table, start=1):
        mark = f" ({row[identifier]})" if identifier is not None else ""
        source = f"{path.name} row {number}{mark}"
        yield source, lambda row=row, source=source: _from_table(row, names, source)  # type: ignore[misc]


def _label_columns(path: Path, table: Sequence[Mapping[str, str]], options: CrystalOptions) -> list[str]:
    columns = list(table[0])
    if options.labels is None:
        candidates = [name for name in columns if name not in _NO_LABELS]
        return [name for name in candidates if all(not row[name] or _number(row[name]) is not None for row in table)]
    missing = [name for name in options.labels if name not in columns]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; it has {', '.join(columns)}")
    return list(options.labels)


def _from_table(row: Mapping[str, str], names: Sequence[str], source: str) -> Crystal:
    import gemmi

    labels: dict[str, float] = {}
    for name in names:
        value = math.nan if not (row[name] or "").strip() else _number(row[name])
        if value is None or math.isinf(value):
            raise _Unusable(f"{name} is {row[name]!r}, expected a finite number, or nothing where it is not known")
        if not math.isnan(value):
            labels[label_name(name)] = value
    try:
        blocks = list(gemmi.cif.read_string(row["cif"] or ""))
    except (ValueError, RuntimeError) as error:
        raise _Unusable(f"its CIF cannot be read: {error}") from error
    if len(blocks) != 1:
        raise _Unusable(f"its CIF holds {len(blocks)} blocks, expected 1")
    return _with_labels(_from_block(blocks[0], source), labels)


def _cif_rows(path: Path) -> Iterator[_Row]:
    import gemmi

    try:
        blocks = list(gemmi.cif.read(str(path)))
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a CIF file: {error}") from error
    for block in blocks:
        source = f"{path.name} block {block.name}"
        yield source, lambda block=block, source=source: _from_block(block, source)  # type: ignore[misc]


def _from_block(block: Any, source: str) -> Crystal:
    import gemmi

    small = gemmi.make_small_structure_from_block(block)
    if not small.cell.is_crystal():
        raise _Unusable("no unit cell")
    disordered = [site for site in small.sites if abs(site.occ - 1) > 1e-3]
    if disordered:
        raise _Unusable(f"site {disordered[0].label} has occupancy {disordered[0].occ:g}; ordered structures only")
    sites = small.get_all_unit_cell_sites()
    cell = np.array(small.cell.orth.mat.tolist()).T
    places = np.array([site.fract.tolist() for site in sites]).reshape(-1, 3)
    elements = np.array([site.element.atomic_number for site in sites], np.int64)
    return Crystal(elements, places @ cell, cell, {}, None, source)


def _ase_rows(path: Path, file_format: str, options: CrystalOptions) -> Iterator[_Row]:
    import ase.io

    try:
        structures = ase.io.read(str(path), index=":", format=file_format)
    except Exception as error:  # ASE's readers raise whatever their parsing meets; the file is named in one line
        raise UserError(f"{path}: ASE cannot read it as {file_format}: {error}") from error
    for number, atoms in enumerate(structures, start=1):
        source = f"{path.name} structure {number}"
        yield source, lambda atoms=atoms, source=source: _from_ase(atoms, options, source)  # type: ignore[misc]


def _from_ase(atoms: Any, options: CrystalOptions, source: str) -> Crystal:
    if not atoms.pbc.all():
        raise _Unusable(f"periodic in {int(atoms.pbc.sum())} directions, expected 3")
    numbers = {key: float(value) for key, value in atoms.info.items() if isinstance(value, int | float | np.number)}
    wanted = tuple(numbers) if options.labels is None else options.labels
    infinite = [name for name in wanted if math.isinf(numbers.get(name, math.nan))]
    if infinite:
        raise _Unusable(
            f"{infinite[0]} is {numbers[infinite[0]]}, expected a finite number, or NaN where it is not known"
        )
    known = [name for name in wanted if not math.isnan(numbers.get(name, math.nan))]
    energy = atoms.calc.results.get("energy") if atoms.calc is not None else None
    crystal = Crystal(atoms.numbers.astype(np.int64), atoms.positions, atoms.cell.array, {}, None, source)
    crystal = _with_labels(crystal, {label_name(name): numbers[name] for name in known})
    return crystal if energy is None else replace(crystal, energy=float(energy))


def _with_labels(crystal: Crystal, labels: Mapping[str, float]) -> Crystal:
    per_atom = labels.get(ENERGY_PER_ATOM)
    energy = None if per_atom is None else per_atom * len(crystal.elements)
    return replace(crystal, labels=labels, energy=energy)


def label_name(column: str) -> str:
    """A column's name as a label: small letters, digits and underscores, as in 'band_gap_ev' for 'Band gap (eV)'."""
    return re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _symbol(number: int) -> str:
    import gemmi

    return str(gemmi.Element(number).name)
