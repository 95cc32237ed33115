"""System -> Context: the static features of each kind of system. One function per kind, one output type.

Graphormer's encodings (Ying et al. 2021): element and degree (centrality), shortest-path length and bond order per pair;
a hashed environment code that tells atoms of different surroundings apart; and for pairs one or two bonds apart the
distance in the reference geometry, since bond lengths and angles hardly vary. Nothing here depends on a conformation.

Anchors, where the noise of a site reverts to, and extents, how far the site strays from there: a free molecule has one
extent about its centre of mass; fixed atoms, pockets and slabs are anchored at their reference positions, and a ligand
at the centroid of its pocket, so that nothing of its pose is told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from dig_scale.batch import Context
from dig_scale.config import Model
from dig_scale.errors import UserError
from dig_scale.system import SiteRole, System, SystemKind

ENVIRONMENT_CODES = 1024
"""Buckets of the environment hash."""
ENVIRONMENT_RADIUS = 4
"""Bonds that an environment code looks out."""
UNREACHABLE = 510
"""Path length of pairs in different molecules, as in DiG."""
ACROSS = 6
"""Bond-order code of pairs of a ligand's and a pocket's site."""
CHAIN_STEP, CHAIN_TWO_STEPS = 3.8, 6.0
"""Å; distance of C-alpha atoms of neighbouring residues, and typical distance of next neighbours."""
EXTENTS: Mapping[int, float] = {
    SiteRole.SUBSURFACE: 0.2,
    SiteRole.SURFACE: 0.2,
    SiteRole.ADSORBATE: 2.0,
    SiteRole.POCKET: 0.5,
}
"""Å; how far anchored sites stray, per coordinate."""
LIGAND_OFFSET = 2.5
"""Å; distance of a ligand's centre from its pocket's, per coordinate."""
_FEATURES_OF_OTHERS = ("site_features", "pair_features")
_RESIDUES = (
    *("ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE"),
    *("LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL"),
)


def featurise(system: System) -> Context:
    """Context of one system (b = 1). Raises UserError for a kind without features."""
    if system.kind not in FEATURES:
        known = ", ".join(FEATURES)
        raise UserError(
            f"system {system.name!r}: no features for systems of kind {system.kind!r}; known kinds: {known}"
        )
    return FEATURES[system.kind](system)


def molecule(system: System) -> Context:
    """Atoms or beads: a free molecule, one with fixed atoms, or a ligand in a pocket."""
    anchor, extent, free = _anchors(system)
    return atomistic(system, anchor, extent, free)


def catalyst(system: System) -> Context:
    """Slab and adsorbate about their initial structure, with the cell."""
    extent = np.array([EXTENTS.get(int(role), 0.2) for role in system.roles])
    return atomistic(system, system.reference_positions, extent, np.zeros(1, bool))


def crystal(system: System) -> Context:
    """The atoms of a composition; their cell is part of the state."""
    _require_mobile(system)
    none = np.zeros((system.n_sites, 3))
    return atomistic(system, none, np.ones(system.n_sites), np.zeros(1, bool))


def protein(system: System) -> Context:
    """Residues: type and place along the chain, neighbours at the distance of linked C-alpha atoms."""
    _require_mobile(system)
    n = system.n_sites
    apart = np.abs(system.residue_index[:, None] - system.residue_index[None])
    lengths = np.where(system.chain_index[:, None] == system.chain_index[None], apart, UNREACHABLE)
    linked = path_lengths(n, system.bonds)
    segment = np.clip(np.where((linked <= 2) & (linked == lengths), lengths, np.maximum(lengths, 3)), 0, 4)
    segment[np.diag_indices(n)] = 0
    reference = np.select([segment == 1, segment == 2], [CHAIN_STEP, CHAIN_TWO_STEPS], 0.0)
    radius = 2.2 * n**0.38  # radius of gyration of folded chains, Å (Flory exponent of compact proteins)
    context = atomistic(system, np.zeros((n, 3)), np.full(n, radius / 3**0.5), np.ones(1, bool))
    types = np.array([_RESIDUES.index(name) + 1 if name in _RESIDUES else 21 for name in system.residue_names])
    changed = {"element": types, "environment": _sequence_codes(system), "place": system.residue_index + 1}
    pairs = {"pair_segment": segment, "path_length": lengths}
    long = {key: torch.as_tensor(value, dtype=torch.long)[None] for key, value in (changed | pairs).items()}
    distances = torch.as_tensor(reference, dtype=torch.float32)[None]
    return Context(**(vars(context) | long | {"pair_reference": distances}))


FEATURES: dict[str, Callable[[System], Context]] = {
    SystemKind.PROTEIN: protein,
    SystemKind.MOLECULE: molecule,
    SystemKind.CATALYST: catalyst,
    SystemKind.CRYSTAL: crystal,
}
"""One entry per kind of system."""


def atomistic(system: System, anchor: np.ndarray, extent: np.ndarray, free: np.ndarray) -> Context:
    """Context of atoms with anchors [N, 3] Å, extents [N] Å and whether translations are no degree of freedom [1]."""
    n = system.n_sites
    lengths = path_lengths(n, system.bonds)
    orders = np.zeros((n, n), np.int64)
    orders[system.bonds[:, 0], system.bonds[:, 1]] = system.bond_orders + 1
    orders = orders + orders.T
    orders[np.ix_(system.roles == SiteRole.LIGAND, system.roles == SiteRole.POCKET)] = ACROSS
    orders[np.ix_(system.roles == SiteRole.POCKET, system.roles == SiteRole.LIGAND)] = ACROSS
    reference = system.reference_positions
    distances = np.linalg.norm(reference[:, None] - reference[None], axis=-1)
    as_long = lambda values: torch.as_tensor(np.asarray(values), dtype=torch.long)[None]  # noqa: E731
    as_float = lambda values: torch.as_tensor(np.asarray(values), dtype=torch.float32)[None]  # noqa: E731
    return Context(
        present=torch.ones(1, n, dtype=torch.bool),
        mobile=torch.as_tensor(system.mobile)[None],
        element=as_long(system.elements),
        degree=as_long((lengths == 1).sum(axis=1)),
        environment=as_long(environment_codes(system)),
        role=as_long(system.roles),
        place=as_long(np.zeros(n)),
        pair_segment=as_long(np.clip(lengths, 0, 4)),
        path_length=as_long(lengths),
        bond_order=as_long(orders),
        pair_reference=as_float(distances),
        anchor=as_float(anchor),
        extent=as_float(extent),
        free=torch.as_tensor(free),
        cell=as_float(np.zeros((3, 3)) if system.cell is None else system.cell),
        periodic=torch.as_tensor(system.periodic)[None],
        condition=torch.zeros(1, 0),
        known=torch.zeros(1, 0, dtype=torch.bool),
        site_features=as_float(np.zeros((n, 0)) if system.site_features is None else system.site_features),
        pair_features=as_float(np.zeros((n, n, 0)) if system.pair_features is None else system.pair_features),
    )


def require_features(system: System, model: Model) -> None:
    """Raises UserError where a model reads features that a system does not have, or has in another width."""
    for name in _FEATURES_OF_OTHERS:
        expected, values = getattr(model, name), getattr(system, name)
        found = 0 if values is None else values.shape[-1]
        if expected and found != expected:
            has = f"{name} of width {found}" if found else f"no {name}"
            raise UserError(
                f"system {system.name!r} has {has}, this model reads {expected} (model.{name}): give representations of "
                "that width, by the option of an import or --representation of `dig-scale sample`"
            )


def features_read(context: Context, model: Model) -> Context:
    """The context with the features that a model reads, and without those that it does not."""
    return without_features(context, [name for name in _FEATURES_OF_OTHERS if not getattr(model, name)])


def without_features(context: Context, names: Sequence[str] = _FEATURES_OF_OTHERS) -> Context:
    """The context with none of the features that `names` lists, all by default."""
    held = {name: getattr(context, name) for name in names}
    return replace(context, **{name: value.new_zeros(*value.shape[:-1], 0) for name, value in held.items()})


def _require_mobile(system: System) -> None:
    # a fixed site needs a place, and these systems hold neither frames of residues nor places in a cell
    if not system.mobile.all():
        label = system.site_label(int(np.flatnonzero(~system.mobile)[0]))
        raise UserError(
            f"system {system.name!r}: {label} is fixed, but all sites of a {system.kind} move; make all mobile"
        )


def _anchors(system: System) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchors [N, 3], extents [N] and whether the system is free [1]."""
    reference, n = system.reference_positions, system.n_sites
    pocket, ligand = system.roles == SiteRole.POCKET, system.roles == SiteRole.LIGAND
    held = pocket if pocket.any() else ~system.mobile
    if not held.any():
        extent = max(0.5, float(np.sqrt(((reference - reference.mean(axis=0)) ** 2).mean())))
        return np.zeros((n, 3)), np.full(n, extent), np.ones(1, bool)
    centre = reference[held].mean(axis=0)
    loose = reference[~held] - (reference[ligand].mean(axis=0) if ligand.any() else centre)
    extent = np.sqrt((loose**2).mean() + (LIGAND_OFFSET**2 if ligand.any() else 0.0)) if len(loose) else 0.5
    anchor = np.where(held[:, None], reference, centre)
    return anchor, np.where(held, EXTENTS[SiteRole.POCKET], max(0.5, extent)), np.zeros(1, bool)


