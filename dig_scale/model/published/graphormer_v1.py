"""The Graphormer backbone of DiG's three networks of atoms (Ying et al. 2021; Zheng et al. 2023; microsoft/Graphormer).

Parts, not a network: embeddings of atoms, biases from the molecular graph, biases from distances, post-norm layers, the
equivariant read-out. catalyst.py, ligand.py and carbon.py put them together, each in its published way. Attribute names are
those of the published state dicts. Periodic images are extra keys that copy an atom's key and value: since only their bias
differs, they are folded into one bias per atom, exactly, and the trunk sees N + 1 keys; the read-out sees them one by one.

Shapes: B samples, N atoms, N + 1 tokens with the graph token first, H heads, D width, K radial kernels, E images.
Embedding rows count from 1; row 0 is padding. Positions in Å. Knows no noise schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NEAREST_HOPS = 5
PAIR_TYPES = 128
"""Pair types are numbered 128 a_i + a_j by rows of the atom table."""
UNIT_EPSILON = 1e-5


@dataclass(frozen=True)
class GraphormerSizes:
    """Sizes of a published network of atoms; the tables' lengths include their padding row."""

    tags: int
    width: int = 768
    layers: int = 12
    heads: int = 32
    hidden: int = 768
    kernels: int = 128
    atoms: int = 4609
    degrees: int = 512
    edges: int = 1537
    edge_distances: int = 128
    spatial: int = 513


@dataclass(frozen=True)
class GraphRows:
    """Rows of the embedding tables (0 is padding): atoms [B, N, F], degree [B, N], tags [B, N], spatial [B, N, N], hops
    [B, N, N, 5, G] (edge features along the first five hops of the shortest path). Carbon has atoms and tags alone.
    """

    atoms: Tensor
    tags: Tensor
    degree: Tensor | None = None
    spatial: Tensor | None = None
    hops: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """Which atoms [B, N] are not padding."""
        return self.atoms[..., 0] != 0


@dataclass(frozen=True)
class Keys:
    """What atoms attend to: the atoms, then images. source [B, N+E] atom copied, offset [B, N+E, 3] Å, taken [B, N+E]."""

    source: Tensor
    offset: Tensor
    taken: Tensor

    @classmethod
    def of_atoms(cls, present: Tensor) -> Keys:
        """The atoms alone."""
        batch, atoms = present.shape
        source = torch.arange(atoms, device=present.device).expand(batch, -1)
        return cls(source, torch.zeros(batch, atoms, 3, device=present.device), present)

    def positions(self, atoms: Tensor) -> Tensor:
        """Positions [B, N+E, 3] of atoms at `atoms` [B, N, 3] and of their images."""
        return _gather(atoms, self.source) + self.offset.to(atoms.dtype)


def image_keys(positions: Tensor, cell: Tensor, present: Tensor, cells: Tensor, cutoff: float) -> Keys:
    """The atoms, and those images (of neighbour cells [M, 3]) that are nearer than `cutoff` Å to any atom, but not on it."""
    batch, atoms = present.shape
    offsets = (cells.to(cell) @ cell).repeat_interleave(atoms, dim=1)
    source = torch.arange(atoms, device=present.device).repeat(len(cells)).expand(batch, -1)
    images = positions.repeat(1, len(cells), 1) + offsets
    apart = torch.cdist(positions, images, compute_mode="donot_use_mm_for_euclid_dist")
    near = ((apart < cutoff) & (apart > UNIT_EPSILON) & present.unsqueeze(-1)).any(dim=1) & _gather(present, source)
    order = torch.argsort(near.logical_not().to(torch.int8), dim=1, stable=True)[:, : int(near.sum(1).max())]
    own = Keys.of_atoms(present)
    return Keys(
        torch.cat([own.source, _gather(source, order)], 1),
        torch.cat([own.offset.to(offsets), _gather(offsets, order)], 1),
        torch.cat([present, _gather(near, order)], 1),
    )


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values [B, N, ...] at index [B, M] of axis 1."""
    wide = index.view(*index.shape, *([1] * (values.dim() - 2)))
    return torch.gather(values, 1, wide.expand(*index.shape, *values.shape[2:]))


class AtomEmbedding(nn.Module):
    """Embeddings of atoms and degrees, and the graph token."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__()
        self.atom_encoder = nn.Embedding(sizes.atoms, sizes.width)
        self.in_degree_encoder = nn.Embedding(sizes.degrees, sizes.width)
        self.out_degree_encoder = nn.Embedding(sizes.degrees, sizes.width)
        self.graph_token = nn.Embedding(1, sizes.width)

    def degrees(self, rows: Tensor) -> Tensor:
        """[B, N, D] for the degrees of an undirected graph."""
        return self.in_degree_encoder(rows) + self.out_degree_encoder(rows)

    def with_graph_token(self, atoms: Tensor) -> Tensor:
        """[B, N+1, D] from [B, N, D]."""
        return torch.cat([self.graph_token.weight.expand(len(atoms), 1, -1), atoms], dim=1)


