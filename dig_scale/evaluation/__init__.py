"""Evaluation: an Ensemble against reference MD, as numbers, as a page, as a picture. The public face of the package."""

from __future__ import annotations

from dig_scale.evaluation.comparison import evaluate
from dig_scale.evaluation.cost import Costs
from dig_scale.evaluation.pictures import summary_picture
from dig_scale.evaluation.reference import ReferenceSet, reference_from_frames
from dig_scale.evaluation.report import write_report
from dig_scale.evaluation.result import Evaluation

__all__ = [
    "Costs",
    "Evaluation",
    "ReferenceSet",
    "evaluate",
    "reference_from_frames",
    "summary_picture",
    "write_report",
]
