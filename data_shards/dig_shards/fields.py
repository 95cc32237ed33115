"""Named per-frame arrays and the integer grid they are stored on.

In: float or integer arrays [frames, *shape]. Out: arrays of the stored type. A field with a `scale` holds floats on a
grid: value = integer * scale, so the error is at most scale / 2. Knows neither files nor what a field means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dig_shards.errors import ShardError

POSITION_SCALE = 1e-3
"""Default grid for positions: 1e-3 of the unit, so int32 spans about two million units each way."""

STORED_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class FieldSpec:
    """One named per-frame array: `shape` of a frame, stored `dtype`, grid `scale` (None: stored as is), and `unit`.

    Raises ShardError for a name, shape, dtype or scale that the formats cannot hold.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "int32"
    scale: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ShardError(f"field name {self.name!r}: use lower-case letters, digits and _ (at most 64), no dots")
        if any(size < 1 for size in self.shape):
            raise ShardError(f"field {self.name}: shape {self.shape} has an empty axis; leave the field out instead")
        if self.dtype not in STORED_DTYPES:
            raise ShardError(f"field {self.name}: stored dtype {self.dtype!r} is not one of {', '.join(STORED_DTYPES)}")
        if self.scale is None:
            return
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ShardError(f"field {self.name}: scale {self.scale} must be finite and positive")
        if self.storage.kind == "f":
            raise ShardError(f"field {self.name}: a scale needs an integer dtype such as int32, not {self.dtype}")

    @property
    def storage(self) -> np.dtype[Any]:
        """The stored numpy dtype, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def frame_bytes(self) -> int:
        """Bytes of one stored frame."""
        return self.storage.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        """The field as a JSON object; `from_json` is its inverse."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "scale": self.scale,
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> FieldSpec:
        """The field a JSON object describes."""
        return cls(
            name=document["name"],
            shape=tuple(document["shape"]),
            dtype=document["dtype"],
            scale=document["scale"],
            unit=document["unit"],
        )


def encode(spec: FieldSpec, values: np.ndarray, where: str, first_frame: int = 0) -> np.ndarray:
    """Stored form [F, *shape] of a field's values [F, *shape].

    Raises ShardError, naming `where`, field and frame, for a wrong shape, a non-finite value, or one outside the grid.
    """
    values = np.asarray(values)
    if values.ndim != 1 + len(spec.shape) or values.shape[1:] != spec.shape:
        expected = ", ".join(["frames", *map(str, spec.shape)])
        raise ShardError(f"{where}: field {spec.name} has shape {list(values.shape)}, expected [{expected}]")
    if values.dtype.kind not in "fiub":
        raise ShardError(f"{where}: field {spec.name} has dtype {values.dtype}, expected real numbers")
    _require(np.isfinite(values), values, spec, where, first_frame, "is not finite; drop or recompute this frame")
    if spec.scale is None and spec.storage.kind == "f":
        return _to_float(spec, values, where, first_frame)
    on_grid = values if spec.scale is None else np.rint(np.divide(values, spec.scale, dtype=np.float64))
    if spec.scale is None:
        _require(on_grid == np.rint(on_grid), values, spec, where, first_frame, "is no integer; give the field a scale")
    limits = np.iinfo(spec.storage)
    step = 1 if spec.scale is None else spec.scale
    reach = f"is outside [{limits.min * step:g}, {limits.max * step:g}] {spec.unit}; use a wider dtype or coarser scale"
    # In floating point the top of the 64-bit range rounds up, hence the strict comparison against max + 1.
    _require((on_grid >= limits.min) & (on_grid < limits.max + 1), values, spec, where, first_frame, reach)
    return on_grid.astype(spec.storage)


def decode(spec: FieldSpec, stored: np.ndarray) -> np.ndarray:
    """Values of stored integers: float32 for a field with a scale, otherwise a copy in the stored dtype."""
    if spec.scale is None:
        return stored.astype(spec.storage.newbyteorder("="))
    return np.asarray(np.multiply(stored, np.float32(spec.scale), dtype=np.float32, casting="unsafe"))


def _to_float(spec: FieldSpec, values: np.ndarray, where: str, first_frame: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = values.astype(spec.storage)
    _require(np.isfinite(stored), values, spec, where, first_frame, f"overflows {spec.dtype}; use float64")
    return stored


def _require(
    good: np.ndarray, values: np.ndarray, spec: FieldSpec, where: str, first_frame: int, complaint: str
) -> None:
    if good.all():
        return
    position = np.unravel_index(int(np.argmin(good)), good.shape)
    raise ShardError(
        f"{where}: field {spec.name}, frame {first_frame + int(position[0])}: {values[position]} {complaint}"
    )
