"""The results of ``rkd search`` as a table or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from rkd_cli.report.found import found_facts, name_of, summary_of, within
from rkd_cli.screen.tables import show_text
from rkd_cli.screen.terminal import console

if TYPE_CHECKING:
    from rkd_cli.commands.search import Found


def show_found(found: Found, as_json: bool) -> None:
    """The answers or the groups, as a table or as one JSON object."""
    if as_json:
        show_text(json.dumps(found_facts(found)))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    duplicates = found.threshold is not None
    table.add_column("group" if duplicates else "query", overflow="fold")
    if not duplicates:
        table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("image", overflow="fold")
    table.add_column(found.measure, justify="right", no_wrap=True)
    for number, group in enumerate(found.groups, 1):
        for place, hit in enumerate(group):
            table.add_row("" if place else str(number), Text(within(hit.path, found.gallery)), f"{hit.similarity:.4f}")
    for query, hits in found.answers:
        for rank, hit in enumerate(hits, 1):
            left = Text("" if rank > 1 else name_of(query))
            table.add_row(left, str(rank), Text(within(hit.path, found.gallery)), f"{hit.similarity:.4f}")
    if found.groups or found.answers:
        console.print(table)
    show_text(summary_of(found))
