"""The data of a report's templates: cards, charts, tables and maps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os.path import commonprefix
from statistics import fmean, stdev
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
_SHAPES = {"float": 0, "float16": 0, "int8": 1, "binary": 2, "binary+rescore": 3}  # in charts
_CLASSES = 500  # worst ones, in the table
_POINT = 1.0  # percent that a smaller vector may lose
_SPLITS = {"eval": "evaluation", "train": "training", "val": "validation"}

Styles = Mapping[str, int]  # {name of a run or model: number of its curve and swatch}
View = dict[str, Any]  # template variables


def _cell(
    text: str, share: float | None = None, recorded: bool = False, other: str = "", value: float | None = None
) -> View:
    """A table cell. ``share``: fraction of the teacher's value; ``recorded``: by the run, not measured now;
    ``other``: what the run recorded, if different; ``value``: the number that the text shows, unrounded."""
    return {"text": text, "share": share, "best": False, "recorded": recorded, "other": other, "value": value}


def groups_of(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """{title: runs}: those that differ only in their seeds and folds are one entry."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.facts.identity, []).append(run)
    return {_title_of(members): members for members in found.values()}


def entries_of(part: SetReport) -> dict[str, list[Model]]:
    """``groups_of`` the models of a set; a model without a run is an entry."""
    found: dict[str, list[Model]] = {}
    for model in part.models:
        found.setdefault(model.run.facts.identity if model.run else model.name, []).append(model)
    return {
        _title_of([model.run for model in models if model.run]) or models[0].name: models for models in found.values()
    }


def _title_of(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    if len(names) < 2:
        return "".join(names)
    common = re.sub(r"[-_/ ]*(seed)?[-_/ ]*$", "", commonprefix(names))  # noqa: RUF071 (letters)
    what = "run" if any(run.facts.fold for run in runs) else "seed"
    return f"{common or runs[0].facts.path.parent.name or names[0]} ({count(len(names), what)})"


def styles_of(found: Report) -> dict[str, int]:
    """A style number for each entry and for its runs and models, used in the whole page."""
    groups = groups_of((*found.runs, *found.teachers))
    names = [[title, *(run.name for run in runs)] for title, runs in groups.items()]
    names += [[title, *(m.name for m in models)] for part in found.sets for title, models in entries_of(part).items()]
    numbers: dict[str, int] = {}
    for members in names:
        known = [numbers[name] for name in members if name in numbers]
        numbers |= dict.fromkeys(members, known[0] if known else len({*numbers.values()}))
    return numbers


def card_of(title: str, runs: Sequence[Run], styles: Styles, taught: Sequence[str]) -> View:
    """The card of a run, or of runs that differ only in their seeds. ``taught``: its students. The state is empty if
    all are done."""
    run = next((run for run in runs if run.facts.status != "done"), runs[0])
    facts, settings = run.facts, run.settings
    unit = "unit length" if settings["l2normalize"] else "not normalized"
    reached = f"{facts.reached or 0} of {facts.epochs}"
    bests = [_best_epoch(run.facts) for run in runs if run.facts.best_epoch is not None]
    best = f", best {', '.join(bests)}" if bests else ""
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
        ("Seed" if len(runs) == 1 else "Seeds", ", ".join(str(run.facts.seed) for run in runs)),
        ("Epochs", reached + best),
        ("Time", ", ".join(duration(run.facts.seconds) for run in runs)),
        ("Last change", f"{run.changed:%Y-%m-%d %H:%M}"),
        ("Version", f"rkd {run.version}" if run.version else "unknown: no checkpoint yet"),
        ("Directory", ", ".join(str(run.facts.path) for run in runs)),
    ]
    return {"name": title, "style": styles[title], "what": what, "state": state, "facts": rows}


