"""``rkd_cli.distill`` and ``rkd_cli.train_teacher``: the runs of the commands, from Python."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from rkd_cli.commands.card import write_card
from rkd_cli.data.decode import Decoding
from rkd_cli.data.given import given
from rkd_cli.embedding.embedder import NetworkEmbedder
from rkd_cli.embedding.loaded import LoadedModel, load
from rkd_cli.errors import SettingsError
from rkd_cli.events import Reporter, silent
from rkd_cli.models.checkpoint import read_checksum, read_header, read_tensors
from rkd_cli.models.embedding_net import EmbeddingNet, tensors_of
from rkd_cli.models.given import Preprocessing, from_module, is_timm, name_of
from rkd_cli.models.sources import located
from rkd_cli.runtime.processes import is_distributed
from rkd_cli.schemas import Result
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.names import flag_name, meant
from rkd_cli.settings.resolve import check_effect, resolve
from rkd_cli.training.loop import train
from rkd_cli.training.open import build_run
from rkd_cli.training.plan import Given

Network = str | os.PathLike[str] | nn.Module
_Settings = TypeVar("_Settings", TeacherSettings, DistillSettings)
_BY_POSITION = {"data": "images", "base": "the network", "load": "the network", "teacher": "the teacher"}
_OF_CHECKPOINTS = ("base", "embedding_size", "l2normalize")
_OF_COMMANDS = ("nproc", "jobs", "log")


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its directory, the figures of ``result.json``, and the best model, as ``load`` gives it."""

    directory: Path
    result: Result
    model: LoadedModel


def distill(
    teacher: Network | LoadedModel | Sequence[str],
    student: Network,
    images: object,
    *,
    config: str | os.PathLike[str] | None = None,
    report: Reporter = silent,
    **flags: Any,
) -> TrainedRun:
    """Distil a teacher into a student, as ``rkd distill`` does.

    Args:
        teacher: what ``--teacher`` takes, several names, a network of yours, or what ``load`` returned, for a network
            with its own preprocessing. It is copied.
        student: the name of a network (``--base``), a checkpoint or run directory to start from (``--load``), or a
            network of yours, which is trained itself. timm's, without a classifier, get a linear layer of
            ``embedding_size``; the output of others is the embedding, unless ``embedding_size`` adds such a layer.
        images: what ``--data`` takes; or a torch Dataset of images or pairs (image, label), which always gives the same
            image for a number; or a ``datasets.Dataset``; or a mapping of such data sets by split.
        config: as ``--config``.
        report: receives the events of the run (``rkd_cli.events``), for instance ``print``.
        flags: other flags of the command, by their names: ``lr=1e-3, save_dir="student"``.
    Raises:
        RkdError: the run cannot start, or fails. Each of its ``problems`` is a line.
    """
    name, source = _teacher(teacher, flags)
    return _run(DistillSettings, student, images, {"teacher": name}, source, config, report, flags)


def train_teacher(
    network: Network,
    images: object,
    *,
    config: str | os.PathLike[str] | None = None,
    report: Reporter = silent,
    **flags: Any,
) -> TrainedRun:
    """Train a teacher on labels, as ``rkd train-teacher`` does; the arguments are those of ``distill``."""
    return _run(TeacherSettings, network, images, {}, None, config, report, flags)


def _teacher(teacher: Any, flags: Mapping[str, Any]) -> tuple[object, NetworkEmbedder | None]:
    """The names of teachers, or the name of a network and a copy of it: batch norms will be folded into its layers."""
    names = [teacher] if isinstance(teacher, str | os.PathLike) else teacher
    if isinstance(names, list | tuple):
        if wrong := [type(name).__name__ for name in names if not isinstance(name, str | os.PathLike)]:
            raise SettingsError(f"distill(): several teachers must be names or paths, got {wrong[0]}")
        return [os.fspath(name) for name in names] if len(names) != 1 else os.fspath(names[0]), None
    loaded = teacher if isinstance(teacher, LoadedModel) else load(teacher, **_side(flags))
    embedder = loaded.embedder
    network = embedder.network
    return embedder.name, replace(embedder, opened=deepcopy(network) if isinstance(network, EmbeddingNet) else network)


