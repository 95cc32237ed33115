"""Protein structure files -> the backbone of their residues, model by model.

In: PDB or mmCIF, plain or .gz. Out: BackboneModels, N, CA and C in Å. Waters, ligands, caps and free amino acids are no
residues; a modified residue goes by its standard parent (gemmi's table); of alternative locations the one of highest occupancy
is read. Knows no Systems.
"""

from __future__ import annotations

import enum
import gzip
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dig_scale.errors import UserError
from dig_scale.importers import residues

if TYPE_CHECKING:
    import gemmi

ATOMS = ("N", "CA", "C")
NO_RESIDUES = residues.CAPS | residues.WATER | {"NH2"}

_PDB = (".pdb", ".ent")
_MMCIF = (".cif", ".mmcif", ".pdbx")


class Differences(enum.StrEnum):
    """What to do where files disagree on the name of a residue."""

    REFUSE = "refuse"
    AS_FIRST = "as-first"
    """Take the first file's name and say so in the origin."""


@dataclass(frozen=True)
class BackboneOptions:
    """What to read.

    chains: names of chains, in the order wanted (default: all with residues), or, in chains_of, by file name; leave_out:
    residue names to leave out, such as "UNK"; differences between the sequences of files; representations: what
    representations.represented takes.
    """

    chains: tuple[str, ...] = ()
    chains_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    differences: Differences = Differences.REFUSE
    representations: str | None = None


@dataclass(frozen=True, order=True)
class Place:
    """Where a residue stands: number of its chain in the order read, residue number, insertion code."""

    chain: int
    number: int
    insertion: str = ""


@dataclass(frozen=True)
class BackboneModel:
    """One conformation as read: names (parents of modified residues) by Place, atoms [N, 3, 3] Å (N, CA, C), and reports."""

    source: str
    places: tuple[Place, ...]
    names: tuple[str, ...]
    atoms: np.ndarray
    left_out: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


def read_models(path: Path, options: BackboneOptions | None = None) -> tuple[BackboneModel, ...]:
    """All models of a file; raises UserError naming the file and its line or residue."""
    chosen = options or BackboneOptions()
    structure = _structure(path)
    found = tuple(
        _model(path, f"{path.name}, model {number}" if len(structure) > 1 else path.name, model, chosen)
        for number, model in enumerate(structure, 1)
    )
    if not found or not any(model.places for model in found):
        raise UserError(f"{path}: no amino-acid residue with N, CA and C in it; expected a protein structure")
    return found


def parent_name(name: str) -> str | None:
    """The standard amino acid of a residue name: itself, of a protonation variant, or of a modification gemmi tabulates."""
    import gemmi

    if residues.standard_name(name) in residues.AMINO_ACIDS:
        return residues.standard_name(name)
    known = gemmi.find_tabulated_residue(name)
    return residues.THREE_LETTER.get(known.one_letter_code.upper()) if known.is_amino_acid() else None


def _text(path: Path) -> tuple[str, str]:
    """Content and format suffix of a file."""
    if not path.is_file():
        raise UserError(f"no file at {path}")
    zipped = path.suffix.lower() == ".gz"
    suffix = Path(path.stem).suffix.lower() if zipped else path.suffix.lower()
    if suffix not in _PDB + _MMCIF:
        raise UserError(f"{path}: no known format; expected a file ending in {', '.join(_PDB + _MMCIF)} (or .gz)")
    try:
        raw = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error
    if not raw.strip():
        raise UserError(f"{path}: the file is empty")
    return raw.decode("utf-8", errors="replace"), suffix


def _structure(path: Path) -> gemmi.Structure:
    import gemmi

    text, suffix = _text(path)
    try:
        if suffix in _PDB:
            _check_pdb_lines(path, text)
            return gemmi.read_pdb_string(text)
        blocks = [block for block in gemmi.cif.read_string(text) if block.find_values("_atom_site.Cartn_x")]
        if not blocks:
            raise UserError(f"{path}: no _atom_site records; expected an mmCIF file of a structure")
        return gemmi.make_structure_from_block(blocks[0])
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged or cut off: {error}") from error


def _check_pdb_lines(path: Path, text: str) -> None:
    """gemmi reads what is no number as 0; that, and an unfinished model or residue, must not pass unseen."""
    open_models, last, residue = 0, 0, ""
    atoms: set[str] = set()
    lines = text.rstrip().splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith(("ATOM  ", "HETATM")):
            check_coordinates(path, number, line)
            atoms = {*(atoms if residue == line[17:27] else ()), line[12:16].strip()}
            last, residue = number, line[17:27]
        open_models += line.startswith("MODEL ") - line.startswith("ENDMDL")
    if not last:
        raise UserError(f"{path}: holds no ATOM records; expected a PDB file of a structure")
    cut_residue = last == len(lines) and lines[-1].startswith("ATOM") and parent_name(residue[:3].strip())
    if open_models > 0 or (cut_residue and not set(ATOMS) <= atoms):
        raise UserError(f"{path}: line {last} ({residue}): the file is cut off here; get it whole")


