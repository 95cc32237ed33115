"""The sections [sample.guide] and [sample.steer] of a recipe, structures with a wanted property, and [predict], a network that
tells a property. Angles are in degrees here."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from dig_scale.config_section import PositiveFloat, Section

PREDICTOR = "predictor:"
"""What the folder of a predictor begins with where a property may stand."""


class GuideSpec(Section):
    """Property guidance (Bayes' rule on the clean estimate, or by a predictor): a value near `target`, or one inside `window`."""

    property: str
    """distance:i,j, angle:i,j,k, dihedral:i,j,k,l or gyration:i,j,... of sites from 0 on, MODULE:FUNCTION or FILE.py:FUNCTION;
    or predictor:FOLDER, what a recipe with [predict] was trained on there."""
    target: float | None = None
    """Å, or degrees of angles and dihedrals, or what the function gives; so are the numbers below."""
    spread: PositiveFloat | None = None
    """Standard deviation about the target: 10 degrees, or 0.1, when absent; of predictors 0, as they have their own."""
    window: tuple[float, float] | None = None
    """Low and high; of dihedrals upwards from low, through 180 if need be."""
    softness: PositiveFloat | None = None
    """Width of the window's edges: 5 degrees, or 0.05, when absent."""
    scale: float = 1.0
    """Multiplies the gradient; 1 is Bayes' rule."""
    clip: PositiveFloat | None = None
    """Bound on every element of the gradient in units of the score of one standard deviation of noise."""
    start: float = Field(default=1.0, ge=0, le=1)
    end: float = Field(default=0.0, ge=0, le=1)
    """It acts while end <= t <= start, t = 1 being pure noise."""

    @model_validator(mode="after")
    def _one_wish(self) -> GuideSpec:
        if (self.target is None) == (self.window is None):
            raise ValueError(f"guide of {self.property!r} needs either a target or a window")
        if self.target is None and self.spread is not None:
            raise ValueError(
                f"guide of {self.property!r}: spread goes with a target; the edges of a window have softness"
            )
        if self.window is None and self.softness is not None:
            raise ValueError(f"guide of {self.property!r}: softness goes with a window; a target has spread")
        if self.end > self.start:
            raise ValueError(f"guide from t = {self.start:g} to {self.end:g}: expected start >= end")
        if predictor_of(self) is not None and self.target is None:
            raise ValueError(f"guide of {self.property!r}: a predictor guides to a target, not into a window")
        return self


def predictor_of(guide: GuideSpec | None) -> Path | None:
    """The training folder of the predictor that guides, or None where none does."""
    if guide is None or not guide.property.startswith(PREDICTOR):
        return None
    return Path(guide.property.removeprefix(PREDICTOR))


class SteerSpec(Section):
    """Feynman-Kac steering towards low values of a potential U; samples keep weights that correct averages."""

    potentials: tuple[str, ...] = Field(min_length=1)
    """PROPERTY:TARGET:SPREAD is ((value - target)/spread)²/2, as in dihedral:4,6,8,10:60:20; PROPERTY alone is U itself (kT)."""
    strength: float = 1.0
    """Multiplies the sum of the potentials."""
    resample_below: float = Field(default=0.5, ge=0, le=1)
    """Fraction of effective samples below which a population is resampled; 0: never."""
    start: float = Field(default=1.0, ge=0, le=1)
    """U counts from this t on, t = 1 being pure noise."""


class Predict(Section):
    """A predictor of a property is trained in the place of a score model: its distribution given a noised structure."""

    property: str
    """A label of the frames, such as energy (eV); or a property of the clean structure as in --guide, distance:i,j, angle:i,j,k,
    dihedral:i,j,k,l, gyration:i,j,..., MODULE:FUNCTION or FILE.py:FUNCTION."""
    centre: float | None = None
    """Degrees of angles, else the property's own unit; the mean over training frames when absent. A dihedral has none."""
    spread: PositiveFloat | None = None
    """Standard deviation, likewise."""
