"""The house's plan, checked: floors, doors for heavy packages, no boolean parameters, quiet imports, small rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dig_scale.system import SystemKind

ROOT = Path(__file__).parent.parent.parent
PACKAGES = (ROOT / "dig_scale", ROOT / "kernels" / "dig_kernels", ROOT / "data_shards" / "dig_shards")
DOORS = {
    "deepspeed": {"dig_scale/training/zero.py"},
    "ray": {
        "dig_scale/simulation/campaign.py",
        "dig_scale/simulation/potential_actors.py",
        "dig_scale/simulation/relabel.py",
        "dig_scale/serving/app.py",
    },
    "openmm": {
        "dig_scale/simulation/mmff.py",
        "dig_scale/simulation/openmm_engine.py",
        "dig_scale/simulation/openmm_pocket.py",
        "dig_scale/simulation/openmm_potential.py",
        "dig_scale/simulation/openmm_prepared.py",
        "dig_scale/simulation/openmm_solvent.py",
        "dig_scale/simulation/openmm_systems.py",
        "dig_scale/importers/protein.py",
        "dig_scale/importers/completion.py",
    },
}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in package.rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_imports_run_downward_only() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", DOORS)
def test_heavy_packages_come_in_through_their_doors_alone(package: str) -> None:
    users = {path.relative_to(ROOT).as_posix() for path in sources() if package in imported(path)}
    assert users <= DOORS[package]


def test_triton_stays_in_the_kernels_and_a_processor_does_without() -> None:
    users = {path.relative_to(ROOT).parts[:2] for path in sources() if "triton" in imported(path)}
    assert users == {("kernels", "dig_kernels")}
    code = "import sys, dig_scale.model.score_model, dig_scale.sampling.integrate; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


KIND_DOORS = ("dig_scale/model/features.py", "dig_scale/diffusion/composition.py", "dig_scale/importers/")


def names_a_kind(node: ast.AST) -> bool:
    return any(
        isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "SystemKind"
        for part in ast.walk(node)
    )


def choices_by_kind(path: Path) -> list[int]:
    """Lines that compare with, match, or look up a SystemKind, or compare an attribute `kind` with a text."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        chosen: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            of_kind = any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides)
            text = any(isinstance(part, ast.Constant) and part.value in list(SystemKind) for part in ast.walk(node))
            chosen = [node] if names_a_kind(node) or (of_kind and text) else []
        elif isinstance(node, ast.Dict):
            chosen = [key for key in node.keys if key is not None and names_a_kind(key)]
        elif isinstance(node, ast.match_case):
            chosen = [node.pattern] if names_a_kind(node.pattern) else []
        elif isinstance(node, ast.Subscript):
            chosen = [node] if names_a_kind(node.slice) else []
        lines += [one.lineno for one in chosen if hasattr(one, "lineno")]
    return lines


def test_only_features_processes_and_importers_choose_by_kind_of_system() -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        if not path.relative_to(ROOT).as_posix().startswith(KIND_DOORS)
        for line in choices_by_kind(path)
    ]
    assert not offenders


def test_a_choice_by_kind_is_seen(tmp_path: Path) -> None:
    lines = (
        "a = system.kind is SystemKind.PROTEIN",
        "b = {SystemKind.CRYSTAL: 1}[system.kind]",
        "c = system.kind == 'molecule'",
        "d = system.kind in (SystemKind.CATALYST, SystemKind.CRYSTAL)",
        "e = table[SystemKind.PROTEIN]",
        "match system.kind:\n    case SystemKind.PROTEIN:\n        f = 1",
    )
    path = tmp_path / "chooses.py"
    for line in lines:
        path.write_text(line)
        assert choices_by_kind(path), line
    path.write_text("g = System(kind=SystemKind.MOLECULE, name=str(system.kind))")
    assert not choices_by_kind(path)


def test_no_public_function_takes_a_boolean() -> None:
    offenders = []
    for path in sources():
        for function in functions(path):
            arguments = [*function.args.args, *function.args.kwonlyargs]
            annotations = [ast.unparse(a.annotation) for a in arguments if a.annotation]
            if not function.name.startswith("_") and any(text in ("bool", "bool | None") for text in annotations):
                offenders.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}")
    assert not offenders


def test_every_module_and_public_name_says_what_it_is() -> None:
    silent = []
    for path in sources():
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            silent.append(str(path.relative_to(ROOT)))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not silent


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "misc", "helpers"}
    assert not [path for path in sources() if path.stem in drawers]


def test_the_command_line_starts_without_heavy_packages() -> None:
    code = "import sys, dig_scale.cli; print([m for m in ('torch', 'ray', 'deepspeed', 'openmm', 'mdtraj') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