class GraphBias(nn.Module):
    """Attention bias from shortest paths, the bonds along them, and the graph token's distance."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__()
        heads = sizes.heads
        self.heads = heads
        self.edge_encoder = nn.Embedding(sizes.edges, heads)
        self.edge_dis_encoder = nn.Embedding(sizes.edge_distances * heads * heads, 1)
        self.spatial_pos_encoder = nn.Embedding(sizes.spatial, heads)
        self.graph_token_virtual_distance = nn.Embedding(1, heads)

    def forward(self, rows: GraphRows) -> Tensor:
        """[B, H, N+1, N+1]."""
        assert rows.spatial is not None and rows.hops is not None
        per_hop = self.edge_dis_encoder.weight.view(-1, self.heads, self.heads)[: rows.hops.shape[3]]
        along = torch.einsum("bijmh,mhg->bijg", self.edge_encoder(rows.hops).mean(-2), per_hop)
        length = (rows.spatial - 1).clamp(1, NEAREST_HOPS).unsqueeze(-1)
        pairs = (self.spatial_pos_encoder(rows.spatial) + along / length).permute(0, 3, 1, 2)
        token = self.graph_token_virtual_distance.weight.view(1, self.heads, 1, 1)
        column = torch.cat([token.expand(len(pairs), -1, pairs.shape[-1], 1), pairs], dim=3)
        return torch.cat([token.expand(len(pairs), -1, 1, column.shape[-1]), column], dim=2)


class SelfAttention(nn.Module):
    """Multi-head attention with an additive bias."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.k_proj = nn.Linear(sizes.width, sizes.width)
        self.v_proj = nn.Linear(sizes.width, sizes.width)
        self.q_proj = nn.Linear(sizes.width, sizes.width)
        self.out_proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, N+1, D] from tokens and bias [B, H, N+1, N+1]."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, H, N, d] from [B, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class GraphormerLayer(nn.Module):
    """Post-norm attention and feed-forward."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__()
        self.self_attn = SelfAttention(sizes)
        self.self_attn_layer_norm = nn.LayerNorm(sizes.width)
        self.fc1 = nn.Linear(sizes.width, sizes.hidden)
        self.fc2 = nn.Linear(sizes.hidden, sizes.width)
        self.final_layer_norm = nn.LayerNorm(sizes.width)

    def forward(self, x: Tensor, bias: Tensor, time: Tensor | None) -> Tensor:
        """[B, N+1, D]; the time embedding is not looked at here."""
        return self.feed_forward(self.self_attn_layer_norm(x + self.self_attn(x, bias)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half."""
        return self.final_layer_norm(x + self.fc2(functional.gelu(self.fc1(x))))


