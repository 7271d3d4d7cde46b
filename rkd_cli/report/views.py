"""The data of a report's templates: cards, charts, tables and maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rkd_cli.report import svg
from rkd_cli.report.comparison import figure_order, plain
from rkd_cli.report.text import count, duration, percent

if TYPE_CHECKING:
    from rkd_cli.commands.compare import RunFacts
    from rkd_cli.commands.report import Map, Model, Report, SetReport
    from rkd_cli.commands.runs import Run

_MAPS = {"pca": "principal components", "tsne": "t-SNE", "umap": "UMAP"}
_MEANS = ("R-Precision", "MAP@R", "mAP", "mINP")
_SPLITS = {"eval": "evaluation", "train": "training", "val": "validation"}

Styles = Mapping[str, int]  # {name of a run or model: number of its curve and swatch}
View = dict[str, Any]  # template variables


def _cell(text: str, share: float | None = None, recorded: bool = False, other: str = "") -> View:
    """A table cell. ``share``: fraction of the teacher's value; ``recorded``: by the run, not measured now;
    ``other``: what the run recorded, if different."""
    return {"text": text, "share": share, "best": False, "recorded": recorded, "other": other}


def styles_of(found: Report) -> dict[str, int]:
    """A style number for each run and model, used in the whole page."""
    names = [run.name for run in (*found.runs, *found.teachers)]
    names += [model.name for part in found.sets for model in part.models]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def card_of(run: Run, styles: Styles, taught: Sequence[str]) -> View:
    """The card of a run. ``taught``: its students. The state is empty if the run is done."""
    facts, settings = run.facts, run.settings
    unit = "unit length" if settings["l2normalize"] else "not normalized"
    reached = f"{facts.reached or 0} of {facts.epochs}"
    best = "" if facts.best_epoch is None else f", best {_best_epoch(facts)}"
    if facts.status == "done":
        state = ""
    else:
        state = (
            f"{facts.status}: {reached} epochs done" if facts.reached is not None else f"{facts.status}: no epoch yet"
        )
    if settings["command"] == "distill":
        what = f"Student of {run.teacher or facts.facts['teacher']}"
    else:
        what = f"Teacher of {', '.join(taught)}" if taught else "Trained on labels"
    rows = [
        ("Data set", f"{settings['dataset']}, {settings['data']}"),
        ("Network", str(settings["base"])),
        ("Embedding", f"{settings['embedding_size']} dimensions, {unit}"),
        ("Loss", str(facts.facts["loss"])),
        ("Seed", str(facts.seed)),
        ("Epochs", reached + best),
        ("Time", duration(facts.seconds)),
        ("Last change", f"{run.changed:%Y-%m-%d %H:%M}"),
        ("Version", f"rkd {run.version}" if run.version else "unknown: no checkpoint yet"),
        ("Directory", str(facts.path)),
    ]
    return {"name": run.name, "style": styles[run.name], "what": what, "state": state, "facts": rows}


def loss_charts(runs: Sequence[Run], styles: Styles) -> list[View]:
    """A chart for each loss term."""
    charts = []
    for term in dict.fromkeys(term for run in runs for row in run.rows for term in row.losses):
        curves = [
            (run.name, styles[run.name], [(r.epoch, r.losses[term]) for r in run.rows if term in r.losses])
            for run in runs
        ]
        charts.append(svg.line_chart(f"Loss: {term}", curves))
    return charts


def recall_charts(runs: Sequence[Run], styles: Styles) -> list[View]:
    """For several runs a chart per figure, for a single run a chart per split."""
    charts = []
    for split, called in _SPLITS.items():
        names = figure_order(name for run in runs for row in run.rows for name in row.figures.get(split, {}))
        curves = {name: [(run, _points(run, split, name)) for run in runs] for name in names}
        if len(runs) == 1 and names:
            own = [(name, style, points) for style, name in enumerate(names) for _, points in curves[name]]
            charts.append(svg.line_chart(f"On {called} images, %", own))
        elif len(runs) > 1:
            for name in names if split == "eval" else names[:1]:
                own = [(run.name, styles[run.name], points) for run, points in curves[name]]
                charts.append(svg.line_chart(f"{name} on {called} images, %", own))
    return charts


def legend_of(charts: Sequence[View]) -> list[View]:
    """One line for each name in the charts."""
    return list({line["name"]: line for chart in charts for line in chart["lines"]}.values())


def figures_table(part: SetReport, named: Sequence[str], styles: Styles) -> View:
    """Recalls of all models, measured now or else recorded. The best trained model of each column is marked.

    ``named``: the runs that compete, if there are two.
    """
    names = figure_order(
        name for model in part.models for name in (*(f"R@{k}" for k in model.recall), *_recorded(model))
    )
    trained = any(_best_row(model, "train") for model in part.models)
    columns = ["best epoch", *names]
    means = [name for name in _MEANS if any(_means(model)[name] is not None for model in part.models)]
    columns += means
    columns += ["last epoch"] if any(model.run and model.run.facts.last is not None for model in part.models) else []
    columns += ["training"] if trained else []
    values: list[dict[str, View]] = [_figure_cells(model, names) for model in part.models]
    competing = [number for number, model in enumerate(part.models) if model.name in named]
    if len(competing) < 2:
        competing = list(range(len(part.models)))
    competing = [number for number in competing if not _is_untrained(part.models[number])]
    for column in (*names, *means):
        scores = {number: float(values[number][column]["text"]) for number in competing if column in values[number]}
        if len(scores) > 1:
            for number in (number for number, score in scores.items() if score == max(scores.values())):
                values[number][column]["best"] = True
    rows = [
        {
            "title": model.name,
            "style": styles[model.name],
            "cells": [cells.get(column, _cell("")) for column in columns],
        }
        for model, cells in zip(part.models, values, strict=True)
    ]
    return {"columns": columns, "rows": rows}


def cost_table(part: SetReport, styles: Styles) -> View:
    """Costs and recalls as rows, models as columns, each with its percentage of the teacher's value."""
    models = [model for model in part.models if model.cost or model.recall]
    teachers = {model.name: next((m for m in models if m.name == _teacher(model)), None) for model in models}
    lines: dict[str, dict[str, tuple[str, float]]] = {}
    for model in models:
        for title, text, value in _costs(model):
            lines.setdefault(title, {})[model.name] = (text, value)
    rows = []
    for title, values in lines.items():
        cells = []
        for model in models:
            text, value = values.get(model.name, ("", 0.0))
            teacher = teachers[model.name]
            whole = values.get(teacher.name, ("", 0.0))[1] if teacher else 0.0
            cells.append(_cell(text, value / whole if whole and text else None))
        rows.append({"title": title, "cells": cells})
    return {"columns": [model.name for model in models], "rows": rows}


