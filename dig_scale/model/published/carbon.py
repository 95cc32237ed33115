"""DiG's released network for carbon crystals (Zheng et al. 2023; microsoft/Graphormer), 95.7 M parameters.

In: positions (Å) of n atoms and, after them, of the cell's eight corners, about the cell's centre; the step t (0..499, 0 is
the least noisy). Out: the noise of atoms and corners. Attention sees all 26 neighbour cells within 20 Å; a second distance
channel sees the reference: atoms at 0, corners on a cube of 4 Å. Corners are in the order of bits (i, j, k): 0, c, b, b+c,
a, a+c, a+b, a+b+c. The read-out is an equivariant transformer (Thölke and De Fabritiis 2022) on neighbours within 5 Å, not
periodic, then a whitening norm and gated blocks (Schütt et al. 2021). `force_proj` and `sid_encoder` stand in the published
file and are not used. The published graph keeps 32 neighbours a site, which up to 24 atoms are all. Knows no noise schedule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dig_scale.model.published.catalyst import TwoChannels
from dig_scale.model.published.graphormer_v1 import (
    Encoder,
    GraphEncoder,
    GraphormerSizes,
    GraphRows,
    VectorReadOut,
    image_keys,
    split_heads,
    whole_bias,
)
from dig_scale.model.published.structure import sinusoids

CUTOFF, NEIGHBOUR_CUTOFF = 20.0, 5.0
REFERENCE_EDGE = 4.0
CORNERS = 8
UNIT_COVARIANCE = 1e-5
"""Added to covariances of vectors before their root is inverted."""
STRUCTURE_IDS = 20000
EQUIVARIANT_LAYERS = 4
CARBON_SIZES = GraphormerSizes(tags=15)
"""Tags: 0 padding, 3 atoms, 4..11 the corners in order."""


def corner_bits(device: torch.device | str = "cpu") -> Tensor:
    """Which cell vectors [8, 3] lead to each corner."""
    bit = torch.tensor([0.0, 1.0], device=device)
    return torch.cartesian_prod(bit, bit, bit)


def cell_of(positions: Tensor) -> Tensor:
    """Cell vectors [B, 3, 3] (rows) of structures whose last eight sites are the corners."""
    corners = positions[:, -CORNERS:]
    return corners[:, [4, 2, 1]] - corners[:, :1]


def completed(positions: Tensor) -> Tensor:
    """The same with all corners made from the origin's and those of a, b and c."""
    corners = corner_bits(positions.device).to(positions) @ cell_of(positions) + positions[:, -CORNERS:][:, :1]
    return torch.cat([positions[:, :-CORNERS], corners], dim=1)


def reference_sites(atoms: int, device: torch.device | str = "cpu") -> Tensor:
    """The reference [n + 8, 3], Å: atoms at 0, corners on a cube of 4 Å about 0."""
    corners = (corner_bits(device) - 0.5) * REFERENCE_EDGE
    return torch.cat([torch.zeros(atoms, 3, device=device), corners])


def carbon_rows(atoms: int, element: int = 6) -> GraphRows:
    """Rows of the tables for n atoms of one element and the eight corners, one sample."""
    numbers = torch.cat([torch.full((atoms,), element + 2), torch.full((CORNERS,), 3)])
    tags = torch.cat([torch.full((atoms,), 3), torch.arange(CORNERS) + 4])
    return GraphRows(numbers.view(1, -1, 1), tags.unsqueeze(0))


def _neighbour_cells(device: torch.device) -> Tensor:
    steps = torch.tensor([-1, 0, 1], device=device)
    cells = torch.cartesian_prod(steps, steps, steps)
    return cells[(cells != 0).any(1)]


class CarbonEncoder(GraphEncoder):
    """The stack of layers, with a table of structure numbers that nothing reads."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__(sizes)
        self.sid_encoder = nn.Embedding(STRUCTURE_IDS, sizes.width)


class Smearing(nn.Module):
    """Exponential-normal radial functions of distances up to 5 Å (Unke and Meuwly 2019)."""

    def __init__(self, kernels: int) -> None:
        super().__init__()
        lowest = math.exp(-NEIGHBOUR_CUTOFF)
        self.register_buffer("means", torch.linspace(lowest, 1, kernels))
        self.register_buffer("betas", torch.full((kernels,), (2 / kernels * (1 - lowest)) ** -2))

    def forward(self, distances: Tensor) -> Tensor:
        """[..., K]."""
        d = distances.unsqueeze(-1)
        means, betas = self.get_buffer("means"), self.get_buffer("betas")
        return fading(d) * torch.exp(-betas * (torch.exp(-5.0 / NEIGHBOUR_CUTOFF * d) - means) ** 2)


def fading(distances: Tensor) -> Tensor:
    """Cosine cut-off: 1 at 0, 0 from 5 Å."""
    return 0.5 * (torch.cos(distances * math.pi / NEIGHBOUR_CUTOFF) + 1) * (distances < NEIGHBOUR_CUTOFF)


class EquivariantAttention(nn.Module):
    """One update of scalars [B, N, D] and vectors [B, N, 3, D] over neighbours."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.layernorm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, 3 * width)
        self.vec_proj = nn.Linear(width, 3 * width, bias=False)
        self.dk_proj = nn.Linear(sizes.kernels, width)
        self.dv_proj = nn.Linear(sizes.kernels, 3 * width)

    def forward(
        self, x: Tensor, vectors: Tensor, radial: Tensor, distances: Tensor, units: Tensor, near: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Changes of scalars and vectors; pairs [B, N (receiver), N (sender), ...]."""
        x = self.layernorm(x)
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        first, second, third = self.vec_proj(vectors).chunk(3, dim=-1)
        keys = functional.silu(self.dk_proj(radial)).unflatten(-1, (self.heads, -1))
        weights = functional.silu(torch.einsum("bhid,bhjd,bijhd->bijh", q, k, keys))
        weights = weights * (fading(distances) * near).unsqueeze(-1)
        values = functional.silu(self.dv_proj(radial)).unflatten(-1, (self.heads, -1))
        values = values * v.transpose(1, 2).unsqueeze(1) * near[..., None, None]
        scalar, carried, made = values.chunk(3, dim=-1)
        summed = torch.einsum("bijh,bijhd->bihd", weights, scalar).flatten(2)
        along = torch.einsum("bjchd,bijhd->bichd", vectors.unflatten(-1, (self.heads, -1)), carried)
        along = along + torch.einsum("bijc,bijhd->bichd", units, made)
        o1, o2, o3 = self.o_proj(summed).chunk(3, dim=-1)
        return (first * second).sum(2) * o2 + o3, third * o1.unsqueeze(2) + along.flatten(3)


class WhiteningNorm(nn.Module):
    """Vectors [B, N, 3, D] times the inverse root of their 3 x 3 covariance over D, in fp64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, vectors: Tensor) -> Tensor:
        """[B, N, 3, D]."""
        v = vectors.double() - vectors.double().mean(-1, keepdim=True)
        # 1, 2, 3 keep the eigenvalues of vanishing vectors apart; they break the symmetry at 1e-5.
        apart = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=v.dtype, device=v.device))
        values, axes = torch.linalg.eigh(v @ v.mT / v.shape[-1] + UNIT_COVARIANCE * apart)
        root = axes * torch.rsqrt(values + UNIT_COVARIANCE).unsqueeze(-2) @ axes.mT
        return (root @ v).to(vectors.dtype) * self.weight