class GraphEncoder(nn.Module):
    """Embeddings and the stack of layers."""

    def __init__(self, sizes: GraphormerSizes, layer: type[GraphormerLayer] = GraphormerLayer) -> None:
        super().__init__()
        self.graph_node_feature = AtomEmbedding(sizes)
        self.tag_embedding = nn.Embedding(sizes.tags, sizes.width)
        self.graph_attn_bias = GraphBias(sizes)
        self.emb_layer_norm = nn.LayerNorm(sizes.width)
        self.layers = nn.ModuleList(layer(sizes) for _ in range(sizes.layers))

    def forward(self, x: Tensor, bias: Tensor, time: Tensor | None) -> Tensor:
        """[B, N+1, D] after all layers."""
        x = self.emb_layer_norm(x)
        for layer in self.layers:
            x = layer(x, bias, time)
        return x


class Encoder(nn.Module):
    """GraphEncoder and the transform after it."""

    def __init__(self, sizes: GraphormerSizes, graph_encoder: GraphEncoder) -> None:
        super().__init__()
        self.graph_encoder = graph_encoder
        self.lm_output_learned_bias = nn.Parameter(torch.zeros(1))
        self.lm_head_transform_weight = nn.Linear(sizes.width, sizes.width)
        self.layer_norm = nn.LayerNorm(sizes.width)

    def forward(self, x: Tensor, bias: Tensor, time: Tensor | None = None) -> Tensor:
        """Atoms' tokens [B, N, D] from tokens [B, N+1, D], a bias [B, H, N+1, N+1] and what a layer wants of time."""
        x = self.lm_head_transform_weight(self.graph_encoder(x, bias, time))
        return (self.layer_norm(functional.gelu(x)) + self.lm_output_learned_bias)[:, 1:]


class RadialKernels(nn.Module):
    """exp(-|temp_k| (x - mean_k)^2) of x = mul d + bias by pair type; a table of means whose first row is used."""

    def __init__(self, kernels: int, rows: int = 50) -> None:
        super().__init__()
        self.means = nn.Embedding(rows, kernels)
        self.temps = nn.Embedding(rows, kernels)
        self.mul = nn.Embedding(PAIR_TYPES**2, 1)
        self.bias = nn.Embedding(PAIR_TYPES**2, 1)

    def forward(self, distances: Tensor, pair_types: Tensor) -> Tensor:
        """[..., K]."""
        return _kernels(self, distances, pair_types, self.means.weight[0], self.temps.weight[0])


class FlatRadialKernels(nn.Module):
    """The same with one plain vector of means and temps (the ligand network)."""

    def __init__(self, kernels: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.rand(kernels) * 3)
        self.temps = nn.Parameter(torch.rand(kernels) * 9.9 + 0.1)
        self.mul = nn.Embedding(PAIR_TYPES**2, 1)
        self.bias = nn.Embedding(PAIR_TYPES**2, 1)

    def forward(self, distances: Tensor, pair_types: Tensor) -> Tensor:
        """[..., K]."""
        return _kernels(self, distances, pair_types, self.means, self.temps)


def _kernels(
    tables: RadialKernels | FlatRadialKernels, distances: Tensor, pair_types: Tensor, means: Tensor, temps: Tensor
) -> Tensor:
    x = tables.mul(pair_types) * distances.unsqueeze(-1) + tables.bias(pair_types)
    return torch.exp(-temps.abs() * (x - means) ** 2)


class TwoLayers(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, width)
        self.layer2 = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out]."""
        return self.layer2(functional.gelu(self.layer1(x)))


class DistanceBias(nn.Module):
    """Radial kernels -> attention bias by an MLP and, summed over keys, node features by a linear map."""

    def __init__(self, sizes: GraphormerSizes, kernels: nn.Module) -> None:
        super().__init__()
        self.dist_feature_extractor = kernels
        self.feature_proj = TwoLayers(sizes.kernels, sizes.heads)
        self.edge_proj = nn.Linear(sizes.kernels, sizes.width)

    def forward(self, kernels: nn.Module, positions: Tensor, keys: Keys, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Bias [B, H, N, N+E], -inf on keys not taken, and node features [B, N, D], at these positions [B, N, 3]."""
        distances = torch.linalg.vector_norm(positions.unsqueeze(2) - keys.positions(positions).unsqueeze(1), dim=-1)
        types = atoms[..., 0].unsqueeze(2) * PAIR_TYPES + _gather(atoms[..., 0], keys.source).unsqueeze(1)
        features = kernels(distances, types)
        away = ~keys.taken.unsqueeze(1)
        bias = self.feature_proj(features).permute(0, 3, 1, 2).masked_fill(away.unsqueeze(1), float("-inf"))
        return bias, self.edge_proj(features.masked_fill(away.unsqueeze(-1), 0.0).sum(dim=2))


