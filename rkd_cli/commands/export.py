"""What ``rkd export`` writes: a network as one file that other programs run, compared with the checkpoint first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.commands.evaluate import set_of, with_data_of_runs
from rkd_cli.commands.options import (
    check_length,
    check_weights,
    note_untrained,
    open_named,
    reading,
    reading_as_trained,
)
from rkd_cli.data import ImageSet, load_dataset
from rkd_cli.data.loader import Batch, without_damaged
from rkd_cli.embedding.batches import embed
from rkd_cli.embedding.embedder import Embedder, NetworkEmbedder
from rkd_cli.errors import CheckpointError, DataError, RunError, SettingsError
from rkd_cli.events import Note, Reporter
from rkd_cli.metrics import recall_at_k
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.convert import to_int8, to_onnx, to_program
from rkd_cli.models.embedding_net import in_teacher_space
from rkd_cli.models.exported import check_installed, open_exported, packed, packed_program, read_program
from rkd_cli.models.sources import located
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.runtime.files import refuse_existing, replace_file
from rkd_cli.runtime.seeds import derive_seed
from rkd_cli.runtime.timing import times_of
from rkd_cli.schemas import Exported, Header
from rkd_cli.settings import ExportSettings

LEAST_COSINE = 0.999  # between the embeddings of an image by the checkpoint and by what was exported in float
BATCHES = (1, 32)  # that latencies are measured of
_CALIBRATION_BATCH = 32
_NOISE = 64  # images
_ROUNDS = 5  # turns of each network, of latency
_SECONDS = 2.0  # of each network and batch, in all turns

# (embeddings (N, D), labels (N,) or None) of what networks are compared on
_Embed = Callable[[nn.Module], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Candidate:
    """A form of the network and what it was found to be.

    Args:
        what: torch (the checkpoint), onnx, int8, or program.
        bytes: of its file.
        latency: {images a batch: median milliseconds}, on the CPU.
        worst_cosine: with the checkpoint's embedding, of the image where it is lowest; None: of itself.
        recall: Recall@K of unseen classes; empty where there are no labels.
    """

    what: str
    bytes: int
    latency: dict[int, float]
    worst_cosine: float | None
    recall: dict[int, float]


@dataclass(frozen=True)
class ExportResult:
    """A file and how it compares. ``candidates`` ends with what the file holds and begins with the checkpoint;
    ``dataset`` and ``data`` are what they were compared on, or ``missing`` says why that was noise alone."""

    path: Path
    name: str
    header: Header
    candidates: tuple[Candidate, ...]
    images: int
    threads: int
    missing: str | None
    dataset: str = ""
    data: Path = Path()


def export_file(name: str, settings: ExportSettings, report: Reporter) -> ExportResult:
    """Export a network, compare, and write the file, whole or not at all.

    Args:
        name: of a checkpoint, a run directory, or a pretrained network.
        settings: what is asked for.
        report: is told how far it is.
    Raises:
        RunError: the file's embeddings are not the checkpoint's, or it cannot be written.
        RkdError: something cannot be had, or flags that contradict it or each other.
    """
    out = settings.out
    refuse_existing("--out", out, settings.overwrite)
    if out.suffix == ".onnx":
        check_installed("rkd export", "onnxscript")
    check_weights([name], settings)
    embedder = open_named(name, settings, report)
    note_untrained(embedder, report)
    if not isinstance(embedder, NetworkEmbedder):
        raise SettingsError(f"{embedder.name}: holds embeddings, and no network: name a checkpoint")
    check_length(embedder, settings.l2normalize)
    splits, settings, dataset, missing = _images(embedder, settings, report)
    network, header, own = _in_space(embedder, settings, report)
    context = make_context("cpu", "fp32")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    except OSError as error:
        raise RunError(f"{out.parent}: cannot be made ({error.strerror}): choose another --out") from None

    def embedded(form: nn.Module) -> tuple[Tensor, Tensor | None]:
        if splits is None:
            none = torch.full((_NOISE,), -1)
            batch = Batch(_noise(_NOISE, header.image_size), none, none, none)
            return embed(form, [batch], _NOISE, context, report, "Comparing on noise")[0], None
        sets = {"Embedding unseen images": splits[1]}
        how = reading_as_trained(embedder, settings, context.device)
        (found,) = embedder.embed(sets, how, context, report, form).values()
        return found.embeddings, None if splits[1].labels is None else found.labels

    facts = Exported(header=header, parameters=network.parameter_count(), weights="float", projected_from=own)
    with TemporaryDirectory(prefix="rkd-export-") as folder:
        calibration = _calibration(embedder, splits[0], settings, context, report) if splits else iter(())
        forms = _made(network, facts, calibration if settings.int8 else None, Path(folder, out.name))
        first = Path(located(name)).stat().st_size if embedder.is_checkpoint else 4 * facts.parameters
        candidates, networks, data, count = _compared(network, first, forms, embedded, settings.recall, name)
        latencies = _latencies(networks, header.image_size)
    replace_file(out, lambda partial: partial.write_bytes(data))
    timed = tuple(replace(one, latency=latency) for one, latency in zip(candidates, latencies, strict=True))
    threads = torch.get_num_threads()
    return ExportResult(out, name, header, timed, count, threads, missing, dataset, settings.data)


def _in_space(
    embedder: NetworkEmbedder, settings: ExportSettings, report: Reporter
) -> tuple[EmbeddingNet, Header, int | None]:
    """The network to export and its header; and the size it projects from, where it does.

    Raises:
        SettingsError: it is exported already, or --teacher-space of a network that does not answer there.
    """
    network, header, name = embedder.network, embedder.header, embedder.name
    if not isinstance(network, EmbeddingNet):
        raise SettingsError(f"{name}: is exported already: name the checkpoint that it was made of")
    if not settings.teacher_space:
        # an export without the projection does not reach the teacher's space
        away = {} if header.teacher_size == header.embedding_size else {"teacher_space": None, "teacher_size": None}
        return network, header.model_copy(update={**away, "projections": ()}), None
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
) -> tuple[tuple[ImageSet, ImageSet] | None, ExportSettings, str, str | None]:
    """Training and evaluation images, with settings that say where they are, and their set; or why there are none.

    Raises:
        SettingsError, DataError: there are none, and they were asked for.
    """
    asked = settings.dataset or "data" in settings.model_fields_set
    try:
        settings = with_data_of_runs([embedder], settings.dataset, settings, report)
        name = set_of(embedder, settings.dataset, settings, report)
        splits = load_dataset(name, settings.data, report)
    except (SettingsError, DataError) as error:
        if asked:
            raise
        if settings.int8:
            raise SettingsError(f"--int8: is calibrated by training images, and {error.problems[0]}") from None
        return None, settings, "", error.problems[0]
    if settings.skip_damaged:
        train, evaluation = (images.decoded(settings.max_pixels) for images in splits)
        splits = without_damaged((train, evaluation), settings.workers, report)
    return splits, settings, name, None


def _calibration(
    embedder: NetworkEmbedder, train: ImageSet, settings: ExportSettings, context: Context, report: Reporter
) -> Iterator[np.ndarray]:
    """Batches (B, 3, S, S) uint8 of some training images, always the same."""
    generator = torch.Generator().manual_seed(derive_seed(0, "calibration"))
    drawn = torch.randperm(len(train), generator=generator)[: settings.calibration_images].tolist()
    some = replace(train, paths=tuple(train.paths[index] for index in drawn), labels=None, classes=())
    how = replace(reading(settings), batch=_CALIBRATION_BATCH)
    (batches,) = embedder.loaders([some], how, context, report)
    for batch in batches:
        yield batch.images.numpy()


def _made(
    network: EmbeddingNet, facts: Exported, calibration: Iterator[np.ndarray] | None, path: Path
) -> Iterator[tuple[str, bytes, nn.Module]]:
    """(what, the file, the network read back from it), each made when the one before was found right."""
    side = facts.header.image_size
    if path.suffix == ".pt2":
        path.write_bytes(packed_program(to_program(network, side), facts))
        yield "program", path.read_bytes(), read_program(path)[0]
        return
    graph = to_onnx(network, side)
    path.write_bytes(packed(graph, facts))
    yield "onnx", path.read_bytes(), open_exported(path)
    if calibration is not None:
        small = to_int8(graph, calibration)
        path.write_bytes(packed(small, facts.model_copy(update={"weights": "int8"})))
        yield "int8", path.read_bytes(), open_exported(path)


def _compared(
    network: EmbeddingNet,
    size: int,
    forms: Iterator[tuple[str, bytes, nn.Module]],
    embedded: _Embed,
    ks: Sequence[int],
    name: str,
) -> tuple[list[Candidate], list[nn.Module], bytes, int]:
    """The checkpoint and each form of it with their networks, the last one's file, and the number of images.

    Raises:
        RunError: a form in float gives other embeddings.
    """
    due, labels = embedded(network)
    networks: list[nn.Module] = [network]
    candidates, data = [Candidate("torch", size, {}, None, _recall(due, labels, ks))], b""
    for what, file, form in forms:
        found, _ = embedded(form)
        worst = float(F.cosine_similarity(due.double(), found.double(), dim=1).min())
        if what != "int8" and not worst >= LEAST_COSINE:  # NaN is not
            raise RunError(
                f"{name}: what was exported gives other embeddings: worst cosine {worst:.6f} on {len(due):,} images, "
                f"{LEAST_COSINE} is the least: nothing was written"
            )
        candidates.append(Candidate(what, len(file), {}, worst, _recall(found, labels, ks)))
        networks.append(form)
        data = file
    return candidates, networks, data, len(due)


def _recall(embeddings: Tensor, labels: Tensor | None, ks: Sequence[int]) -> dict[int, float]:
    return {} if labels is None else recall_at_k(embeddings, labels, ks)


def _noise(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8, in memory as loaders give images, always the same."""
    generator = torch.Generator().manual_seed(derive_seed(0, "noise"))
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


@torch.inference_mode()
def _latencies(networks: Sequence[nn.Module], side: int) -> list[dict[int, float]]:
    """{images a batch: median milliseconds} of each, in turns, so that what else the machine does meets all alike."""
    taken: list[dict[int, list[float]]] = [{batch: [] for batch in BATCHES} for _ in networks]
    for batch in BATCHES:
        images = _noise(batch, side)
        for _ in range(_ROUNDS):
            for network, of_network in zip(networks, taken, strict=True):
                of_network[batch] += times_of(partial(network, images), _SECONDS / _ROUNDS)
    return [{batch: 1e3 * statistics.median(times) for batch, times in one.items()} for one in taken]
