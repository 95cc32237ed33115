"""Mutants of kernel modules: a gate that cannot fail when a sign flips guards nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """The module with the one occurrence of `right` in its source replaced by `wrong`, written to and loaded from `folder`."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(right) == 1, f"{right!r} does not stand exactly once in {module.__file__}"
    path = folder / "mutant.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None and spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed
