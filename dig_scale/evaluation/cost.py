"""What a sample costs: CPU seconds of MD, of training and of sampling, per independent sample.

In: Costs as they were measured (None where unknown) and the reference's statistical inefficiency. Out: CostTable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dig_scale.evaluation.reference import ReferenceSet


@dataclass(frozen=True)
class Costs:
    """Measured costs in CPU seconds; None is "not recorded"."""

    md_cpu_seconds: float | None = None
    training_cpu_seconds: float | None = None
    sampling_cpu_seconds: float | None = None
    network_evaluations_per_sample: float | None = None
    weighting_cpu_seconds: float | None = None
    """Log-densities and energies of all samples."""


@dataclass(frozen=True)
class ReferenceQuality:
    """How much independent information the MD holds; times in ps, block length of the bootstrap in frames."""

    source: str
    frames: int
    trajectories: int
    frame_spacing_ps: float
    total_time_ps: float
    temperature: float
    statistical_inefficiency: float
    decorrelation_time_ps: float
    independent_frames: float
    block_length: int
    n_blocks: int


@dataclass(frozen=True)
class CostTable:
    """Costs and what follows from them; None where a cost it needs was not recorded."""

    md_cpu_seconds: float | None
    training_cpu_seconds: float | None
    sampling_cpu_seconds: float | None
    network_evaluations_per_sample: float | None
    md_seconds_per_independent_sample: float | None
    model_seconds_per_sample: float | None
    model_samples_per_second: float | None
    speed_up: float | None
    """MD seconds per independent sample over model seconds per sample, training left out."""
    break_even_samples: float | None
    """Samples at which training and sampling have cost as much as MD of the same number of independent samples."""


def reference_quality(
    reference: ReferenceSet, inefficiency: float, block_length: int, n_blocks: int
) -> ReferenceQuality:
    """Facts of a reference, its frames ordered by trajectory and time."""
    same = reference.trajectory[1:] == reference.trajectory[:-1]
    steps = np.diff(reference.time_ps)[same]
    spacing = float(np.median(steps)) if len(steps) else 0.0
    return ReferenceQuality(
        source=reference.source,
        frames=reference.n_frames,
        trajectories=len(np.unique(reference.trajectory)),
        frame_spacing_ps=spacing,
        total_time_ps=spacing * reference.n_frames,
        temperature=reference.temperature,
        statistical_inefficiency=inefficiency,
        decorrelation_time_ps=inefficiency * spacing,
        independent_frames=reference.n_frames / inefficiency,
        block_length=block_length,
        n_blocks=n_blocks,
    )


def cost_table(costs: Costs, n_samples: int, independent_frames: float) -> CostTable | None:
    """Costs per sample; None when nothing was recorded."""
    recorded = (costs.md_cpu_seconds, costs.training_cpu_seconds, costs.sampling_cpu_seconds)
    if all(seconds is None for seconds in recorded):
        return None
    per_md = _ratio(costs.md_cpu_seconds, independent_frames)
    per_sample = _ratio(costs.sampling_cpu_seconds, n_samples)
    saved = per_md - per_sample if per_md is not None and per_sample is not None else None
    return CostTable(
        md_cpu_seconds=costs.md_cpu_seconds,
        training_cpu_seconds=costs.training_cpu_seconds,
        sampling_cpu_seconds=costs.sampling_cpu_seconds,
        network_evaluations_per_sample=costs.network_evaluations_per_sample,
        md_seconds_per_independent_sample=per_md,
        model_seconds_per_sample=per_sample,
        model_samples_per_second=_ratio(1.0, per_sample),
        speed_up=_ratio(per_md, per_sample),
        break_even_samples=_ratio(costs.training_cpu_seconds, saved) if saved is not None and saved > 0 else None,
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