def _run(
    model: type[_Settings],
    network: Network,
    images: object,
    words: Mapping[str, Any],
    teacher: NetworkEmbedder | None,
    config: str | os.PathLike[str] | None,
    report: Reporter,
    flags: dict[str, Any],
) -> TrainedRun:
    _check_names(model, flags)
    own, build = _network(network, flags)
    with _named(images, report) as (data, more):
        asked = {**words, **own, "data": data, **flags, **more}
        settings = resolve(model, asked, Path(config) if config else None)
        check_effect(settings, asked.keys() - more.keys())
        if build and own.get("embedding_size") == settings.embedding_size:  # no layer is added
            if getattr(settings, "freeze_base", False):
                raise SettingsError("freeze_base: leaves nothing to train. Add a layer with another embedding_size.")
            if "init" in flags:
                raise SettingsError("init: the network has its embedding layer. Add one with another embedding_size.")
            settings = settings.model_copy(update={"init": "random"})
        run = build_run(settings, report, Given(teacher, build))
        done = train(run, report)
    write_card(settings.save_dir)
    best = settings.save_dir / "best.safetensors"
    if build is None:
        found = load(settings.save_dir, device=settings.device, precision=settings.precision)
        return TrainedRun(settings.save_dir, done.result, found)
    tensors = read_tensors(best, tensors_of(run.model))
    run.model.load_state_dict({name: tensors[name] for name in run.model.state_dict()})
    header, place = read_header(best), str(settings.save_dir)
    embedder = NetworkEmbedder(place, str(best), read_checksum(best), header, run.model.eval())
    found = LoadedModel(embedder, run.context, settings.batch, Decoding(header.fit, max_pixels=settings.max_pixels))
    return TrainedRun(settings.save_dir, done.result, found)


def _check_names(model: type[TeacherSettings | DistillSettings], flags: Mapping[str, Any]) -> None:
    """Raise a SettingsError for keywords that are no flags of the command, or have no effect here."""
    name, fields = "distill" if model is DistillSettings else "train_teacher", model.model_fields
    given = sorted(flags.keys() & _BY_POSITION & fields.keys())
    problems = [f"{name}(): {word}: is given as {_BY_POSITION[word]}" for word in given]
    problems += [
        f"{name}(): unknown argument {word}" + meant(flag_name(word), [*map(flag_name, fields)])
        for word in sorted(flags.keys() - fields.keys())
    ]
    problems += [f"{name}(): {word}: use `rkd {model.command}`" for word in _OF_COMMANDS if word in flags]
    if is_distributed():
        problems.append(f"{name}(): runs in one process. Start torchrun with `rkd {model.command}`.")
    if problems:
        raise SettingsError(*problems)


def _network(network: Network, flags: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The flags that name a network to train, and the function that builds it, if it is no name."""
    if not isinstance(network, nn.Module):
        name = os.fspath(network)
        if not Path(name).exists() and not name.startswith("hf:"):
            return {"base": name}, None
        path = located(name)
        header = read_header(Path(path))
        return {"load": path, **{field: getattr(header, field) for field in _OF_CHECKPOINTS}}, None
    if "weights" in flags:
        raise SettingsError(f"weights: {type(network).__name__} has its weights. Omit the argument.")
    wrapped, _ = from_module(network, **_side(flags))
    own: dict[str, Any] = {"base": name_of(network), "weights": "given"}
    if is_timm(network):
        if getattr(network, "num_classes", 0):
            raise SettingsError(f"{own['base']}: has a classifier. Create it with num_classes=0.")
    else:
        own["embedding_size"] = wrapped.embedding_size
        own |= {"l2normalize": wrapped.l2normalize} if wrapped is network else {}
    return own, partial(_built, wrapped, is_timm(network))


def _side(flags: Mapping[str, Any]) -> Preprocessing:
    """The size of the images of a run, to try networks with; without the flag, what they say."""
    side = str(flags.get("image_size", ""))
    return {"image_size": int(side)} if side.isdigit() else {}


def _built(network: EmbeddingNet, with_layer: bool, size: int, l2normalize: bool) -> EmbeddingNet:
    """The network to train, with another linear layer if its embeddings have another size."""
    network.l2normalize = l2normalize
    if not with_layer and size == network.embedding_size:
        return network
    if not isinstance(network.linear, nn.Identity):
        raise SettingsError(f"embedding_size {size}: the network has {network.embedding_size}. Omit it.")
    return EmbeddingNet(network.base, network.embedding_size, size, l2normalize, network.normalization)


@contextmanager
def _named(images: object, report: Reporter) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of the images for ``--data``, and flags that they need."""
    if isinstance(images, str | os.PathLike):
        yield os.fspath(images), {}
        return
    forks = multiprocessing.get_start_method() == "fork"  # other processes do not have the data sets
    with given(images, report) as name:
        yield str(name), {} if forks else {"workers": 0}
