"""A published network as a folder of this project: published.safetensors, and published.json which says what it is.

In: a PublishedModel. Out: the folder, and the model back from it without the published file; nothing in it can execute.
published.json holds the format version, the kind, BioEmu's configuration, and name and SHA-256 of the file it came from. It
is written last: a folder without it holds no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dig_shards.durable import replace_durably
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dig_scale.errors import UserError
from dig_scale.model.published.bioemu import BioEmuConfig, ResidueTables
from dig_scale.model.published.structure import StructureSizes
from dig_scale.model.published.weights import PublishedKind, PublishedModel, load_published, published_from_state

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "published.safetensors", "published.json"


@dataclass(frozen=True)
class PublishedFolder:
    """What a folder holds: the model, and the name and SHA-256 of the published file."""

    model: PublishedModel
    source: str
    sha256: str

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return len(self.model.net.state_dict())

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.net.parameters())


def is_published(folder: Path) -> bool:
    """Whether a folder holds a published network."""
    return (folder / DESCRIPTION).is_file()


def import_published(file: Path, config: Path | None, out: Path) -> PublishedFolder:
    """Write the network of a published file into `out`; returns what is there then.

    Raises UserError where the file does not load whole, or `out` holds another network.
    """
    model = load_published(file, config)
    written = PublishedFolder(model, file.name, _sha256(file))
    description = _description(written)
    if is_published(out) and _described(out) != description:
        raise UserError(f"{out} holds another published network; choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{WEIGHTS}.tmp"
    # tensors that share memory become their own
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.net.state_dict().items()}
    save_file(state, temporary)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(out / WEIGHTS)
    replace_durably(out / DESCRIPTION, json.dumps(description, indent=1).encode())
    return written


def read_published(folder: Path) -> PublishedFolder:
    """The network in a folder; raises UserError naming the file that is missing or does not fit."""
    description = _described(folder)
    file = folder / WEIGHTS
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file: {error}; import the published file again"
        ) from None
    try:
        kind, config = PublishedKind(description["kind"]), _config(description["config"])
        source, sha256 = str(description["source"]), str(description["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / DESCRIPTION}: {error!r}; import the published file again") from None
    return PublishedFolder(published_from_state(kind, state, config, file), source, sha256)


def _description(written: PublishedFolder) -> dict[str, Any]:
    model, config = written.model, None
    if model.config is not None:
        config = asdict(model.config) | {"tables": model.config.tables.value}
    return {
        "format_version": FORMAT_VERSION,
        "kind": model.kind.value,
        "config": config,
        "source": written.source,
        "sha256": written.sha256,
        "tensors": written.tensors,
        "parameters": written.parameters,
    }


def _described(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not describe a published network ({error}); run `dig-scale import-weights`"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format {version!r}, this version reads {FORMAT_VERSION}; import the file again")
    return content


def _config(content: dict[str, Any] | None) -> BioEmuConfig | None:
    if content is None:
        return None
    sizes, tables = StructureSizes(**content["sizes"]), ResidueTables(content["tables"])
    return BioEmuConfig(sizes, tables, content["positions"], content["rotations"])


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
