"""From settings to a plan: everything is checked before training starts, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from rkd_cli.data import ImageSet
from rkd_cli.data.loader import Batch, without_damaged
from rkd_cli.data.members import joined
from rkd_cli.data.splits import content_digest
from rkd_cli.embedding.embedder import Embedder, NetworkEmbedder, open_embedder
from rkd_cli.embedding.vectors import Vectors
from rkd_cli.errors import CheckpointError, SettingsError, first_line
from rkd_cli.events import NetworkFacts, Note, ObjectiveFacts, Reporter, silent
from rkd_cli.models import EmbeddingNet, build_model, load_model
from rkd_cli.models.checkpoint import read_header
from rkd_cli.models.embedding_net import expose_stages, freeze, freeze_statistics, to_device
from rkd_cli.models.exported import ExportedNet
from rkd_cli.models.joined import JOINED, JOINED_VECTORS, TEACHERS, JoinedNet, JoinedSpace, joined_size
from rkd_cli.models.sources import is_pretrained, located
from rkd_cli.models.sync_norm import synchronize
from rkd_cli.runtime.context import Context, check_compiler, make_context, naming_memory
from rkd_cli.schemas import Header
from rkd_cli.settings import DistillSettings, TeacherSettings, flag_name
from rkd_cli.settings.resolve import agree
from rkd_cli.training import notes
from rkd_cli.training.images import Images, Sets, find_images, names_digest, split_images
from rkd_cli.training.objective import STAGES, Objective, View, objectives, teacher_loss, teacher_space
from rkd_cli.training.run_directory import RunDirectory
from rkd_cli.training.step import views
from rkd_cli.training.teachers import CachedTeacher, LiveTeacher, Teacher, at_unit_length, join_vectors

_USUAL_SIDE = 224  # pixels; every ImageNet network takes this size
_PAIR_LOSSES = ("l2_triplet", "l1_triplet", "contrastive")
_Settings = TeacherSettings | DistillSettings
_AnySettings = TypeVar("_AnySettings", TeacherSettings, DistillSettings)


@dataclass(frozen=True)
class Given:
    """Networks that Python code gives in place of names in the settings.

    ``build`` returns the network to train, with an embedding of so many dimensions, perhaps of unit length.
    """

    teacher: NetworkEmbedder | None = None
    build: Callable[[int, bool], EmbeddingNet] | None = None


@dataclass(frozen=True)
class Teaching:
    """The teacher, and one objective, or one for the first epochs and one for the rest."""

    teacher: CachedTeacher | LiveTeacher
    digest: str
    facts: NetworkFacts
    objectives: list[Objective]
    header: Header | None = None  # of the file of several teachers, if their spaces are joined


@dataclass(frozen=True)
class Plan:
    """A checked training; ``open_run`` makes a ``Run`` from it."""

    settings: _Settings  # without auto values
    context: Context
    images: Images
    directory: RunDirectory
    model: EmbeddingNet
    losses: nn.ModuleList  # with their weights and queues
    terms: list[ObjectiveFacts]
    sample: str | None  # the miner of a loss on labels
    teaching: Teaching | None = None
    checked: tuple[int, float] = (0, 0.0)  # images checked for damage, and seconds


def plan_run(settings: _Settings, report: Reporter, given: Given = Given()) -> Plan:
    """Check settings, images and networks. With ``--skip-damaged``, decode all images last.

    Raises:
        RkdError: the training cannot start.
    """
    if isinstance(settings, TeacherSettings):
        return plan_teacher(settings, report, given)
    return plan_student(settings, report, given)


def plan_teacher(settings: TeacherSettings, report: Reporter, given: Given) -> Plan:
    """``plan_run`` of ``rkd train-teacher``."""
    if settings.loss not in _PAIR_LOSSES and not settings.l2normalize:
        report(Note(notes.LENGTHS_OPEN.format(settings.loss)))
    settings = _with_statistics(settings, report)
    context = _context(settings)
    settings, sets = find_images(settings, report, context.ranks.is_first)
    images = split_images(settings, sets, (), context.ranks, silent if settings.skip_damaged else report)
    directory = RunDirectory.find(settings.save_dir, settings.overwrite, settings.resume)
    model = _to_train(_new_model(settings, images, context, directory, report, given), settings, context, report)
    if settings.freeze_base:
        model.base.requires_grad_(False)
    sets, checked = _undamaged(settings, sets, context, report)
    if settings.skip_damaged:
        images = split_images(settings, sets, (), context.ranks, report)
    settings = settings.model_copy(update={"batch": images.batch})
    context.seed_torch("proxies")
    losses = nn.ModuleList([teacher_loss(settings, len(images.splits["train"].classes))])
    directory = _of_run(directory, settings, images, {}, context, report)
    sample = settings.sample if settings.loss in _PAIR_LOSSES else None
    terms = [ObjectiveFacts({settings.loss: 1.0})]
    return Plan(settings, context, images, directory, model, losses, terms, sample, checked=checked)


def plan_student(settings: DistillSettings, report: Reporter, given: Given) -> Plan:
    """``plan_run`` of ``rkd distill``."""
    sources = (
        [given.teacher]
        if given.teacher
        else [
            open_embedder(located(name), settings.teacher_weights, image_size=settings.image_size, report=report)
            for name in settings.teachers
        ]
    )
    files = _vectors_of(sources)
    settings = _with_statistics(_with_unit_student(settings, report), report)
    context = _context(settings)
    settings, sets = find_images(settings, report, context.ranks.is_first)
    images = split_images(settings, sets, files, context.ranks, silent if settings.skip_damaged else report)
    directory = RunDirectory.find(settings.save_dir, settings.overwrite, settings.resume)
    for source in sources:
        notes.tell_of_teacher(settings, source, images.splits, report)
    model = _new_model(settings, images, context, directory, report, given)
    space = _space_of(settings, sources, len(images.splits["train"]))
    facts = _facts_of(settings, sources, space)
    notes.tell_of_size(settings, model, facts, report)
    for source in sources:
        if isinstance(source.network, nn.Module):  # the members too of a file of teachers
            for part in source.network.modules():
                if isinstance(part, EmbeddingNet):
                    freeze(part)
    _expose_stages(settings, sources[0], model)
    teacher = _teacher(settings, sources, files, space, images, context, report)
    model = _to_train(model, settings, context, report)
    learned, taught = _first_views(settings, model, teacher, context)
    context.seed_torch("hints")
    sizes = tuple(source.size for source in sources) if settings.is_averaged else ()
    stages = objectives(settings, learned, taught, context.device, context.ranks, sizes)
    size = taught.embeddings.shape[1]
    if settings.init == "teacher" and (settings.is_averaged or model.embedding_size != size):
        raise SettingsError(
            f"--init teacher: needs one teacher space, and an embedding of its {size} dimensions. Pass "
            f"--embedding-size {size}, or --init pca."
        )
    losses = nn.ModuleList(stage.losses for stage in stages)
    model.teacher_space = teacher_space(settings, stages[-1], taught.embeddings.shape[1])
    sets, checked = _undamaged(settings, sets, context, report)
    if settings.skip_damaged:
        images = split_images(settings, sets, files, context.ranks, report)
        if files:
            teacher = join_vectors(files, images.splits, settings.data, context, teacher.form)
    settings = settings.model_copy(update={"batch": images.batch})
    digest = " ".join(source.digest for source in sources)
    header = _header_of(settings, sources, space, images.splits["train"]) if space else None
    inputs = {"teacher": digest}
    if space and directory.resumed:
        inputs["space"] = directory.read_space(space)
    directory = _of_run(directory, settings, images, inputs, context, report)
    epochs = [settings.hint_epochs, None][-len(stages) :]
    terms = [ObjectiveFacts(stage.ratios, count) for stage, count in zip(stages, epochs, strict=True)]
    sample = settings.triplet_sample if settings.triplet_ratio else None
    teaching = Teaching(teacher, digest, facts, stages, header)
    return Plan(settings, context, images, directory, model, losses, terms, sample, teaching, checked)


def _context(settings: _Settings) -> Context:
    context = make_context(settings.device, settings.precision, settings.seed)
    if settings.compile:
        check_compiler(context.device)
    return context


def _undamaged(settings: _Settings, sets: Sets, context: Context, report: Reporter) -> tuple[Sets, tuple[int, float]]:
    """The sets, with ``--skip-damaged`` without damaged images; the number of images checked, and seconds."""
    if not settings.skip_damaged:
        return sets, (0, 0.0)
    start = context.clock()
    train, evaluation = without_damaged(sets, settings.workers, report)
    return (train, evaluation), (sum(map(len, sets)), context.clock() - start)


def _of_run(
    directory: RunDirectory,
    settings: _Settings,
    images: Images,
    inputs: dict[str, str],
    context: Context,
    report: Reporter,
) -> RunDirectory:
    """The directory with settings and input digests; those of a resumed run must match."""
    inputs = inputs | {"images": names_digest(images.splits)}
    if directory.resumed and context.ranks.is_first:
        inputs["content"] = content_of(images.splits, report)
    if directory.resumed and "content" in inputs.keys() - directory.resumed.inputs.keys():
        report(
            Note(
                f"{directory.path}: an earlier version started this run and stored no digest of the image content. "
                "Only names and labels are compared."
            )
        )
    text = json.dumps({"command": settings.command} | json.loads(settings.model_dump_json()), indent=2)
    return directory.of_run(text, inputs, context.ranks.is_first)


def content_of(splits: dict[str, ImageSet], report: Reporter) -> str:
    """Digest of the content of all image files."""
    return content_digest(joined(images.paths for images in splits.values()), report)


def _new_model(
    settings: _Settings,
    images: Images,
    context: Context,
    directory: RunDirectory,
    report: Reporter,
    given: Given,
) -> EmbeddingNet:
    if given.build:
        context.seed_torch("weights")
        return given.build(settings.embedding_size, settings.l2normalize)
    base, size, unit, side = settings.base, settings.embedding_size, settings.l2normalize, settings.image_size
    if directory.resumed:  # weights come from the resume state
        with suppress(CheckpointError):  # a run stopped very early has no checkpoint yet
            side = read_header(settings.save_dir / "last.safetensors").input_size or side
        return build_model(base, size, unit, image_size=side)
    if settings.load is None:
        context.seed_torch("weights")
        return build_model(base, size, unit, settings.weights, side, report)
    header = read_header(settings.load)
    agree(settings.load, header, base, size, unit)
    notes.tell_of_seen(str(settings.load), header, images.splits, report)
    model = load_model(settings.load)
    model.teacher_space = None  # depends on the losses of this run
    return model


def _to_train(model: EmbeddingNet, settings: _Settings, context: Context, report: Reporter) -> EmbeddingNet:
    """``_on_device``, then freeze or synchronize batch norm."""
    _on_device(model, settings, settings.base, context, report)
    if settings.freeze_bn and not freeze_statistics(model):
        raise SettingsError(f"--freeze-bn: {settings.base} has no batch norm. Omit the flag.")
    if settings.sync_bn:
        synchronize(model, settings.base, context.ranks, context.device)
    return model


def _on_device(model: EmbeddingNet, settings: _Settings, base: str, context: Context, report: Reporter) -> None:
    """Move a network to the device, try it on one image, and compile it with ``--compile``."""
    side = model.normalization.input_size
    if side and side != settings.image_size:
        report(Note(f"{base} only takes {side} pixel images. Images of {settings.image_size} pixels are resized."))
    try:
        with naming_memory(f"{base} with one image of {settings.image_size} pixels", "choose a smaller --base"):
            to_device(model, context.device).eval()
            _pass_zeros(model, settings.image_size, context.device)
    except RuntimeError as error:
        _pass_zeros(model, _USUAL_SIDE, context.device)  # fails again if the size is not the cause
        reason = first_line(error)
        raise SettingsError(
            f"--image-size {settings.image_size}: {base} fails on this size ({reason}). Choose another."
        ) from None
    if settings.compile:
        model.compile()


@torch.inference_mode()
def _pass_zeros(model: EmbeddingNet, side: int, device: torch.device) -> None:
    model(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))


def _with_statistics(settings: _AnySettings, report: Reporter) -> _AnySettings:
    """Turn off what a recipe says of pretrained networks where the network starts from random weights or --load."""
    if settings.load:
        return settings.model_copy(update={"init": "random"})  # the layer is loaded
    if settings.weights != "none":
        return settings
    if settings.freeze_bn:  # it has no statistics yet
        report(Note("batch norms are trained (no --freeze-bn), because the network starts from random weights"))
    return settings.model_copy(update={"freeze_bn": False, "init": "random"})


def _with_unit_student(settings: DistillSettings, report: Reporter) -> DistillSettings:
    """Set ``--l2normalize`` if no loss trains the student's lengths and no flag says otherwise."""
    flags = [flag for flag in settings.direction_flags if flag != "--relaxed-ratio"]  # it trains lengths
    if not flags or settings.l2normalize:
        return settings
    active = {flag_name(name) for name in settings.active_ratios}
    named = ", ".join(flags)
    if active <= {*flags, "--at-ratio"} and not settings.load and "l2normalize" not in settings.model_fields_set:
        report(Note(f"--l2normalize: student embeddings get unit length, because only directions count for {named}"))
        return settings.model_copy(update={"l2normalize": True})
    report(Note(notes.LENGTHS_OPEN.format(named)))
    return settings


