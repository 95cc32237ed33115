"""Map, concatenate and select over frozen dataclasses of tensors (fields may be None, tensors, or such dataclasses again)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def tree_map(function: Callable[..., Tensor], tree: T, *others: T) -> T:
    """A copy of `tree` with `function` applied to every tensor (and the tensors at the same place in `others`)."""
    if isinstance(tree, Tensor):
        return cast(T, function(tree, *others))
    if is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in fields(tree)]
        values = {n: tree_map(function, getattr(tree, n), *(getattr(o, n) for o in others)) for n in names}
        return type(tree)(**values)
    return tree


def tree_select(tree: T, rows: Tensor) -> T:
    """Rows of every tensor along its leading axis; `rows` is an index or a mask."""
    return tree_map(lambda leaf: leaf[rows], tree)


def tree_cat(trees: Sequence[T]) -> T:
    """Concatenation along the leading axis; the trees have the same structure."""
    first, *rest = trees
    return tree_map(lambda *leaves: torch.cat(leaves), first, *rest)


def tree_to(tree: T, device: torch.device | str) -> T:
    """A copy on `device`."""
    return tree_map(lambda leaf: leaf.to(device), tree)


def leading_size(tree: Any) -> int:
    """Length of the leading axis of the first tensor found; raises ValueError where there is none."""
    if isinstance(tree, Tensor):
        return len(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            value = getattr(tree, field.name)
            if value is not None and (isinstance(value, Tensor) or is_dataclass(value)):
                return leading_size(value)
    raise ValueError(f"no tensor in {type(tree).__name__}")
