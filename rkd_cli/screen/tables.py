"""Tables and lines that are the result of a command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from rkd_cli.report.text import (
    as_flags,
    count,
    doctor_text,
    dry_run_rows,
    evaluated_text,
    export_notes,
    export_text,
    free_name,
    interval_lines,
    percent,
    short_time,
    title,
)
from rkd_cli.screen.terminal import console, first_that_fits

if TYPE_CHECKING:
    from rkd_cli.bench.measure import Measurement
    from rkd_cli.commands.demo import DemoResult
    from rkd_cli.commands.embed import Written
    from rkd_cli.commands.evaluate import Evaluation, SplitMetrics
    from rkd_cli.commands.export import ExportResult
    from rkd_cli.commands.runs import RunSize
    from rkd_cli.data.cache import CacheFile
    from rkd_cli.runtime.doctor import Diagnosis
    from rkd_cli.settings.recipes import Recipe
    from rkd_cli.training.dry_run import DryRun

_WIDE = 110  # terminal columns from which tables show every figure


def show_text(text: str) -> None:
    """A line that is the result of a command."""
    console.print(text, soft_wrap=True, markup=False)


def show_dry_run(found: DryRun) -> None:
    """The estimate of a dry run."""
    show_text(f"{title(found.started)}: a dry run, nothing is written")
    if not console.is_terminal:
        for label, text in dry_run_rows(found):
            show_text(f"  {label}: {text}")
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for label, text in dry_run_rows(found):
        grid.add_row(label, Text(text))  # a path may look like markup
    console.print(grid)


def show_evaluations(results: Sequence[Evaluation], as_json: bool) -> None:
    """One table, or one per network if there are variants, or one JSON object per line."""
    if as_json:
        for result in results:
            show_text(json.dumps(_facts(result)))
        return
    if any(result.variants for result in results):
        for result in results:
            show_text(evaluated_text(result))
            others = dict.fromkeys(variant.gallery for variant in result.variants if variant.gallery)
            for gallery in others:
                show_text(f"other: queries in the gallery of {gallery}")
            console.print(_variants_table(result))
    else:
        for result in results:
            show_text(evaluated_text(result))
        console.print(_evaluations_table(results))
    for result in results:
        for name, split in _splits(result):
            if split.without_positive:
                show_text(
                    f"{result.name}: {split.without_positive} of {split.queries or split.images} {name} queries have "
                    "no positive and are left out"
                )
    for result in results:
        for line in interval_lines(result):
            show_text(line)
    if len(results) == 1 and results[0].search:
        flags = results[0].search | {"html": free_name(Path("found.html"))}
        show_text(f"next: {shlex.join(['rkd', 'search', results[0].name, *as_flags(flags)])}")


def _splits(result: Evaluation) -> list[tuple[str, SplitMetrics]]:
    return [(name, split) for name, split in (("train", result.train), ("eval", result.eval)) if split]


def _evaluations_table(results: Sequence[Evaluation]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if len(results) > 1:
        table.add_column("model", overflow="fold")
    roles = any(split.queries is not None for result in results for _, split in _splits(result))
    more = ("mAP", "mINP") if roles else ()
    for name in ("split", *(f"R@{k}" for k in results[0].eval.recall), "R-Prec", "MAP@R", *more):
        table.add_column(name, justify="left" if name == "split" else "right")
    for result in results:
        path = [Text(result.name)] if len(results) > 1 else []
        for name, split in _splits(result):
            means = (split.map, split.minp) if roles else ()
            table.add_row(*path, name, *_figures(split), *("" if mean is None else percent(mean) for mean in means))
            path = [Text("")] if path else []
    return table


def _variants_table(result: Evaluation) -> Table:
    """The network's embeddings, then each variant on the evaluation split."""
    kinds = {(v.size, v.vectors) for v in result.variants} | {(result.size, result.vectors)}
    stored = kinds != {(result.size, "float")}
    crossed = any(v.gallery for v in result.variants)
    roomy = console.width >= _WIDE or not stored
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    if crossed:
        table.add_column("gallery", no_wrap=True)
    if stored:
        table.add_column("embedding", no_wrap=True)
        table.add_column("bytes", justify="right", no_wrap=True)
    for name in ("split", *(f"R@{k}" for k in result.eval.recall), *(("R-Prec", "MAP@R") if roomy else ())):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)

    def row(gallery: str, size: int, vectors: str, bytes: int, *figures: str) -> None:
        left = [Text(gallery)] if crossed else []
        left += [Text(f"{size} {vectors}"), Text(f"{bytes:,}")] if stored else []
        table.add_row(*left, *figures)

    for name, split in _splits(result):
        row("own", result.size, result.vectors, result.vector_bytes, name, *_figures(split)[: None if roomy else -2])
    for variant in result.variants:
        recalls = map(percent, variant.recall.values())
        row("other" if variant.gallery else "own", variant.size, variant.vectors, variant.bytes, "eval", *recalls)
    return table


