"""ScoreFn -> ScoreFn: samples with wanted properties, of any model by a predictor, or of conditioned models without one.

property_guided, Bayes' rule (Zheng et al. 2023): s(x | c) = s(x) + scale grad log q(c | x_t), where q(c | x_t) is read
CLEAN   off the clean estimate, log q(c | E[x_0 | x_t]), differentiated through the network (Chung et al. 2023, DPS): any
        property of clean structures will do, and it is an approximation wherever x_t leaves x_0 open;
NOISED  off the noised structure by a predictor that is told the noise level: exact where the predictor is. predicted_guide
        takes one that answers with a distribution, which is as wide as the noise leaves the property open.
A gradient is a tangent of the state: of positions, fractional coordinates and lattices the plain one, of rotations that of
x exp(v) at v = 0; sites that do not move have none, free molecules are not pushed as a whole.

classifier_free (Ho and Salimans 2022): s(x) + w (s(x|c) - s(x)). Knows what a Context asks for, not what a property is.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dig_scale.batch import Context, Geometry, Score, ScoreFn, State, fields_of
from dig_scale.diffusion.composition import Composition
from dig_scale.diffusion.euclidean import per_sample
from dig_scale.errors import UserError
from dig_scale.predictions import PropertyPredictor
from dig_scale.sampling.clean_estimate import clean_estimate, geometry_of
from dig_scale.tree import T, tree_map

Property = Callable[[Geometry, Context], Tensor]
"""(clean structures [B], context) -> values [B], differentiable."""

NoisyProperty = Callable[[Geometry, Context, Tensor], Tensor]
"""(noised structures [B] on the scale of the data, context, noise level [B] Å) -> values [B], differentiable."""

Likelihood = Callable[[Tensor], Tensor]
"""Values [B] of a property -> log q(c | value) [B], up to a constant."""


class Seen(enum.StrEnum):
    """What a guide's property is read off."""

    CLEAN = "clean"
    NOISED = "noised"


@dataclass(frozen=True)
class Guide:
    """log q(c | x_t), and how it enters the score.

    scale multiplies the gradient; clip bounds every element of it, times the noise's standard deviation sigma (a clip of 1
    moves no estimate of the noise by more than 1); it acts while end <= t <= start.
    """

    log_likelihood: NoisyProperty
    seen: Seen
    scale: float = 1.0
    clip: float | None = None
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.start <= 1:
            raise UserError(f"guidance from t = {self.start:g} to {self.end:g}: expected 1 >= start >= end >= 0")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"guidance clip {self.clip:g}: expected a positive number, or none")
        if not math.isfinite(self.scale):
            raise UserError(f"guidance scale {self.scale}: expected a finite number")

    def acts(self, t: Tensor) -> Tensor:
        """Rows [B] at whose time it acts."""
        return (t <= self.start) & (t >= self.end)


def clean_guide(prop: Property, likelihood: Likelihood) -> Guide:
    """A guide by a property of clean structures; settings by dataclasses.replace."""
    return Guide(lambda geometry, context, level: likelihood(prop(geometry, context)), Seen.CLEAN)


def noised_guide(predictor: NoisyProperty, likelihood: Likelihood) -> Guide:
    """A guide by a predictor on noised structures; settings by dataclasses.replace."""
    return Guide(lambda geometry, context, level: likelihood(predictor(geometry, context, level)), Seen.NOISED)


def predicted_guide(predictor: PropertyPredictor, target: float, spread: float) -> Guide:
    """A guide towards a value, give or take `spread`, of what a predictor on noised structures tells; settings by
    dataclasses.replace."""

    def log_likelihood(geometry: Geometry, context: Context, level: Tensor) -> Tensor:
        wanted = geometry.positions.new_full((len(level),), target)
        return predictor(geometry, context, level).widened(spread).log_density(wanted)

    return Guide(log_likelihood, Seen.NOISED)


@dataclass(frozen=True)
class Normal:
    """log q of a value that shall be `target`, give or take `std`; of values of a `period` (2 pi of angles) by the nearest."""

    target: float
    std: float
    period: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """[B]."""
        return -0.5 * (_difference(values, self.target, self.period) / self.std) ** 2


@dataclass(frozen=True)
class Window:
    """log q of a value that shall lie from `low` to `high`, with edges `softness` wide; of a `period`, low to high upwards."""

    low: float
    high: float
    softness: float
    period: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """[B]."""
        half = (self.high - self.low) / 2
        apart = _difference(values, self.low + half, self.period)
        return logsigmoid((half - apart) / self.softness) + logsigmoid((half + apart) / self.softness)


