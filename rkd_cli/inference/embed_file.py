"""What ``rkd embed`` writes: the embeddings of images, perhaps reduced, in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rkd_cli.compress import apply_pca, fit_pca
from rkd_cli.data import ImageSet, load_dataset
from rkd_cli.data.loader import find_damaged
from rkd_cli.data.sets.folder import find_images
from rkd_cli.data.vectors import is_vectors, read_vectors, relative_names, write_vectors
from rkd_cli.errors import DataError, RunError, SettingsError
from rkd_cli.events import Note, Reporter
from rkd_cli.inference.embedder import Embedder, check_weights, embed_sets, look_up, open_network, sides_of
from rkd_cli.runtime.context import make_context
from rkd_cli.settings import EmbedSettings


@dataclass(frozen=True)
class Written:
    """A file of embeddings and how it came about."""

    path: Path
    name: str  # of what embedded
    images: int
    size: int
    data: Path
    dataset: str | None
    with_map: bool  # whether it keeps a PCA map


def embed_file(name: str, settings: EmbedSettings, report: Reporter) -> Written:
    """Embed images and write the file, whole or not at all.

    Args:
        name: of a checkpoint, a run directory, a pretrained network, or a file of embeddings.
        settings: what is asked for.
        report: is told how far it is.
    Raises:
        RkdError: something cannot be had or written, or flags that contradict it or each other.
    """
    out = settings.out
    if out.exists() and (out.is_dir() or not settings.overwrite):
        raise SettingsError(f"--out {out}: is there already: name another file, or add --overwrite to replace a file")
    check_weights([name], settings)
    embedder = look_up(name, settings)
    sides_of(embedder, settings)
    if embedder.is_checkpoint and settings.l2normalize not in (None, embedder.l2normalize):
        raise SettingsError(
            f"--l2normalize {settings.l2normalize} contradicts {embedder.name}, which holds {embedder.l2normalize}: "
            "leave the flag out"
        )
    pca = _kept_map(settings.pca_file, embedder) if settings.pca_file else None
    context = make_context(settings.device, settings.precision)
    images = _images(settings, report)
    _check_components(settings, len(images), embedder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    except OSError as error:
        raise RunError(f"{out.parent}: cannot be made ({error.strerror}): choose another --out") from None
    sets = embed_sets(embedder, open_network(embedder), {"Embedding images": images}, settings, context, report)
    (embedded,) = sets.values()
    _check_components(settings, len(embedded.images), embedder)  # a file may have embeddings of fewer
    embeddings, names = embedded.embeddings, relative_names(embedded.images.paths, settings.data)
    if settings.pca_size:
        pca = fit_pca(embeddings, settings.pca_size)
    if pca:
        mean, components = map(context.to_device, pca)
        embeddings = apply_pca(embeddings, mean, components, embedder.l2normalize)
    write_vectors(out, embeddings.cpu().numpy(), names, (pca[0].cpu().numpy(), pca[1].cpu().numpy()) if pca else None)
    return Written(out, name, len(names), embeddings.shape[1], settings.data, settings.dataset, pca is not None)


def _check_components(settings: EmbedSettings, count: int, embedder: Embedder) -> None:
    most = min(count, embedder.size)
    if settings.pca_size and settings.pca_size > most:
        what = f"{embedder.name} has {most} dimensions" if most == embedder.size else f"there are {most} images"
        raise SettingsError(f"--pca {settings.pca}: {what}, which have no more components: name fewer")


def _kept_map(path: Path, embedder: Embedder) -> tuple[Tensor, Tensor]:
    """The map that a file keeps.

    Raises:
        DataError: it is no file of embeddings.
        SettingsError: it keeps none, or one of embeddings of another size.
    """
    if not path.is_file() or not is_vectors(path):
        missing = "no such file" if not path.is_file() else "no file of embeddings"
        raise SettingsError(f"--pca {path}: {missing}: name one that `rkd embed --pca D` wrote, or a number")
    pca = read_vectors(path).pca
    if pca is None:
        raise SettingsError(f"--pca {path}: keeps no PCA map: name a file that `rkd embed --pca D` wrote")
    mean, components = (torch.from_numpy(part) for part in pca)
    if len(mean) != embedder.size:
        raise SettingsError(
            f"--pca {path}: its map is of {len(mean)} dimensions, and {embedder.name} has {embedder.size}"
        )
    return mean, components


def _images(settings: EmbedSettings, report: Reporter) -> ImageSet:
    """Every image of the set, or below the folder.

    Raises:
        DataError: there is none.
        RunError: a worker was killed, or is stuck.
    """
    if settings.dataset:
        paths = [path for split in load_dataset(settings.dataset, settings.data, report) for path in split.paths]
    elif settings.data.is_dir():
        paths = find_images(settings.data)
    else:
        raise DataError(f"{settings.data}: no such folder: name that of the images with --data")
    if not paths:
        raise DataError(f"{settings.data}: holds no image: name a folder that does with --data")
    images = ImageSet(tuple(paths), None, ())
    if settings.skip_damaged and (damaged := find_damaged([images], settings.workers, report)):
        report(Note(f"{len(damaged)} damaged images are left out, the first of them {next(iter(damaged))}"))
        images = images.without(damaged)
    return images