def _vectors_of(sources: Sequence[Embedder]) -> list[Vectors]:
    """The vectors files of the teachers, if they are files; all are, or none is."""
    files = [source.vectors for source in sources if source.vectors]
    for vectors in files:
        if vectors.kind == "binary":
            raise SettingsError(
                f"--teacher {vectors.path}: binary embeddings have no distances to learn from. Name a float or int8 "
                "file."
            )
    if 0 < len(files) < len(sources):
        network = next(source.name for source in sources if not source.vectors)
        raise SettingsError(
            f"--teacher {network}: is a network, and {files[0].path} is a vectors file. Write its vectors with "
            "`rkd embed`, and name that file."
        )
    return files


def _space_of(settings: DistillSettings, sources: Sequence[Embedder], images: int) -> JoinedSpace | None:
    """The space of several teachers, which is not fitted yet; None for one teacher, and if losses are averaged."""
    if len(sources) == 1 or settings.is_averaged:
        return None
    sizes = [source.size for source in sources]
    size = joined_size(sizes, images)
    if settings.csd_ratio or settings.queue_ratio or settings.d3_ratio:  # these compare embeddings of one size
        size = min(size, settings.embedding_size)
    return JoinedSpace(sizes, size)


def _teacher(
    settings: DistillSettings,
    sources: Sequence[Embedder],
    files: Sequence[Vectors],
    space: JoinedSpace | None,
    images: Images,
    context: Context,
    report: Reporter,
) -> CachedTeacher | LiveTeacher:
    first = sources[0]
    form: Callable[[Tensor], Tensor] | None = space.to(context.device) if space else None
    if len(sources) == 1 and settings.direction_flags and not first.unit:
        flags, form = ", ".join(settings.direction_flags), at_unit_length
        report(
            Note(
                "the teacher's embeddings are scaled to unit length for all losses and figures, because only "
                f"directions count for {flags}"
            )
        )
    if files:
        if settings.teacher_views:
            report(Note(f"{first.name} is a vectors file: --teacher-views {settings.teacher_views} is not used"))
        if settings.mixup:
            raise SettingsError(f"--mixup: {first.name} is a vectors file. Name a network as --teacher.")
        return join_vectors(files, images.splits, settings.data, context, form)
    networks = [source.network for source in sources if source.network]
    for source, network in zip(sources, networks, strict=True):
        for part in network.modules():
            if isinstance(part, EmbeddingNet):
                _on_device(part, settings, source.name, context, report)
            elif isinstance(part, ExportedNet) and (side := part.facts.header.image_size) != settings.image_size:
                raise SettingsError(
                    f"--image-size {settings.image_size}: {source.name} only takes {side} pixel images. Pass "
                    f"--image-size {side}."
                )
        network.to(context.device)  # with the space of a file of teachers
    network = networks[0] if len(networks) == 1 else JoinedNet(networks)
    return LiveTeacher(network, context, settings.chunk, form)


