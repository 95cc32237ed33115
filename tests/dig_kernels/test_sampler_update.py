"""The sampler's update: fused and reference forms agree, and noise by number is the samplers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from head_checks import mutant
from torch import Tensor

pytest.importorskip("triton")

from dig_kernels import sampler_update as module
from dig_kernels.dispatch import Backend
from dig_kernels.layout import Packing, pack_lengths
from dig_kernels.sampler_update import CounterNoise, StepCoefficients, counter_noise, sampler_update

from dig_scale.sampling.noise import counter_normal

LENGTHS = (5, 0, 1, 181)


def case(packing: Packing) -> tuple[Tensor, Tensor, Tensor, StepCoefficients, Tensor]:
    """x, score, noise, coefficients and mobile."""
    generator = torch.Generator().manual_seed(0)
    x, score, noise = torch.randn(3, packing.sites, 3, generator=generator)
    coefficients = StepCoefficients(*torch.randn(3, packing.batch, generator=generator))
    return x, score, noise, coefficients, torch.rand(packing.sites, generator=generator) > 0.3


def counters(batch: int) -> CounterNoise:
    """Seeds and indices on both sides of 32 bits."""
    sample = torch.arange(batch)
    return CounterNoise(sample + 2**40 * (sample % 2), 3 * sample + 2**35 * (sample // 2), 7 * sample)


def agrees(packing: Packing, noise: Tensor | CounterNoise) -> bool:
    x, score, _, coefficients, mobile = case(packing)
    expected, found = (
        sampler_update(x, score, noise, coefficients, packing, mobile=mobile, backend=backend)
        for backend in (Backend.REFERENCE, Backend.TRITON)
    )
    return torch.allclose(found, expected, atol=1e-6) and torch.equal(found[~mobile], x[~mobile])


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (2,), ()])
def test_kernel_agrees_with_the_oracle_and_immobile_sites_stay(lengths: tuple[int, ...]) -> None:
    packing = pack_lengths(lengths)
    assert agrees(packing, case(packing)[2])
    assert agrees(packing, counters(packing.batch))


def test_it_is_the_written_formula() -> None:
    packing = pack_lengths((2, 1))
    x, score, noise, coefficients, _ = case(packing)
    sample = [0, 0, 1]
    expected = torch.stack([
        coefficients.x[b] * x[i] + coefficients.score[b] * score[i] + coefficients.noise[b] * noise[i]
        for i, b in enumerate(sample)
    ])  # fmt: skip
    assert torch.allclose(sampler_update(x, score, noise, coefficients, packing, backend=Backend.TRITON), expected)


def test_counter_noise_is_the_samplers_noise_in_any_packing() -> None:
    packing = pack_lengths(LENGTHS)
    source = counters(packing.batch)
    expected = counter_normal(source.seed, source.index, source.step, 3 * packing.max_length)
    parts = [row[: 3 * n].view(n, 3) for row, n in zip(expected, LENGTHS, strict=True)]
    assert torch.equal(counter_noise(source, packing), torch.cat(parts))
    zero, one = torch.zeros(packing.batch), torch.ones(packing.batch)
    still = torch.zeros(packing.sites, 3)
    drawn = sampler_update(still, still, source, StepCoefficients(zero, zero, one), packing, backend=Backend.TRITON)
    assert torch.allclose(drawn, torch.cat(parts), atol=1e-6)


def test_a_derivative_is_the_references() -> None:
    packing = pack_lengths((2, 3))
    x, score, noise, coefficients, mobile = case(packing)
    score.requires_grad_()
    out = sampler_update(x, score, noise, coefficients, packing, mobile=mobile, backend=Backend.TRITON)
    (grad,) = torch.autograd.grad(out.sum(), score)
    sample = torch.tensor([0, 0, 1, 1, 1])
    assert torch.allclose(grad, (coefficients.score[sample] * mobile).unsqueeze(-1).expand(-1, 3))


def test_operator_registration_and_compilation() -> None:
    packing = pack_lengths((5, 1))
    x, score, noise, coefficients, mobile = case(packing)
    of = (coefficients.x, coefficients.score, coefficients.noise)
    checks = ("test_schema", "test_faketensor")
    arguments = (x, score, noise, *of, mobile, None, None, None, packing.cu_seqlens, 5)
    torch.library.opcheck(module._sampler_update, arguments, test_utils=checks)
    function = lambda y: sampler_update(y, score, noise, coefficients, packing, backend=Backend.TRITON)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("old + tl.load(c + b)", "old - tl.load(c + b)"),
        ("+ tl.load(e + b) * random", "- tl.load(e + b) * random"),
        ("tl.where(lane < 2, tl.cos(angle), tl.sin(angle))", "tl.where(lane < 2, tl.sin(angle), tl.cos(angle))"),
    ],
)
def test_a_wrong_sign_does_not_pass(
    original: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = pack_lengths((3,))
    mutant(monkeypatch, tmp_path, "sampler_update_kernels", original, changed)
    assert not agrees(packing, counters(1))


def test_wrong_shapes_are_named() -> None:
    packing = pack_lengths((3,))
    x, score, noise, coefficients, mobile = case(packing)
    with pytest.raises(ValueError, match=r"score has shape \(2, 3\), expected \(3, 3\)"):
        sampler_update(x, score[1:], noise, coefficients, packing)
    with pytest.raises(ValueError, match=r"noise.seed has shape \(2,\), expected \(1,\)"):
        sampler_update(x, score, counters(2), coefficients, packing)
    with pytest.raises(ValueError, match="mobile has shape"):
        sampler_update(x, score, noise, coefficients, packing, mobile=mobile[1:])
