"""Figures and lines as plain text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rkd_cli.events import NetworkFacts, RunDone, RunStarted, SplitFacts
from rkd_cli.schemas import OVERLAP, EpochDone, Figures, leading
from rkd_cli.settings import DistillSettings, flag_name

if TYPE_CHECKING:
    from rkd_cli.commands.evaluate import Evaluation
    from rkd_cli.commands.export import ExportResult
    from rkd_cli.runtime.doctor import Diagnosis, Space
    from rkd_cli.training.dry_run import DryRun

_TITLES = {"train-teacher": "Training a teacher", "distill": "Distilling"}
_SPLITS = {"train": "train", "eval": "evaluate", "val": "pick the best epoch"}

_MUCH = 1.0  # points of Recall@1, of int8


def title(run: RunStarted) -> str:
    return _TITLES[run.command]


def header_rows(run: RunStarted) -> list[tuple[str, str]]:
    """(label, text) of what a run does."""
    rows = [
        ("data", data_text(run.dataset, run.splits)),
        ("network" if run.teacher is None else "student", network_text(run.network)),
    ]
    if run.teacher:
        rows.append(("teacher", network_text(run.teacher)))
    rows += [
        ("loss", _objectives(run)),
        ("device", f"{run.device}, {run.precision}, images {run.reader}"),
        ("saving to", str(run.save_dir)),
    ]
    if run.resumed_at:
        epoch, step = run.resumed_at
        rows.append(("resuming", f"at epoch {epoch}" + (f", after step {step} of it" if step else "")))
    return rows


def dry_run_rows(found: DryRun) -> list[tuple[str, str]]:
    """(label, text) of a dry run."""
    run, once = found.started, sum(work.seconds for work in found.once.values())
    sides = "".join(f", which the {name} resizes to {side}" for name, side in found.resized_to.items())
    rows = [
        *header_rows(run),
        ("weights", "random" if found.weights == "none" else found.weights),
        ("batches", f"{found.batch} images of {found.image_size} pixels a side{sides}"),
        ("steps", f"{run.epochs} epochs of {run.steps_per_epoch}"),
    ]
    for what, work in found.once.items():
        files = f", {_megabytes(work.bytes)} into {work.folder}, {_megabytes(work.free)} free" if work.folder else ""
        rows.append(("once", f"{what}: {work.count:,} {work.unit}, {_about(work.seconds)}{files}"))
    teacher = f", once {_about(found.teacher_seconds)} for the teacher" if found.teacher_seconds else ""
    each = " + ".join(map(_about, found.seconds)) + (" for each seed" if len(found.seconds) > 1 else "")
    in_bf16 = f" ({short_time(found.bf16_seconds)} with --precision bf16)" if found.bf16_seconds else ""
    of_all = f" of {_gigabytes(found.memory_total)}" if found.memory_total else ""
    rows += [
        ("a step", " and ".join(map(short_time, found.step_seconds)) + in_bf16),
        ("an epoch", " and ".join(_about(run.steps_per_epoch * seconds) for seconds in found.step_seconds)),
        ("evaluation", f"{_about(found.evaluation_seconds)} each time{teacher}"),
        ("all", f"{_about(once + sum(found.seconds))}, of which {_about(once)} once and {each}"),
        ("memory", f"{_gigabytes(found.memory)} at the peak{of_all}" if found.memory else "unknown"),
        ("disk", f"{_megabytes(len(found.seconds) * found.run_bytes)} of models, {_megabytes(found.run_free)} free"),
        ("not included", "saving, memory of decoding processes, other programs"),
    ]
    return rows


def count(number: int, what: str) -> str:
    """1 image, 2,000 images."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _about(seconds: float) -> str:
    return short_time(seconds) if seconds < 60 else duration(seconds)


def network_text(network: NetworkFacts) -> str:
    unit = "unit length" if network.l2normalize else "not normalized"
    text = f"{network.base}, {network.parameters / 1e6:.1f} M parameters, {network.embedding_size}-d, {unit}"
    return f"{text}, {network.path}" if network.path else text


def evaluated_text(result: Evaluation) -> str:
    """The network and the data set of an evaluation."""
    header, parts = result.header, []
    if header and header.base != result.name:
        parts.append(header.base)
    if header:
        parts.append(f"{result.parameters / 1e6:.1f} M parameters")
    if result.file_bytes:
        parts.append(f"{result.file_bytes / 1e6:.1f} MB")
    if result.milliseconds:
        parts.append(f"{short_time(result.milliseconds / 1e3)} an image on the CPU ({count(result.threads, 'thread')})")
    parts += [f"{result.size}-d", "unit length" if result.l2normalize else "not normalized"]
    if header and header.dataset:  # a pretrained network has none
        parts.append(f"epoch {header.epoch}")
    return f"{result.name}: {', '.join(parts)}, on {result.dataset}"


