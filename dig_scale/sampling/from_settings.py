"""What recipes and the command line say of properties, in words and degrees -> guides, steering and states, in radians.

In: config_properties' sections, or NAME:PROPERTY:LOW:HIGH. Out: sampling.guidance.Guide, a potential for steering.steer, and
States, which tell of values whether they are inside. A dihedral has a period of 360 degrees; other properties have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from dig_scale.batch import Context, Geometry
from dig_scale.config_properties import GuideSpec, SteerSpec
from dig_scale.errors import UserError
from dig_scale.predictions import Predicted, PropertyPredictor
from dig_scale.sampling.collective_variables import Angle, Dihedral, property_from, require_sites
from dig_scale.sampling.guidance import (
    Guide,
    Likelihood,
    Normal,
    Property,
    Window,
    clean_guide,
    predicted_guide,
)
from dig_scale.sampling.steering import Steering
from dig_scale.system import System

_SPREAD, _SOFTNESS = {True: 10.0, False: 0.1}, {True: 5.0, False: 0.05}
"""Defaults by whether the property is an angle, in degrees or its own unit."""


@dataclass(frozen=True)
class Bounds:
    """A property and the values, low <= value < high, that are inside; degrees where it is an angle, else its own unit."""

    text: str
    prop: Property
    low: float
    high: float

    def inside(self, values: np.ndarray) -> np.ndarray:
        """Which values [S], as the property gives them (rad, Å), are inside."""
        own = np.asarray(values, np.float64) / _unit(self.prop)
        if _period(self.prop) is None:
            return np.asarray((own >= self.low) & (own < self.high))
        width = self.high - self.low
        return np.asarray(np.mod(own - self.low, 360.0) < (width if width > 0 else width + 360.0))


@dataclass(frozen=True)
class State:
    """A region of structures: those inside all bounds."""

    name: str
    bounds: tuple[Bounds, ...]

    @property
    def definition(self) -> str:
        """In words, as in 'dihedral:4,6,8,10 from -180 to 0'."""
        return " and ".join(f"{one.text} from {one.low:g} to {one.high:g}" for one in self.bounds)


def guide_from(spec: GuideSpec, system: System) -> Guide:
    """The guide that a recipe asks for; raises UserError for a site that the system does not have."""
    prop = _known(spec.property, system)
    return _with_settings(clean_guide(prop, _likelihood(spec, prop)), spec)


def guide_by(predictor: PropertyPredictor, predicts: Predicted, spec: GuideSpec) -> Guide:
    """The guide of a predictor that a recipe asks for; the predictor answers in units in which the property is of order 1."""
    assert spec.target is not None
    return _with_settings(predicted_guide(predictor, *predicts.wanted(spec.target, spec.spread or 0.0)), spec)


def steering_from(spec: SteerSpec, system: System) -> tuple[Property, Steering]:
    """The sum of the potentials [B] in nat that a recipe steers by, and how; raises UserError as guide_from does."""
    parts = [_potential(text, system) for text in spec.potentials]

    def total(geometry: Geometry, context: Context) -> Tensor:
        found = parts[0](geometry, context)
        for part in parts[1:]:
            found = found + part(geometry, context)
        return found

    return total, Steering(spec.strength, spec.resample_below, spec.start)


def states_from(texts: Sequence[str]) -> tuple[State, ...]:
    """States of NAME:PROPERTY:LOW:HIGH; several texts of one name bound it together. Raises UserError for anything else."""
    bounds: dict[str, tuple[Bounds, ...]] = {}
    for text in texts:
        name, _, rest = text.partition(":")
        parts = rest.rsplit(":", 2)
        numbers = _numbers(parts[1:])
        if not name or len(parts) != 3 or numbers is None:
            raise UserError(f"state {text!r}: expected NAME:PROPERTY:LOW:HIGH, as in left:dihedral:4,6,8,10:0:180")
        prop = property_from(parts[0])
        if _period(prop) is None and not numbers[0] < numbers[1]:
            raise UserError(f"state {text!r}: {numbers[0]:g} is not below {numbers[1]:g}, and only dihedrals go round")
        if _period(prop) is not None and not all(map(math.isfinite, numbers)):
            raise UserError(f"state {text!r}: a dihedral lies between finite angles in degrees, as in -180:0")
        bounds[name] = (*bounds.get(name, ()), Bounds(parts[0], prop, numbers[0], numbers[1]))
    return tuple(State(name, found) for name, found in bounds.items())


def _with_settings(guide: Guide, spec: GuideSpec) -> Guide:
    return replace(guide, scale=spec.scale, clip=spec.clip, start=spec.start, end=spec.end)


def _likelihood(spec: GuideSpec, prop: Property) -> Likelihood:
    unit, angular = _unit(prop), isinstance(prop, Angle | Dihedral)
    if spec.window is None:
        assert spec.target is not None
        return Normal(spec.target * unit, (spec.spread or _SPREAD[angular]) * unit, _period(prop))
    low, high = spec.window
    if high <= low and _period(prop) is None:
        raise UserError(f"guide of {spec.property!r}: the window from {low:g} to {high:g} is empty")
    upper = high if high > low else high + 360.0
    return Window(low * unit, upper * unit, (spec.softness or _SOFTNESS[angular]) * unit, _period(prop))


def _potential(text: str, system: System) -> Property:
    """((value - target)/spread)²/2 of PROPERTY:TARGET:SPREAD, else the property itself."""
    parts = text.rsplit(":", 2)
    numbers = _numbers(parts[1:]) if len(parts) == 3 else None
    if numbers is None:
        return _known(text, system)
    prop, (target, spread) = _known(parts[0], system), numbers
    if not spread > 0 or not math.isfinite(target):
        raise UserError(
            f"potential {text!r}: expected PROPERTY:TARGET:SPREAD with a finite target and a spread above 0"
        )
    wanted = Normal(target * _unit(prop), spread * _unit(prop), _period(prop))
    return lambda geometry, context: -wanted(prop(geometry, context))


def _known(text: str, system: System) -> Property:
    prop = property_from(text)
    require_sites(prop, system.n_sites, system.name)
    return prop


def _numbers(words: Sequence[str]) -> tuple[float, float] | None:
    try:
        first, second = (float(word) for word in words)
    except ValueError:
        return None
    return None if math.isnan(first) or math.isnan(second) else (first, second)


def _unit(prop: Property) -> float:
    """What one of the user's units is in the property's."""
    return math.pi / 180 if isinstance(prop, Angle | Dihedral) else 1.0


def _period(prop: Property) -> float | None:
    return 2 * math.pi if isinstance(prop, Dihedral) else None