@dataclass(frozen=True)
class Bins:
    """log q that a value belongs to the bin number `wanted`: softmax over bins of -|value - centre| sharpness, as in DiG."""

    centres: tuple[float, ...]
    wanted: int
    sharpness: float = 1.0

    def __call__(self, values: Tensor) -> Tensor:
        """[B]."""
        centres = values.new_tensor(self.centres)
        return torch.log_softmax(-self.sharpness * (values.unsqueeze(-1) - centres).abs(), dim=-1)[..., self.wanted]


def property_guided(score_fn: ScoreFn, composition: Composition, guides: Sequence[Guide]) -> ScoreFn:
    """The score with the guides' gradients added; outside their times it is score_fn, called once.

    Raises UserError where a guide's answer is not one differentiable number per sample.
    """

    def guided(state: State, context: Context, t: Tensor) -> Score:
        acting = [guide for guide in guides if bool(guide.acts(t).any())]
        if not acting:
            return score_fn(state, context, t)
        with torch.inference_mode(mode=False), torch.enable_grad():
            plain = _Noised(_outside_inference(state), _outside_inference(context), _outside_inference(t))
            score, pushes = _score_and_pushes(score_fn, composition, acting, plain)
        return tree_map(lambda s, *rest: s.detach() + torch.stack(rest).sum(0).detach(), score, *pushes)

    return guided


@dataclass(frozen=True)
class _Noised:
    state: State
    context: Context
    t: Tensor


def _score_and_pushes(
    score_fn: ScoreFn, composition: Composition, guides: Sequence[Guide], at: _Noised
) -> tuple[Score, list[Score]]:
    leaves = {
        name: torch.zeros_like(x[..., 0] if name == "rotations" else x, requires_grad=True)
        for name, x in fields_of(at.state).items()
    }
    moved = {name: composition.fields[name].process.move(x, leaves[name]) for name, x in fields_of(at.state).items()}
    state = State(**moved)
    if any(guide.seen is Seen.CLEAN for guide in guides):
        score = score_fn(state, at.context, at.t)
        clean = geometry_of(composition, clean_estimate(composition, state, score, at.t), at.context)
    else:
        with torch.no_grad():
            score = score_fn(at.state, at.context, at.t)
        clean = None
    pushes = []
    for guide in guides:
        seen = clean if guide.seen is Seen.CLEAN else composition.seen(state, at.context, at.t)
        assert seen is not None
        values = guide.log_likelihood(seen, at.context, composition.noise_level(at.t))
        pushes.append(_push(composition, guide, at, _gradients(values, leaves, len(at.t))))
    return score, pushes


def _gradients(values: Tensor, leaves: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    if values.shape != (rows,):
        raise UserError(f"a guide answered with shape {tuple(values.shape)}: expected one number per sample, ({rows},)")
    if not values.requires_grad:
        raise UserError("a guide's answer has no gradient: compute it from the structure it is given, in torch")
    found = torch.autograd.grad(values.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _push(composition: Composition, guide: Guide, at: _Noised, gradients: dict[str, Tensor]) -> Score:
    """What a guide adds to the score."""
    values, acts = fields_of(composition.constrained(State(**gradients), at.context)), guide.acts(at.t)
    for name, gradient in values.items():
        scaled = guide.scale * gradient
        if guide.clip is not None:
            bound = guide.clip / per_sample(composition.fields[name].process.coefficients(at.t).sigma, scaled)
            scaled = torch.maximum(torch.minimum(scaled, bound), -bound)
        values[name] = torch.where(per_sample(acts, scaled).bool(), scaled, torch.zeros_like(scaled))
    return Score(**values)


def _outside_inference(tree: T) -> T:
    """A copy that autograd may keep, of tensors made under inference mode."""
    return tree_map(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, tree)


def _difference(values: Tensor, target: float, period: float | None) -> Tensor:
    apart = values - target
    return apart if period is None else apart - period * torch.round(apart.detach() / period)


def classifier_free(score_fn: ScoreFn, weight: float) -> ScoreFn:
    """The score with the wanted properties weighted by `weight`; at 1 it is the conditioned score, called once."""
    if weight == 1:
        return score_fn

    def guided(state: State, context: Context, t: Tensor) -> Score:
        unconditioned = replace(context, known=torch.zeros_like(context.known))
        free = score_fn(state, unconditioned, t)
        if weight == 0:
            return free
        return tree_map(lambda a, b: a + weight * (b - a), free, score_fn(state, context, t))

    return guided
