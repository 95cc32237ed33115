"""AlphaFold2's single and pair representations of a protein, from files; what published protein networks are given, and what
networks of one's own may be given (`represented`), a language model's embedding and a template's geometry among them.

In: `.npz` with `single` [N, 384] and `pair` [N, N, 128]; `.pkl` of AlphaFold2 or DiG, the same keys at the top or under
`representations`; or BioEmu's cache, `<name>_single.npy` with `<name>_pair.npy` beside it. Out: float32 arrays. Pickles are
read by an unpickler that knows numpy arrays, dict, list, tuple, str and numbers and refuses every other class, so a file
cannot run code. Representations must be AlphaFold2's own: those of other programs differ in their numbers.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dig_scale.config import LANGUAGE_MODEL, TEMPLATE
from dig_scale.errors import UserError
from dig_scale.system import System, SystemKind

SINGLE_WIDTH, PAIR_WIDTH = 384, 128
_NUMPY_MODULES = (
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
)
_NUMPY_NAMES = ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
_ALLOWED = frozenset((module, name) for module in _NUMPY_MODULES for name in _NUMPY_NAMES)


@dataclass(frozen=True)
class Representation:
    """What AlphaFold2 says of one protein of N residues: single [N, 384] and pair [N, N, 128] float32."""

    name: str
    single: np.ndarray
    pair: np.ndarray

    @property
    def residues(self) -> int:
        """Number of residues N."""
        return len(self.single)


def represented(system: System, source: str) -> System:
    """A protein with the features that `source` names: a file as read_representation takes it, `esm2:` and a language model,
    or `template:` and a structure.

    Raises UserError naming the file or model, and the system where it has another number of residues.
    """
    if system.kind != SystemKind.PROTEIN:
        raise UserError(f"{source}: representations are of residues, and system {system.name!r} is a {system.kind}")
    if source.startswith(LANGUAGE_MODEL):
        from dig_scale.importers.language_model import embedded

        single = embedded(system, source.removeprefix(LANGUAGE_MODEL))
        return replace(system, site_features=single, pair_features=None, origin=_origin(system, source))
    if source.startswith(TEMPLATE):
        from dig_scale.importers.templates import template_features

        path = Path(source.removeprefix(TEMPLATE))
        origin = _origin(system, TEMPLATE + path.name)
        found = template_features(system, path)
        return replace(system, site_features=found.site, pair_features=found.pair, origin=origin)
    read = read_representation(Path(source))
    if read.residues != system.n_sites:
        raise UserError(
            f"{source}: single and pair are of {read.residues} residues, system {system.name!r} has {system.n_sites}"
            + _left_out(system)
        )
    origin = _origin(system, Path(source).name)
    return replace(system, site_features=read.single, pair_features=read.pair, origin=origin)


def _origin(system: System, representations: str) -> dict[str, Any]:
    return system.origin | {"representations": representations}


def _left_out(system: System) -> str:
    missing = system.origin.get("left_out")
    return f" (left out of it: {'; '.join(missing[:3])}{'; ...' if len(missing) > 3 else ''})" if missing else ""


def read_representation(path: Path) -> Representation:
    """The representation in a .npz, a .pkl or a *_single.npy; raises UserError naming the file, the array and its shape."""
    if not path.is_file():
        raise UserError(f"no representations at {path}: give AlphaFold2's single and pair as .npz or .pkl")
    readers = {".npz": _from_npz, ".pkl": _from_pickle, ".pickle": _from_pickle, ".npy": _from_npy}
    if path.suffix not in readers:
        raise UserError(f"{path}: representations are read from .npz, .pkl or _single.npy, not from {path.suffix!r}")
    arrays = readers[path.suffix](path)
    single, pair = (_array(arrays, name, path) for name in ("single", "pair"))
    count = len(single)
    for name, array, expected in (
        ("single", single, (count, SINGLE_WIDTH)),
        ("pair", pair, (count, count, PAIR_WIDTH)),
    ):
        if array.shape != expected:
            raise UserError(f"{path}: {name} has shape {array.shape}, expected {expected} for {count} residues")
        if not np.isfinite(array).all():
            raise UserError(f"{path}: {name} has entries that are not finite numbers")
    return Representation(path.stem, single, pair)


def _from_npz(path: Path) -> Mapping[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a readable .npz: {error}") from None


def _from_npy(path: Path) -> Mapping[str, Any]:
    beside = path.with_name(path.name.replace("_single.npy", "_pair.npy"))
    if not path.name.endswith("_single.npy") or not beside.is_file():
        raise UserError(f"{path}: expected <name>_single.npy with <name>_pair.npy beside it")
    try:
        return {"single": np.load(path, allow_pickle=False), "pair": np.load(beside, allow_pickle=False)}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} or {beside.name} is not a readable .npy: {error}") from None


def _from_pickle(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as stream:
            content = _ArraysOnly(stream).load()
    except _ForbiddenError as error:
        raise UserError(f"{path}: {error}; save single and pair as an .npz instead") from None
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{path} is not a readable pickle: {type(error).__name__}: {error}") from None
    if isinstance(content, Mapping) and isinstance(content.get("representations"), Mapping):
        content = content["representations"]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict with 'single' and 'pair'")
    return content


def _array(arrays: Mapping[str, Any], name: str, path: Path) -> np.ndarray:
    if name not in arrays:
        raise UserError(f"{path}: no {name!r} among {sorted(map(str, arrays))}; AlphaFold2 must return representations")
    array = arrays[name]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(
            f"{path}: {name} is a {getattr(array, 'dtype', type(array).__name__)}, expected an array of numbers"
        )
    return np.asarray(array, np.float32)


class _ForbiddenError(pickle.UnpicklingError):
    """A pickle names something else than arrays and plain values."""


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _ForbiddenError(f"the pickle asks for bytes in {encoding!r}, and only latin1 is read")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays and plain values; any other name in the file is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """The few constructors of numpy arrays, and the one by which old protocols write bytes."""
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) not in _ALLOWED:
            raise _ForbiddenError(
                f"the pickle asks for {module}.{name}, and only numpy arrays and plain values are read"
            )
        return super().find_class(module, name)