def _figures(split: SplitMetrics) -> list[str]:
    return [*map(percent, split.recall.values()), percent(split.r_precision), percent(split.map_at_r)]


def _facts(result: Evaluation) -> dict[str, object]:
    header = result.header
    facts: dict[str, object] = {
        "checkpoint": result.name,
        "dataset": result.dataset,
        "base": header.base if header else None,
        "embedding_size": result.size,
        "vectors": result.vectors,
        "l2normalize": result.l2normalize,
        "parameters": result.parameters if header else None,
        "file_bytes": result.file_bytes,
        "milliseconds": result.milliseconds,
        "threads": result.threads,
        "epoch": header.epoch if header else None,
    }
    for name, split in (("train", result.train), ("eval", result.eval)):
        facts[f"{name}_recall"] = _keyed(split.recall) if split else None
        facts[f"{name}_r_precision"] = split.r_precision if split else None
        facts[f"{name}_map_at_r"] = split.map_at_r if split else None
        facts[f"{name}_without_positive"] = split.without_positive if split else None
        if split and split.queries is not None:
            facts |= {f"{name}_{what}": getattr(split, what) for what in ("map", "minp", "queries", "gallery")}
    facts["against"] = {name: found._asdict() for name, found in result.against.items()}
    facts["seen_classes"] = list(result.seen)
    facts["variants"] = [
        {
            "gallery": variant.gallery,
            "size": variant.size,
            "vectors": variant.vectors,
            "bytes": variant.bytes,
            "eval_recall": _keyed(variant.recall),
        }
        for variant in result.variants
    ]
    return facts


def _keyed(recall: Mapping[int, float]) -> dict[str, float]:
    return {str(k): value for k, value in recall.items()}


def show_written(written: Written) -> None:
    """A vectors file, and commands that use it."""
    asked = written.settings
    kind = "" if asked.vectors == "float" else f" as {asked.vectors}"
    speed = f", {written.images_per_second:,.0f} images/s" if written.images_per_second else ""
    what = f"{written.images:,} embeddings of {written.size} dimensions{kind} by {written.name}{speed}"
    show_text(f"{written.path}: {what}{f'; their paths are in {written.paths}' if written.paths else ''}")
    where, path = f"--data {shlex.quote(str(asked.data))}", shlex.quote(str(written.path))
    if asked.dataset:
        where = f"--dataset {asked.dataset} {where}"
    uses = []
    half_whitened = asked.half_whiten or asked.pca_file  # the map of a file may be
    if written.holds and asked.vectors != "binary" and not half_whitened:
        student = free_name(Path("student"), "settings.json")
        place = "" if student == Path("student") else f" --save-dir {student}"
        uses.append(f"teach with it: rkd distill --teacher {path} {where}{place}")
    if written.holds not in ("", "images"):
        uses.append(f"measure it: rkd evaluate {path} {where}")
    if uses:
        show_text("; ".join(uses))
    if written.has_map:
        weights = f" --weights {shlex.quote(str(asked.weights))}" if asked.weights else ""
        show_text(f"other images in the same space: rkd embed {shlex.quote(written.name)}{weights} --pca {path} ...")


def show_export(result: ExportResult, as_json: bool) -> None:
    """The exported file, compared with the checkpoint."""
    if as_json:
        facts = asdict(result) | {"header": result.header.model_dump(mode="json")}
        show_text(json.dumps(facts, default=str))
        return
    show_text(export_text(result))
    checkpoint, *forms = result.candidates
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("form", no_wrap=True)
    ks = [f"R@{k}" for k in checkpoint.recall]
    for name in ("MB", *(f"ms x{batch}" for batch in checkpoint.latency), "worst cosine", *ks):
        table.add_column(name, justify="right", no_wrap=True)
    for form in (checkpoint, *forms):
        cosine = "" if form.worst_cosine is None else f"{form.worst_cosine:.5f}"
        times = (f"{ms:.2f}" for ms in form.latency.values())
        table.add_row(form.what, f"{form.bytes / 1e6:.2f}", *times, cosine, *map(percent, form.recall.values()))
    console.print(table)
    for line in export_notes(result):
        show_text(line)