def _sequence_codes(system: System) -> np.ndarray:
    """Hashed codes [N] of each residue with the two before and after it in its chain, where they are not missing."""
    places = list(zip(system.chain_index.tolist(), system.residue_index.tolist(), strict=True))
    names = dict(zip(places, system.residue_names, strict=True))
    codes = []
    for chain, place in places:
        near = [(step, names.get((chain, place + step))) for step in range(-2, 3)]
        words = [f"{step}{name}" for step, name in near if name is not None]
        codes.append(1 + int(_digest(" ".join(words)), 16) % (ENVIRONMENT_CODES - 1))
    return np.array(codes)


def path_lengths(n_sites: int, bonds: np.ndarray) -> np.ndarray:
    """Bonds on the shortest path between every two sites [N, N]; UNREACHABLE between molecules."""
    weights = np.ones(len(bonds))
    graph = coo_array((weights, (bonds[:, 0], bonds[:, 1])), shape=(n_sites, n_sites))
    lengths = shortest_path(graph.tocsr(), directed=False, unweighted=True)
    return np.where(np.isinf(lengths), UNREACHABLE, lengths).astype(np.int64)


def environment_codes(system: System) -> np.ndarray:
    """Hashed codes [N] below ENVIRONMENT_CODES of each site's surroundings (Weisfeiler-Lehman refinement).

    Elements, formal charges and bond orders within ENVIRONMENT_RADIUS bonds; beads start from their names. Symmetric
    sites (the hydrogens of a methyl group) share a code. Atoms without a bond have code 0: their element says it all.
    """
    neighbours: list[list[tuple[int, int]]] = [[] for _ in range(system.n_sites)]
    for (i, j), order in zip(system.bonds.tolist(), system.bond_orders.tolist(), strict=True):
        neighbours[i].append((j, order))
        neighbours[j].append((i, order))
    labels = [_initial_label(system, i) for i in range(system.n_sites)]
    for _ in range(ENVIRONMENT_RADIUS):
        labels = [
            _digest(labels[i] + "|" + ",".join(sorted(f"{order}:{labels[j]}" for j, order in neighbours[i])))
            for i in range(system.n_sites)
        ]
    codes = np.array([1 + int(label, 16) % (ENVIRONMENT_CODES - 1) for label in labels])
    bonded = np.array([bool(near) for near in neighbours]) | (system.elements == 0)
    return np.where(bonded, codes, 0)


def _initial_label(system: System, site: int) -> str:
    if system.elements[site] == 0:
        return f"bead {system.residue_names[site]} {system.atom_names[site]}"
    return f"{system.elements[site]} {system.formal_charges[site]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
