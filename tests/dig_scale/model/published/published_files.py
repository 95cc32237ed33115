"""Published checkpoint layouts, written down from their description rather than from the modules under test, and numbers to
fill them with that anyone can repeat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
BLOCK = 1024


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def united(parts: Iterable[Shapes]) -> Shapes:
    shapes: Shapes = {}
    for part in parts:
        shapes |= part
    return shapes


def structure_table(width: int, pair: int, layers: int, heads: int, hidden: int, buckets: int = 64) -> Shapes:
    """DiG's protein network; BioEmu's has the same keys."""
    shapes: Shapes = {
        "step_emb.dummy": (0,),
        **norm("x1d_proj.0", 384),
        "x1d_proj.1.weight": (width, 384),
        **norm("x2d_proj.0", 128),
        "x2d_proj.1.weight": (pair, 128),
        "rp_proj.relative_attention_bias.weight": (buckets, pair),
    }
    for i in range(layers):
        layer = f"st_module.encoder.layers.{i}"
        shapes |= norm(f"{layer}.norm1", width)
        shapes[f"{layer}.attn.trained_point_weight"] = (heads,)
        shapes |= {f"{layer}.attn.scalar_{name}.weight": (width, width) for name in ("query", "key", "value")}
        shapes[f"{layer}.attn.pair_bias.weight"] = (heads, pair)
        shapes |= {f"{layer}.attn.point_{name}.weight": (heads * 12, width) for name in ("query", "key")}
        shapes[f"{layer}.attn.point_value.weight"] = (heads * 24, width)
        shapes[f"{layer}.attn.pair_value.weight"] = (width, pair)
        shapes |= linear(f"{layer}.attn.fc_out", width, 2 * width + heads * 32)
        shapes |= norm(f"{layer}.norm2", width)
        shapes |= linear(f"{layer}.ffn.ff.0", hidden, width) | linear(f"{layer}.ffn.ff.3", width, hidden)
    for head in ("fc_t", "fc_eps"):
        name = f"st_module.diff_head.{head}"
        shapes |= norm(f"{name}.0", width) | linear(f"{name}.1", width, width) | linear(f"{name}.3", 3, width)
    return shapes


def protein_table() -> Shapes:
    return structure_table(768, 256, 12, 32, 1024)


def small_protein_table() -> Shapes:
    return structure_table(64, 16, 2, 4, 32)


def bioemu_table(shapes: Shapes, layers: int, width: int, pair: int, tables_per_layer: int = 0) -> Shapes:
    """The wrapper's prefix, and version 1.2's tables of residue types."""
    extra: Shapes = {}
    for i in range(layers * tables_per_layer):
        layer = f"st_module.encoder.layers.{i}"
        extra |= {f"{layer}.x1d_mul.weight": (30, width), f"{layer}.x1d_add.weight": (30, width)}
        extra |= {f"{layer}.x2d_mul.weight": (1000, pair), f"{layer}.x2d_add.weight": (1000, pair)}
        extra |= {f"{layer}.alpha_1d": (), f"{layer}.alpha_2d": ()}
    return {f"model_nn.{key}": shape for key, shape in (shapes | extra).items()}


BIOEMU_CONFIG = """
score_model:
  _target_: bioemu.shortcuts.DiGConditionalScoreModel
  dim_model: {width}
  dim_pair: {pair}
  dim_hidden: {hidden}
  dim_single_rep: 64
  dropout: 0.1
  extra_residue_embeds: {extra}
  max_distance_relative: 128
  num_buckets: 64
  num_heads: {heads}
  num_layers: {layers}
sdes:
  pos:
    _target_: bioemu.shortcuts.CosineVPSDE
    s: 0.008
  node_orientations:
    _target_: bioemu.shortcuts.DiGSO3SDE
    cache_dir: ~/sampling_so3_cache
    eps_t: 0.001
    num_sigma: {sigmas}
    num_omega: 200
    l_max: 200
    omega_exponent: 3
    sigma_min: 0.02
    sigma_max: 1.65
    tol: 1.0e-07
    overwrite_cache: false
