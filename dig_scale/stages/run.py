"""Every stage of a recipe in a row."""

from __future__ import annotations

from pathlib import Path

from dig_scale.config import Recipe
from dig_scale.errors import UserError
from dig_scale.stages.data import import_stage, pack_stage, simulate_stage
from dig_scale.stages.evaluate import evaluate_stage
from dig_scale.stages.folders import RunFolders
from dig_scale.stages.sample import sample_stage, shared_out
from dig_scale.stages.train import train_stage


def run_all(recipe: Recipe, folders: RunFolders) -> Path:
    """Every stage of a recipe in a row; the path of report.html."""
    for section in ("pack", "train"):
        if getattr(recipe, section) is None:
            raise UserError(f"recipe {recipe.name!r} has no [{section}] section; `dig-scale run` needs it")
    if recipe.predict is not None:
        raise UserError(
            f"recipe {recipe.name!r} has [predict]: it trains a predictor, which gives no samples; use `dig-scale train`"
        )
    if recipe.simulate is None and not recipe.imports and not recipe.searches:
        raise UserError(
            f"recipe {recipe.name!r} has neither [simulate] nor [[imports]] nor [[searches]]; `dig-scale run` needs one"
        )
    if recipe.simulate is not None or recipe.searches:
        simulate_stage(recipe, folders.trajectories)
    if recipe.imports:
        import_stage(recipe, folders.trajectories)
    pack_stage(recipe, [folders.trajectories], folders.dataset)
    train_stage(recipe, folders.dataset, folders.model)
    sample_stage(shared_out(folders.model, None, recipe.sample, folders.ensemble))
    return evaluate_stage(folders.ensemble, folders.trajectories, recipe.evaluate, folders.report)
