"""Rotations of SO(3) and the frames of protein backbones, batched and differentiable in torch.

In and out: tensors of any float type, [..., 3] axis-angles (rad), [..., 4] quaternions (w, x, y, z), [..., 3, 3] matrices
that act on column vectors. A residue's frame maps local to global, `global = R @ local + T`: T is the C-alpha, and the
columns of R are e1 = unit(N - CA), e2 = (C - CA) made orthogonal to e1, e3 = e1 x e2 (Zheng et al. 2023, DiG; note that
AlphaFold has its x axis on CA -> C). Knows neither noise nor files.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dig_scale.errors import InvalidSystemError

BACKBONE_ATOMS = ("N", "CA", "C", "O", "CB")
IDEAL_N = (1.45597958, 0.0, 0.0)
IDEAL_C = (-0.533655602, 1.42752619, 0.0)
"""Å, in the local frame; those of the published DiG code."""
IDEAL_CB = (-0.53581729, -0.76164456, 1.21395939)
"""Å; CA-CB 1.530, N-CA-CB 110.5°, C-CA-CB 110.1° (Engh and Huber 1991), on the side of L residues."""

_CARBONYL_LENGTH = 1.231
_CARBONYL_ANGLE = math.radians(120.8)
_LAST_PSI = math.radians(145.0)
_SMALL = 1e-4
_SHORTEST_BOND = 0.5
_SMALLEST_SINE = 1e-2


def exp(axis_angle: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3 3"]:
    """Rotation matrix of an axis-angle in rad; smooth at 0."""
    squared = (axis_angle**2).sum(-1, keepdim=True)
    small = squared < _SMALL
    angle = torch.where(small, torch.ones_like(squared), squared).sqrt()
    cosine = torch.where(small, 1 - squared / 8 + squared**2 / 384, torch.cos(angle / 2))
    sine = torch.where(small, 0.5 - squared / 48 + squared**2 / 3840, torch.sin(angle / 2) / angle)
    return matrix_from_quaternion(torch.cat([cosine, sine * axis_angle], dim=-1))


def log(rotation: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 3"]:
    """Axis-angle in rad, of length at most pi (either sign of the axis at pi); accurate near 0 and near pi."""
    quaternion = quaternion_from_matrix(rotation)
    cosine, vector = quaternion[..., :1], quaternion[..., 1:]
    squared = (vector**2).sum(-1, keepdim=True)
    small = squared < _SMALL
    sine = torch.where(small, torch.ones_like(squared), squared).sqrt()
    ratio = torch.where(small, squared, torch.zeros_like(squared)) / torch.where(small, cosine, 1.0) ** 2
    series = (1 - ratio / 3 + ratio**2 / 5 - ratio**3 / 7) / torch.where(small, cosine, 1.0)
    return vector * 2 * torch.where(small, series, torch.atan2(sine, cosine) / sine)


def quaternion_from_matrix(rotation: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 4"]:
    """Unit quaternion (w, x, y, z) with w >= 0, by the largest of its four components (Shepperd 1978)."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotation.unbind(-2))
    rows = torch.stack(
        [
            torch.stack([1 + a + e + i, h - f, c - g, d - b], -1),
            torch.stack([h - f, 1 + a - e - i, b + d, c + g], -1),
            torch.stack([c - g, b + d, 1 - a + e - i, f + h], -1),
            torch.stack([d - b, c + g, f + h, 1 - a - e + i], -1),
        ],
        dim=-2,
    )
    largest = rows.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = torch.gather(rows, -2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    unit = row / row.norm(dim=-1, keepdim=True)
    return torch.where(unit[..., :1] < 0, -unit, unit)


def matrix_from_quaternion(quaternion: Float[Tensor, "... 4"]) -> Float[Tensor, "... 3 3"]:
    """Rotation matrix of a quaternion (w, x, y, z) of any length but 0."""
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
    )
    return torch.stack(rows, -2)


def geodesic(
    start: Float[Tensor, "... 3 3"], end: Float[Tensor, "... 3 3"], eta: float | Tensor
) -> Float[Tensor, "... 3 3"]:
    """Point at fraction eta (number, or tensor that broadcasts to [...]) of the shortest path from start to end."""
    fraction = eta.unsqueeze(-1) if isinstance(eta, Tensor) else eta
    return start @ exp(fraction * log(start.mT @ end))


