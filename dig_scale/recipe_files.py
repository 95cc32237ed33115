"""Recipes in TOML -> config.Recipe: `load_recipe(path, overrides)` reads a file, or a bundled recipe by its name, and applies
`--set section.key=value`. Files that a recipe names are relative to it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dig_scale.config import LANGUAGE_MODEL, TEMPLATE, Recipe
from dig_scale.config_properties import PREDICTOR
from dig_scale.errors import RecipeError


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Recipe from a TOML file or the name of a bundled one, with `section.key=value` overrides; raises RecipeError."""
    path = resolve_recipe_path(source)
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        content = apply_override(content, override)
    content = _anchor_files(content, path.parent)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Recipe from plain data; `source` is named in the RecipeError."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise RecipeError(f"{source}: " + "; ".join(lines)) from None


def bundled_recipes() -> dict[str, Path]:
    """Name -> path of the recipes that come with the project (the wheel's copy, or launch/recipes in a checkout)."""
    packaged = Path(str(resources.files("dig_scale"))) / "recipes"
    folder = packaged if packaged.is_dir() else Path(__file__).parent.parent / "launch" / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def resolve_recipe_path(source: str | Path) -> Path:
    """Path of a recipe given as a file or a bundled name; raises RecipeError listing the bundled names."""
    path = Path(source)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    if str(source) in bundled:
        return bundled[str(source)]
    raise RecipeError(f"no recipe {str(source)!r}: give a .toml file or one of {', '.join(bundled)}")


def apply_override(content: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `content` with one `section.key=value` applied; the value is read as TOML, else as a string."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"override {override!r}: expected section.key=value, as in train.learning_rate=1e-4")
    return _with_value(content, key.strip().split("."), _toml_value(text.strip()), override)


def _with_value(content: dict[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    if len(keys) == 1:
        return content | {keys[0]: value}
    inner = content.get(keys[0], {})
    if not isinstance(inner, dict):
        raise RecipeError(f"override {override!r}: {keys[0]} is not a section")
    return content | {keys[0]: _with_value(inner, keys[1:], value, override)}


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _anchor_files(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Files in a recipe are relative to the recipe; ${NAME} stands for an environment variable, if it is set."""
    anchored = dict(content)
    for key, named in (("systems", ("file", "prepared")), ("imports", ("files",))):
        entries = anchored.get(key)
        if isinstance(entries, list):
            anchored[key] = [_anchored_representations(_anchored_entry(one, named, folder), folder) for one in entries]
    train = anchored.get("train")
    for key, name in (("physics_informed", "candidates"), ("posterior", "pairs")):
        if isinstance(train, dict) and key in train:
            train = train | {key: _anchored_entry(train[key], (name,), folder)}
            anchored["train"] = train
    sample = anchored.get("sample")
    if isinstance(sample, dict) and "guide" in sample:
        anchored["sample"] = sample | {"guide": _anchored_predictor(sample["guide"], folder)}
    return anchored


def _anchored_predictor(guide: Any, folder: Path) -> Any:
    named = guide.get("property") if isinstance(guide, dict) else None
    if not isinstance(named, str) or not named.startswith(PREDICTOR):
        return guide
    return guide | {"property": PREDICTOR + _anchored(named.removeprefix(PREDICTOR), folder)}


def _anchored_representations(entry: Any, folder: Path) -> Any:
    """A file of representations is one of the recipe's files; a language model is a name, or a folder that starts with a dot."""
    options = entry.get("options") if isinstance(entry, dict) else None
    if not isinstance(options, dict) or not isinstance(options.get("representations"), str):
        return entry
    given = options["representations"]
    prefix = next((one for one in (LANGUAGE_MODEL, TEMPLATE) if given.startswith(one)), "")
    named = given.removeprefix(prefix)
    if prefix != LANGUAGE_MODEL or named.startswith("."):
        named = _anchored(named, folder)
    return entry | {"options": options | {"representations": prefix + named}}


def _anchored_entry(entry: Any, keys: Sequence[str], folder: Path) -> Any:
    """An entry with the files under `keys`, and those of its complex, relative to the recipe's folder."""
    if not isinstance(entry, dict):
        return entry
    anchored = {key: _anchored_files(entry[key], folder) for key in keys if key in entry}
    if "complex" in entry:
        anchored["complex"] = _anchored_entry(entry["complex"], ("protein", "ligand"), folder)
    return entry | anchored


def _anchored_files(value: Any, folder: Path) -> Any:
    return [_anchored(one, folder) for one in value] if isinstance(value, list) else _anchored(value, folder)


def _anchored(path: Any, folder: Path) -> str:
    filled = os.path.expandvars(str(path))
    return filled if "$" in filled else str(folder / filled)
