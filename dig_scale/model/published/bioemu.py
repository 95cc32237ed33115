"""BioEmu's network (Lewis et al. 2025; microsoft/bioemu, versions 1.0 to 1.2) and the configuration that comes with it.

In: noised residue frames (Å), diffusion time t in [0, 1], single [N, 384] and pair [N, N, 128] of AlphaFold2, residue types.
Out: `translation` = sigma_t times the score of positions (global frame, order 1, the same in nm and Å) and `rotation` = the
score of rotations over BioEmu's scale, as a tangent v of this project's frames, R -> R exp(v).

Units. BioEmu diffuses positions in nm; they are divided by 10 at this door. Frames. BioEmu's are AlphaFold2's, R' local to
global with x = C - CA and y towards N; this project's are R = R' Q^T (e1 = N - CA, e2 towards C) with the constant Q whose
columns are AlphaFold2's axes in this project's frame, for the ideal residue N (-0.525, 1.363, 0), C (1.526, 0, 0) Å. BioEmu
steps R' -> R' exp(v'), so v = Q v'. Inside, its network takes R'^T, which is no more than a matter of storage.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from dig_scale.errors import UserError
from dig_scale.model.published.protein import Conditioned
from dig_scale.model.published.structure import (
    PAIR_WIDTH,
    SINGLE_WIDTH,
    PairWork,
    Pose,
    SequenceOffset,
    StepEmbedding,
    StructureLayer,
    StructureModule,
    StructureSizes,
    evoformer_projection,
)
from dig_scale.units import ANGSTROM_PER_NM

TIME_SCALE = 1000.0
IDEAL_N, IDEAL_C = (-0.525, 1.363, 0.0), (1.526, 0.0, 0.0)
"""AlphaFold2's local N and C, Å, with CA at the origin."""
RESIDUE_TYPES, PAIR_TYPES, PAIR_STRIDE = 30, 1000, 30
RESIDUE_CODES = dict(zip("XACDEFGHIKLMNPQRSTVWYUOBZ", (*range(24), 25), strict=True))
"""One-letter code -> row of the residue tables, as in the training of version 1.2."""


class ResidueTables(Enum):
    """Whether layers modulate their input by residue types."""

    NONE = "none"
    PER_LAYER = "per layer"


@dataclass(frozen=True)
class BioEmuConfig:
    """What config.yaml says: sizes, residue tables, and the parameters of the two processes by name."""

    sizes: StructureSizes = field(default_factory=lambda: StructureSizes(width=512, layers=8))
    tables: ResidueTables = ResidueTables.NONE
    positions: dict[str, float] = field(default_factory=lambda: {"s": 0.008})
    rotations: dict[str, float] = field(default_factory=dict)


_SIZES = {
    "dim_model": "width",
    "dim_pair": "pair_width",
    "num_layers": "layers",
    "num_heads": "heads",
    "dim_hidden": "hidden",
    "num_buckets": "buckets",
    "max_distance_relative": "longest_offset",
}
_UNUSED = {"_target_", "dim_single_rep", "dropout", "extra_residue_embeds"}
_ROTATION_KEYS = {"eps_t", "num_sigma", "num_omega", "omega_exponent", "l_max", "sigma_min", "sigma_max", "tol"}
_CACHING = {"_target_", "cache_dir", "overwrite_cache"}