"""


def bioemu_config(extra: str = "false", **sizes: int) -> str:
    given = {"width": 512, "pair": 256, "hidden": 1024, "heads": 32, "layers": 8, "sigmas": 20} | sizes
    return BIOEMU_CONFIG.format(extra=extra, **given)


def graphormer_table(tags: int, width: int = 768, layers: int = 12, heads: int = 32) -> Shapes:
    """What the three networks of atoms have in common."""
    graph = "encoder.graph_encoder"
    shapes: Shapes = {
        "encoder.lm_output_learned_bias": (1,),
        f"{graph}.graph_node_feature.atom_encoder.weight": (4609, width),
        f"{graph}.graph_node_feature.in_degree_encoder.weight": (512, width),
        f"{graph}.graph_node_feature.out_degree_encoder.weight": (512, width),
        f"{graph}.graph_node_feature.graph_token.weight": (1, width),
        f"{graph}.tag_embedding.weight": (tags, width),
        f"{graph}.graph_attn_bias.edge_encoder.weight": (1537, heads),
        f"{graph}.graph_attn_bias.edge_dis_encoder.weight": (128 * heads * heads, 1),
        f"{graph}.graph_attn_bias.spatial_pos_encoder.weight": (513, heads),
        f"{graph}.graph_attn_bias.graph_token_virtual_distance.weight": (1, heads),
        **norm(f"{graph}.emb_layer_norm", width),
    }
    for i in range(layers):
        layer = f"{graph}.layers.{i}"
        for name in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}.self_attn.{name}_proj", width, width)
        shapes |= norm(f"{layer}.self_attn_layer_norm", width) | norm(f"{layer}.final_layer_norm", width)
        shapes |= linear(f"{layer}.fc1", width, width) | linear(f"{layer}.fc2", width, width)
    shapes |= linear("encoder.lm_head_transform_weight", width, width) | norm("encoder.layer_norm", width)
    return shapes | distance_table("graph_3d_bias", width, heads) | read_out_table("force_proj", width)


def distance_table(name: str, width: int, heads: int) -> Shapes:
    first, second = linear(f"{name}.feature_proj.layer1", 128, 128), linear(f"{name}.feature_proj.layer2", heads, 128)
    return first | second | linear(f"{name}.edge_proj", width, 128)


def read_out_table(name: str, width: int) -> Shapes:
    shapes = united(linear(f"{name}.{part}_proj", width, width) for part in ("q", "k", "v"))
    return shapes | {f"{name}.force_proj.weight": (1, width)}


def pair_type_tables(name: str) -> Shapes:
    return {f"{name}.mul.weight": (16384, 1), f"{name}.bias.weight": (16384, 1)}


def two_channels() -> Shapes:
    shapes: Shapes = {}
    for name in ("graph_3d_bias.dist_feature_extractor", "graph_3d_bias.dist_feature_extractor_init"):
        shapes |= {f"{name}.means.weight": (50, 128), f"{name}.temps.weight": (50, 128)} | pair_type_tables(name)
    return shapes


def catalyst_table(width: int = 768, layers: int = 12, heads: int = 32) -> Shapes:
    common = graphormer_table(4, width, layers, heads)
    return common | two_channels() | read_out_table("force_proj_delta_pos", width)


def ligand_table(width: int = 768, layers: int = 12, heads: int = 32) -> Shapes:
    time = "encoder.graph_encoder.timestep_encoder"
    shapes = graphormer_table(3, width, layers, heads) | distance_table("graph_3d_bias_crystal", width, heads)
    for bias in ("graph_3d_bias", "graph_3d_bias_crystal"):
        name = f"{bias}.dist_feature_extractor"
        shapes |= {f"{name}.means": (128,), f"{name}.temps": (128,)} | pair_type_tables(name)
    shapes |= {f"{time}.time_proj.dummy": (0,)}
    shapes |= linear(f"{time}.time_embedding.0", width, width) | linear(f"{time}.time_embedding.2", width, width)
    per_layer = (linear(f"encoder.graph_encoder.layers.{i}.time_emb_layer.1", width, width) for i in range(layers))
    return shapes | united(per_layer)


def carbon_table(width: int = 768, layers: int = 12, heads: int = 32) -> Shapes:
    half = width // 2
    shapes = graphormer_table(15, width, layers, heads) | two_channels()
    shapes["encoder.graph_encoder.sid_encoder.weight"] = (20000, width)
    for i in range(4):
        layer = f"attention_layers.{i}"
        shapes |= norm(f"{layer}.layernorm", width) | {f"{layer}.vec_proj.weight": (3 * width, width)}
        shapes |= linear(f"{layer}.q_proj", width, width) | linear(f"{layer}.k_proj", width, width)
        shapes |= linear(f"{layer}.v_proj", 3 * width, width) | linear(f"{layer}.o_proj", 3 * width, width)
        shapes |= linear(f"{layer}.dk_proj", width, 128) | linear(f"{layer}.dv_proj", 3 * width, 128)
    shapes |= norm("out_norm", width) | {"out_norm_vec.weight": (width,)}
    shapes |= {"distance_expansion.means": (128,), "distance_expansion.betas": (128,)}
    for i, (into, out) in enumerate(((width, half), (half, 1))):
        block = f"output_model_noise.output_network.{i}"
        shapes |= {f"{block}.vec1_proj.weight": (into, into), f"{block}.vec2_proj.weight": (out, into)}
        shapes |= linear(f"{block}.update_net.0", into, 2 * into) | linear(f"{block}.update_net.2", 2 * out, into)
    return shapes


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def flat(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of these shapes that take no room: one number each, repeated."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand((), generator=generator).to(dtype).expand(shape) for key, shape in shapes.items()}


def random_state(shapes: Shapes, seed: int = 0, scale: float = 0.1) -> dict[str, Tensor]:
    """Normal numbers; norms and the gains of distances about 1, temperatures and means positive."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: scale * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return {key: value + offset(key) for key, value in state.items()}


