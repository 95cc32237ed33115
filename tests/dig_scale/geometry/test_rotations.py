"""Rotations: exp and log against each other and against SciPy, frames of backbones, ideal geometry, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dig_scale.errors import InvalidSystemError
from dig_scale.geometry import rotations

AXES = torch.nn.functional.normalize(
    torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1
)
ANGLES = (0.0, 1e-12, 1e-7, 1e-3, 9.9e-3, 1.01e-2, 0.5, 2.0, 3.0, math.pi - 1e-3, math.pi - 1e-7)


@pytest.mark.parametrize("angle", ANGLES)
def test_log_undoes_exp_from_zero_to_pi(angle: float) -> None:
    vectors = angle * AXES
    torch.testing.assert_close(rotations.log(rotations.exp(vectors)), vectors, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("angle", ANGLES)
def test_single_precision_keeps_a_millionth_of_a_radian(angle: float) -> None:
    vectors = (angle * AXES).float()
    found = rotations.log(rotations.exp(vectors))
    assert found.dtype == torch.float32
    if angle < math.pi - 1e-6:
        torch.testing.assert_close(found, vectors, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(rotations.exp(found), rotations.exp(vectors), rtol=0, atol=3e-6)


def test_log_at_pi_is_a_half_turn_about_the_axis() -> None:
    turned = rotations.exp(math.pi * AXES)
    found = rotations.log(turned)
    torch.testing.assert_close(found.norm(dim=-1), torch.full((50,), math.pi, dtype=torch.float64))
    torch.testing.assert_close(rotations.exp(found), turned, rtol=0, atol=1e-12)


def test_exp_and_quaternions_agree_with_scipy() -> None:
    vectors = 2.5 * AXES
    theirs = Rotation.from_rotvec(vectors.numpy())
    np.testing.assert_allclose(rotations.exp(vectors).numpy(), theirs.as_matrix(), atol=1e-14)
    quaternions = rotations.quaternion_from_matrix(rotations.exp(vectors))
    np.testing.assert_allclose(quaternions.numpy(), theirs.as_quat(canonical=True, scalar_first=True), atol=1e-14)
    torch.testing.assert_close(rotations.matrix_from_quaternion(-3 * quaternions), rotations.exp(vectors))


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.5, 3.1])
def test_gradients_of_exp_and_log_match_finite_differences(angle: float) -> None:
    vectors = (angle * AXES[:2]).requires_grad_()
    assert torch.autograd.gradcheck(rotations.exp, (vectors,))
    assert torch.autograd.gradcheck(lambda v: rotations.log(rotations.exp(v)), (vectors,))
    assert torch.autograd.gradgradcheck(rotations.exp, (vectors,))


def test_geodesic_runs_at_constant_speed_between_its_ends() -> None:
    start, end = rotations.exp(0.7 * AXES), rotations.exp(2.9 * AXES.flip(0))
    whole = rotations.log(start.mT @ end).norm(dim=-1)
    torch.testing.assert_close(rotations.geodesic(start, end, 1.0), end)
    for eta in (0.0, 0.25, 0.8):
        part = rotations.log(start.mT @ rotations.geodesic(start, end, eta)).norm(dim=-1)
        torch.testing.assert_close(part, eta * whole)
    mixed = rotations.geodesic(start, end, torch.linspace(0, 1, 50, dtype=torch.float64))
    torch.testing.assert_close(mixed[-1], end[-1])


def test_random_rotations_are_uniform() -> None:
    drawn = rotations.random_rotations(torch.randn(100_000, 4, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(torch.linalg.det(drawn), torch.ones(100_000), rtol=0, atol=1e-5)
    # Entries have mean 0 and variance 1/3; the trace has variance 1. Five standard errors over ten numbers.
    error = 1 / math.sqrt(100_000)
    assert drawn.mean(0).abs().max() < 5 * error * math.sqrt(1 / 3)
    assert (drawn**2).mean(0).sub(1 / 3).abs().max() < 5 * error * math.sqrt(1 / 5 - 1 / 9)
    trace = drawn.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(float((trace**2).mean()) - 1) < 5 * error * math.sqrt(3 - 1)


def test_frames_of_ideal_backbones_are_the_frames_they_came_from() -> None:
    turned, placed = rotations.exp(2 * AXES), 10 * AXES.flip(0)
    atoms = rotations.backbone_from_frames(turned, placed)
    found, centre = rotations.frames_from_backbone(*atoms[:, :3].unbind(1))
    torch.testing.assert_close(found, turned, rtol=0, atol=1e-12)
    torch.testing.assert_close(centre, placed)
    torch.testing.assert_close(found[..., 0], torch.nn.functional.normalize(atoms[:, 0] - placed, dim=-1))


def test_local_coordinates_survive_the_way_through_a_frame() -> None:
    points = torch.randn(50, 7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turned, placed = rotations.exp(2 * AXES), 10 * AXES.flip(0)
    local = rotations.to_local(turned, placed, points)
    torch.testing.assert_close(rotations.to_global(turned, placed, local), points)


@pytest.mark.parametrize("broken", ["line", "same", "nan"])
def test_a_backbone_without_a_frame_is_refused_with_its_index(broken: str) -> None:
    n, ca, c = (torch.tensor(local, dtype=torch.float64).repeat(2, 3, 1) for local in
                (rotations.IDEAL_N, (0.0, 0.0, 0.0), rotations.IDEAL_C))  # fmt: skip
    c[1, 2] = {"line": -n[1, 2], "same": ca[1, 2], "nan": torch.full((3,), math.nan, dtype=torch.float64)}[broken]
    assert rotations.is_well_formed(n, ca, c).tolist() == [[True] * 3, [True, True, False]]
    with pytest.raises(InvalidSystemError, match=r"index \(1, 2\)"):
        rotations.frames_from_backbone(n, ca, c)


def angle(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> float:
    first, second = (torch.nn.functional.normalize(x - b, dim=-1) for x in (a, c))
    return math.degrees(math.acos(float((first * second).sum())))


def torsion(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> float:
    axis = torch.nn.functional.normalize(c - b, dim=-1)
    before, after = torch.linalg.cross(b - a, axis), torch.linalg.cross(axis, d - c)
    return math.degrees(
        math.atan2(float((torch.linalg.cross(before, after) * axis).sum()), float((before * after).sum()))
    )


def test_a_single_residue_has_textbook_geometry() -> None:
    n, ca, c, o, cb = rotations.backbone_from_frames(rotations.exp(AXES[:1]), 5 * AXES[:1])[0].unbind(0)
    assert float((cb - ca).norm()) == pytest.approx(1.530, abs=1e-3)
    assert float((o - c).norm()) == pytest.approx(1.231, abs=1e-3)
    assert angle(n, ca, c) == pytest.approx(110.5, abs=0.1)
    assert angle(n, ca, cb) == pytest.approx(110.5, abs=0.1) and angle(c, ca, cb) == pytest.approx(110.1, abs=0.1)
    assert angle(ca, c, o) == pytest.approx(120.8, abs=0.1)
    assert torsion(n, ca, c, o) == pytest.approx(145 - 180, abs=0.1)
    # L residues: (N, C, CB) about CA is right-handed.
    assert float((n - ca) @ torch.linalg.cross(c - ca, cb - ca)) > 1


def test_the_carbonyl_lies_in_the_plane_of_the_peptide_bond_opposite_to_n() -> None:
    turned, placed = rotations.exp(2 * AXES), 4 * AXES.flip(0)
    joined = torch.ones(50, dtype=torch.bool)
    joined[7] = False
    n, ca, c, o, _ = rotations.backbone_from_frames(turned, placed, joined).unbind(1)
    for i in range(49):
        expected = torsion(n[i], ca[i], c[i], n[i + 1]) if i != 7 else 145.0
        difference = torsion(n[i], ca[i], c[i], o[i]) - expected
        assert abs(difference) == pytest.approx(180, abs=1e-6)


def test_gradients_flow_from_atoms_to_frames() -> None:
    vectors, placed = AXES[:6].clone().requires_grad_(), (4 * AXES[6:12]).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, x: rotations.backbone_from_frames(rotations.exp(v), x), (vectors, placed))