def _facts_of(settings: DistillSettings, sources: Sequence[Embedder], space: JoinedSpace | None) -> NetworkFacts:
    """What the screen says about the teachers."""
    found = [_facts_of_one(source) for source in sources]
    if len(found) == 1:
        return found[0]
    base, parameters = " + ".join(facts.base for facts in found), sum(facts.parameters for facts in found)
    if space is None:
        return NetworkFacts(base, parameters, sum(facts.embedding_size for facts in found), False)
    return NetworkFacts(base, parameters, space.size, True, settings.save_dir / TEACHERS)


def _facts_of_one(source: Embedder) -> NetworkFacts:
    path = None if is_pretrained(source.name) else Path(source.name)
    if source.vectors:
        return NetworkFacts("embeddings", 0, source.vectors.size, source.unit, path)
    assert source.network is not None and source.header is not None
    network = source.network
    return NetworkFacts(
        source.header.base, network.parameter_count(), network.embedding_size, network.l2normalize, path
    )


def _header_of(settings: DistillSettings, sources: Sequence[Embedder], space: JoinedSpace, images: ImageSet) -> Header:
    """The header of the file of teachers in the run's directory."""
    names = [source.name if is_pretrained(source.name) else str(Path(source.path).resolve()) for source in sources]
    seen = {digest for source in sources if source.header for digest in source.header.seen_classes}
    return Header(
        base=JOINED_VECTORS if sources[0].vectors else JOINED,
        embedding_size=space.size,
        l2normalize=True,
        resize=settings.resize,
        image_size=settings.image_size,
        fit=images.decoding.fit,
        mean=(0, 0, 0),  # each network has its own
        std=(1, 1, 1),
        dataset=settings.dataset,
        epoch=0,
        train_recall={},
        eval_recall={},
        seen_classes=tuple(sorted(seen)),
        teachers=tuple((name, source.digest) for name, source in zip(names, sources, strict=True)),
    )


