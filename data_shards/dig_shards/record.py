"""One training example, as named arrays.

In: decoded arrays of one frame. Out: the same, with where they came from. Knows no molecules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dig_shards.fields import FieldSpec


@dataclass(frozen=True)
class Source:
    """Where a frame came from: a trajectory's name and the frame's number in that trajectory."""

    trajectory: str
    frame: int


@dataclass(frozen=True)
class Record:
    """One frame of one system: `arrays[name]` has shape `fields[i].shape`, float32 where the field has a scale."""

    system_id: str
    source: Source
    arrays: Mapping[str, np.ndarray]
    fields: tuple[FieldSpec, ...]