def whole_bias(graph: Tensor, spatial: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """The trunk's bias [B, H, N+1, N+1] with images folded in, and the read-out's [B, H, N, N+E].

    `graph` [B, H, N+1, N+1] is the bias of tokens, which images share with their atoms; `spatial` [B, H, N, N+E] that of
    distances. Keys that are not taken get -inf.
    """
    shared = torch.gather(graph[..., 1:], -1, keys.source[:, None, None].expand(*graph.shape[:3], -1))
    total = shared + functional.pad(spatial, (0, 0, 1, 0))
    total = total.masked_fill(~keys.taken[:, None, None], float("-inf"))
    return torch.cat([graph[..., :1], folded(total, keys.source, graph.shape[-1] - 1)], -1), total[:, :, 1:]


def folded(bias: Tensor, source: Tensor, atoms: int) -> Tensor:
    """[B, H, R, N]: the log-sum-exp of the bias [B, H, R, N+E] over each atom and its images, which is what attention sees."""
    if source.shape[1] == atoms:
        return bias
    index = source[:, None, None].expand_as(bias)
    empty = bias.new_full((*bias.shape[:-1], atoms), float("-inf"))
    top = empty.scatter_reduce(-1, index, bias, "amax")
    level = torch.where(torch.isfinite(top), top, 0.0).detach()
    shares = torch.exp(bias - torch.gather(level, -1, index))
    return level + torch.log(torch.zeros_like(empty).scatter_add(-1, index, shares))


class VectorReadOut(nn.Module):
    """F_i = w . sum_j A_ij u_ij v_j with unit vectors u from atoms to keys; turns with its input, reflections included."""

    def __init__(self, sizes: GraphormerSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.q_proj = nn.Linear(sizes.width, sizes.width)
        self.k_proj = nn.Linear(sizes.width, sizes.width)
        self.v_proj = nn.Linear(sizes.width, sizes.width)
        self.force_proj = nn.Linear(sizes.width, 1, bias=False)

    def forward(self, x: Tensor, bias: Tensor, units: Tensor, keys: Keys) -> Tensor:
        """[B, N, 3] from tokens [B, N, D], the whole bias [B, H, N, N+E] and units [B, N, N+E, 3]."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v, bias = q.float(), k.float(), v.float(), bias.float()
        # The map to one number is the same along x, y, z, so values become one number per head before the sum.
        strength = torch.einsum("bhjd,hd->bhj", v, self.force_proj.weight.float().view(self.heads, -1))
        source = keys.source.unsqueeze(1)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        logits = torch.gather(logits, -1, source.unsqueeze(2).expand_as(bias)) + bias
        strengths = torch.gather(strength, -1, source.expand(-1, self.heads, -1))
        signed = (torch.softmax(logits, -1) * strengths.unsqueeze(2)).sum(1)
        return torch.einsum("bij,bijc->bic", signed, units)


def unit_vectors(positions: Tensor, keys: Keys) -> Tensor:
    """(r_i - r_j)/(|r_i - r_j| + 1e-5), [B, N, N+E, 3]."""
    displacement = positions.unsqueeze(2) - keys.positions(positions).unsqueeze(1)
    return displacement / (torch.linalg.vector_norm(displacement, dim=-1, keepdim=True) + UNIT_EPSILON)
