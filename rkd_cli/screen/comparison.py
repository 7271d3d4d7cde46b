"""The table of ``rkd compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkd_cli.report.comparison import (
    ALWAYS_SAID,
    Row,
    comparison_facts,
    comparison_table,
    concatenated_lines,
    difference_lines,
)
from rkd_cli.screen.tables import show_text
from rkd_cli.screen.terminal import console

if TYPE_CHECKING:
    from rkd_cli.commands.compare import Comparison

_SETTINGS = "settings"
_FOLDED = 24  # width of the column of folded settings
_LEFT = ("run", "state", *ALWAYS_SAID, _SETTINGS)
_FIRST = ("R@1", "overlap@10")  # never dropped


def show_comparison(found: Comparison, as_json: bool) -> None:
    """One table of all runs, with a section for each data set and the mean above each group of seeds."""
    if as_json:
        show_text(json.dumps(comparison_facts(found), indent=2))
        return
    titles, sections, same = comparison_table(found)
    if same:
        show_text(f"all: {same}")
    settings = [name.replace("_", "-") for name in found.differing if name not in ALWAYS_SAID]
    _print(titles, sections, settings)
    has_mean = any(group.mean for group in found.groups)
    has_folds = any(group.mean and group.folds > 1 for group in found.groups)
    show_text(
        "percent at the best epoch, on the evaluation split"
        + ("; mean ± sample standard deviation over the seeds of finished runs" if has_mean else "")
        + (", each the mean of its folds (of one seed: over its folds)" if has_folds else "")
    )
    for line in concatenated_lines(found):
        show_text(line)
    if has_folds and not found.concatenated:
        show_text("--concatenate also measures the concatenated embeddings of the fold models")
    for line in difference_lines(found):
        show_text(line)
    if found.differences:
        show_text("± of a difference: half of its 95 % interval (paired t-test over seeds)")
    for problem in found.problems:
        show_text(f"left out: {problem}")


def _print(titles: list[str], sections: Sequence[tuple[str, Sequence[Row]]], settings: Sequence[str]) -> None:
    """In a log, print all columns. On a terminal, drop columns and fold the settings until the table fits."""
    needed = _width(titles, sections)
    if not console.is_terminal:
        Console(width=max(needed, console.width), highlight=False, emoji=False).print(_table(titles, sections))
        return
    figures = [title for title in titles if "@" in title and title not in _FIRST]
    for dropped in (*reversed(figures), _SETTINGS, "MB", "params", "time", "last", "epoch"):  # larger K first
        if needed <= console.width:
            break
        if dropped == _SETTINGS:
            titles, sections = _merged(titles, sections, settings)
        titles = [title for title in titles if title != dropped or dropped == _SETTINGS]
        needed = _width(titles, sections)
    console.print(_table(titles, sections))


def _merged(
    titles: list[str], sections: Sequence[tuple[str, Sequence[Row]]], settings: Sequence[str]
) -> tuple[list[str], list[tuple[str, Sequence[Row]]]]:
    """All settings in one folding column."""
    among = [title for title in titles if title in settings]
    if not among:
        return titles, list(sections)
    at = titles.index(among[0])
    left = [title for title in titles if title not in among]

    def merged(row: Row) -> Row:
        return row | {_SETTINGS: ", ".join(f"{title} {row[title]}" for title in among if title in row)}

    return [*left[:at], _SETTINGS, *left[at:]], [(data, [merged(row) for row in rows]) for data, rows in sections]


def _width(titles: Sequence[str], sections: Sequence[tuple[str, Sequence[Row]]]) -> int:
    table = _table(titles, sections)
    for title, column in zip(titles, table.columns, strict=True):
        if title == _SETTINGS:
            column.max_width = _FOLDED
    return Console(width=10_000).measure(table).maximum


def _table(titles: Sequence[str], sections: Sequence[tuple[str, Sequence[Row]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in titles:
        folds = title in _LEFT
        longest = max(len(title), *(len(row.get(title, "")) for _, rows in sections for row in rows))
        least = min(longest, 12 if title == "run" else 8) if folds else longest
        table.add_column(
            title, justify="left" if folds else "right", overflow="fold", no_wrap=not folds, min_width=least
        )
    before = sections[0][0]
    for data, rows in sections:
        if data != before:
            table.add_section()
        before = data
        for row in rows:
            style = "bold" if row["run"].startswith("mean of") and "seed" not in row else None
            table.add_row(*(Text(row.get(title, "")) for title in titles), style=style)
    return table
