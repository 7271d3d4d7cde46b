"""What ``rkd search`` found: a table, JSON, or a page of pictures."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from rkd_cli.report.page import render
from rkd_cli.report.tables import show_text
from rkd_cli.report.terminal import console
from rkd_cli.report.text import count

if TYPE_CHECKING:
    from rkd_cli.commands.search import Found


def show_found(found: Found, as_json: bool) -> None:
    """The answers or the groups, as a table or as one JSON object."""
    if as_json:
        show_text(json.dumps(_facts(found)))
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
            table.add_row("" if place else str(number), Text(_within(hit.path, found.gallery)), f"{hit.similarity:.4f}")
    for query, hits in found.answers:
        for rank, hit in enumerate(hits, 1):
            left = Text("" if rank > 1 else _name(query))
            table.add_row(left, str(rank), Text(_within(hit.path, found.gallery)), f"{hit.similarity:.4f}")
    if found.groups or found.answers:
        console.print(table)
    show_text(summary_of(found))


def summary_of(found: Found) -> str:
    """A line on what was searched."""
    where = f"{count(found.images, 'image')} of {_name(found.gallery)}, by {found.model}"
    if found.threshold is None:
        queries = len(found.answers)
        by = "" if found.recall is None else f"; faiss finds {100 * found.recall:.1f} % of the exact answers"
        return f"{queries:,} {'query' if queries == 1 else 'queries'} among {where}{by}"
    what = f"{count(len(found.groups), 'group')} of {count(sum(map(len, found.groups)), 'duplicate')}"
    return f"{what} (cosine {found.threshold:g} or more) among {where}"


def found_html(found: Found, pictures: dict[Path, bytes | None], made: datetime) -> str:
    """The page, with a thumbnail of each image, None of one that cannot be read."""
    return render(
        "search.html.j2",
        title="Duplicates" if found.threshold is not None else "Search",
        made=made,
        found=found,
        summary=summary_of(found),
        pictures=pictures,
        name=_name,
    )


def _name(path: Path) -> str:
    """A path that can be printed, whatever its bytes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _within(path: Path, gallery: Path) -> str:
    return _name(path.relative_to(gallery) if path.is_relative_to(gallery) else path)


def _facts(found: Found) -> dict[str, object]:
    def hits(rows: object) -> list[dict[str, object]]:
        return [{"path": _name(hit.path), found.measure: hit.similarity} for hit in rows]  # type: ignore[attr-defined]

    facts: dict[str, object] = {"model": found.model, "gallery": _name(found.gallery), "images": found.images}
    if found.threshold is not None:
        return facts | {"threshold": found.threshold, "groups": [hits(group) for group in found.groups]}
    answers = [{"query": _name(query), "nearest": hits(near)} for query, near in found.answers]
    return facts | {"measure": found.measure, "recall": found.recall, "answers": answers}