def loss_charts(groups: Mapping[str, Sequence[Run]], styles: Styles) -> list[View]:
    """A chart for each loss term."""
    charts = []
    for term in dict.fromkeys(term for runs in groups.values() for r in runs for row in r.rows for term in row.losses):
        curves = [
            (
                title,
                styles[title],
                _means([{r.epoch: r.losses[term] for r in run.rows if term in r.losses} for run in runs]),
            )
            for title, runs in groups.items()
        ]
        charts.append(svg.line_chart(f"Loss: {term}", curves))
    return charts


def recall_charts(groups: Mapping[str, Sequence[Run]], styles: Styles) -> list[View]:
    """For several entries a chart per figure, for a single one a chart per split."""
    charts = []
    for split, called in _SPLITS.items():
        every = [run for runs in groups.values() for run in runs]
        names = figure_order(name for run in every for row in run.rows for name in row.figures.get(split, {}))
        curves = {
            name: [(title, _means([_points(run, split, name) for run in runs])) for title, runs in groups.items()]
            for name in names
        }
        if len(groups) == 1 and names:
            own = [(name, style, points) for style, name in enumerate(names) for _, points in curves[name]]
            charts.append(svg.line_chart(f"On {called} images, %", own))
        elif len(groups) > 1:
            for name in names if split == "eval" else names[:1]:
                own = [(title, styles[title], points) for title, points in curves[name]]
                charts.append(svg.line_chart(f"{name} on {called} images, %", own))
    return charts


def legend_of(charts: Sequence[View]) -> list[View]:
    """One line for each name in the charts."""
    return list({line["name"]: line for chart in charts for line in chart["lines"]}.values())


def figures_table(part: SetReport, named: Sequence[str], styles: Styles) -> View:
    """Recalls of all models, measured now or else recorded; the best trained entry of each column is marked. Of runs
    that differ only in their seeds, the means and standard deviations stand above them.

    ``named``: the runs that compete, if there are two.
    """
    names = figure_order(
        name for model in part.models for name in (*(f"R@{k}" for k in model.recall), *_recorded(model))
    )
    trained = any(_training_figures(model) for model in part.models)
    columns = ["best epoch", *names]
    means = [name for name in _MEANS if any(_mean_figures(model)[name] is not None for model in part.models)]
    columns += means
    columns += ["last epoch"] if any(model.run and model.run.facts.last is not None for model in part.models) else []
    columns += ["training"] if trained else []
    rows, competing = [], list[tuple[bool, dict[str, View]]]()
    for title, models in entries_of(part).items():
        cells = [_figure_cells(model, names) for model in models]
        shown = cells[0] if len(models) == 1 else _mean_cells(cells)
        if not all(map(_is_untrained, models)):
            competing.append((any(model.name in named for model in models), shown))
        rows.append((title, styles[title], "mean" if len(models) > 1 else "", shown))
        if len(models) > 1:
            rows += [(m.name, styles[title], "member", own) for m, own in zip(models, cells, strict=True)]
    if sum(is_named for is_named, _ in competing) > 1:
        competing = [pair for pair in competing if pair[0]]
    for column in (*names, *means):
        scores = [cells[column] for _, cells in competing if column in cells]
        highest = max((cell["value"] for cell in scores), default=0)
        for cell in scores if len(scores) > 1 else ():
            cell["best"] = round(cell["value"], 4) == round(highest, 4)
    return {
        "columns": columns,
        "rows": [
            {"title": title, "style": style, "kind": kind, "cells": [cells.get(c, _cell("")) for c in columns]}
            for title, style, kind, cells in rows
        ],
    }


def _mean_cells(rows: Sequence[Mapping[str, View]]) -> dict[str, View]:
    """The mean and the sample standard deviation of each figure that all rows have."""
    found = {}
    for column in rows[0]:
        values = [row[column]["value"] for row in rows if column in row and row[column]["value"] is not None]
        if len(values) == len(rows):
            mean, deviation = fmean(values), stdev(values)
            recorded = any(row[column]["recorded"] for row in rows)
            found[column] = _cell(f"{percent(mean)} ± {percent(deviation)}", recorded=recorded, value=mean)
    return found


