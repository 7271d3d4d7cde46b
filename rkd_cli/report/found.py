"""The results of ``rkd search`` as a line of text, an HTML page and JSON."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rkd_cli.report.page import render
from rkd_cli.report.text import count

if TYPE_CHECKING:
    from rkd_cli.commands.search import Found


def summary_of(found: Found) -> str:
    """One line about the search."""
    where = f"{count(found.images, 'image')} of {name_of(found.gallery)}, by {found.model}"
    if found.threshold is None:
        queries = len(found.answers)
        by = "" if found.recall is None else f"; faiss finds {100 * found.recall:.1f} % of the exact answers"
        return f"{queries:,} {'query' if queries == 1 else 'queries'} among {where}{by}"
    what = f"{count(len(found.groups), 'group')} of {count(sum(map(len, found.groups)), 'duplicate')}"
    return f"{what} (cosine {found.threshold:g} or more) among {where}"


def found_html(found: Found, pictures: dict[Path, bytes | None], made: datetime) -> str:
    """The page. ``pictures``: {path: thumbnail, None if unreadable}."""
    return render(
        "search.html.j2",
        title="Duplicates" if found.threshold is not None else "Search",
        made=made,
        found=found,
        summary=summary_of(found),
        pictures=pictures,
        name=name_of,
    )


def found_facts(found: Found) -> dict[str, object]:
    """The answers or the groups, for ``--json``."""

    def hits(rows: object) -> list[dict[str, object]]:
        return [{"path": name_of(hit.path), found.measure: hit.similarity} for hit in rows]  # type: ignore[attr-defined]

    facts: dict[str, object] = {"model": found.model, "gallery": name_of(found.gallery), "images": found.images}
    if found.threshold is not None:
        return facts | {"threshold": found.threshold, "groups": [hits(group) for group in found.groups]}
    answers = [{"query": name_of(query), "nearest": hits(near)} for query, near in found.answers]
    return facts | {"measure": found.measure, "recall": found.recall, "answers": answers}


def name_of(path: Path) -> str:
    """A path as printable text."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def within(path: Path, gallery: Path) -> str:
    """A path, relative to the gallery if inside."""
    return name_of(path.relative_to(gallery) if path.is_relative_to(gallery) else path)