def read_bioemu_config(path: Path) -> BioEmuConfig:
    """The configuration in a BioEmu config.yaml; raises UserError naming the file and the entry that is not understood."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable BioEmu config.yaml: {' '.join(str(error).split())}") from None
    model = _section(content, path, "score_model", "DiGConditionalScoreModel")
    unknown = sorted(set(model) - set(_SIZES) - _UNUSED)
    if unknown:
        raise UserError(f"{path}, score_model: entries {unknown} are not known; expected some of {sorted(_SIZES)}")
    defaults = BioEmuConfig()
    given = {_SIZES[key]: int(value) for key, value in model.items() if key in _SIZES}
    sizes = {f.name: getattr(defaults.sizes, f.name) for f in fields(StructureSizes)} | given
    processes = content.get("sdes") or {}
    return BioEmuConfig(
        StructureSizes(**sizes),
        ResidueTables.PER_LAYER if model.get("extra_residue_embeds") else ResidueTables.NONE,
        _numbers(processes, path, "pos", "CosineVPSDE", {"s"}) or defaults.positions,
        _numbers(processes, path, "node_orientations", "DiGSO3SDE", _ROTATION_KEYS),
    )


def _section(content: Any, path: Path, name: str, target: str) -> dict[str, Any]:
    section = content.get(name) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{path}: no {name} section; give the config.yaml that came with the BioEmu checkpoint")
    found = str(section.get("_target_", target))
    if found.split(".")[-1] != target:
        raise UserError(f"{path}, {name}: _target_ {found!r}, expected one that ends in {target}")
    return section


def _numbers(processes: dict[str, Any], path: Path, name: str, target: str, allowed: set[str]) -> dict[str, float]:
    if name not in processes:
        return {}
    section = _section(processes, path, name, target)
    unknown = sorted(set(section) - allowed - _CACHING)
    if unknown:
        raise UserError(f"{path}, sdes.{name}: entries {unknown} are not known; expected some of {sorted(allowed)}")
    return {key: float(value) for key, value in section.items() if key in allowed}


def residue_codes(sequence: str) -> Tensor:
    """Rows [N] int64 of the residue tables for a one-letter sequence; raises UserError naming a letter it does not know."""
    unknown = sorted(set(sequence) - set(RESIDUE_CODES))
    if unknown:
        raise UserError(f"sequence: letters {unknown} are no residue types; expected {''.join(sorted(RESIDUE_CODES))}")
    return torch.tensor([RESIDUE_CODES[letter] for letter in sequence])


def alphafold_axes() -> Tensor:
    """Q [3, 3]: AlphaFold2's residue axes (columns) in this project's residue frame."""
    n, c = torch.tensor(IDEAL_N, dtype=torch.float64), torch.tensor(IDEAL_C, dtype=torch.float64)
    first = n / n.norm()
    second = c - (c @ first) * first
    second = second / second.norm()
    return torch.stack([first, second, torch.linalg.cross(first, second)]).float()


class ModulatedLayer(StructureLayer):
    """A layer that first scales and shifts its input by residue types; tokens keep the change, the pair tensor does not."""

    def __init__(self, sizes: StructureSizes) -> None:
        super().__init__(sizes)
        self.x1d_mul = nn.Embedding(RESIDUE_TYPES, sizes.width)
        self.x1d_add = nn.Embedding(RESIDUE_TYPES, sizes.width)
        self.x2d_mul = nn.Embedding(PAIR_TYPES, sizes.pair_width)
        self.x2d_add = nn.Embedding(PAIR_TYPES, sizes.pair_width)
        self.alpha_1d = nn.Parameter(torch.tensor(0.0))
        self.alpha_2d = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, pair: Tensor, residues: Tensor | None, work: PairWork) -> Tensor:
        """[B, N, D]; residue types [N] are needed."""
        if residues is None:
            raise UserError("this BioEmu network takes residue types: give the sequence of the protein")
        pairs = residues.unsqueeze(1) * PAIR_STRIDE + residues
        x = x + self.alpha_1d * (x * self.x1d_mul(residues) + self.x1d_add(residues))
        pair = pair + self.alpha_2d * (pair * self.x2d_mul(pairs) + self.x2d_add(pairs))
        return super().forward(x, pair, residues, work)


class BioEmuNet(nn.Module):
    """The network inside BioEmu's wrapper (prefix `model_nn.` of the published state dict)."""

    def __init__(self, config: BioEmuConfig) -> None:
        super().__init__()
        sizes = config.sizes
        self.step_emb = StepEmbedding(sizes.width)
        self.x1d_proj = evoformer_projection(SINGLE_WIDTH, sizes.width)
        self.x2d_proj = evoformer_projection(PAIR_WIDTH, sizes.pair_width)
        self.rp_proj = SequenceOffset(sizes)
        layer = ModulatedLayer if config.tables is ResidueTables.PER_LAYER else StructureLayer
        self.st_module = StructureModule(sizes, layer)


class BioEmu(nn.Module):
    """BioEmu's score network; see the module's header."""

    def __init__(self, config: BioEmuConfig = BioEmuConfig()) -> None:
        super().__init__()
        self.config = config
        self.model_nn = BioEmuNet(config)

    def condition(self, single: Tensor, pair: Tensor, sequence: str | None = None) -> Conditioned:
        """The static features of a protein; its sequence is needed by version 1.2 alone."""
        net = self.model_nn
        codes = residue_codes(sequence).to(single.device) if sequence is not None else None
        return Conditioned(net.x1d_proj(single), net.x2d_proj(pair) + net.rp_proj(len(single)), codes)

    def forward(self, pose: Pose, t: Tensor, protein: Conditioned) -> tuple[Tensor, Tensor]:
        """translation and rotation [B, N, 3] at times t [B] in [0, 1]; positions of the pose in Å."""
        axes = alphafold_axes().to(pose.rotations)
        inner = Pose(pose.positions / ANGSTROM_PER_NM, pose.rotations @ axes, pose.known)
        tokens = protein.tokens + self.model_nn.step_emb(TIME_SCALE * t).unsqueeze(1)
        translation, rotation = self.model_nn.st_module(tokens, protein.pair, inner, protein.residues)
        return inner.turned(translation.unsqueeze(2)).squeeze(2), rotation @ axes.T
