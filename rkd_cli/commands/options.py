"""Apply and check the flags that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from rkd_cli.embedding.batches import evaluation_batch
from rkd_cli.embedding.embedder import Embedder, NetworkEmbedder, Reading, VectorsEmbedder, open_embedder
from rkd_cli.errors import SettingsError
from rkd_cli.events import Note, Reporter, silent
from rkd_cli.models.checkpoint import untrained_notes
from rkd_cli.models.exported import is_exported
from rkd_cli.models.sources import is_pretrained
from rkd_cli.settings import ImageSettings, flag_name
from rkd_cli.settings.resolve import read_config


def open_named(name: str, settings: ImageSettings, report: Reporter = silent) -> NetworkEmbedder | VectorsEmbedder:
    """``open_embedder`` with the flags of a command."""
    embedder = open_embedder(name, settings.weights, settings.l2normalize, settings.image_size, report)
    if isinstance(embedder, VectorsEmbedder):
        return embedder
    embedder = embedder.with_preprocessing(settings.resize, settings.image_size, settings.fit)
    side, given = embedder.header.input_size, embedder.header.image_size
    if side and side != given:
        report(Note(f"{embedder.name} only takes {side} pixel images. Images of {given} pixels are resized."))
    return embedder


def reading(settings: ImageSettings) -> Reading:
    """How the flags say that images are read."""
    where = (settings.data, settings.cache, settings.cache_dir)
    return Reading(*where, settings.workers, settings.max_pixels, settings.batch)


def reading_as_trained(embedder: Embedder, settings: ImageSettings, device: torch.device) -> Reading:
    """``reading``, by default with the batch of the checkpoint's run.

    Another batch rounds differently, which may swap nearly equal neighbors.
    """
    found, run = reading(settings), Path(embedder.path).with_name("settings.json")
    if "batch" not in settings.model_fields_set and embedder.is_checkpoint and run.is_file():
        with suppress(SettingsError):
            saved = read_config(run)
            batch, chunk = saved.get("batch"), saved.get("chunk", 0)
            if isinstance(batch, int) and isinstance(chunk, int) and batch > 0 <= chunk:
                return replace(found, batch=evaluation_batch(batch, chunk, device))
    return found


def note_untrained(embedder: Embedder, report: Reporter) -> None:
    """Report a checkpoint from before training."""
    if embedder.header and embedder.is_checkpoint:
        for note in untrained_notes(embedder.name, embedder.header, Path(embedder.path)):
            report(Note(note))


def check_weights(names: Sequence[str], settings: ImageSettings) -> None:
    """Raise a SettingsError if ``--weights`` is not for exactly one pretrained network."""
    pretrained = [name for name in names if is_pretrained(name)]
    if settings.weights and len(set(pretrained)) != 1:
        found = f"{len(pretrained)} are named" if pretrained else f"{names[0]} has its own weights"
        raise SettingsError(f"--weights {settings.weights}: needs one timm:NAME or torchvision:NAME, but {found}.")


def check_used(embedders: Sequence[Embedder], settings: ImageSettings) -> None:
    """Raise a SettingsError for image flags without a network, or ``--precision`` without a checkpoint."""
    networks = [embedder for embedder in embedders if embedder.header]
    unused = [] if networks else ["resize", "image_size", "fit"]
    if all(is_exported(Path(embedder.path)) for embedder in networks):
        unused.append("precision")
    who = f"{networks[0].name} is exported" if networks else f"{embedders[0].name} is a vectors file"
    given = [name for name in unused if name in settings.model_fields_set]
    if given:
        raise SettingsError(*(f"{flag_name(name)}: has no effect, because {who}. Omit the flag." for name in given))


def check_length(embedder: Embedder, l2normalize: bool | None) -> None:
    """Raise a SettingsError if ``--l2normalize`` differs from the checkpoint."""
    if embedder.is_checkpoint and l2normalize not in (None, embedder.unit):
        raise SettingsError(f"--l2normalize {l2normalize}: {embedder.name} has {embedder.unit}. Omit the flag.")
