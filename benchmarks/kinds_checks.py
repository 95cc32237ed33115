"""Rows of benchmarks/kinds.py that need no training: one code path, published weights, frames, IGSO(3), bad input."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.rows import Row, at_most, note

ROOT = Path(__file__).parent.parent
FIFTH_KIND = ROOT / "tests" / "dig_scale" / "training" / "test_new_kind.py"
PUBLISHED_TESTS = ("tests/dig_scale/model/published", "tests/dig_scale/sampling/test_released.py")
DRAWS = 100_000


def code_rows() -> list[Row]:
    """Branching on the kind of system, and the size of a toy fifth kind."""
    allowed = ("dig_scale/model/features.py", "dig_scale/diffusion/composition.py", "dig_scale/importers/")
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "dig_scale").rglob("*.py"))
        if any(_asks_for_kind(node) for node in ast.walk(ast.parse(path.read_text())))
    ]
    astray = [name for name in found if not name.startswith(allowed) and name != "dig_scale/system.py"]
    passed = _passes(str(FIFTH_KIND.relative_to(ROOT)))
    return [
        at_most("one code path: files that branch on SystemKind elsewhere", float(len(astray)), "", 0),
        at_most("one code path: lines of a fifth kind", float(_lines_of_fifth_kind()), "lines", 60),
        _verdict("one code path: the fifth kind is packed, trained and sampled", passed),
    ]


def _asks_for_kind(node: ast.AST) -> bool:
    """Whether code compares, matches or dispatches on the kind of a system."""
    if isinstance(node, ast.Compare | ast.Match):
        asked = ast.unparse(node if isinstance(node, ast.Compare) else node.subject)
        return "SystemKind." in asked or re.search(r"\bsystem\.kind\b", asked) is not None
    if isinstance(node, ast.Dict):
        return any(key is not None and ast.unparse(key).startswith("SystemKind.") for key in node.keys)
    return False


def published_rows() -> list[Row]:
    """Anchors of the published protein network, strict loading of all published layouts, replay of an init state."""
    return [_verdict(f"published weights: {name}", _passes(name)) for name in PUBLISHED_TESTS]


def _passes(*tests: str) -> bool:
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        print(run.stdout[-2000:], file=sys.stderr)
    return run.returncode == 0


def _verdict(measure: str, passed: bool) -> Row:
    return Row(measure, "passed" if passed else "failed", "", "passed", passed)


def _lines_of_fifth_kind() -> int:
    """Code lines of the whole extension in its test: from its first constant to its two entries in registries."""
    text = FIFTH_KIND.read_text()
    inside = re.search(r"^BOND = .*?^@pytest.fixture\n.*?(?=^@pytest)", text, re.S | re.M)
    if inside is None:
        raise ValueError(f"{FIFTH_KIND}: the new kind is not where it was")
    return sum(1 for line in inside.group().splitlines() if line.strip() and not line.strip().startswith("#"))


def frame_rows(shared: Path) -> list[Row]:
    """N, CA, C of every PDB file through frames and back."""
    from dig_scale.errors import UserError
    from dig_scale.geometry.rotations import frames_from_backbone, to_global, to_local
    from dig_scale.importers.backbone_file import BackboneOptions, read_models

    worst, determinant, files, refused = 0.0, 0.0, 0, []
    for path in sorted(shared.rglob("*.pdb")):
        try:
            models = read_models(path, BackboneOptions())
        except UserError as error:
            refused.append(f"{path.name}: {error}")
            continue
        files += 1
        for model in models:
            atoms = torch.as_tensor(np.asarray(model.atoms), dtype=torch.float32)
            rotations, origins = frames_from_backbone(atoms[:, 0], atoms[:, 1], atoms[:, 2])
            back = to_global(rotations, origins, to_local(rotations, origins, atoms))
            worst = max(worst, float((back - atoms).abs().max()))
            determinant = max(determinant, float((torch.linalg.det(rotations) - 1).abs().max()))
    return [
        note("frames: PDB files with residues", float(files)),
        note("frames: PDB files without a backbone", float(len(refused))),
        at_most("frames: largest error of N, CA, C after the round trip", worst, "Å", 1e-3),
        at_most("frames: largest |det R - 1|", determinant, "", 1e-5),
    ]


def rotation_rows() -> list[Row]:
    """IGSO(3) against a 50-digit series, and its draws."""
    from dig_scale.diffusion.rotation import density, sample, score

    worst_density, worst_score = 0.0, 0.0
    for eps in np.geomspace(0.05, 2.0, 9):
        for omega in np.linspace(0.05, np.pi, 12):
            exact, slope = _series(float(omega), float(eps))
            if exact < 1e-30:
                continue
            omega_t, eps_t = torch.tensor(omega), torch.tensor(eps)
            worst_density = max(worst_density, abs(float(density(omega_t, eps_t)) / exact - 1))
            error = abs(float(score(omega_t, eps_t)) - slope) / max(abs(slope), 1.0)
            worst_score = max(worst_score, error)
    generator = torch.Generator().manual_seed(1)
    errors = []
    for eps in (0.05, 0.3, 1.0, 2.0):
        noise = torch.randn(1, DRAWS, 3, generator=generator)
        trace = sample(torch.tensor([eps]), noise)[0].diagonal(dim1=-2, dim2=-1).sum(-1).double()
        errors.append(abs(float(trace.mean()) - 3 * np.exp(-2 * eps**2)) / float(trace.std() / DRAWS**0.5))
    return [
        at_most("IGSO(3): largest relative error of the density", worst_density, "", 1e-4),
        at_most("IGSO(3): largest error of the score", worst_score, "", 1e-4),
        at_most(f"IGSO(3): E[tr R] of {DRAWS:,} draws, largest deviation", max(errors), "s.e.", 4),
    ]


def _series(omega: float, eps: float) -> tuple[float, float]:
    """f and f'/f by 50-digit sums of the defining series."""
    import mpmath

    with mpmath.workdps(50):
        w, e = mpmath.mpf(omega), mpmath.mpf(eps)
        terms = int(25 / eps) + 20
        value = slope = mpmath.mpf(0)
        for degree in range(terms):
            weight = (2 * degree + 1) * mpmath.exp(-degree * (degree + 1) * e**2)
            half = degree + mpmath.mpf(1) / 2
            value += weight * mpmath.sin(half * w) / mpmath.sin(w / 2)
            slope += weight * (
                half * mpmath.cos(half * w) / mpmath.sin(w / 2)
                - mpmath.sin(half * w) * mpmath.cos(w / 2) / (2 * mpmath.sin(w / 2) ** 2)
            )
        return float(value), float(slope / value)


