"""Molecular graphs -> rows of the published networks' embedding tables, as their preprocessing numbered them.

Row 0 is padding. A feature f of value v stands in row v + 2 + 512 f of the atom table (element Z in row Z + 2) and in row
v + 3 + 512 f of the edge table. Shortest paths are Floyd and Warshall's with the published program's habit of taking atom
0 as a way-point for none: a path through it counts as one unlabelled edge (row 1). Knows no files, no positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from dig_scale.errors import UserError
from dig_scale.model.published.graphormer_v1 import NEAREST_HOPS, GraphRows
from dig_scale.model.published.ligand import ligand_first
from dig_scale.system import SiteRole, System

FEATURE_STRIDE = 512
UNREACHABLE, ACROSS = 510, 511
_CATALYST_TAGS = {SiteRole.SUBSURFACE: 1, SiteRole.SURFACE: 2, SiteRole.ADSORBATE: 3}


def catalyst_rows(system: System) -> GraphRows:
    """Rows of one slab with adsorbate, batch axis 1; bonds are the adsorbate's. Raises UserError naming the system."""
    unknown = sorted({int(role) for role in system.roles} - {int(role) for role in _CATALYST_TAGS})
    if unknown:
        names = [SiteRole(role).name.lower() for role in unknown]
        raise UserError(f"system {system.name!r}, roles: sites that are {names} are no part of a slab or an adsorbate")
    tags = torch.tensor([_CATALYST_TAGS[SiteRole(int(role))] for role in system.roles])
    features = np.asarray(system.elements)[:, None]
    return graph_rows(features, system.bonds, np.zeros((len(system.bonds), 1), np.int64), tags)


def ligand_rows(atoms: np.ndarray, bonds: np.ndarray, bond_features: np.ndarray, ligand: int) -> GraphRows:
    """Rows of a pocket, its first `ligand` atoms the ligand's: integer features [N, F], bonds [M, 2], [M, G]; batch axis 1."""
    return graph_rows(atoms, bonds, bond_features, ligand_first(ligand, len(atoms)), ligand)


def graph_rows(
    atoms: np.ndarray, bonds: np.ndarray, bond_features: np.ndarray, tags: torch.Tensor, ligand: int = 0
) -> GraphRows:
    """Rows of one undirected graph, batch axis 1; `ligand` atoms at the front are in a graph of their own.

    atoms [N, F] and bond_features [M, G] are integers from 0 below 512.
    """
    count = len(atoms)
    labels = np.zeros((count, count, bond_features.shape[1]), np.int64)
    adjacency = np.zeros((count, count), bool)
    for (i, j), values in zip(bonds.tolist(), bond_features, strict=True):
        adjacency[i, j] = adjacency[j, i] = True
        labels[i, j] = labels[j, i] = values + 2 + FEATURE_STRIDE * np.arange(len(values))
    lengths, via = shortest_paths(adjacency)
    lengths[:ligand, ligand:] = lengths[ligand:, :ligand] = ACROSS
    columns = atoms + 2 + FEATURE_STRIDE * np.arange(atoms.shape[1])
    return GraphRows(
        atoms=torch.from_numpy(columns).unsqueeze(0),
        tags=tags.unsqueeze(0),
        degree=torch.from_numpy(adjacency.sum(1) + 1).unsqueeze(0),
        spatial=torch.from_numpy(lengths + 1).unsqueeze(0),
        hops=torch.from_numpy(_first_hops(via, labels) + 1).unsqueeze(0),
    )


def shortest_paths(adjacency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and last way-points [N, N] of shortest paths; UNREACHABLE in both where there is none."""
    lengths = np.where(adjacency, 1, UNREACHABLE).astype(np.int64)
    np.fill_diagonal(lengths, 0)
    via = np.zeros_like(lengths)
    for k in range(len(lengths)):
        through = lengths[:, k, None] + lengths[k]
        shorter = through < lengths
        lengths, via = np.where(shorter, through, lengths), np.where(shorter, k, via)
    away = lengths >= UNREACHABLE
    return np.where(away, UNREACHABLE, lengths), np.where(away, UNREACHABLE, via)


def _first_hops(via: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels [N, N, 5, G] of the first edges of each path; -1 past its end and where there is no path."""
    count = len(via)
    hops = np.full((count, count, NEAREST_HOPS, labels.shape[-1]), -1, np.int64)
    for i, j in np.argwhere((via != UNREACHABLE) & ~np.eye(count, dtype=bool)).tolist():
        path = [i, *_way_points(via, i, j), j][: NEAREST_HOPS + 1]
        for hop, (a, b) in enumerate(pairwise(path)):
            hops[i, j, hop] = labels[a, b]
    return hops


def _way_points(via: np.ndarray, i: int, j: int) -> Sequence[int]:
    k = int(via[i, j])
    return [] if k == 0 else [*_way_points(via, i, k), k, *_way_points(via, k, j)]