def interval_lines(result: Evaluation) -> list[str]:
    """What the interval of each difference says; only a clear one is called better."""
    lines = []
    for other, found in result.against.items():
        verdict = "better than" if found.difference > 0 else "worse than"
        says = f"is {verdict}" if found.is_clear else "cannot be told apart from"
        low, high = (f"{100 * end:+.2f}" for end in (found.low, found.high))
        gain = f"R@1 {100 * found.difference:+.2f} points, 95 % interval {low} to {high}"
        lines.append(f"{result.name} {says} {other}: {gain} (bootstrap over {found.classes:,} classes)")
    return lines


def export_text(result: ExportResult) -> str:
    """What an exported file contains, and what it was compared on."""
    header = result.header
    unit = "unit length" if header.l2normalize else "not normalized"
    side = header.image_size
    kind = "uint8" if result.input == "uint8" else "normalized float"
    takes = f"takes {kind} RGB (N, 3, {side}, {side}), center crop of {header.resize} pixels (--fit {header.fit})"
    on = "images of noise" if result.missing else "evaluation images"
    return (
        f"{result.path}: {result.name}, {takes}, gives {header.embedding_size}-d, {unit}; "
        f"compared on {result.images:,} {on}, on the CPU, {count(result.threads, 'thread')}"
    )


def export_notes(result: ExportResult) -> list[str]:
    """The cost of int8, what was not compared, and the next command."""
    header, (*others, written) = result.header, result.candidates
    lines = []
    if written.what.startswith("int8"):
        before = others[-1]
        points = [100 * (before.recall[k] - written.recall[k]) for k in written.recall]
        costs = f"costs {points[0]:.2f} points of R@1" if points else "costs recall that was not measured"
        (one, *_, many) = written.latency
        speed = f"{before.latency[one] / written.latency[one]:.1f} x (one image), "
        speed += f"{before.latency[many] / written.latency[many]:.1f} x ({many})"
        smaller = f"{before.bytes / written.bytes:.1f} x smaller"
        lines.append(f"{written.what} {costs}; {smaller}, speed {speed} of float")
        if points and points[0] > _MUCH:
            remedy = "--int8-weights" if written.what == "int8" else "--fp16"
            lines.append(f"warning: {written.what} costs more than {_MUCH:.0f} point: use {remedy}, or float")
    if result.missing:
        lines.append(f"note: Recall@K and real images were not compared: {result.missing}")
    if written.what != "program" and not result.missing:
        has_classes = bool(written.recall)
        flags: dict[str, object] = {"data": result.data}
        if has_classes and result.dataset != header.dataset:
            flags = {"dataset": result.dataset} | flags
        if not has_classes:
            flags["out"] = free_name(Path("embeddings.npz"))
        command = ["evaluate" if has_classes else "embed", str(result.path), *as_flags(flags)]
        lines.append(f"next: {shlex.join(['rkd', *command])}")
    return lines


def data_text(dataset: str, splits: Sequence[SplitFacts]) -> str:
    return f"{dataset}: {', '.join(map(split_text, splits))}"


def split_text(split: SplitFacts) -> str:
    what = f"images of {split.classes} classes" if split.classes else "photos"
    counts = ((split.queries, "queries"), (split.gallery, "in the gallery"), (split.cameras, "cameras"))
    more = ", ".join(f"{number:,} {name}" for number, name in counts if number)
    return f"{split.images:,} {what} {_SPLITS[split.name]}" + (f" ({more})" if more else "")


def _objectives(run: RunStarted) -> str:
    parts = []
    for objective in run.objectives:
        terms = " + ".join(
            f"{ratio:g} {name}" if ratio != 1 or run.teacher else name for name, ratio in objective.ratios.items()
        )
        parts.append(f"{objective.epochs} epochs {terms}" if objective.epochs else terms)
    negatives = f", {run.sample} negatives" if run.sample else ""
    return ", then ".join(parts) + negatives


def ended_lines(run: RunStarted, done: RunDone) -> list[str]:
    """A line if --patience ended the run."""
    at, best = done.result.ended_at, done.result.best_epoch
    return [f"ended early at epoch {at} of {run.epochs} (--patience): none was better than epoch {best}"] if at else []


def saved_line(done: RunDone) -> str:
    best, *others = done.saved
    files = " and ".join([f"{best} (epoch {done.result.best_epoch})", *(other.name for other in others)])
    return f"saved {files} in {duration(done.result.seconds)}"


def cost_line(run: RunStarted, done: RunDone) -> str:
    """Size and speed of the best model."""
    facts = [f"{done.model_bytes / 1e6:.1f} MB", f"{run.network.parameters / 1e6:.1f} M parameters"]
    if done.milliseconds is not None:
        facts.append(f"{short_time(done.milliseconds / 1e3)} an image (one thread)")
    return f"{done.saved[0]}: {', '.join(facts)}"