def cost_table(part: SetReport) -> View:
    """Costs and recalls as rows, entries as columns, each with its percentage of the teacher's value."""
    entries = {t: models for t, models in entries_of(part).items() if any(m.cost or m.recall for m in models)}
    title_of = {model.name: title for title, models in entries.items() for model in models}
    lines: dict[str, dict[str, tuple[str, float]]] = {}
    for title, models in entries.items():
        for what, text, value in _costs(models):
            lines.setdefault(what, {})[title] = (text, value)
    rows = []
    for what, values in lines.items():
        cells = []
        for title, models in entries.items():
            text, value = values.get(title, ("", 0.0))
            whole = values.get(title_of.get(_teacher(models[0]) or "", ""), ("", 0.0))[1]
            cells.append(_cell(text, value / whole if whole and text else None))
        rows.append({"title": what, "cells": cells})
    return {"columns": list(entries), "rows": rows}


def choice_charts(part: SetReport, styles: Styles) -> list[View]:
    """Recall@1 against the size of the model file, against the time of an image, and against the bytes of a vector."""
    entries = [(title, models) for title, models in entries_of(part).items() if models[0].recall]
    costs = [(title, models, models[0].cost) for title, models in entries if models[0].cost]
    sizes = [_point(t, models, styles, c.file_bytes / 1e6, "MB") for t, models, c in costs if c]
    times = [_point(t, models, styles, c.latency[1, 1], "ms") for t, models, c in costs if c]
    charts = [
        svg.scatter(f"Recall@1 and {what}", points, f"{label}, logarithmic", "Recall@1, %", "{:g}".format)
        for what, points, label in (
            ("size of the model", sizes, "MB of the model file"),
            ("time of an image", times, "ms for an image on one thread"),
        )
        if len(points) > 1
    ]
    vectors = [
        _point(title, models, styles, float(row["bytes"]), "bytes", row)
        for title, models in entries
        for row in _variant_rows(models)
    ]
    if len({point["x"] for point in vectors}) > 1:
        name = "Recall@1 and size of a vector"
        charts.append(svg.scatter(name, vectors, "bytes of a vector, logarithmic", "Recall@1, %", "{:g}".format))
    return charts


def _point(
    title: str, models: Sequence[Model], styles: Styles, x: float, unit: str, row: View | None = None
) -> dict[str, Any]:
    """A point of a chart; ``row``: of which vectors, if not of the model."""
    values = row["values"] if row else [100 * model.recall[1] for model in models if model.recall]
    mean, spread = fmean(values), stdev(values) if len(values) > 1 else 0.0
    what = f"{row['size']}-d {row['vectors']}" if row else ""
    reached = f"{mean:.2f}" + (f" ± {spread:.2f}" if len(values) > 1 else "")
    return {
        "x": x, "y": mean, "spread": spread, "style": styles[title],
        "kind": _SHAPES[row["vectors"]] if row else 0, "label": f"{row['size']}-d" if row else title[:28],
        "tip": f"{title}{', ' if what else ''}{what}: {reached} % at {x:.4g} {unit}",
    }  # fmt: skip


def vector_table(part: SetReport, styles: Styles) -> list[View]:
    """Sizes and kinds of vectors, the smallest first; ``best`` where none that is as small reaches as much."""
    rows = [
        row | {"title": title, "style": styles[title], "mean": fmean(row["values"]), "spread": row["values"]}
        for title, models in entries_of(part).items()
        for row in _variant_rows(models)
    ]
    rows.sort(key=lambda row: (row["bytes"], -row["mean"]))
    reached = -1.0
    for row in rows:
        row["best"], reached = row["mean"] > reached, max(reached, row["mean"])
        row["spread"] = f" ± {stdev(row['values']):.2f}" if len(row["values"]) > 1 else ""
    return rows if len({row["bytes"] for row in rows}) > 1 else []


