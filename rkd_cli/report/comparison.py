"""The table of ``rkd compare`` as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from rkd_cli.report.text import count, duration, percent

if TYPE_CHECKING:
    from rkd_cli.commands.compare import Comparison, Group, RunFacts

ALWAYS_SAID = ("data", "network", "loss", "teacher")  # columns, or above the table if all runs are equal
_PATHS = ("data", "teacher")
_UNTRAINED = "untrained: epoch 0 is best"

Row = dict[str, str]  # {title of a column: cell}


def comparison_table(found: Comparison) -> tuple[list[str], list[tuple[str, list[Row]]], str]:
    """Column titles, (data set, rows) of each group, and a text of what all runs have in common."""
    runs = [run for group in found.groups for run in group.runs]
    short = {name: shortened([str(run.facts[name]) for run in runs if name in run.facts]) for name in _PATHS}
    same = [
        f"{name} {next(run.facts[name] for run in runs if name in run.facts)}"
        for name in ALWAYS_SAID
        if name not in found.differing and any(name in run.facts for run in runs)
    ]
    sections = [(group.runs[0].facts["data"], list(_rows(group, found.differing, short))) for group in found.groups]
    titles = _titles(found, [row for _, rows in sections for row in rows])
    return titles, sections, ", ".join(same) if len(runs) > 1 else ""


def difference_lines(found: Comparison) -> list[str]:
    """What the 95 % interval of each difference says; only a clear one is called better."""
    runs = [str(run.path) for group in found.groups for run in group.runs]
    short = shortened(runs)
    lines = []
    for one in found.differences:
        first, second = (f"the runs like {short[str(group.runs[0].path)]}" for group in (one.first, one.second))
        gain = f"{one.figure} {100 * one.mean:+.2f} ± {percent(one.margin)} points over {one.seeds} common seeds"
        verdict = "are better than" if one.mean > 0 else "are worse than"
        lines.append(f"{first} {verdict if one.is_clear else 'cannot be told apart from'} {second}: {gain}")
    return lines


def csv_text(found: Comparison) -> str:
    """A row per run in full precision, with the mean and standard deviation of its group."""
    figures = _figure_names(found)
    statistics = [f"{name} {what}" for name in (*figures, "last") for what in ("mean", "sd")]
    own = ("run", "status", "data", "network", "loss", "teacher")
    folds = ["fold"] if any(run.fold for group in found.groups for run in group.runs) else []
    epochs = ("best_epoch", "untrained", "reached", "epochs")
    cost = ("last", "parameters", "bytes", "seconds")
    text = io.StringIO()
    columns = ["group", *own, *found.differing, "seed", *folds, *epochs, *figures, *cost, "seeds", *statistics]
    table = csv.DictWriter(text, list(dict.fromkeys(columns)), lineterminator="\n")  # epochs is a setting too
    table.writeheader()
    for number, group in enumerate(found.groups, 1):
        for run in group.runs:
            facts = {name: plain(run.facts[name]) for name in (*own, *found.differing) if name in run.facts}
            row = facts | {"group": number, "seeds": group.seeds} | _run_facts(run) | dict(run.figures)
            for name in group.mean.keys() & {*figures, "last"}:
                row |= {f"{name} mean": group.mean[name], f"{name} sd": group.deviation[name]}
            table.writerow(row)
    return text.getvalue()


def _run_facts(run: RunFacts) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "status": run.status,
        "seed": run.seed,
        **({"fold": run.fold} if run.fold else {}),
        "best_epoch": run.best_epoch,
        "untrained": run.is_untrained,
        "reached": run.reached,
        "epochs": run.epochs,
        "last": run.last,
        "parameters": run.parameters,
        "bytes": run.bytes,
        "seconds": run.seconds,
    }


def comparison_facts(found: Comparison) -> dict[str, Any]:
    return {
        "differing": found.differing,
        "groups": [
            {
                "seeds": group.seeds,
                "mean": group.mean,
                "standard_deviation": group.deviation,
                **({"concatenated": one} if one else {}),
                "runs": [_run_facts(run) | {"figures": run.figures, "settings": run.facts} for run in group.runs],
            }
            for group, one in zip_longest(found.groups, found.concatenated)
        ],
        "differences": [
            {
                "groups": [found.groups.index(one.first), found.groups.index(one.second)],
                "figure": one.figure,
                "seeds": one.seeds,
                "mean": one.mean,
                "margin_95": one.margin,
            }
            for one in found.differences
        ],
        "unreadable": found.problems,
    }


def _figure_names(found: Comparison) -> list[str]:
    return figure_order(name for group in found.groups for run in group.runs for name in run.figures)


def figure_order(names: Iterable[str]) -> list[str]:
    """Recalls first, the smaller K before the larger."""

    def place(name: str) -> tuple[bool, int, str]:
        kind, _, k = name.partition("@")
        return kind != "R", int(k) if k.isdigit() else 0, name

    return sorted({*names}, key=place)


def _rows(group: Group, differing: Sequence[str], short: dict[str, dict[str, str]]) -> Iterator[Row]:
    """The mean of a group, if any, and its runs. Settings that all runs share are in the row of the mean."""

    def settings(run: RunFacts) -> Row:
        shown = {name: plain(run.facts[name]) for name in differing if name in run.facts}
        return {name.replace("_", "-"): short.get(name, {}).get(value, value) for name, value in shown.items()}

    shared = settings(group.runs[0])
    if len(group.runs) > 1:
        for run in group.runs[1:]:
            shared = {name: value for name, value in settings(run).items() if shared.get(name) == value}
    if group.mean:
        row = shared | {"run": f"mean of {_repeats(group)}", "time": duration(group.mean["seconds"])}
        for name in group.mean.keys() - {"seconds"}:
            row[name] = f"{percent(group.mean[name])} ± {percent(group.deviation[name])}"
        yield row | _cost(group.runs[0])
    for run in group.runs:
        row = {name: value for name, value in settings(run).items() if not group.mean or name not in shared}
        row |= {"run": f"{'  ' if group.mean else ''}{run.path}", "seed": str(run.seed), "time": duration(run.seconds)}
        row |= {"fold": run.fold} if run.fold else {}
        state = [] if run.status == "done" else [f"{run.status}, {run.reached or 0}/{run.epochs}"]
        if run.status == "done" and run.reached != run.epochs:
            state.append(f"ended early, {run.reached}/{run.epochs}")
        if run.is_untrained and run.reached:
            state.append(_UNTRAINED)
        if state:
            row["state"] = "; ".join(state)
        if run.best_epoch is not None:
            row["epoch"] = str(run.best_epoch)
        row |= {name: percent(value) for name, value in run.figures.items()}
        row |= {} if run.last is None else {"last": percent(run.last)}
        yield row | ({} if group.mean else _cost(run))


def _repeats(group: Group) -> str:
    """2 seeds, 3 folds, or 2 seeds x 3 folds."""
    seeds, folds = f"{group.seeds} seeds", f"{group.folds} folds"
    return seeds if group.folds == 1 else folds if group.seeds == 1 else f"{seeds} x {folds}"


def concatenated_lines(found: Comparison) -> list[str]:
    """The recalls of the concatenated embeddings of each group's folds, as means over seeds."""
    lines = []
    short = shortened([str(run.path) for group in found.groups for run in group.runs])
    for group, by_seed in zip(found.groups, found.concatenated, strict=bool(found.concatenated)):
        rows = list(by_seed.values())
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        recalls = [
            f"{name} {percent(fmean(column))}" + (f" ± {percent(stdev(column))}" if len(rows) > 1 else "")
            for name, column in columns.items()
        ]
        if rows:
            who = f"the {group.folds} fold models like {short[str(group.runs[0].path)]}"
            lines.append(f"concatenated embeddings of {who}, {count(len(rows), 'seed')}: {' '.join(recalls)}")
    return lines


def _cost(run: RunFacts) -> Row:
    if run.parameters is None or run.bytes is None:
        return {}
    return {"params": f"{run.parameters / 1e6:.2f}M", "MB": f"{run.bytes / 1e6:.1f}"}


def _titles(found: Comparison, rows: Sequence[Row]) -> list[str]:
    differing = [name.replace("_", "-") for name in found.differing]
    order = ["run", *differing, "state", "seed", "fold", "epoch", *_figure_names(found), "last", "params", "MB", "time"]
    return [title for title in order if any(title in row for row in rows)]


def plain(value: object) -> str:
    """A setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(map(plain, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def shortened(values: Sequence[str]) -> dict[str, str]:
    """{path: as many of its last parts as make it unique}."""
    distinct = list(dict.fromkeys(values))
    parts = 1
    while True:
        short = {value: "/".join(value.split("/")[-parts:]) for value in distinct}
        if len(set(short.values())) == len(distinct) or parts > max(value.count("/") for value in distinct):
            return short
        parts += 1
