"""Tables and lines that are the result of a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from rkd_cli.report.terminal import console
from rkd_cli.report.text import fidelity_text, percent, short_time

if TYPE_CHECKING:
    from rkd_cli.bench.fidelity import Fidelity
    from rkd_cli.bench.measure import Measurement
    from rkd_cli.config.recipes import Recipe
    from rkd_cli.data.cache import CacheFile
    from rkd_cli.demo.story import DemoResult
    from rkd_cli.inference.evaluate import Evaluation


def show_text(text: str) -> None:
    """A line that is the result of a command."""
    console.print(text, soft_wrap=True, markup=False)


def show_evaluations(results: Sequence[Evaluation], as_json: bool) -> None:
    """The metrics of checkpoints, as one table or as one JSON object a line."""
    if as_json:
        for result in results:
            show_text(json.dumps(_facts(result)))
        return
    for result in results:
        header = result.header
        network = f"{header.base}, {result.parameters / 1e6:.1f} M parameters, {header.embedding_size}-d"
        unit = "unit length" if header.l2normalize else "not normalized"
        show_text(f"{result.path}: {network}, {unit}, epoch {header.epoch}, on {result.dataset}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if len(results) > 1:
        table.add_column("checkpoint", overflow="fold")
    for name in ("classes", *(f"R@{k}" for k in results[0].eval.recall), "R-Prec", "MAP@R"):
        table.add_column(name, justify="left" if name == "classes" else "right")
    for result in results:
        for name, split in (("training", result.train), ("unseen", result.eval)):
            figures = [*split.recall.values(), split.r_precision, split.map_at_r]
            path = [Text(str(result.path) if name == "training" else "")] if len(results) > 1 else []
            table.add_row(*path, name, *map(percent, figures))
    console.print(table)
    for result in results:
        for name, split in (("training", result.train), ("unseen", result.eval)):
            if split.without_positive:
                show_text(
                    f"{result.path}: {split.without_positive} of {split.images} {name} queries have no positive "
                    "and are left out"
                )


def _facts(result: Evaluation) -> dict[str, object]:
    header = result.header
    facts: dict[str, object] = {
        "checkpoint": str(result.path),
        "dataset": result.dataset,
        "base": header.base,
        "embedding_size": header.embedding_size,
        "l2normalize": header.l2normalize,
        "parameters": result.parameters,
        "epoch": header.epoch,
    }
    for name, split in (("train", result.train), ("eval", result.eval)):
        facts[f"{name}_recall"] = {str(k): value for k, value in split.recall.items()}
        facts[f"{name}_r_precision"] = split.r_precision
        facts[f"{name}_map_at_r"] = split.map_at_r
        facts[f"{name}_without_positive"] = split.without_positive
    facts["seen_classes"] = list(result.seen)
    return facts


def show_caches(folder: Path, removed: Sequence[CacheFile], left: Sequence[CacheFile]) -> None:
    """The files of decoded images in a folder, and which of them were removed."""
    if left:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("images in", overflow="fold")
        for name in ("images", "side", "MB"):
            table.add_column(name, justify="right", no_wrap=True)
        for file in left:
            table.add_row(Text(file.images), f"{file.count:,}", str(file.resize), f"{file.bytes / 1e6:,.0f}")
        console.print(table)
    for files, done in ((removed, " removed"), (left, "")):
        if files or (not done and not removed):
            size = sum(file.bytes for file in files) / 1e6
            count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
            show_text(f"{folder}: {count} of decoded images, {size:,.0f} MB{done}")


def show_recipes(recipes: Sequence[Recipe]) -> None:
    """The built-in recipes and the figures they aim at."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what")
    table.add_column("published R@1", justify="right")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.what, f"{recipe.published:.2f}" if recipe.published else "")
    console.print(table)
    show_text("Run one with `rkd train-teacher --config NAME` (the ...-teacher ones) or `rkd distill --config NAME`.")


def show_bench(
    rows: Sequence[Measurement], fidelity: Fidelity | None, machine: Mapping[str, object], as_json: bool
) -> None:
    """Our time and memory, or our students, beside the textbook's."""
    if as_json:
        ratios = [{**asdict(row), "faster": row.faster, "leaner": row.leaner} for row in rows]
        facts = {"machine": machine, "rows": ratios} | ({"fidelity": asdict(fidelity)} if fidelity else {})
        print(json.dumps(facts, indent=2))  # noqa: T201
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("work")
    for name in ("textbook, ours", "faster", "memory, MB", "leaner"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text.assemble(row.work, (f" ({row.note})" if row.note else "", "dim")),
            *_pair(row.textbook_seconds, row.seconds, row.faster, short_time),
            *_pair(row.textbook_bytes, row.bytes, row.leaner, lambda count: f"{count / 1e6:,.1f}"),
        )
    if rows:
        console.print(table)
    if fidelity:
        show_text(fidelity_text(fidelity))
    show_text(", ".join(f"{name} {value}" for name, value in machine.items()))


def _pair(
    textbook: float | None, ours: float | None, ratio: float | None, show: Callable[[float], str]
) -> tuple[str, str]:
    both = ["-" if value is None else show(value) for value in (textbook, ours)]
    return " ".join(both) if ours is not None else "", f"{ratio:.1f} x" if ratio else ""


def show_demo(result: DemoResult) -> None:
    """Teacher, triplet student and RKD student side by side."""
    table = Table(
        box=box.SIMPLE_HEAD, title="Best epoch of each, Recall@K in percent", title_justify="left", pad_edge=False
    )
    for name in ("network", "size", "d", "classes"):
        table.add_column(name, justify="right" if name in ("size", "d") else "left")
    for k in result.rows[0].eval_recall:
        table.add_column(f"R@{k}", justify="right")
    for row in result.rows:
        style = "bold green" if row is result.rows[-1] else None
        facts = (row.name, f"{row.parameters / 1e6:.2f}M", str(row.embedding_size))
        table.add_row(*facts, "training", *map(percent, row.train_recall.values()), style=style)
        table.add_row("", "", "", "unseen", *map(percent, row.eval_recall.values()), style=style)
    console.print(table)
    console.print(
        f"RKD gains {100 * result.gain:+.2f} points of unseen Recall@1 over the triplet loss "
        f"with the same student ({result.seconds / 60:.1f} minutes).\n"
        f"The student is {result.student}: try `rkd evaluate` on it.",
        soft_wrap=True,
    )