def _variant_rows(models: Sequence[Model]) -> list[View]:
    """What all runs of an entry have, with the recall of each in percent."""
    found: dict[tuple[int, str, int], list[float]] = {}
    for model in models:
        for variant in model.variants:
            found.setdefault((variant.size, variant.vectors, variant.bytes), []).append(100 * variant.recall[1])
    return [
        {"size": size, "vectors": vectors, "bytes": bytes, "values": values}
        for (size, vectors, bytes), values in found.items()
        if len(values) == len(models)
    ]


def class_table(part: SetReport) -> View:
    """Recall@1 of each class by the compared models, the class that the main one finds worst first."""
    shown = {model.name: model.by_class for model in part.models if model.name in part.compared}
    columns = [name for name in part.compared if shown.get(name)]
    if not columns or part.compared[part.main] not in columns:
        return {"columns": [], "rows": []}
    taken = {}
    for pair in reversed(part.confusions):
        taken[pair.of] = pair.taken_for
    main = shown[part.compared[part.main]]
    order = sorted(main, key=lambda name: (main[name], -part.class_sizes.get(name, 0), name))[:_CLASSES]
    rows = [
        {"title": name, "images": part.class_sizes.get(name, 0), "shares": [shown[one].get(name) for one in columns]}
        for name in order
    ]
    return {"columns": columns, "rows": rows, "total": len(main)}


def summary_of(part: SetReport) -> list[str]:
    """The fraction of the teacher's recall that each student reaches, at what fraction of its cost, and the smallest
    vectors that lose little."""
    by_name = {model.name: model for model in part.models}
    lines = []
    for title, models in entries_of(part).items():
        model, teacher = models[0], by_name.get(_teacher(models[0]) or "")
        if all(map(_is_untrained, models)):
            lines.append(f"{title} is untrained: no epoch was better than epoch 0.")
            continue
        measured = [m.recall[1] for m in models if m.recall]
        if not teacher or not teacher.recall.get(1) or not measured:
            continue
        recall = fmean(measured)
        spread = f" ± {percent(stdev(measured))}" if len(measured) > 1 else ""
        line = (
            f"{title} reaches {100 * recall / teacher.recall[1]:.1f} % of the Recall@1 of {teacher.name} "
            f"({percent(recall)}{spread} of {percent(teacher.recall[1])})"
        )
        if model.cost and teacher.cost:
            shares = [
                f"{_share(model.cost.parameters, teacher.cost.parameters)} of the parameters",
                f"{_share(model.cost.flops, teacher.cost.flops)} of the FLOPs",
                f"{_share(model.cost.latency[1, 1], teacher.cost.latency[1, 1])} of the time",
            ]
            line += f" at {shares[0]}, {shares[1]} and {shares[2]} for an image on one thread"
        lines.append(f"{line}.")
        rows = sorted(_variant_rows(models), key=lambda row: (row["bytes"], -fmean(row["values"])))
        highest = max((fmean(row["values"]) for row in rows), default=0.0)
        small = next((row for row in rows if fmean(row["values"]) >= highest - _POINT), None)
        if small and small["bytes"] < max(row["bytes"] for row in rows):
            lines.append(
                f"{title} needs {small['bytes']} bytes a vector ({small['size']} dimensions, {small['vectors']}) for "
                f"{fmean(small['values']):.2f}: at most {_POINT:g} point below its best vectors."
            )
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


def differing_table(found: Report) -> View:
    """Settings that differ between entries as rows, entries as columns."""
    groups = groups_of(found.runs)
    seeds = {title: ", ".join(str(run.facts.seed) for run in runs) for title, runs in groups.items()}
    rows = [
        {
            "title": name.replace("_", "-"),
            "cells": [_cell(plain(r.facts.facts[name]) if name in r.facts.facts else "") for r, *_ in groups.values()],
        }
        for name in found.differing
    ]
    rows += [{"title": "seed", "cells": list(map(_cell, seeds.values()))}] if len({*seeds.values()}) > 1 else []
    return {"columns": list(groups), "rows": rows}


