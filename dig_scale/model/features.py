"""System -> Context: the static features of each kind of system. One function per SystemKind, one output type.

Graphormer's encodings (Ying et al. 2021): element and degree (centrality), shortest-path length and bond order per pair;
a hashed environment code that tells atoms of different surroundings apart; and for pairs one or two bonds apart the
distance in the reference geometry, since bond lengths and angles hardly vary. Nothing here depends on a conformation.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from dig_scale.batch import Context
from dig_scale.errors import UserError
from dig_scale.system import System, SystemKind

ENVIRONMENT_CODES = 1024
"""Buckets of the environment hash."""
ENVIRONMENT_RADIUS = 4
"""Bonds that an environment code looks out."""
UNREACHABLE = 510
"""Path length of pairs in different molecules, as in DiG."""


def featurise(system: System) -> Context:
    """Context of one system (b = 1). Raises UserError for a kind without features."""
    if system.kind not in (SystemKind.MOLECULE, SystemKind.PROTEIN):
        raise UserError(f"system {system.name!r}: no features for kind {system.kind} yet; expected molecule or protein")
    return _atomistic(system)


def _atomistic(system: System) -> Context:
    n = system.n_sites
    lengths = path_lengths(n, system.bonds)
    orders = np.zeros((n, n), np.int64)
    orders[system.bonds[:, 0], system.bonds[:, 1]] = system.bond_orders + 1
    reference = system.reference_positions - system.reference_positions.mean(axis=0)
    distances = np.linalg.norm(reference[:, None] - reference[None], axis=-1)
    degree = (lengths == 1).sum(axis=1)
    as_long = lambda values: torch.as_tensor(np.asarray(values), dtype=torch.long)[None]  # noqa: E731
    return Context(
        present=torch.ones(1, n, dtype=torch.bool),
        mobile=torch.as_tensor(system.mobile)[None],
        element=as_long(system.elements),
        degree=as_long(degree),
        environment=as_long(environment_codes(system)),
        pair_segment=as_long(np.clip(lengths, 0, 4)),
        path_length=as_long(lengths),
        bond_order=as_long(orders + orders.T),
        pair_reference=torch.as_tensor(distances, dtype=torch.float32)[None],
        extent=torch.tensor([np.sqrt((reference**2).mean())], dtype=torch.float32).clamp(min=0.5),
    )


def path_lengths(n_sites: int, bonds: np.ndarray) -> np.ndarray:
    """Bonds on the shortest path between every two sites [N, N]; UNREACHABLE between molecules."""
    weights = np.ones(len(bonds))
    graph = coo_array((weights, (bonds[:, 0], bonds[:, 1])), shape=(n_sites, n_sites))
    lengths = shortest_path(graph.tocsr(), directed=False, unweighted=True)
    return np.where(np.isinf(lengths), UNREACHABLE, lengths).astype(np.int64)


def environment_codes(system: System) -> np.ndarray:
    """Hashed codes [N] in 1..ENVIRONMENT_CODES-1 of each site's surroundings (Weisfeiler-Lehman refinement).

    Elements, formal charges and bond orders within ENVIRONMENT_RADIUS bonds; beads start from their names. Symmetric
    sites (the hydrogens of a methyl group) share a code.
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
    return np.array([1 + int(label, 16) % (ENVIRONMENT_CODES - 1) for label in labels])


def _initial_label(system: System, site: int) -> str:
    if system.elements[site] == 0:
        return f"bead {system.residue_names[site]} {system.atom_names[site]}"
    return f"{system.elements[site]} {system.formal_charges[site]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
