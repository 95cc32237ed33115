"""Open Catalyst LMDB files -> plain dictionaries, without torch_geometric and without running what a pickle names.

In: an LMDB file or folder whose values are pickled torch_geometric Data objects (of either generation). Out: for every
entry, its key and its attributes as numpy arrays, numbers and strings. A pickle may name containers, NumPy arrays and
Torch tensors; any other name is refused. Knows nothing of surfaces.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dig_scale.errors import UserError

_NOT_ENTRIES = (b"length", b"__len__", b"__keys__")
_CONTAINER_MODULES = ("torch_geometric.", "fairchem.", "ocpmodels.")
_NUMPY_NAMES = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
}
_TORCH_NAMES = {
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
}


class Container:
    """What a pickled data object is read into: its attributes, whatever its class was."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments
        self.__dict__.update(named)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:
            state = {**(state[0] or {}), **(state[1] or {})}
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def read_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and attributes of every entry, in the order of numeric keys; raises UserError naming file and entry."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"{path}: reading it needs lmdb ({error}); pip install 'dig-scale[oc20]'") from error
    if not path.exists():
        raise UserError(f"no LMDB at {path}")
    try:
        environment = lmdb.open(
            str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
        )
    except lmdb.Error as error:
        raise UserError(f"{path}: LMDB cannot open it: {error}") from error
    with environment, environment.begin() as transaction:
        keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
        for key in sorted((key for key in keys if key not in _NOT_ENTRIES), key=_in_order):
            name = key.decode(errors="replace")
            yield name, attributes(bytes(transaction.get(key) or b""), f"{path}, entry {name!r}")


def attributes(data: bytes, place: str) -> dict[str, Any]:
    """Attributes of one pickled data object or dictionary; raises UserError naming `place` for what is not plain data."""
    try:
        content = _PlainUnpickler(io.BytesIO(data)).load()
    except _Refused as refused:
        raise UserError(f"{place}: its pickle names {refused}; expected data containers, arrays and tensors") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ImportError, TypeError, ValueError) as error:
        raise UserError(f"{place}: not a pickled data object: {error}") from error
    return {name: _plain(value) for name, value in _flat(content).items() if value is not None}


def _in_order(key: bytes) -> tuple[int, int, bytes]:
    return (0, int(key), key) if key.isdigit() else (1, 0, key)


def _flat(content: Any) -> dict[str, Any]:
    """Attributes of a container; those of new data objects lie in the mapping of a store."""
    held = dict(content) if isinstance(content, Mapping) else dict(vars(content))
    for inner in ("_store", "_mapping"):
        value = held.pop(inner, None)
        if isinstance(value, Container | Mapping):
            held |= _flat(value)
    return {name: value for name, value in held.items() if not name.startswith("_") and name != "arguments"}


def _plain(value: Any) -> Any:
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    return np.asarray(value) if isinstance(value, list | tuple) and value and not isinstance(value[0], str) else value


class _Refused(Exception):
    """A pickle names something that is no plain data."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_CONTAINER_MODULES):
            return Container
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in _NUMPY_NAMES:
            return super().find_class(module, name)
        known = _torch_names()
        if (module, name) in known:
            return known[module, name]
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, identifier: Any) -> Any:
        raise _Refused(f"outside data {identifier!r}")


def _torch_names() -> dict[tuple[str, str], Callable[..., Any]]:
    import importlib

    import torch

    names = {key: getattr(importlib.import_module(key[0]), key[1]) for key in _TORCH_NAMES}
    storages = {
        ("torch", name): getattr(torch, name)
        for name in ("FloatStorage", "DoubleStorage", "LongStorage", "IntStorage", "BoolStorage")
    }
    dtypes = {("torch", name): getattr(torch, name) for name in ("float32", "float64", "int64", "int32", "bool")}
    return names | storages | dtypes | {("torch.storage", "_load_from_bytes"): _storage_from_bytes}


def _storage_from_bytes(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)