def next_line(run: RunStarted, done: RunDone) -> str:
    """The next command after a run, or a note that the run was in vain."""
    if done.result.best_epoch == 0:
        return "note: the best epoch is 0, the network before training. Train longer, or with another --lr."
    directory = str(done.saved[0].parent)
    if run.command == "train-teacher":
        command, values = ["distill"], {"teacher": directory, **run.shared, **_save_dir(run)}
    elif "R@1" not in done.result.best["eval"]:
        is_whole = run.dataset in ("images", "folder", "list", "packed")  # --data has them all
        listed = () if is_whole else ("dataset",)
        out = free_name(Path("embeddings.npz"))
        command, values = ["embed", directory], _of(run, *listed, "data", "skip_damaged") | {"out": out}
    else:  # the directory stores the data set
        command, values = ["evaluate", directory], _of(run, "skip_damaged")
    return f"next: {shlex.join(['rkd', *command, *as_flags(values)])}"


def _of(run: RunStarted, *names: str) -> dict[str, object]:
    return {name: value for name, value in run.shared.items() if name in names}


def _save_dir(run: RunStarted) -> dict[str, object]:
    """A free ``--save-dir`` for the next student, if the default has a run."""
    usual = Path(str(run.shared.get("config", DistillSettings.model_fields["save_dir"].default)))
    place = free_name(usual, "settings.json")
    return {"save_dir": place} if place != usual else {}


def free_name(usual: Path, inside: str = "") -> Path:
    """The first of NAME, NAME-2, ... that does not exist, or does not contain ``inside``."""
    place, number = usual, 1
    while (place / inside).exists():
        number += 1
        place = usual.with_name(f"{usual.stem}-{number}{usual.suffix}")
    return place


def as_flags(values: Mapping[str, object]) -> list[str]:
    """Settings as command line flags."""
    words = []
    for name, value in values.items():
        flag = flag_name(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def closing_line(done: RunDone) -> str:
    """The last line of the published code: recall, or overlap without labels."""
    result, name = done.result, leading(done.result.best["eval"])
    said = "Recall" if name == "R@1" else "Overlap@10"
    train = f"Best Train {said}: {result.best_train[name]:.4f}, " if result.best_train else ""
    return f"{train}Best Eval {said}: {result.best['eval'][name]:.4f}"


def epoch_line(done: EpochDone, epochs: int) -> str:
    parts = [f"epoch {done.epoch}/{epochs}"]
    if done.losses:
        parts += [f"{name} {value:.5g}" for name, value in done.losses.items()]
        parts += [f"lr {done.learning_rate:.3g}", f"{done.images_per_second:.0f} images/s"]
    parts += [figures_line(done.figures)] if done.figures else []
    parts.append(f"{done.seconds:.0f} s")
    return "  ".join(parts) + ("  best" if done.is_best else "")


def figures_line(figures: Figures) -> str:
    """The figures of the evaluation split and the first figure of the other splits."""
    shown = figure_columns(figures, True)
    return "  ".join(
        f"{split} " + " ".join(f"{name} {percent(figures[split][name])}" for _, name in columns)
        for split, columns in groupby(shown, lambda column: column[0])
    )


def figure_columns(figures: Figures, has_labels: bool) -> list[tuple[str, str]]:
    """(split, name) of the figures shown for an epoch; before the first one, of the leading figure."""
    if not figures:
        return [("eval", "R@1" if has_labels else OVERLAP)]
    first = [(split, leading(figures[split])) for split in ("train", "val") if split in figures]
    return [*first, *(("eval", name) for name in figures.get("eval", {}))]


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def cell(figures: Figures, split: str, name: str) -> str:
    found = figures.get(split, {})
    return percent(found[name]) if name in found else ""


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def short_time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def doctor_text(found: Diagnosis) -> str:
    """One fact per line, for a bug report."""
    rows = list(found.versions.items())
    formats = [name for name, is_read in found.formats.items() if is_read]
    missing = [name for name, is_read in found.formats.items() if not is_read]
    rows += [
        ("images", f"reads {', '.join(formats)}" + (f"; not {', '.join(missing)}" if missing else "")),
        ("system", found.system),
        ("interpreter", found.python),
        ("processor", f"{found.processor}, {found.cores_for_us} of {found.cores} cores, torch threads {found.threads}"),
        ("cuda", found.cuda),
    ]
    for device in found.devices:
        works = "works" if device.problem is None else f"does not work: {device.problem}"
        rows.append(("device", f"{device.name}, {_space(device.memory)}, {works}"))
    limit = f", this container's limit {_gigabytes(found.memory_limit)}" if found.memory_limit else ""
    rows += [
        ("memory", f"{_space(found.memory)}{limit}"),
        ("/dev/shm", _space(found.shared_memory)),
        ("directory", f"{found.working_directory}, disk {_space(found.disk)}"),
    ]
    for name, folder in found.caches.items():
        content = f"{folder.files:,} files, {_gigabytes(folder.bytes)}" if folder.files else "empty or absent"
        rows.append((name, f"{folder.path}, {content}, disk {_space(folder.disk)}"))
    rows += [(name, value) for name, value in found.environment.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _space(space: Space) -> str:
    if space.total is None:
        return "unknown"
    return _gigabytes(space.total) + (f", {_gigabytes(space.free)} free" if space.free is not None else "")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
