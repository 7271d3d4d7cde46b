"""``rkd export``: write a network for other programs, after comparing it with the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.commands.evaluate import choose_dataset, with_run_data
from rkd_cli.commands.options import (
    check_length,
    check_weights,
    note_untrained,
    open_named,
    reading,
    reading_as_trained,
)
from rkd_cli.data import ImageSet, load_dataset
from rkd_cli.data.decode import center_crop
from rkd_cli.data.loader import Batch, without_damaged
from rkd_cli.embedding.batches import embed
from rkd_cli.embedding.embedder import Embedder, NetworkEmbedder
from rkd_cli.errors import CheckpointError, DataError, RunError, SettingsError, first_line
from rkd_cli.events import Note, Progress, Reporter
from rkd_cli.metrics import Protocol, recall_at_k
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.convert import to_int8, to_int8_weights, to_onnx, to_program
from rkd_cli.models.embedding_net import in_teacher_space
from rkd_cli.models.exported import (
    FLOAT_INPUT,
    INPUT,
    OPSET,
    OUTPUT,
    PREPROCESSOR,
    check_installed,
    described,
    fed,
    is_exported,
    mean_and_std,
    open_exported,
    packed,
    packed_program,
    preprocessor,
    read_exported,
    read_program,
)
from rkd_cli.models.layouts import is_layout, open_layout, write_layout
from rkd_cli.models.sources import bytes_of, located
from rkd_cli.report.card import layout_card, template
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.runtime.files import atomic_write, refuse_existing, replace_file, write_json
from rkd_cli.runtime.seeds import derive_seed
from rkd_cli.runtime.timing import times_of
from rkd_cli.schemas import PADDING, Exported, Header
from rkd_cli.settings import ExportSettings

LEAST_COSINE = 0.999  # of an image's embeddings by the checkpoint and by a float export
BATCHES = (1, 32)  # to measure latency of
_CALIBRATION_BATCH = 32
_NOISE = 64  # images
_ROUNDS = 5  # networks take turns in latency measurements
_SECONDS = 2.0  # per network and batch, in all rounds

# a network -> its (N, D) embeddings, and (N,) labels or None
_Embed = Callable[[nn.Module], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Candidate:
    """A form of the network, as measured."""

    what: str  # torch (the checkpoint), onnx, fp16, int8, int8-weights, program, or timm
    bytes: int  # of the file or folder
    latency: dict[int, float]  # {batch: median milliseconds} on the CPU
    worst_cosine: float | None  # lowest cosine with the checkpoint's embedding of an image
    recall: dict[int, float]  # Recall@K of the evaluation split; empty without labels


@dataclass(frozen=True)
class ExportResult:
    """An exported file."""

    path: Path
    name: str
    header: Header
    candidates: tuple[Candidate, ...]  # from the checkpoint to the form in the file
    images: int
    threads: int
    missing: str | None  # why there were no images to compare on, only noise
    input: str  # uint8 or float
    dataset: str = ""
    data: Path = Path()


def export_file(name: str, settings: ExportSettings, report: Reporter) -> ExportResult:
    """Export a network, compare it with the checkpoint, and write the file atomically.

    Raises:
        RunError: the embeddings differ from the checkpoint's, or the file cannot be written.
        RkdError: the network or the images cannot be read, or flags contradict them or each other.
    """
    embedder, out = _opened(name, settings, report)
    splits, settings, dataset, missing = _images(embedder, settings, report)
    network, header, own = _in_space(embedder, settings, report)
    context = make_context("cpu", "fp32")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # fail before the work
    except OSError as error:
        raise RunError(f"{out.parent}: cannot be created ({error.strerror}). Choose another --out.") from None

    def embedded(form: nn.Module) -> tuple[Tensor, Tensor | None]:
        if splits is None:
            none = torch.full((_NOISE,), -1)
            batch = Batch(_noise(_NOISE, header.image_size), none, none, none)
            return embed(form, [batch], _NOISE, context, report, "Comparing on noise")[0], None
        sets = {"Embedding eval images": splits[1]}
        how = reading_as_trained(embedder, settings, context.device)
        (found,) = embedder.embed(sets, how, context, report, form).values()
        return found.embeddings, None if splits[1].labels is None else found.labels

    facts = Exported(
        header=header,
        parameters=network.parameter_count(),
        weights=settings.stored,
        input=settings.input,
        opset=OPSET if out.suffix == ".onnx" else None,
        projected_from=own,
    )
    with TemporaryDirectory(prefix="rkd-export-") as folder:
        calibration = _calibration(embedder, splits[0], settings, context, report) if splits else iter(())
        made = Path(folder, out.name)
        if settings.is_folder:
            made.mkdir()
            card = layout_card(Path(embedder.path), out.name, header, settings.to or "")
            write_layout(made, network, header, card, settings.to == "sentence-transformers")
        forms = _forms(network, facts, calibration if settings.int8 else None, made, report)
        size = bytes_of(Path(located(name))) if embedder.is_checkpoint else 4 * facts.parameters
        recall = partial(_recall, settings.recall, splits[1].protocol if splits else None)
        candidates, networks, count = _compare(network, size, forms, embedded, recall, name)
        report(Progress("Measuring latency", 0, 1, "steps"))
        latencies = _latencies(networks, header.image_size)
        report(Progress("Measuring latency", 1, 1, "steps"))
        _write(made, out, facts, report)
    timed = tuple(replace(one, latency=latency) for one, latency in zip(candidates, latencies, strict=True))
    threads = torch.get_num_threads()
    takes = "float" if settings.is_folder else settings.input
    return ExportResult(out, name, header, timed, count, threads, missing, takes, dataset, settings.data)


def snippet_text(name: str, language: str) -> str:
    """A program that embeds images with an exported ONNX file, without this one."""
    path = Path(located(name))
    if not is_exported(path):
        raise SettingsError(
            f"--snippet: {name} is no .onnx file. Write one with `rkd export {name} --out student.onnx`."
        )
    facts = read_exported(path).facts
    header, is_float = facts.header, facts.input == "float"
    mean, std = mean_and_std(header) if is_float else (None, None)
    return template(f"snippet.{'py' if language == 'python' else 'js'}.j2").render(
        file=path.name,
        header=header,
        edge=center_crop(0, header.resize, header.image_size).left,
        padding=list(PADDING),
        mean=mean,
        std=std,
        input=FLOAT_INPUT if is_float else INPUT,
        output=OUTPUT,
    )


def _opened(name: str, settings: ExportSettings, report: Reporter) -> tuple[NetworkEmbedder, Path]:
    """The network to export and where to, after everything that can be checked was."""
    out = settings.out
    assert out  # the settings require it
    for path in (out, *_beside(out, settings.input)):
        refuse_existing("--out", path, settings.overwrite)
    if out.suffix == ".onnx":
        check_installed("rkd export", "onnxscript")
    check_weights([name], settings)
    embedder = open_named(name, settings, report)
    note_untrained(embedder, report)
    if not isinstance(embedder, NetworkEmbedder):
        raise SettingsError(f"{embedder.name}: is a vectors file without a network. Name a checkpoint.")
    check_length(embedder, settings.l2normalize)
    return embedder, out


def _in_space(
    embedder: NetworkEmbedder, settings: ExportSettings, report: Reporter
) -> tuple[EmbeddingNet, Header, int | None]:
    """The network to export and its header, and the size that ``--teacher-space`` projects from, if it projects."""
    network, header, name = embedder.network, embedder.header, embedder.name
    if header.teachers:
        raise SettingsError(f"{name}: holds several teachers, which cannot be exported. Export their student.")
    if not isinstance(network, EmbeddingNet) or (settings.is_folder and is_layout(Path(embedder.path))):
        raise SettingsError(f"{name}: is already exported. Name the checkpoint it was made from.")
    if not settings.teacher_space:
        # without its projection, the network cannot embed in the teacher's space
        lost = {} if header.teacher_size == header.embedding_size else {"teacher_space": None, "teacher_size": None}
        return network, header.model_copy(update={**lost, "projections": ()}), None
    projected = bool(network.teacher_space and embedder.size in network.teacher_space.projections)
    try:
        network, header = in_teacher_space(network, header)
    except CheckpointError as error:
        raise SettingsError(f"--teacher-space: {name} {error.problems[0]}") from None
    if not projected:
        report(Note(f"--teacher-space: {name} embeds there without a projection"))
    return network, header, embedder.size if projected else None


def _images(
    embedder: Embedder, settings: ExportSettings, report: Reporter
) -> tuple[Sequence[ImageSet] | None, ExportSettings, str, str | None]:
    """Train and eval images, the settings with their folder, and their data set; or the reason why there are none.

    Missing images are an error only if flags name them or ``--int8`` needs them.
    """
    named = settings.dataset or "data" in settings.model_fields_set
    try:
        settings = with_run_data([embedder], settings.dataset, settings, report)
        name = choose_dataset(embedder, settings.dataset, settings, report)
        splits: Sequence[ImageSet] = load_dataset(name, settings.data, report)
    except (SettingsError, DataError) as error:
        if named:
            raise
        if settings.int8:
            raise SettingsError(f"--int8: needs training images. {error.problems[0]}") from None
        return None, settings, "", error.problems[0]
    if settings.skip_damaged:
        splits = without_damaged([images.decoded(settings.max_pixels) for images in splits], settings.workers, report)
    return splits, settings, name, None


def _calibration(
    embedder: NetworkEmbedder, train: ImageSet, settings: ExportSettings, context: Context, report: Reporter
) -> Iterator[Tensor]:
    """Batches (B, 3, S, S) uint8 of training images, the same in every export."""
    generator = torch.Generator().manual_seed(derive_seed(0, "calibration"))
    drawn = torch.randperm(len(train), generator=generator)[: settings.calibration_images].tolist()
    images = replace(train, paths=tuple(train.paths[index] for index in drawn), labels=None, classes=())
    how = replace(reading(settings), batch=_CALIBRATION_BATCH)
    (batches,) = embedder.loaders([images], how, context, report)
    for batch in batches:
        yield batch.images


def _forms(
    network: EmbeddingNet, facts: Exported, calibration: Iterator[Tensor] | None, path: Path, report: Reporter
) -> Iterator[tuple[str, Path, nn.Module]]:
    """(what, its file, the network read back from it) of each form; int8 is made after the float form was compared.

    A folder at ``path`` is read back by timm.
    """
    side = facts.header.image_size
    if path.is_dir():
        yield "timm", path, open_layout(path)[0]
        return
    report(Progress("Exporting the network", 0, 1, "steps"))
    if path.suffix == ".pt2":
        path.write_bytes(packed_program(to_program(network, side), facts))
        yield "program", path, read_program(path)[0]
        return
    graph = to_onnx(network, side, facts.input == "float", facts.weights == "fp16")
    is_int8 = facts.weights.startswith("int8")
    path.write_bytes(packed(graph, facts.model_copy(update={"weights": "float"}) if is_int8 else facts))
    yield "fp16" if facts.weights == "fp16" else "onnx", path, open_exported(path)
    if is_int8:
        report(Progress("Quantizing to int8", 0, 1, "steps"))
        given = None if calibration is None else (fed(facts, images) for images in calibration)
        path.write_bytes(packed(to_int8_weights(graph) if given is None else to_int8(graph, given), facts))
        yield facts.weights, path, open_exported(path)


def _beside(out: Path, kind: str) -> list[Path]:
    """The files that describe an ONNX file to other programs."""
    files = [out.with_suffix(".json"), out.with_name(PREPROCESSOR)]
    return files[: 1 + (kind == "float")] if out.suffix == ".onnx" else []


def _write(made: Path, out: Path, facts: Exported, report: Reporter) -> None:
    """Move a file or folder to where it was asked for, atomically, and describe an ONNX file in a JSON file."""
    if made.is_file():
        replace_file(out, lambda partial: partial.write_bytes(made.read_bytes()))
    else:
        try:
            with atomic_write(out) as partial:
                shutil.copytree(made, partial)
        except OSError as error:
            raise RunError(f"{out}: cannot be written ({error.strerror or first_line(error)})") from None
    contents = described(facts, out.name), preprocessor(facts.header)
    for path, content in zip(_beside(out, facts.input), contents, strict=False):
        if content:
            write_json(path, content)
        else:
            report(Note(f"no {path.name}, because it cannot describe --fit pad: see {out.with_suffix('.json').name}"))


def _compare(
    network: EmbeddingNet,
    size: int,
    forms: Iterator[tuple[str, Path, nn.Module]],
    embedded: _Embed,
    recall: Callable[[Tensor, Tensor | None], dict[int, float]],
    name: str,
) -> tuple[list[Candidate], list[nn.Module], int]:
    """The checkpoint and its forms, their networks, and the number of images.

    Raises a RunError if a float form gives other embeddings.
    """
    expected, labels = embedded(network)
    networks: list[nn.Module] = [network]
    candidates = [Candidate("torch", size, {}, None, recall(expected, labels))]
    for what, path, form in forms:
        found, _ = embedded(form)
        worst = float(F.cosine_similarity(expected.double(), found.double(), dim=1).min())
        if not what.startswith("int8") and not worst >= LEAST_COSINE:  # also if NaN
            raise RunError(
                f"{name}: the exported network gives other embeddings: the worst cosine on {len(expected):,} images is "
                f"{worst:.6f}, below {LEAST_COSINE}. Nothing was written."
            )
        candidates.append(Candidate(what, bytes_of(path), {}, worst, recall(found, labels)))
        networks.append(form)
    return candidates, networks, len(expected)


def _recall(
    ks: Sequence[int], protocol: Protocol | None, embeddings: Tensor, labels: Tensor | None
) -> dict[int, float]:
    return {} if labels is None else recall_at_k(embeddings, labels, ks, protocol=protocol)


def _noise(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8, the same in every export, in the memory format of loaders."""
    generator = torch.Generator().manual_seed(derive_seed(0, "noise"))
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


@torch.inference_mode()
def _latencies(networks: Sequence[nn.Module], side: int) -> list[dict[int, float]]:
    """{batch: median milliseconds} of each network. They take turns, so that other load affects all of them equally."""
    taken: list[dict[int, list[float]]] = [{batch: [] for batch in BATCHES} for _ in networks]
    for batch in BATCHES:
        images = _noise(batch, side)
        for _ in range(_ROUNDS):
            for network, of_network in zip(networks, taken, strict=True):
                of_network[batch] += times_of(partial(network, images), _SECONDS / _ROUNDS)
    return [{batch: 1e3 * median(times) for batch, times in one.items()} for one in taken]