def summary_of(part: SetReport) -> list[str]:
    """The fraction of the teacher's recall that each student reaches, at what fraction of its cost."""
    by_name = {model.name: model for model in part.models}
    lines = []
    for model in part.models:
        teacher = by_name.get(_teacher(model) or "")
        if _is_untrained(model):
            lines.append(f"{model.name} is untrained: no epoch was better than epoch 0.")
            continue
        if not teacher or not teacher.recall.get(1) or not model.recall:
            continue
        line = (
            f"{model.name} reaches {100 * model.recall[1] / teacher.recall[1]:.1f} % of the Recall@1 of {teacher.name} "
            f"({percent(model.recall[1])} of {percent(teacher.recall[1])})"
        )
        if model.cost and teacher.cost:
            shares = [
                f"{_share(model.cost.parameters, teacher.cost.parameters)} of the parameters",
                f"{_share(model.cost.flops, teacher.cost.flops)} of the FLOPs",
                f"{_share(model.cost.latency[1, 1], teacher.cost.latency[1, 1])} of the time",
            ]
            line += f" at {shares[0]}, {shares[1]} and {shares[2]} for an image on one thread"
        lines.append(f"{line}.")
    return lines


def map_view(drawn: Map) -> View:
    """The embedding map of a set."""
    classes = sorted(set(drawn.labels or ()))
    keys = {name: number for number, name in enumerate(classes)}
    planes = []
    for plane in drawn.planes:
        variance = f", {100 * plane.variance:.0f} % of the variance" if plane.variance is not None else ""
        planes.append((plane.name, f"{_MAPS[drawn.kind]}{variance}", svg.clusters(plane.points, drawn.labels, keys)))
    legend = [{"key": key, "color": key % 8, "shape": svg.marker(key), "name": name} for name, key in keys.items()]
    return {"kind": _MAPS[drawn.kind], "planes": planes, "legend": legend, "points": len(drawn.planes[0].points)}


