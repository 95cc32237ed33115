"""Published checkpoint files -> this project's networks, strictly: every tensor of the file in its place and none left over.

Recognised by their keys: DiG's protein network (`state_dict` inside), BioEmu 1.0 to 1.2 (a plain state dict, with the
config.yaml that came with it), and DiG's catalyst, ligand and carbon networks (fairseq files: `model` inside; the ligand
network's moving average where the file has one). A `module.` prefix is stripped; half and double precision become single.
Files are unpickled with weights_only, so they cannot run code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dig_scale.errors import UserError
from dig_scale.model.published.bioemu import BioEmu, BioEmuConfig, read_bioemu_config
from dig_scale.model.published.carbon import CARBON_SIZES, CarbonNet
from dig_scale.model.published.catalyst import CATALYST_SIZES, CatalystNet
from dig_scale.model.published.graphormer_v1 import GraphormerSizes
from dig_scale.model.published.ligand import LIGAND_SIZES, LigandNet
from dig_scale.model.published.protein import ProteinNet
from dig_scale.model.published.structure import StructureSizes

SHOWN = 4
"""Keys named in a message before the rest is counted."""

State = Mapping[str, Tensor]


class PublishedKind(StrEnum):
    """The published networks that load."""

    DIG_PROTEIN = "dig-protein"
    BIOEMU = "bioemu"
    DIG_CATALYST = "dig-catalyst"
    DIG_LIGAND = "dig-ligand"
    DIG_CARBON = "dig-carbon"


@dataclass(frozen=True)
class PublishedModel:
    """A published network in eval mode, the file it came from and, for BioEmu, its configuration."""

    kind: PublishedKind
    net: nn.Module
    source: Path
    config: BioEmuConfig | None = None

    def to(self, device: torch.device | str) -> PublishedModel:
        """The same on `device` (modules move in place, as in PyTorch)."""
        return replace(self, net=self.net.to(device))


def load_published(path: Path, config_path: Path | None = None) -> PublishedModel:
    """The network in a published file; raises UserError naming the file and the keys that do not fit.

    BioEmu's configuration is `config_path`, or config.yaml beside the file.
    """
    content = _read(path)
    kind = recognise(content, path)
    state = _prepared(content, kind, path)
    config = _bioemu_config(path, config_path) if kind is PublishedKind.BIOEMU else None
    return published_from_state(kind, state, config, path)


def published_from_state(
    kind: PublishedKind, state: State, config: BioEmuConfig | None, source: Path
) -> PublishedModel:
    """The network of this kind with these tensors; raises UserError naming the source and the keys that do not fit."""
    with torch.device("meta"):
        net = _build(kind, state, config)
    _check(net, state, kind, source)
    net.load_state_dict(state, strict=True, assign=True)
    return PublishedModel(kind, net.eval(), source, config)


def recognise(content: State, path: Path) -> PublishedKind:
    """Which published network the keys belong to; raises UserError if none."""
    marks = (
        ("model_nn.", PublishedKind.BIOEMU),
        ("st_module.", PublishedKind.DIG_PROTEIN),
        ("attention_layers.", PublishedKind.DIG_CARBON),
        ("graph_3d_bias_crystal.", PublishedKind.DIG_LIGAND),
        ("graph_3d_bias.", PublishedKind.DIG_CATALYST),
    )
    for mark, kind in marks:
        if any(key.startswith(mark) for key in content):
            return kind
    raise UserError(
        f"{path}: not a published network that is known here; its {len(content)} keys begin with {_named(content)}; "
        f"expected one of {', '.join(PublishedKind)}"
    )


def _read(path: Path) -> State:
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the published file itself")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as a file of tensors alone ({reason})") from None
    state = _unwrapped(content)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise UserError(
            f"{path}: holds no state dict; expected tensors by name, or these under 'state_dict' or 'model'"
        )
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _unwrapped(content: Any) -> Any:
    if not isinstance(content, Mapping):
        return content
    if "model" in content and isinstance(content["model"], Mapping):
        extra = content.get("extra_state")
        average = extra.get("ema") if isinstance(extra, Mapping) else None
        return average if isinstance(average, Mapping) and average else content["model"]
    return content.get("state_dict", content)


def _prepared(content: State, kind: PublishedKind, path: Path) -> State:
    """The state dict with old forms made new, in single precision."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in content.items()}
    if kind is PublishedKind.DIG_CATALYST:
        return _one_head(state)
    key = "encoder.graph_encoder.sid_encoder.weight"
    if kind is PublishedKind.DIG_CARBON and key not in state:
        # Nothing reads this table, and the published loader makes a new one.
        width = state["out_norm.weight"].shape[0] if "out_norm.weight" in state else CARBON_SIZES.width
        return state | {key: torch.zeros(20000, width)}
    return state