class GatedBlock(nn.Module):
    """Scalars and vectors of D channels to `out` channels, vectors scaled by scalars."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.vec1_proj = nn.Linear(width, width, bias=False)
        self.vec2_proj = nn.Linear(width, out, bias=False)
        self.update_net = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 2 * out))

    def forward(self, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, out] and [B, N, 3, out]."""
        lengths = torch.linalg.vector_norm(self.vec1_proj(vectors), dim=-2)
        scalars, gates = self.update_net(torch.cat([x, lengths], -1)).chunk(2, dim=-1)
        return scalars, gates.unsqueeze(-2) * self.vec2_proj(vectors)


class NoiseOutput(nn.Module):
    """Two gated blocks down to one vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.output_network = nn.ModuleList([GatedBlock(width, width // 2), GatedBlock(width // 2, 1)])

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """[B, N, 3]."""
        first, last = self.output_network
        x, vectors = first(x, vectors)
        return last(functional.silu(x), vectors)[1].squeeze(-1)


class CarbonNet(nn.Module):
    """See the module's header."""

    def __init__(self, sizes: GraphormerSizes = CARBON_SIZES) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes, CarbonEncoder(sizes))
        self.graph_3d_bias = TwoChannels(sizes)
        self.force_proj = VectorReadOut(sizes)
        self.output_model_noise = NoiseOutput(sizes.width)
        self.out_norm_vec = WhiteningNorm(sizes.width)
        self.distance_expansion = Smearing(sizes.kernels)
        self.out_norm = nn.LayerNorm(sizes.width)
        self.attention_layers = nn.ModuleList(EquivariantAttention(sizes) for _ in range(EQUIVARIANT_LAYERS))

    def forward(self, positions: Tensor, rows: GraphRows, step: Tensor) -> Tensor:
        """Noise [B, n + 8, 3] of structures of the same n, at positions [B, n + 8, 3] with complete corners, step [B]."""
        graph, distances = self.encoder.graph_encoder, self.graph_3d_bias
        atoms = rows.atoms.expand(len(positions), -1, -1)
        present = atoms[..., 0] != 0
        reference = reference_sites(positions.shape[1] - CORNERS, positions.device).expand_as(positions)
        cells = _neighbour_cells(positions.device)
        keys = image_keys(positions, cell_of(positions), present, cells, CUTOFF)
        now, near = distances(distances.dist_feature_extractor, positions, keys, atoms)
        before, near_before = distances(distances.dist_feature_extractor_init, reference.to(positions), keys, atoms)
        embedded = graph.graph_node_feature.atom_encoder(atoms).sum(-2) + graph.tag_embedding(rows.tags)
        tokens = graph.graph_node_feature.with_graph_token(embedded + near + near_before)
        tokens = tokens + sinusoids(step, self.sizes.width).to(tokens.dtype).unsqueeze(1)
        no_graph = now.new_zeros(*now.shape[:2], now.shape[2] + 1, now.shape[2] + 1)
        trunk, _ = whole_bias(no_graph, now + before, keys)
        return self._read_out(self.encoder(tokens, trunk), positions)

    def _read_out(self, x: Tensor, positions: Tensor) -> Tensor:
        displacement = positions.unsqueeze(1) - positions.unsqueeze(2)  # from receiver i to sender j
        distances = torch.linalg.vector_norm(displacement, dim=-1)
        near = distances < NEIGHBOUR_CUTOFF
        units = displacement / (distances + 1e-3).unsqueeze(-1)
        radial = self.distance_expansion(distances)
        vectors = x.new_zeros(*x.shape[:2], 3, x.shape[2])
        for layer in self.attention_layers:
            change, turned = layer(x, vectors, radial, distances, units, near)
            x, vectors = x + change, vectors + turned
        return self.output_model_noise(self.out_norm(x), self.out_norm_vec(vectors))
