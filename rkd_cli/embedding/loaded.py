"""``rkd_cli.load``: embed images from Python."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rkd_cli.data.decode import AS_DISPLAYED, Decoding, center_crop, cut, load_resized, resized
from rkd_cli.data.loader import Batch
from rkd_cli.embedding.batches import check_finite, embed_batches
from rkd_cli.embedding.embedder import NetworkEmbedder, open_embedder
from rkd_cli.errors import CheckpointError, DataError
from rkd_cli.events import Event, Note
from rkd_cli.models.embedding_net import EmbeddingNet, in_teacher_space, to_device
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.schemas import Fit, Header
from rkd_cli.settings import InferenceSettings
from rkd_cli.settings.resolve import resolve

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
ImageLike = str | os.PathLike[str] | Image.Image | Pixels
Embeddings = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True)
class LoadedModel:
    """A network that embeds images as ``rkd embed`` and ``rkd evaluate`` do."""

    embedder: NetworkEmbedder  # its network is on the device, in evaluation mode
    context: Context
    batch: int
    decoding: Decoding = AS_DISPLAYED

    @property
    def name(self) -> str:
        """The name that was given to ``load``."""
        return self.embedder.name

    @property
    def header(self) -> Header:
        """``base``, ``resize``, ``image_size``, ``l2normalize``; for a checkpoint also ``dataset``, ``epoch`` and
        ``eval_recall``."""
        return self.embedder.header

    @property
    def size(self) -> int:
        """Number of dimensions of an embedding."""
        return self.embedder.size

    def embed(self, images: ImageLike | Iterable[ImageLike]) -> Embeddings:
        """Embed images, resized and center-cropped as for evaluation.

        The EXIF orientation and the color profile are applied, also to PIL images that have them.

        Args:
            images: one image or an iterable of N: paths, PIL images of any mode, and uint8 arrays, (H, W, 3) RGB or
                (H, W) gray. One batch is in memory at a time.
        Returns:
            (N, D) float32 embeddings in the order of the images; (1, D) for one image.
        Raises:
            DataError: an image cannot be read, or has another type; names the first.
            RunError: embeddings are not finite, or memory is full.
        """
        numbered = enumerate(cast(Iterable[ImageLike], [images] if _is_single(images) else images))
        found = [np.empty((0, self.size), np.float32)]
        network, what = self.embedder.network, f"{self.name}: embedding images"
        batches = embed_batches(
            network, self._batches(numbered), self.context, what, is_checked=False, remedy="give load() a smaller batch"
        )
        for _, embeddings in batches:
            check_finite(embeddings, self.name)
            found.append(embeddings.float().cpu().numpy())
        return np.concatenate(found)

    def _batches(self, numbered: Iterator[tuple[int, ImageLike]]) -> Iterator[Batch]:
        while group := list(itertools.islice(numbered, self.batch)):
            pixels = torch.stack([self._pixels(image, number) for number, image in group])
            none = torch.full((len(group),), -1)
            yield Batch(pixels.permute(0, 3, 1, 2), none, none, none)  # (B, H, W, 3) -> (B, 3, H, W), no copy

    def _pixels(self, image: ImageLike, number: int) -> Tensor:
        resize, image_size = self.header.resize, self.header.image_size
        square = torch.from_numpy(_resized(image, f"images[{number}]", resize, self.decoding))
        return cut(square, center_crop(number, resize, image_size), image_size)


def load(
    name: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    precision: str | None = None,
    batch: int | None = None,
    fit: Fit | None = None,
    max_pixels: int | None = None,
    teacher_space: bool = False,
) -> LoadedModel:
    """Open a network to embed images: ``rkd_cli.load("student").embed(["a.jpg", "b.jpg"])``.

    Args:
        name: a run directory (its best checkpoint), a checkpoint, an exported .onnx (runs on the CPU),
            ``timm:NAME`` or ``torchvision:NAME`` (pretrained features, unit length), or ``hf:ORG/NAME``.
        weights: a weights file of a pretrained network, in its library's format; by default downloaded once.
        device: auto (default), cpu, cuda or cuda:N. A CUDA device becomes the current device of the process, and
            the use of TF32 is set for the whole process.
        precision: auto (default), fp32, tf32 or bf16, as ``--precision``.
        batch: images per forward pass, as ``--batch``; affects only speed and memory.
        fit: how an image becomes a square: square (squashed), crop (center) or pad (border); by default as the
            model was trained.
        max_pixels: largest image to decode, in pixels, as ``--max-pixels``.
        teacher_space: return (N, Dt) embeddings of a student in its teacher's space, to search the teacher's
            embeddings. Needs a student that was trained for it.
    Raises:
        CheckpointError: there is no such file, it is damaged, or it has no teacher space.
        WeightsError: an unknown network, or weights that cannot be downloaded or do not fit.
        SettingsError: the machine lacks the device or precision, or ONNX Runtime is not installed.
    """
    flags = {
        "weights": None if weights is None else Path(weights),
        "device": device,
        "precision": precision,
        "batch": batch,
        "fit": fit,
        "max_pixels": max_pixels,
    }
    settings = resolve(InferenceSettings, {flag: value for flag, value in flags.items() if value is not None})
    embedder = open_embedder(os.fspath(name), settings.weights, report=_warn)
    path = embedder.path
    if not isinstance(embedder, NetworkEmbedder):
        raise CheckpointError(f"{path}: is a vectors file without a network. Name a checkpoint.")
    if settings.weights and embedder.is_checkpoint:
        raise CheckpointError(f"{path}: contains its weights. Omit the weights argument.")
    context = make_context(settings.device, settings.precision)
    embedder = embedder.with_preprocessing(None, None, settings.fit)
    network, header = embedder.network, embedder.header
    if teacher_space:
        if not isinstance(network, EmbeddingNet):
            raise CheckpointError(f"{path}: is exported. Load the checkpoint, or export it with --teacher-space.")
        try:
            network, header = in_teacher_space(network, header)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.problems[0]}") from None
    embedder = replace(embedder, header=header, opened=to_device(network, context.device))
    return LoadedModel(embedder, context, settings.batch, Decoding(header.fit, max_pixels=settings.max_pixels))


def _warn(event: Event) -> None:
    """Turn a note into a Python warning."""
    if isinstance(event, Note):
        warnings.warn(event.text, stacklevel=2)


def _is_single(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim <= 3  # with four dimensions, an array of images
    return isinstance(images, str | os.PathLike | Image.Image)


def _resized(image: ImageLike, what: str, resize: int, decoding: Decoding) -> np.ndarray:
    """(resize, resize, 3) uint8; a DataError if it cannot be read, or is no image."""
    match image:
        case str() | os.PathLike():
            path = Path(image)
            if not path.is_file():
                raise DataError(f"{path}: {'is a folder, not an image' if path.is_dir() else 'no such image'}")
            return load_resized(path, resize, decoding)
        case Image.Image():
            name = getattr(image, "filename", "")
            return resized(image, resize, f"{what} ({name})" if name else what, decoding)
        case np.ndarray():
            if image.dtype == np.uint8 and image.size and image.shape[2:] in ((), (3,)) and image.ndim > 1:
                return resized(Image.fromarray(image), resize, what, decoding)
            given = f"{image.dtype} of shape {image.shape}"
            raise DataError(f"{what}: is {given}. Arrays must be uint8, (H, W, 3) RGB or (H, W) gray.")
    kind = type(image).__name__
    raise DataError(f"{what}: is of type {kind}. Pass a path, a PIL image or a uint8 array.")