def show_caches(folder: Path, removed: Sequence[CacheFile], left: Sequence[CacheFile]) -> None:
    """The cache files of a folder, and which of them were removed."""
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
            show_text(f"{folder}: {count(len(files), 'file')}, {size:,.0f} MB{done}")


def show_sizes(found: Sequence[RunSize], removed: int | None) -> None:
    """Runs with their sizes, and what may go. ``removed``: bytes that were removed, if any."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("MB", "may go, MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    for run in found:
        spare, names = sum(run.spare.values()), sorted(file.name for file in run.spare)
        cells = (f"{run.bytes / 1e6:,.1f}", f"{spare / 1e6:,.1f}" if spare else "", ", ".join(names))
        table.add_row(Text(str(run.path)), run.status, *map(Text, cells))
    console.print(table)
    total, spare = (sum(sizes) / 1e6 for sizes in zip(*((r.bytes, sum(r.spare.values())) for r in found), strict=True))
    if removed is None:
        said = f"{spare:,.1f} MB may go" + (" (--clear removes it)" if spare else "")
    else:
        said = f"{removed / 1e6:,.1f} MB removed"
    show_text(f"{count(len(found), 'run')}, {total:,.1f} MB, {said}")


def show_doctor(found: Diagnosis, as_json: bool) -> None:
    """System information as text or as one JSON object."""
    show_text(json.dumps(asdict(found), indent=2, default=str) if as_json else doctor_text(found))


def show_recipes(recipes: Sequence[Recipe]) -> None:
    """The built-in recipes and their published figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what")
    table.add_column("published R@1", justify="right")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.what, f"{recipe.published:.2f}" if recipe.published else "")
    console.print(table)
    show_text("Run one with `rkd train-teacher --config NAME` (the ...-teacher ones) or `rkd distill --config NAME`.")


def bench_json(rows: Sequence[Measurement], machine: Mapping[str, object]) -> str:
    """The measurements and the machine, as JSON."""
    ratios = [{**asdict(row), "faster": row.faster, "leaner": row.leaner} for row in rows]
    return json.dumps({"machine": machine, "rows": ratios}, indent=2)


def show_bench(rows: Sequence[Measurement], machine: Mapping[str, object], as_json: bool) -> None:
    """Time and memory of rkd and of the textbook code."""
    if as_json:
        print(bench_json(rows, machine))  # noqa: T201
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
    show_text(", ".join(f"{name} {value}" for name, value in machine.items()))


def _pair(
    textbook: float | None, ours: float | None, ratio: float | None, show: Callable[[float], str]
) -> tuple[str, str]:
    both = ["-" if value is None else show(value) for value in (textbook, ours)]
    return " ".join(both) if ours is not None else "", f"{ratio:.1f} x" if ratio else ""


def show_demo(result: DemoResult) -> None:
    """Teacher and students in one table, and what to try next."""
    ks = list(result.rows[0].recall)
    console.print(first_that_fits((_demo_table(result, ks[:count]) for count in range(len(ks), 0, -1)), console))
    unit, free = (f"{100 * gain:+.2f}" for gain in result.gains)
    lines = (
        f"RKD, without labels, gains over the triplet loss: {unit} points of Recall@1 with embeddings of unit length, "
        f"{free} without.",
        "The D3still student shares the teacher's space: its queries also search the teacher's index.",
        f"This is one seed, in {result.seconds / 60:.1f} minutes; `rkd manual results` has the means of ten. Train "
        "another with --seed 2 --save-dir demo-2.",
    )
    for line in lines:
        console.print(line, soft_wrap=not console.is_terminal)
    student, teacher = (shlex.quote(str(result.directory / name)) for name in ("student", "teacher"))
    show_text(f"next: rkd evaluate {student} --gallery {teacher}")


def _demo_table(result: DemoResult, ks: Sequence[int]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Recall@K in percent on the evaluation split, best epoch",
        title_justify="left",
        pad_edge=False,
    )
    for name in ("network", "size", "d", "unit length"):
        table.add_column(name, justify="right" if name in ("size", "d") else "left")
    for k in ks:
        table.add_column(f"R@{k}", justify="right")
    for row in result.rows:
        facts = (row.name, f"{row.parameters / 1e6:.2f}M", str(row.embedding_size), "yes" if row.l2normalize else "no")
        table.add_row(*facts, *(percent(row.recall[k]) for k in ks))
        if row.in_teacher:
            table.add_row("  teacher's index", "", "", "", *(percent(row.in_teacher[k]) for k in ks))
    return table
