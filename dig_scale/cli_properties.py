"""Options of the command line that speak of properties: guided and steered samples, states; part of dig_scale.cli.

In: what was typed, and a recipe's [sample]. Out: sections of settings. Angles are in degrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dig_scale.errors import UserError

if TYPE_CHECKING:
    from dig_scale.config import Sample

States = Annotated[
    list[str] | None,
    typer.Option(
        "--state", metavar="NAME:PROPERTY:LOW:HIGH", help="As in left:dihedral:4,6,8,10:0:180; may be repeated."
    ),
]
Guide = Annotated[
    str | None,
    typer.Option(
        metavar="PROPERTY",
        help="As in dihedral:4,6,8,10, or predictor:FOLDER; with --guide-target or, of no predictor, --guide-window.",
    ),
]
GuideTarget = Annotated[float | None, typer.Option(help="Wanted value: degrees, Å, or the property's own unit.")]
GuideSpread = Annotated[float | None, typer.Option(help="Standard deviation about the target.")]
GuideWindow = Annotated[tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Wanted values.")]
GuideSoftness = Annotated[float | None, typer.Option(help="Width of the window's edges.")]
GuideScale = Annotated[float | None, typer.Option(help="Multiplies the guide's gradient; 1 is Bayes' rule.")]
GuideClip = Annotated[float | None, typer.Option(help="Bound on it, in scores of one standard deviation of noise.")]
GuideTime = Annotated[float | None, typer.Option(min=0, max=1, help="Diffusion time; 1 is noise.")]
Steer = Annotated[
    list[str] | None,
    typer.Option(
        "--steer",
        metavar="POTENTIAL",
        help="PROPERTY:TARGET:SPREAD is ((value - target)/spread)²/2 in kT; may be repeated.",
    ),
]
SteerStrength = Annotated[float | None, typer.Option(help="Multiplies the potentials.")]

_INSTEAD_OF = {"target": ("window", "softness"), "window": ("target", "spread")}


def with_wishes(defaults: Sample, guide: Mapping[str, Any], steer: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's guide and steer sections with options laid over them; an option of None was not given.

    A target takes the place of the recipe's window, and the other way round; a property of its whole guide. Raises
    UserError for settings of nothing.
    """
    found: dict[str, Any] = {}
    for name, head, options in (("guide", "property", guide), ("steer", "potentials", steer)):
        given = {key: value for key, value in options.items() if value is not None}
        section = getattr(defaults, name)
        if not given:
            continue
        if section is None and head not in given:
            raise UserError(f"--{name}-{next(iter(given))} is for samples with --{name}")
        kept = {} if section is None or head in given else section.model_dump()
        dropped = {other for one, others in _INSTEAD_OF.items() if one in given for other in others}
        found[name] = {key: value for key, value in kept.items() if key not in dropped} | given
    return found
