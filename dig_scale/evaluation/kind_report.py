"""Reports of kinds and of several systems: one self-contained HTML page each, report.json and summary.png beside it.

In: a KindEvaluation and a folder, or the reports of several systems. Out: files. As in report.py every number on a page stands
in a <data> element that names its place in report.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dig_scale.evaluation import pictures
from dig_scale.evaluation.kinds.evaluation import KindEvaluation
from dig_scale.evaluation.report import HTML_NAME, JSON_NAME, Number, templates, write_json
from dig_scale.evaluation.result import numbers
from dig_scale.evaluation.side_by_side import DISTANCE_TITLES

SUMMARY_NAME = "summary.png"


def write_kind_report(evaluation: KindEvaluation, out: Path) -> Path:
    """Write report.html, report.json and summary.png into `out` (made if absent) and return the path of the page."""
    content = numbers(evaluation)
    write_json(content, out)
    sections = evaluation.findings.sections
    drawn = [one.figure and pictures.png_of(one.figure) for one in sections]
    page = out / HTML_NAME
    page.write_text(
        templates()
        .get_template("kind.html.j2")
        .render(
            report=content,
            number=Number(content),
            titles=DISTANCE_TITLES,
            pictures=[(png and pictures.png_uri(png), one.caption) for png, one in zip(drawn, sections, strict=True)],
        )
    )
    if first := next(filter(None, drawn), None):
        (out / SUMMARY_NAME).write_bytes(first)
    return page


def write_overview(pages: Mapping[str, Path], failed: Mapping[str, str], out: Path) -> Path:
    """Write report.html and report.json that list the reports of several systems by name, and why others have none."""
    systems = [_summary(name, page, out) for name, page in pages.items()]
    samples = sum(one["subject"]["samples"] for one in systems)
    content = {"systems": systems, "failed": dict(failed), "samples": samples}
    write_json(content, out)
    page = out / HTML_NAME
    page.write_text(templates().get_template("overview.html.j2").render(report=content, number=Number(content)))
    return page


def _summary(name: str, page: Path, out: Path) -> dict[str, Any]:
    report = json.loads(page.with_name(JSON_NAME).read_text())
    found = report.get("findings", report)
    link = os.path.relpath(page, out)
    return {"name": name, "page": link, "subject": report["subject"], "verdict": found["verdict"]}