def check_coordinates(path: Path, number: int, line: str) -> None:
    """Raises UserError where an ATOM or HETATM line of a PDB file (its `number`) has no three finite numbers for its place."""
    try:
        finite = len(line) >= 54 and math.isfinite(float(line[30:38]) + float(line[38:46]) + float(line[46:54]))
    except ValueError:
        finite = False
    if not finite:
        raise UserError(
            f"{path}: line {number} ({line[12:27].strip()}): coordinates {line[30:54]!r}, expected three finite numbers "
            f"in columns 31-54; the file is damaged or cut off"
        )


def _model(path: Path, source: str, model: gemmi.Model, options: BackboneOptions) -> BackboneModel:
    found: dict[Place, _Residue] = {}
    left_out: list[str] = []
    for chain_number, raw, label in _chain_residues(path, model, options):
        read = _residue(path, raw, label, options)
        if isinstance(read, str):
            left_out.append(f"{source}: {label} ({read})")
        elif read is not None:
            if raw.seqid.num is None:
                raise UserError(f"{path}: {label} has no residue number; number the file")
            place = Place(chain_number, raw.seqid.num, raw.seqid.icode.strip())
            other = found.get(place)
            if other is not None and not (read.alternative and other.alternative):
                raise UserError(f"{path}: {label} stands twice in its chain; renumber the file or choose chains")
            if other is None or read.occupancy > other.occupancy:
                found[place] = read
    return BackboneModel(
        source=source,
        places=tuple(found),
        names=tuple(residue.name for residue in found.values()),
        atoms=np.array([residue.atoms for residue in found.values()]).reshape(-1, 3, 3),
        left_out=tuple(left_out),
        replaced=tuple(residue.replaced for residue in found.values() if residue.replaced),
    )


@dataclass(frozen=True)
class _Residue:
    """One residue as read; alternative: whether it stands in the file in several versions."""

    name: str
    atoms: np.ndarray
    occupancy: float
    alternative: bool
    replaced: str


def _chain_residues(
    path: Path, model: gemmi.Model, options: BackboneOptions
) -> Iterator[tuple[int, gemmi.Residue, str]]:
    """(number of the chain in the order wanted, residue, label) of all residues of the chosen chains."""
    held = {chain.name: chain for chain in model}
    wanted = options.chains_of.get(path.name, options.chains)
    for name in wanted:
        if name not in held:
            raise UserError(f"{path}: no chain {name!r}; its chains are {', '.join(map(repr, held))}")
    number = 0
    for chain in [held[name] for name in wanted] if wanted else list(model):
        for residue in chain:
            yield number, residue, " ".join(f"{chain.name} {residue.name} {residue.seqid}".split())
        number += 1 if wanted or any(parent_name(residue.name) for residue in chain) else 0


def _residue(path: Path, raw: gemmi.Residue, label: str, options: BackboneOptions) -> _Residue | str | None:
    """The residue, why it is left out, or None where it is no residue of a protein."""
    if raw.name in options.leave_out:
        return "left out as asked"
    if raw.name in NO_RESIDUES:
        return None
    parent, chosen = parent_name(raw.name), _backbone_atoms(raw)
    missing = [name for name in ATOMS if name not in chosen]
    if missing:
        return f"no {', '.join(missing)}" if parent else None
    if parent is None:
        raise UserError(
            f"{path}: {label} has a backbone, but no standard amino acid is known as its parent; leave {raw.name} out, "
            f"or rename it in the file"
        )
    versions = [(atom.name, atom.altloc) for atom in raw if atom.name in ATOMS]
    if len(set(versions)) < len(versions):
        raise UserError(f"{path}: {label} stands twice in its chain; renumber the file or choose chains")
    if raw.het_flag == "H" and raw.name in residues.AMINO_ACIDS:
        return "a free amino acid, HETATM"
    atoms = np.array([chosen[name].pos.tolist() for name in ATOMS])
    if not np.isfinite(atoms).all():
        raise UserError(f"{path}: {label}: coordinates are not finite; the file is damaged")
    same = parent == residues.standard_name(raw.name)
    alternative = any(atom.has_altloc() for atom in raw)
    return _Residue(parent, atoms, chosen["CA"].occ, alternative, "" if same else f"{label} -> {parent}")


def _backbone_atoms(residue: gemmi.Residue) -> dict[str, gemmi.Atom]:
    """N, CA and C as far as they are there, in the version of highest occupancy."""
    atoms = [atom for atom in residue if atom.name in ATOMS]
    occupancy: dict[str, float] = {}
    for atom in atoms:
        if atom.has_altloc():
            occupancy[atom.altloc] = occupancy.get(atom.altloc, 0.0) + atom.occ
    best = max(occupancy, key=lambda letter: occupancy[letter], default="")
    ranked = sorted(atoms, key=lambda atom: (atom.altloc == best, atom.occ))
    return {atom.name: atom for atom in ranked}
