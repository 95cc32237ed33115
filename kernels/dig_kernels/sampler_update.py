"""One step of a sampler on packed positions: x' = a_b x + c_b score + e_b noise, immobile sites keeping x.

Every first-order solver's step has this form with coefficients [B] of each sample's own time. Noise is a tensor, or a
CounterNoise, drawn in the kernel: a pure function of (seed, index, step) and the coordinate's number within its sample, so it
is the same in any packing, padded or not. Removal of the centre of mass is the caller's. No derivatives in the kernel: the
reference runs where one is asked for. Whether this or torch.compile of the reference is faster is a matter of measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dig_kernels import reference_heads as reference
from dig_kernels.dispatch import Backend, backend_for, log_slow_path, wants_reference
from dig_kernels.layout import Packing

if TYPE_CHECKING:
    from dig_kernels.compiling import CompileCase

BLOCK = 512
WARPS = 4


@dataclass(frozen=True)
class StepCoefficients:
    """Of x, score and noise, [B] each, one per sample."""

    x: Tensor
    score: Tensor
    noise: Tensor


@dataclass(frozen=True)
class CounterNoise:
    """Noise by number: seed, index and step, [B] int64 each, 0 or more."""

    seed: Tensor
    index: Tensor
    step: Tensor


def counter_noise(source: CounterNoise, packing: Packing) -> Tensor:
    """The noise [T, 3] float32 that a CounterNoise stands for."""
    drawn = reference.counter_normal(source.seed, source.index, source.step, 3 * packing.max_length)
    sample = reference.sample_of_site(packing)
    place = torch.arange(packing.sites, device=drawn.device) - packing.cu_seqlens[sample]
    return drawn.view(packing.batch, packing.max_length, 3)[sample, place]


@torch.library.custom_op("dig_kernels::sampler_update", mutates_args=())
def _sampler_update(
    x: Tensor, score: Tensor, noise: Tensor | None, a: Tensor, c: Tensor, e: Tensor, mobile: Tensor | None,
    seed: Tensor | None, index: Tensor | None, step: Tensor | None, cu: Tensor, max_length: int,
) -> Tensor:  # fmt: skip
    """x' [T, 3]."""
    from dig_kernels import sampler_update_kernels as kernels

    out, chunks = torch.empty_like(x), -(-3 * max_length // BLOCK)
    if len(x):
        flags = {"HAS_MOBILE": mobile is not None, "COUNTER": noise is None}
        noise, mobile, seed, index, step = (x if t is None else t for t in (noise, mobile, seed, index, step))
        kernels.update[(chunks * (len(cu) - 1),)](
            x, score, noise, a, c, e, mobile, seed, index, step, cu, out, chunks, BLOCK=BLOCK, num_warps=WARPS, **flags
        )
    return out


@_sampler_update.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


def sampler_update(
    x: Tensor,
    score: Tensor,
    noise: Tensor | CounterNoise,
    coefficients: StepCoefficients,
    packing: Packing,
    *,
    mobile: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """x' [T, 3] from x, score [T, 3], noise [T, 3] or a CounterNoise, coefficients and mobile [T] bool (None: all are).

    Raises ValueError on shapes that disagree.
    """
    _check(x, score, noise, coefficients, packing, mobile)
    of = (coefficients.x, coefficients.score, coefficients.noise)
    tensors = (x, score, *of, noise if isinstance(noise, Tensor) else None)
    chosen = backend or backend_for(x)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if differentiated and chosen is Backend.TRITON:
        log_slow_path("sampler_update", "a derivative")
    fused = chosen is Backend.TRITON and not differentiated and x.dtype == torch.float32
    if not fused or wants_reference("sampler_update", *tensors):
        drawn = noise if isinstance(noise, Tensor) else counter_noise(noise, packing).to(x.dtype)
        return reference.sampler_update(x, score, drawn, of, packing, mobile)
    counters = (noise.seed, noise.index, noise.step) if isinstance(noise, CounterNoise) else (None, None, None)
    given = noise.float().contiguous() if isinstance(noise, Tensor) else None
    return _sampler_update(
        x.contiguous(), score.float().contiguous(), given, *(t.float() for t in of), mobile, *counters,
        packing.cu_seqlens, packing.max_length,
    )  # fmt: skip


def _check(
    x: Tensor, score: Tensor, noise: Tensor | CounterNoise, coefficients: StepCoefficients, packing: Packing,
    mobile: Tensor | None,
) -> None:  # fmt: skip
    for name, sites in {"x": x, "score": score, "noise": noise}.items():
        if isinstance(sites, Tensor) and sites.shape != (packing.sites, 3):
            raise ValueError(f"{name} has shape {tuple(sites.shape)}, expected ({packing.sites}, 3)")
    samples = {f"coefficients.{name}": getattr(coefficients, name) for name in ("x", "score", "noise")}
    if isinstance(noise, CounterNoise):
        samples |= {"noise.seed": noise.seed, "noise.index": noise.index, "noise.step": noise.step}
    for name, values in samples.items():
        if values.shape != (packing.batch,):
            raise ValueError(f"{name} has shape {tuple(values.shape)}, expected ({packing.batch},), one per sample")
    if mobile is not None and mobile.shape != (packing.sites,):
        raise ValueError(f"mobile has shape {tuple(mobile.shape)}, expected ({packing.sites},)")


def compile_cases() -> list[CompileCase]:
    """The launch configurations to compile for GPUs that are not here."""
    from dig_kernels import sampler_update_kernels as kernels
    from dig_kernels.compiling import CompileCase

    types = {"mobile": "*i1", "cu": "*i32", "chunks": "i32"} | dict.fromkeys(("seed", "index", "step"), "*i64")
    cases = []
    for counter in (False, True):
        constants = {"BLOCK": BLOCK, "HAS_MOBILE": True, "COUNTER": counter}
        arguments = kernels.update.arg_names
        signature = {arg: "constexpr" if arg in constants else types.get(arg, "*fp32") for arg in arguments}
        name = f"sampler_update {'counter' if counter else 'tensor'} noise"
        cases.append(CompileCase(name, kernels.update, signature, constants, WARPS))
    return cases
