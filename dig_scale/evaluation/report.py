"""The report: one self-contained HTML page, and report.json beside it with every number of the page.

In: an Evaluation and a folder. Each number on the page stands in a <data> element that names its place in report.json, so
the two cannot drift apart. The page loads nothing: pictures and style are inside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dig_scale.ensemble import BOLTZMANN
from dig_scale.evaluation import physics_pictures, pictures, structure, thermodynamics
from dig_scale.evaluation.formats import FORMATS, percent
from dig_scale.evaluation.result import Evaluation, numbers
from dig_scale.evaluation.sets import BLOCK_INEFFICIENCIES

HTML_NAME, JSON_NAME = "report.html", "report.json"
MAX_ROWS = 40
"""Rows of a table on the page; report.json has all."""
SET_TITLES = {
    "model": "Model",
    "md": "MD",
    "first_half": "MD, first halves",
    "second_half": "MD, second halves",
    "subsample": "MD, same-size subsample",
    "reweighted": "Model, reweighted",
}


def write_report(evaluation: Evaluation, out: Path) -> Path:
    """Write report.html and report.json into the folder `out` (made if absent) and return the path of the page."""
    content = numbers(evaluation)
    write_json(content, out)
    page = out / HTML_NAME
    page.write_text(render(evaluation, content))
    return page


def render(evaluation: Evaluation, content: dict[str, Any]) -> str:
    """The page of an evaluation whose `numbers` are `content`."""
    titles = dict(SET_TITLES)
    weights = evaluation.physics.weights
    if weights is None or weights.towards != BOLTZMANN:
        del titles["reweighted"]
    if weights is not None:
        titles["reweighted" if weights.towards == BOLTZMANN else "model"] += f" (ESS {percent(weights.fraction)})"
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            report=content,
            number=Number(content),
            titles=titles,
            pictures=_pictures(evaluation),
            rows=_rows(evaluation),
            basins=thermodynamics.BASINS,
            constants={
                "core_margin": f"{thermodynamics.CORE_MARGIN:g}",
                "clash_factor": f"{structure.CLASH_FACTOR:g}",
                "bead_clash": f"{structure.BEAD_CLASH_DISTANCE:.1f}",
                "clash_bonds": structure.CLASH_MIN_BONDS,
                "block_inefficiencies": BLOCK_INEFFICIENCIES,
            },
        )
    )


def templates() -> Environment:
    """The templates of pages; an undefined name in one is an error."""
    return Environment(
        loader=PackageLoader("dig_scale.evaluation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_json(content: dict[str, Any], out: Path) -> Path:
    """Write the numbers of a page as report.json into the folder `out`, made if absent."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / JSON_NAME
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


@dataclass(frozen=True)
class Number:
    """Prints the number at a path of the report's content, in a <data> element that carries path and full value."""

    content: dict[str, Any]

    def __call__(self, path: str, kind: str) -> Markup:
        value = self._at(path)
        if value is None:
            return Markup('<span class="none">—</span>')
        text = FORMATS[kind](value)
        return Markup(f'<data value="{escape(repr(value))}" data-path="{escape(path)}">{escape(text)}</data>')

    def known(self, path: str) -> bool:
        """Whether there is a number at the path."""
        return self._at(path) is not None

    def _at(self, path: str) -> Any:
        value: Any = self.content
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        return value


def _pictures(evaluation: Evaluation) -> dict[str, Any]:
    """Data URIs by place; a place without picture is None."""
    tables = {"bonds": evaluation.bonds, "angles": evaluation.angles}
    drawn = {name: table and pictures.as_svg(pictures.geometry_figure(table)) for name, table in tables.items()}
    torsions, energy = pictures.worst_torsions(evaluation), evaluation.energy
    physics = evaluation.physics
    return drawn | {
        "weights": physics.weights and pictures.as_svg(physics_pictures.weights_figure(physics.weights)),
        "agreement": physics.agreement and pictures.as_png(physics_pictures.agreement_figure(physics.agreement)),
        "cost_curve": physics.cost_curve and pictures.as_svg(physics_pictures.cost_figure(physics.cost_curve)),
        "maps": [(one.label, pictures.as_png(pictures.map_figure(one))) for one in pictures.worst_maps(evaluation)],
        "torsions": pictures.as_svg(pictures.torsion_figure(torsions)) if torsions else None,
        "energy": pictures.as_svg(pictures.energy_figure(energy)) if energy else None,
    }


def _rows(evaluation: Evaluation) -> dict[str, list[int]]:
    """Which rows of each long table stand on the page: all, or the worst MAX_ROWS in the order of the system."""
    divergences = {
        "maps": [one.divergence.model for one in evaluation.maps],
        "torsions": [one.divergence.model for one in evaluation.torsions],
    }
    shifts = {
        name: [abs(term.mean["model"] - term.mean["md"]) for term in table.terms] if table else []
        for name, table in (("bonds", evaluation.bonds), ("angles", evaluation.angles))
    }
    rows = {name: _worst(values, MAX_ROWS) for name, values in (divergences | shifts).items()}
    return rows | {"basins": _worst(divergences["maps"], pictures.MAX_MAPS)}


def _worst(badness: list[float], count: int) -> list[int]:
    order = sorted(range(len(badness)), key=lambda index: -badness[index])
    return sorted(order[:count])
