"""HTML pages of ``rkd report`` and ``rkd compare``, each a single self-contained file."""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rkd_cli import __version__
from rkd_cli.report import svg, views
from rkd_cli.report.comparison import comparison_table, concatenated_lines, difference_lines, shortened
from rkd_cli.report.text import count

if TYPE_CHECKING:
    from rkd_cli.commands.compare import Comparison
    from rkd_cli.commands.report import Report


def report_html(found: Report) -> str:
    """The page of ``rkd report``."""
    runs = (*found.runs, *found.teachers)
    styles = views.styles_of(found)
    groups = views.groups_of(runs)
    names = {title: {run.name for run in members} for title, members in groups.items()}
    students = {t: [s for s, own in groups.items() if {run.teacher for run in own} & names[t]] for t in groups}
    charts = {"Losses": views.loss_charts(groups, styles), "Recall": views.recall_charts(groups, styles)}
    named = [run.name for run in found.runs]
    parts = [
        {
            "set": part,
            "number": number,
            "figures": views.figures_table(part, named, styles),
            "costs": views.cost_table(part),
            "choices": views.choice_charts(part, styles),
            "styles": [(title, styles[title]) for title in views.entries_of(part)],
            "vectors": views.vector_table(part, styles),
            "classes": views.class_table(part),
            "map": views.map_view(part.map) if part.map else None,
        }
        for number, part in enumerate(found.sets)
    ]
    return render(
        "report.html.j2",
        title=f"Report on {named[0] if len(named) == 1 else count(len(runs), 'run')}",
        made=found.made,
        found=found,
        cards=[views.card_of(title, members, styles, students[title]) for title, members in groups.items()],
        summary=[line for part in found.sets for line in views.summary_of(part)],
        curves=[(title, drawn, views.legend_of(drawn)) for title, drawn in charts.items() if drawn],
        parts=parts,
        differing=views.differing_table(found),
        styles=styles,
    )


def comparison_html(found: Comparison, made: datetime) -> str:
    """The page of ``rkd compare --html``."""
    titles, sections, same = comparison_table(found)
    titles = [title for title in titles if title != "data"]  # each set has its own table
    together: dict[str, list[dict[str, Any]]] = {}
    for data, rows in sections:
        together.setdefault(data, []).extend(
            row | {"run": row["run"].strip(), "is_member": row["run"].startswith(" ")} for row in rows
        )
    best: dict[str, set[tuple[str, str]]] = {}  # {set: (run, title)} without untrained runs
    for data, rows in together.items():
        for title in (title for title in titles if "@" in title):
            competing = [row for row in rows if title in row and "seed" in row]
            figures = {row["run"]: float(row[title]) for row in competing if row.get("epoch") != "0"}
            if len(figures) > 1:
                highest = max(figures.values())
                best.setdefault(data, set()).update((run, title) for run in figures if figures[run] == highest)
    return render(
        "compare.html.j2",
        title=f"Comparison of {count(sum(len(group.runs) for group in found.groups), 'run')}",
        made=made,
        titles=titles,
        sections=together,
        best=best,
        same=same,
        concatenated=concatenated_lines(found),
        differences=difference_lines(found),
        words=("network", "loss", "teacher", "state"),
        short=shortened([str(run.path) for group in found.groups for run in group.runs]),
        has_mean=any(group.mean for group in found.groups),
        problems=found.problems,
    )


def render(template: str, **values: Any) -> str:
    """Render a template of this package; values are escaped."""
    environment = Environment(
        loader=PackageLoader("rkd_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.globals |= {"version": __version__, "svg": svg, "count": count}
    html = environment.get_template(template).render(**values)
    for tag, content in re.findall(r"<(style|script)>(.*?)</\1>", html, re.DOTALL):  # what the page's policy allows
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        html = html.replace(f"HASH-OF-{tag.upper()}", f"'sha256-{digest}'", 1)
    return html


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