def differing_table(found: Report, styles: Styles) -> View:
    """Settings that differ between runs as rows, runs as columns."""
    rows = [
        {
            "title": name.replace("_", "-"),
            "cells": [_cell(plain(run.facts.facts[name]) if name in run.facts.facts else "") for run in found.runs],
        }
        for name in (*found.differing, *(["seed"] if len({run.facts.seed for run in found.runs}) > 1 else []))
    ]
    return {"columns": [run.name for run in found.runs], "rows": rows}


def _points(run: Run, split: str, name: str) -> list[tuple[float, float]]:
    figures = ((row.epoch, row.figures.get(split, {})) for row in run.rows)
    return [(epoch, 100 * found[name]) for epoch, found in figures if name in found]


def _recorded(model: Model) -> Mapping[str, float]:
    return model.run.facts.figures if model.run else {}


def _best_row(model: Model, split: str) -> dict[str, float]:
    """The figures of a split at the best epoch of the run."""
    if not model.run:
        return {}
    rows = [row for row in model.run.rows if row.epoch == model.run.facts.best_epoch]
    return rows[0].figures.get(split, {}) if rows else {}


def _means(model: Model) -> dict[str, float | None]:
    return dict(zip(_MEANS, (model.r_precision, model.map_at_r, model.map, model.minp), strict=True))


def _figure_cells(model: Model, names: Sequence[str]) -> dict[str, View]:
    cells: dict[str, View] = {}
    for name in names:
        now = model.recall.get(int(name[2:])) if name.startswith("R@") else None
        then = _recorded(model).get(name)
        if now is not None or then is not None:
            shown, recorded = ("" if value is None else percent(value) for value in (now, then))
            other = "" if shown in ("", recorded) else recorded
            cells[name] = _cell(shown or recorded, recorded=now is None, other=other)
    for name, value in _means(model).items():
        if value is not None:
            cells[name] = _cell(percent(value))
    if model.run:
        facts, training = model.run.facts, _best_row(model, "train")
        cells["best epoch"] = _cell("" if facts.best_epoch is None else _best_epoch(facts))
        cells["last epoch"] = _cell("" if facts.last is None else percent(facts.last))
        cells["training"] = _cell(percent(next(iter(training.values()))) if training else "")
    return cells


def _best_epoch(facts: RunFacts) -> str:
    return "0: untrained" if facts.is_untrained else str(facts.best_epoch)


def _is_untrained(model: Model) -> bool:
    return model.run is not None and model.run.facts.is_untrained


def _teacher(model: Model) -> str | None:
    return model.run.teacher if model.run else None


def _costs(model: Model) -> Iterator[tuple[str, str, float]]:
    """(title, text, value) of each row."""
    if cost := model.cost:
        yield "Parameters", _scaled(cost.parameters), cost.parameters
        yield "FLOPs an image", _scaled(cost.flops), cost.flops
        if cost.file_bytes is not None:
            yield "File", f"{cost.file_bytes / 1e6:.1f} MB", cost.file_bytes
    if model.size:
        yield "Embedding", f"{4 * model.size:,} bytes", 4 * model.size
    if cost := model.cost:
        for (threads, batch), milliseconds in cost.latency.items():
            title = f"Time of {count(batch, 'image')}, {count(threads, 'thread')}"
            yield title, f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:,.0f} ms", milliseconds
    for k, recall in model.recall.items():
        yield f"Recall@{k}, %", percent(recall), recall


def _scaled(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _share(value: float, whole: float) -> str:
    return f"{100 * value / whole:.0f} %" if whole else "n/a"
