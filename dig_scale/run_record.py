"""The record of a run in the folder of its results: what fixes them, so that only the same run adds to the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dig_shards.durable import replace_durably

from dig_scale.errors import UserError

RECORD = "run.json"


def claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Make `out` the folder of the run of this JSON-ready identity; raises UserError naming what differs where it is not."""
    record = out / RECORD
    if record.is_file():
        require_same(out, json.loads(record.read_text()), identity)
        return
    out.mkdir(parents=True, exist_ok=True)
    replace_durably(record, json.dumps(identity, indent=1).encode())


def require_same(out: Path, there: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises UserError where the identity recorded in `out` is not this one, naming what differs."""
    keys = [key for key in {**there, **identity} if there.get(key) != identity.get(key)]
    if keys:
        changed = "; ".join(f"{key} {there.get(key)} -> {identity.get(key)}" for key in keys)
        raise UserError(f"{out} holds another run ({changed}): give another --out")