def waves(shapes: Shapes, amplitude: float) -> dict[str, Tensor]:
    """The j-th tensor is amplitude * sin(0.1 n + j) in double precision, plus what `offset` says."""
    state = {}
    minor = 0.1 * torch.arange(BLOCK, dtype=torch.float64)
    for j, (key, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        # sin(a + b) = sin a cos b + cos a sin b: a sine per block instead of one per number
        major = 0.1 * BLOCK * torch.arange(-(-size // BLOCK), dtype=torch.float64).unsqueeze(1) + j
        sine = (major.sin() * minor.cos() + major.cos() * minor.sin()).flatten()[:size]
        state[key] = (amplitude * sine + offset(key)).float().reshape(shape)
    return state


def offset(key: str) -> float:
    """1 on gains: weights of norms and of distances by pair type, means and temperatures of radial kernels."""
    parts = key.split(".")
    normed = ("norm", "x1d_proj.0", "x2d_proj.0", "fc_t.0", "fc_eps.0", "out_norm_vec")
    is_norm = parts[-1] == "weight" and any(name in ".".join(parts[:-1]) for name in normed)
    is_radial = any(name in parts for name in ("mul", "means", "temps", "betas"))
    return 1.0 if is_norm or is_radial else 0.0


def wave(function: Any, rate: float, *shape: int) -> Tensor:
    """function(rate n) of the flat index n, in double precision, as float32."""
    return function(rate * torch.arange(math.prod(shape), dtype=torch.float64)).float().reshape(shape)


def rotations_of(axis_angles: Tensor) -> Tensor:
    """Matrices of axis-angles by the matrix exponential."""
    x, y, z = axis_angles.double().unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return torch.linalg.matrix_exp(torch.stack(rows, -2)).float()


def protein_inputs(residues: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """single, pair, positions (Å) and IR = R^T of the numeric anchors."""
    single, pair = wave(torch.sin, 0.37, residues, 384), wave(torch.cos, 0.11, residues, residues, 128)
    inverse = rotations_of(wave(torch.cos, 0.7, residues, 3))
    return single, pair, 10 * wave(torch.sin, 1.3, residues, 3), inverse


def save(content: Mapping[str, Any], path: Path) -> Path:
    torch.save(dict(content), path)
    return path


def representation_arrays(residues: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    single = generator.standard_normal((residues, 384), np.float32)
    return {"single": single, "pair": generator.standard_normal((residues, residues, 128), np.float32)}


SMALL = {"width": 64, "layers": 2, "heads": 8}
"""Sizes of the small networks of atoms."""


def atom_positions(atoms: int) -> tuple[Tensor, Tensor]:
    """Positions and reference positions [1, N, 3] Å."""
    positions = 3 * wave(torch.sin, 1.3, 1, atoms, 3)
    return positions, positions + 0.3 * wave(torch.cos, 0.9, 1, atoms, 3)


def slab_cell() -> Tensor:
    """A cell [1, 3, 3] Å small enough for images to matter."""
    return torch.tensor([[[6.0, 0.0, 0.0], [1.0, 7.0, 0.0], [0.0, 0.5, 15.0]]])


def formula_rows(atoms: int, features: int, edge_features: int) -> dict[str, Tensor]:
    """Rows of the tables by formulas: atoms [1, N, F], degree, spatial, hops."""
    i, f = torch.arange(atoms), torch.arange(features)
    pairs = 3 * i.unsqueeze(1) + 5 * i
    hop, e = torch.arange(5), torch.arange(edge_features)
    hops = 3 + 512 * e + (pairs[..., None, None] + 2 * hop.unsqueeze(-1)) % 4
    return {
        "atoms": (2 + 7 * i.unsqueeze(1) % 90 + 3 * f + 512 * f).unsqueeze(0),
        "degree": (1 + i % 4).unsqueeze(0),
        "spatial": (1 + pairs % 7).unsqueeze(0),
        "hops": torch.where(hop.unsqueeze(-1) < (pairs % 6)[..., None, None], hops, 0).unsqueeze(0),
    }