def _stage_flag(settings: DistillSettings) -> str:
    """The flag that compares feature maps, or ''."""
    return "--at-ratio" if settings.at_ratio else "--fitnet-ratio" if settings.fitnet_ratio else ""


def _expose_stages(settings: DistillSettings, source: Embedder, student: EmbeddingNet) -> None:
    """Make teacher and student return feature maps if a term compares them."""
    flag = _stage_flag(settings)
    if not flag:
        return
    if source.network is None:
        raise SettingsError(
            f"{flag}: {source.name} is a vectors file without feature maps. Name a network as --teacher."
        )
    for name, base, network in (("teacher", source.name, source.network), ("student", settings.base, student)):
        if not isinstance(network, EmbeddingNet) or not expose_stages(network):
            raise SettingsError(f"{flag}: the {name} {base} does not have four stages of feature maps. Use a ResNet.")


def _first_views(
    settings: DistillSettings, student: EmbeddingNet, teacher: Teacher, context: Context
) -> tuple[View, View]:
    """Student and teacher outputs for an empty image. Checks that compared feature maps have equal sizes."""
    flag = _stage_flag(settings)
    images = torch.zeros(1, 3, settings.image_size, settings.image_size, dtype=torch.uint8)
    zero: Tensor = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        learned, taught = views(student, teacher, Batch(images, zero, zero, zero), bool(flag), context)
    for stage in STAGES if flag else ():
        ours, theirs = learned.stages[stage].shape[2:], taught.stages[stage].shape[2:]
        if ours != theirs:
            raise SettingsError(
                f"{flag}: feature maps of stage {stage + 1} are {ours[0]} x {ours[1]} in the student and {theirs[0]} x "
                f"{theirs[1]} in the teacher. Choose networks whose feature maps have equal sizes."
            )
    return learned, taught