def _one_head(state: State) -> State:
    """Older catalyst files: no bias in the read-outs, one map for x, y, z instead of three, one read-out for both."""
    kept = {key: value for key, value in state.items() if not key.endswith("force_proj.bias")}
    for key in [key for key in kept if "force_proj1" in key]:
        parts = [kept.pop(key.replace("force_proj1", f"force_proj{axis}")) for axis in (1, 2, 3)]
        kept[key.replace("force_proj1", "force_proj")] = torch.stack(parts).mean(0)
    if not any(key.startswith("force_proj_delta_pos.") for key in kept):
        single = {key: value for key, value in kept.items() if key.startswith("force_proj.")}
        kept |= {key.replace("force_proj", "force_proj_delta_pos", 1): value for key, value in single.items()}
    return kept


def _bioemu_config(path: Path, config_path: Path | None) -> BioEmuConfig:
    chosen = config_path or path.with_name("config.yaml")
    if not chosen.is_file():
        raise UserError(
            f"{path} is a BioEmu checkpoint and {chosen} is missing: give the config.yaml that came with it"
        )
    return read_bioemu_config(chosen)


def _build(kind: PublishedKind, state: State, config: BioEmuConfig | None) -> nn.Module:
    if kind is PublishedKind.BIOEMU:
        assert config is not None
        return BioEmu(config)
    if kind is PublishedKind.DIG_PROTEIN:
        return ProteinNet(_structure_sizes(state))
    builders: dict[PublishedKind, tuple[Callable[[GraphormerSizes], nn.Module], GraphormerSizes]] = {
        PublishedKind.DIG_CATALYST: (CatalystNet, CATALYST_SIZES),
        PublishedKind.DIG_LIGAND: (LigandNet, LIGAND_SIZES),
        PublishedKind.DIG_CARBON: (CarbonNet, CARBON_SIZES),
    }
    builder, sizes = builders[kind]
    return builder(_graphormer_sizes(state, sizes))


def _rows(state: State, key: str, otherwise: int) -> int:
    return state[key].shape[0] if key in state and state[key].dim() else otherwise


def _layers(state: State, prefix: str, otherwise: int) -> int:
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return len(numbers) or otherwise


def _structure_sizes(state: State) -> StructureSizes:
    """Sizes by a few telling tensors; where one is missing the published size stands, and the check says so."""
    usual, first = StructureSizes(), "st_module.encoder.layers.0."
    return replace(
        usual,
        width=_rows(state, "x1d_proj.1.weight", usual.width),
        pair_width=_rows(state, "x2d_proj.1.weight", usual.pair_width),
        layers=_layers(state, "st_module.encoder.layers.", usual.layers),
        heads=_rows(state, first + "attn.trained_point_weight", usual.heads),
        hidden=_rows(state, first + "ffn.ff.0.weight", usual.hidden),
    )


def _graphormer_sizes(state: State, usual: GraphormerSizes) -> GraphormerSizes:
    encoder = "encoder.graph_encoder."
    return replace(
        usual,
        width=_rows(state, "encoder.layer_norm.weight", usual.width),
        layers=_layers(state, encoder + "layers.", usual.layers),
        heads=_rows(state, "graph_3d_bias.feature_proj.layer2.weight", usual.heads),
        hidden=_rows(state, encoder + "layers.0.fc1.weight", usual.hidden),
        kernels=_rows(state, "graph_3d_bias.feature_proj.layer1.weight", usual.kernels),
    )


def _check(net: nn.Module, state: State, kind: PublishedKind, path: Path) -> None:
    wanted = net.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    found = [f"{len(keys)} {word}: {_named(keys)}" for word, keys in problems.items() if keys]
    if found:
        raise UserError(f"{path} looks like {kind.value} but does not fit it: {'; '.join(found)}")


def _named(keys: Any) -> str:
    listed = list(keys)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