def _points(run: Run, split: str, name: str) -> dict[int, float]:
    figures = ((row.epoch, row.figures.get(split, {})) for row in run.rows)
    return {epoch: 100 * found[name] for epoch, found in figures if name in found}


def _means(curves: Sequence[Mapping[int, float]]) -> list[tuple[float, ...]]:
    """(epoch, value) of one run; of several (epoch, mean, lowest, highest)."""
    found: list[tuple[float, ...]] = []
    for epoch in sorted({epoch for curve in curves for epoch in curve}):
        values = [curve[epoch] for curve in curves if epoch in curve]
        found.append((epoch, fmean(values), *((min(values), max(values)) if len(curves) > 1 else ())))
    return found


def _recorded(model: Model) -> Mapping[str, float]:
    return model.run.facts.figures if model.run else {}


def _training_figures(model: Model) -> dict[str, float]:
    """The figures of the training split at the best epoch of the run."""
    if not model.run:
        return {}
    rows = [row for row in model.run.rows if row.epoch == model.run.facts.best_epoch]
    return rows[0].figures.get("train", {}) if rows else {}


def _mean_figures(model: Model) -> dict[str, float | None]:
    return dict(zip(_MEANS, (model.r_precision, model.map_at_r, model.map, model.minp), strict=True))


def _figure_cells(model: Model, names: Sequence[str]) -> dict[str, View]:
    cells: dict[str, View] = {}
    for name in names:
        now = model.recall.get(int(name[2:])) if name.startswith("R@") else None
        then = _recorded(model).get(name)
        if now is not None or then is not None:
            shown, recorded = ("" if value is None else percent(value) for value in (now, then))
            other = "" if shown in ("", recorded) else recorded
            value = now if now is not None else then
            cells[name] = _cell(shown or recorded, recorded=now is None, other=other, value=value)
    for name, value in _mean_figures(model).items():
        if value is not None:
            cells[name] = _cell(percent(value), value=value)
    if model.run:
        facts, training = model.run.facts, _training_figures(model)
        cells["best epoch"] = _cell("" if facts.best_epoch is None else _best_epoch(facts))
        cells["last epoch"] = _cell("" if facts.last is None else percent(facts.last), value=facts.last)
        first = next(iter(training.values()), None)
        cells["training"] = _cell("" if first is None else percent(first), value=first)
    return cells


def _best_epoch(facts: RunFacts) -> str:
    return "0: untrained" if facts.is_untrained else str(facts.best_epoch)


def _is_untrained(model: Model) -> bool:
    return model.run is not None and model.run.facts.is_untrained


def _teacher(model: Model) -> str | None:
    return model.run.teacher if model.run else None


def _costs(models: Sequence[Model]) -> Iterator[tuple[str, str, float]]:
    """(title, text, value) of each row, of runs that differ only in their seeds."""
    model = models[0]
    if cost := model.cost:
        yield "Parameters", _scaled(cost.parameters), cost.parameters
        if cost.flops:  # unknown of exported files
            yield "FLOPs an image", _scaled(cost.flops), cost.flops
        yield "File", f"{cost.file_bytes / 1e6:.1f} MB", cost.file_bytes
    if model.size:
        yield "Embedding", f"{4 * model.size:,} bytes", 4 * model.size
    if cost := model.cost:
        for (threads, batch), milliseconds in cost.latency.items():
            title = f"Time of {count(batch, 'image')}, {count(threads, 'thread')}"
            yield title, f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds:,.0f} ms", milliseconds
    for k in model.recall:
        recalls = [one.recall[k] for one in models if k in one.recall]
        spread = f" ± {percent(stdev(recalls))}" if len(recalls) > 1 else ""
        yield f"Recall@{k}, %", percent(fmean(recalls)) + spread, fmean(recalls)


def _scaled(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _share(value: float, whole: float) -> str:
    return f"{100 * value / whole:.0f} %" if whole else "n/a"
