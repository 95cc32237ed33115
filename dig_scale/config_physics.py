"""The sections of a recipe that train from an energy function: [train.physics_informed] and [train.posterior], and [ablate],
which asks what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dig_scale.config_section import PositiveFloat, PositiveInt, Section


class PhysicsInformed(Section):
    """Training from an energy function (PIDP) beside, or instead of, denoising: its own batches of candidate structures."""

    candidates: Path | None = None
    """Packed dataset whose frames have forces; the training split of the run's own dataset when absent."""
    temperature: PositiveFloat | None = None
    """K of the Boltzmann distribution that the forces stand for; that of `pack` or `simulate` when absent."""
    batch: PositiveInt = 64
    """Candidates per evaluation of this loss, over all ranks."""
    every: PositiveInt = 1
    """Steps from one evaluation of this loss to the next: it costs several times what denoising does. Its weight stays."""
    weight: PositiveFloat = 1.0
    """Of this loss beside the denoising loss of weight `denoising_weight`."""
    denoising_weight: float = Field(default=1.0, ge=0)
    """0: the energy alone."""
    boundary: Literal["force", "direction"] = "force"
    """Whether the score equals the force at the first noise level, or only points along it."""
    boundary_time: float = Field(default=0.0, ge=0, lt=1)
    """t of the first noise level."""
    boundary_weight: float = Field(default=1.0, ge=0)
    boundary_huber: PositiveFloat | None = None
    """Where errors begin to count linearly; nowhere when absent."""
    fokker_planck_weight: float = Field(default=1.0, ge=0)
    fokker_planck_huber: PositiveFloat | None = None
    probes: PositiveInt | None = 1
    """Random probes of the divergence (DiG: 20); the exact divergence when absent."""
    length: PositiveFloat = 1.0
    """Å (rad for rotations); distance between states: along it errors of scores add up to errors of log-densities."""
    rescaling: PositiveFloat = 1.0
    """rho of DiG, which divides the Fokker-Planck loss by rho^(1 - min(0.05, t))."""
    time_decay: float = Field(default=0.0, ge=0)
    """k of the density exp(-k t) of times; 0 is uniform."""
    force_decades: PositiveFloat = 3.0
    """Orders of magnitude above the smallest force within which candidates are kept."""


class Posterior(Section):
    """Denoising learned from an energy, without data: up to a noise level, the mean clean structure given a noised one is sampled
    by Langevin dynamics (`dig-scale posterior`) and learned; frames are denoised above that level alone."""

    pairs: Path | None = None
    """Packed dataset of `dig-scale posterior`: noised structures and their means."""
    noise_max: PositiveFloat = 0.5
    """Å; the level. Dynamics must cross what barriers are as wide as it."""
    copies: PositiveInt = 2
    """Noised copies of each structure."""
    step: PositiveFloat = 0.01
    """Å that a coordinate moves in one step at its thermal velocity; 2 fs of carbon at room temperature."""
    periods: PositiveInt = 4
    """Length of the dynamics in periods 2 pi noise of the restraint to the noised structure; means are of the later half."""
    batch: PositiveInt = 64
    """Pairs per step, over all ranks."""


class Ablate(Section):
    """Three trainings at equal budget: energy alone, few frames alone, and both."""

    frames: PositiveInt = 200
    """Frames at the target temperature that the data-only and the mixed training have, evenly spread over the trajectories."""
    candidates: PositiveInt = 2_000
    """Structures whose forces are learned from, of hotter trajectories, evenly spread likewise."""
    candidate_temperature: PositiveFloat | None = None
    """K of those trajectories; the hottest ones when absent."""
    seconds: PositiveFloat | None = None
    """Wall time of each training, turned into steps by timing some of each; when absent each takes train.steps steps."""
