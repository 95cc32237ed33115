"""IGSO(3): against the series in 50 digits and more, sum rules, published norms, sampling, and a forward-reverse walk."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from dig_scale.diffusion import rotation
from dig_scale.diffusion.rotation import RotationProcess
from dig_scale.geometry import rotations

EPS = (0.02, 0.05, 0.1, 0.3, 0.7, 0.7072, 1.0, 1.65, 2.0, 3.0)
ANGLES = (1e-3, 0.0999, 0.1001, 0.5, 1.5, 3.0, 3.14, math.pi)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def series(omega: float, eps: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """log f and d log f/dw of the defining series; the terms cancel to exp(-w^2/4e^2), hence the digits."""
    digits = 50 + int(omega**2 / (4 * eps**2) / math.log(10))
    with mpmath.workdps(digits):
        w, e = mpmath.mpf(omega), mpmath.mpf(eps)
        total = slope = mpmath.mpf(0)
        for term in range(int(math.sqrt(digits * math.log(10)) / eps) + 3):
            weight, k = (2 * term + 1) * mpmath.exp(-term * (term + 1) * e * e), term + mpmath.mpf(1) / 2
            total += weight * mpmath.sin(k * w)
            slope += weight * k * mpmath.cos(k * w)
        half = w / 2
        return mpmath.log(total / mpmath.sin(half)), slope / total - mpmath.cos(half) / mpmath.sin(half) / 2


@pytest.mark.parametrize("eps", EPS)
def test_density_and_score_are_those_of_the_series(eps: float) -> None:
    for omega in ANGLES:
        if omega**2 / (4 * eps**2) > 300:
            continue
        log_density, score = series(omega, eps)
        found = rotation.log_density(double(omega), double(eps)), rotation.score(double(omega), double(eps))
        assert float(found[0]) == pytest.approx(float(log_density), rel=1e-9, abs=1e-9)
        assert float(found[1]) == pytest.approx(float(score), rel=1e-7, abs=1e-9)
        assert float(rotation.density(double(omega), double(eps))) == pytest.approx(
            float(mpmath.exp(log_density)), rel=1e-9
        )


@pytest.mark.parametrize("eps", [0.005, 0.02, 0.5, 0.7071, 0.70711, 1.65])
def test_score_is_the_slope_of_the_log_density(eps: float) -> None:
    omega = torch.linspace(0.01, 3.1, 200, dtype=torch.float64)
    step = 1e-5
    slope = rotation.log_density(omega + step, double(eps)) - rotation.log_density(omega - step, double(eps))
    torch.testing.assert_close(rotation.score(omega, double(eps)), slope / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", EPS)
def test_density_has_unit_mass_and_the_trace_its_sum_rule(eps: float) -> None:
    nodes, weights = rotation._gauss_legendre(400)
    omega = nodes * min(math.pi, 14 * eps)
    mass = rotation.angle_density(omega, double(eps)) * weights * min(math.pi, 14 * eps)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-10)
    # The character of l = 1 is 1 + 2 cos w, and its coefficient in the series 3 exp(-2 e^2).
    assert float((mass * (1 + 2 * torch.cos(omega))).sum()) == pytest.approx(3 * math.exp(-2 * eps**2), abs=1e-10)


def test_zero_and_tiny_angles_are_finite_and_smooth() -> None:
    for eps in (0.02, 0.5, 1.0):
        slope = float(rotation.score(double(1e-3), double(eps))) / 1e-3
        for omega in (1e-9, 1e-6, 1e-4):
            assert float(rotation.score(double(omega), double(eps))) == pytest.approx(slope * omega, rel=1e-4)
        assert float(rotation.score(double(0.0), double(eps))) == 0
        assert math.isfinite(float(rotation.log_density(double(0.0), double(eps))))


@pytest.mark.parametrize(
    ("eps", "row", "norm"),
    [(0.02, 131, 34.48978), (0.1, 435, 6.861562), (0.5, 738, 1.289312), (1.0, 869, 0.300838), (1.65, 964, 0.00956807)],
)
def test_score_norms_are_those_of_the_published_code(eps: float, row: int, norm: float) -> None:
    assert float(rotation.dig_score_norm(double(eps))) == pytest.approx(norm, rel=1e-6)
    # The row taken stands for another eps, off by up to 0.5 %. Its sum over 2,000 angles counts the one at pi whole instead
    # of half, which is 1/2000 of the mass where the density is flat: 2.5e-4 of the root.
    assert float(rotation.score_norm(double(0.01 * 200 ** (row / 999)))) == pytest.approx(norm, rel=3e-4)


def test_score_norm_is_the_root_mean_square_of_the_target() -> None:
    process, t = RotationProcess(), torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    start = rotations.random_rotations(normals(3, 30_000, 4, seed=3))
    target = process.target(start, process.perturb(start, t, normals(3, 30_000, 3, seed=4)), t)
    found = ((target**2).sum(-1).mean(-1) / math.pi).sqrt()
    # Relative standard error of a mean square of 30,000 values is below 0.6 % here; five of them, halved by the root.
    torch.testing.assert_close(found, process.score_scale(t), rtol=0.015, atol=0)


@pytest.mark.parametrize("eps", [0.02, 0.3, 0.7, 1.0, 1.65])
def test_traces_of_draws_average_to_the_sum_rule(eps: float) -> None:
    drawn = rotation.sample(double(eps), normals(1, 100_000, 3, seed=5))
    trace = drawn.diagonal(dim1=-2, dim2=-1).sum(-1)
    error = float(trace.std()) / math.sqrt(100_000)
    assert abs(float(trace.mean()) - 3 * math.exp(-2 * eps**2)) < 4 * error


def test_angles_of_draws_follow_their_distribution() -> None:
    radius = torch.tensor([[1e-4, 0.01, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    nodes, weights = rotation._gauss_legendre(200)
    wanted = torch.special.gammainc(double(1.5), radius**2 / 2)
    for eps in EPS:
        omega = rotation.angle_quantile(radius, double(eps))
        below = (rotation.angle_density(omega.unsqueeze(-1) * nodes, double(eps)) * weights).sum(-1) * omega
        torch.testing.assert_close(below, wanted, rtol=1e-9, atol=1e-13)


def test_small_noise_is_the_exponential_of_gaussian_noise() -> None:
    noise = normals(1, 1000, 3)
    for eps, tolerance in ((1e-3, 1e-6), (0.02, 3e-4)):
        vectors = rotations.log(rotation.sample(double(eps), noise))
        torch.testing.assert_close(vectors, math.sqrt(2) * eps * noise, rtol=tolerance, atol=1e-12)


def test_a_sample_depends_on_its_own_noise_and_time_alone() -> None:
    process, noise, start = RotationProcess(), normals(4, 9, 3), rotations.random_rotations(normals(4, 9, 4, seed=1))
    t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    together = process.perturb(start, t, noise)
    for i in range(4):
        alone = process.perturb(start[i : i + 1, :5], t[i : i + 1], noise[i : i + 1, :5])
        torch.testing.assert_close(together[i, :5], alone[0], rtol=0, atol=1e-13)
    still = process.perturb(start, t, torch.zeros(4, 9, 3, dtype=torch.float64))
    torch.testing.assert_close(still, start)


def test_the_prior_is_uniform() -> None:
    drawn = RotationProcess().sample_prior(normals(1, 100_000, 3, seed=6))[0]
    trace = drawn.diagonal(dim1=-2, dim2=-1).sum(-1)
    error = 1 / math.sqrt(100_000)
    assert abs(float(trace.mean())) < 4 * error and abs(float((trace**2).mean()) - 1) < 4 * error * math.sqrt(2)
    assert float(drawn.mean(0).abs().max()) < 5 * error * math.sqrt(1 / 3)
    x, degrees = drawn.reshape(10, -1, 3, 3), double(*[3.0] * 10)
    assert RotationProcess().prior_log_density(x, degrees).tolist() == [0.0] * 10


def test_target_is_the_gradient_of_the_log_density_in_the_local_frame() -> None:
    process, t = RotationProcess(), torch.tensor([0.2, 0.8], dtype=torch.float64)
    start = rotations.random_rotations(normals(2, 5, 4, seed=7))
    noised = process.perturb(start, t, normals(2, 5, 3, seed=8))

    def log_density(tangent: Tensor) -> Tensor:
        moved = process.move(noised, tangent)
        omega = rotations.log(start.mT @ moved).norm(dim=-1)
        return rotation.log_density(omega, process.eps(t).unsqueeze(-1)).sum()

    zero = torch.zeros(2, 5, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_density(zero), zero)
    torch.testing.assert_close(process.target(start, noised, t), gradient, rtol=1e-7, atol=1e-7)


def test_single_precision_agrees_with_double() -> None:
    process, noise, start = RotationProcess(), normals(3, 20, 3), rotations.random_rotations(normals(3, 20, 4, seed=1))
    t = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    exact = process.perturb(start, t, noise)
    found = process.perturb(start.float(), t.float(), noise.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=5e-6)
    target = process.target(start.float(), found, t.float())
    assert target.dtype == torch.float32
    scale = process.score_scale(t)[:, None, None]
    torch.testing.assert_close(
        target / scale, process.target(start, exact, t) / scale, rtol=1e-3, atol=1e-4, check_dtype=False
    )


def test_gradients_flow_through_perturb_and_move() -> None:
    process, t = RotationProcess(), torch.tensor([0.5], dtype=torch.float64)
    vectors, noise = normals(1, 4, 3, seed=2).requires_grad_(), normals(1, 4, 3, seed=3)
    assert torch.autograd.gradcheck(lambda v: process.perturb(rotations.exp(v), t, noise), (vectors,))
    assert torch.autograd.gradcheck(lambda v: process.move(rotations.exp(noise), v), (vectors,))


def test_diffusion_is_the_rate_of_the_variance() -> None:
    process, t, step = RotationProcess(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 1e-6
    level = process.coefficients(t)
    rate = (process.variance(t + step) - process.variance(t - step)) / (2 * step)
    torch.testing.assert_close(level.diffusion, rate, rtol=1e-8, atol=0)
    torch.testing.assert_close(level.sigma**2, process.variance(t))
    assert level.alpha.tolist() == [1.0] * 5 and level.drift.tolist() == [0.0] * 5
    assert process.eps(double(0.0, 1.0)).tolist() == pytest.approx([0.02, 1.65])
    assert float(process.eps(double(0.5))) == pytest.approx(0.1816590, rel=1e-6)


def test_many_float32_moves_stay_on_the_manifold() -> None:
    process, current = RotationProcess(), rotations.exp(normals(1, 20, 3).float())
    for step in range(500):
        current = process.move(current, 0.1 * normals(1, 20, 3, seed=step).float())
    torch.testing.assert_close(current @ current.mT, torch.eye(3).expand(1, 20, 3, 3), rtol=0, atol=1e-4)


def test_the_reverse_walk_with_the_exact_score_returns_the_mixture() -> None:
    """Reverse SDE from uniform: 2,000 walkers, two rotations of weight 0.3 and 0.7 that are 2 rad apart."""
    process, walkers, steps, last = RotationProcess(), 2000, 200, 0.2
    modes = rotations.exp(double(0, 0, 0, 0, 2.0, 0).reshape(2, 3))
    log_weights = torch.log(double(0.3, 0.7))

    def score(r: Tensor, t: Tensor) -> Tensor:
        tangents = rotations.log(modes.mT @ r.unsqueeze(-3))
        omega, eps = tangents.norm(dim=-1), process.eps(t)
        share = torch.softmax(rotation.log_density(omega, eps) + log_weights, dim=-1)
        slope = rotation.score(omega, eps) / omega
        return ((share * slope).unsqueeze(-1) * tangents).sum(-2)

    current = process.sample_prior(normals(1, walkers, 3, seed=9))[0]
    times = torch.linspace(1, last, steps + 1, dtype=torch.float64)
    for step in range(steps):
        t = times[step : step + 1]
        heat = process.variance(t) - process.variance(times[step + 1 : step + 2])
        kick = normals(walkers, 3, seed=100 + step)
        current = process.move(current, heat * score(current, t) + heat.sqrt() * kick)
    omega = rotations.log(modes.mT @ current.unsqueeze(-3)).norm(dim=-1)
    nearest, mode = omega.min(dim=-1)
    width = float(process.eps(double(last)))
    # The prior differs from p_1 by less than 1 % in total variation; four standard errors of the draw on top.
    assert float((mode == 0).double().mean()) == pytest.approx(0.3, abs=0.01 + 4 * math.sqrt(0.21 / walkers))
    # 6 eps^2 is the mean square of small angles; four standard errors are 8 % and the finite step adds a little.
    assert float((nearest**2).mean()) == pytest.approx(6 * width**2, rel=0.12)