@dataclass(frozen=True)
class BadInput:
    """A file that is no good, how it is read, and words that its error must hold."""

    name: str
    make: Callable[[Path], list[str]]
    words: tuple[str, ...]


def bad_input_rows(shared: Path) -> list[Row]:
    """One clear error naming file and place, exit code 2, nothing half-written."""
    rows = []
    for case in _bad_inputs(shared):
        with tempfile.TemporaryDirectory() as scratch:
            folder, out = Path(scratch), Path(scratch) / "out"
            command = [sys.executable, "-m", "dig_scale.cli", *case.make(folder), "--out", str(out)]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
            stores = list(out.rglob("*.zarr")) if out.exists() else []
            good = run.returncode == 2 and len(errors) == 1 and not stores
            good = good and all(word.lower() in errors[0].lower() for word in case.words)
            shown = errors[0] if errors else f"exit code {run.returncode}: {run.stderr[-200:]}"
            print(f"{case.name}: {shown}", file=sys.stderr)
            rows.append(_verdict(f"bad input: {case.name}", good))
    return rows


def _bad_inputs(shared: Path) -> Iterator[BadInput]:
    """Recipes written into a folder, one per mistake."""

    def recipe(folder: Path, reader: str, *files: Path, options: str = "{}") -> list[str]:
        listed = ", ".join(f'"{file.resolve()}"' for file in files)
        text = f'name = "bad"\n[[imports]]\nreader = "{reader}"\nfiles = [{listed}]\noptions = {options}\n'
        (folder / "bad.toml").write_text(text)
        return ["import", str(folder / "bad.toml")]

    def truncated(folder: Path) -> list[str]:
        text = (shared / "bioemu_tests" / "chignolin.pdb").read_text()
        (folder / "cut.pdb").write_text(text[: len(text) // 2 - 20])
        return recipe(folder, "backbone", folder / "cut.pdb")

    def unsanitary(folder: Path) -> list[str]:
        names = sorted((shared / "complexes").rglob("*1cbr*"))
        return recipe(folder, "pocket", *sorted(names, key=lambda path: path.suffix != ".pdb")[:2])

    def not_a_number(folder: Path) -> list[str]:
        atoms = '2\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3 pbc="T T T"\nCu 0 0 0\nCu nan 1 1\n'
        (folder / "nan.extxyz").write_text(atoms)
        return recipe(folder, "crystals", folder / "nan.extxyz")

    def flat(folder: Path) -> list[str]:
        atoms = '2\nLattice="3 0 0 0 3 0 3 3 0" Properties=species:S:1:pos:R:3 pbc="T T T"\nCu 0 0 0\nCu 1 1 1\n'
        (folder / "flat.extxyz").write_text(atoms)
        return recipe(folder, "crystals", folder / "flat.extxyz")

    def no_parameters(folder: Path) -> list[str]:
        text = (
            'name = "bad"\n[[systems]]\nname = "x"\nsurface = { metal = "Cu", adsorbate = "I" }\n'
            '[simulate]\ncalculator = { name = "emt" }\nframes = 10\n'
        )
        (folder / "bad.toml").write_text(text)
        return ["simulate", str(folder / "bad.toml")]

    def outside(folder: Path) -> list[str]:
        pocket = shared / "fep_pockets"
        protein = pocket / "cdk2" / "01_protein" / "crd" / "protein.pdb"
        return recipe(folder, "pocket", protein, pocket / "syk" / "02_ligands" / "ligands.sdf")

    yield BadInput("truncated PDB", truncated, ("cut.pdb",))
    yield BadInput("SDF that fails sanitising (1cbr)", unsanitary, ("1cbr",))
    yield BadInput("coordinates that are not numbers", not_a_number, ("nan.extxyz",))
    yield BadInput("zero-volume cell", flat, ("flat.extxyz", "volume"))
    yield BadInput("element without EMT parameters", no_parameters, ("x", "I"))
    yield BadInput("ligand outside the pocket", outside, ("ligand", "protein"))