def nearest_rotations(matrices: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 3 3"]:
    """The proper rotation nearest to each matrix; of target^T mobile, the one that lays mobile on target (Kabsch 1978)."""
    u, _, vh = torch.linalg.svd(matrices)
    sign = torch.ones_like(u[..., 0])
    sign[..., 2] = torch.where(torch.linalg.det(u @ vh) < 0, -1.0, 1.0).to(sign.dtype)
    return (u * sign.unsqueeze(-2)) @ vh


def random_rotations(normal4: Float[Tensor, "... 4"]) -> Float[Tensor, "... 3 3"]:
    """Rotations uniform over SO(3) from four independent standard normals each."""
    return matrix_from_quaternion(normal4)


def is_well_formed(
    n: Float[Tensor, "... 3"], ca: Float[Tensor, "... 3"], c: Float[Tensor, "... 3"]
) -> Bool[Tensor, "..."]:
    """Which residues have a frame: finite N, CA, C in Å that are apart and not on one line."""
    to_n, to_c = n - ca, c - ca
    lengths = to_n.norm(dim=-1), to_c.norm(dim=-1)
    area = torch.linalg.cross(to_n, to_c).norm(dim=-1)
    apart = (lengths[0] > _SHORTEST_BOND) & (lengths[1] > _SHORTEST_BOND)
    return torch.isfinite(area) & apart & (area > _SMALLEST_SINE * lengths[0] * lengths[1])


def frames_from_backbone(
    n: Float[Tensor, "... 3"], ca: Float[Tensor, "... 3"], c: Float[Tensor, "... 3"]
) -> tuple[Float[Tensor, "... 3 3"], Float[Tensor, "... 3"]]:
    """(R, T) of residues from N, CA, C in Å; raises InvalidSystemError with the index of the first that has no frame."""
    good = is_well_formed(n, ca, c)
    if not bool(good.all()):
        index = tuple((~good).nonzero()[0].tolist())
        atoms = [[round(x, 3) for x in atom[index].tolist()] for atom in (n, ca, c)]
        raise InvalidSystemError(
            f"residue at index {index} has no frame: N, CA, C at {atoms} Å, expected finite positions, "
            f"more than {_SHORTEST_BOND} Å apart and not on one line; leave it out"
        )
    e1 = _unit(n - ca)
    across = c - ca
    e2 = _unit(across - (across * e1).sum(-1, keepdim=True) * e1)
    return torch.stack([e1, e2, torch.linalg.cross(e1, e2)], dim=-1), ca


def to_global(
    rotations: Float[Tensor, "... 3 3"], positions: Float[Tensor, "... 3"], local: Float[Tensor, "... A 3"]
) -> Float[Tensor, "... A 3"]:
    """A points per frame, Å: R @ local + T."""
    return local @ rotations.mT + positions.unsqueeze(-2)


def to_local(
    rotations: Float[Tensor, "... 3 3"], positions: Float[Tensor, "... 3"], points: Float[Tensor, "... A 3"]
) -> Float[Tensor, "... A 3"]:
    """A points per frame, Å: R^T @ (global - T)."""
    return (points - positions.unsqueeze(-2)) @ rotations


def backbone_from_frames(
    rotations: Float[Tensor, "... N 3 3"],
    positions: Float[Tensor, "... N 3"],
    joined: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, "... N 5 3"]:
    """N, CA, C, O, CB (in the order of BACKBONE_ATOMS) of each residue, Å, from ideal local geometry.

    joined [N]: residues whose C is bonded to the next one's N, which places O in the peptide plane (default: all but the
    last); the others get the O of an extended chain. Glycine's CB is for the caller to drop.
    """
    local = positions.new_tensor([IDEAL_N, (0.0, 0.0, 0.0), IDEAL_C, IDEAL_CB])
    n, ca, c, cb = to_global(rotations, positions, local.expand(*positions.shape[:-1], 4, 3)).unbind(-2)
    away = _away_from_next(rotations, n, ca, c, joined)
    axis = _unit(c - ca)
    o = c + _CARBONYL_LENGTH * (math.sin(_CARBONYL_ANGLE) * away - math.cos(_CARBONYL_ANGLE) * axis)
    return torch.stack([n, ca, c, o, cb], dim=-2)


def _away_from_next(rotations: Tensor, n: Tensor, ca: Tensor, c: Tensor, joined: Tensor | None) -> Tensor:
    """Unit vectors [..., N, 3] perpendicular to CA-C, opposite to the next residue's N where there is one."""
    axis, normal = _unit(c - ca), rotations[..., 2]
    # N-CA-C-O has the torsion psi + pi: e3 x axis points to the cis side of N.
    cis = torch.linalg.cross(axis, normal)
    alone = -(math.cos(_LAST_PSI) * cis + math.sin(_LAST_PSI) * torch.linalg.cross(axis, cis))
    following = torch.cat([n[..., 1:, :], n[..., -1:, :]], dim=-2) - c
    side = following - (following * axis).sum(-1, keepdim=True) * axis
    length = side.norm(dim=-1, keepdim=True)
    count = n.shape[-2]
    known = torch.ones(count, dtype=torch.bool, device=n.device) if joined is None else joined.clone()
    known = known & (torch.arange(count, device=n.device) < count - 1)
    usable = known.unsqueeze(-1) & (length > _SMALLEST_SINE)
    return torch.where(usable, -side / length.clamp(min=_SMALLEST_SINE), alone)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
