"""``rkd_cli.load``: embed images from Python."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn

from rkd_cli.data.decode import AS_DISPLAYED, Decoding, evaluated
from rkd_cli.data.given import ImageLike, image_of, is_one_image
from rkd_cli.data.loader import Batch
from rkd_cli.embedding.batches import check_finite, embed_batches
from rkd_cli.embedding.embedder import NetworkEmbedder, open_embedder
from rkd_cli.errors import CheckpointError, SettingsError
from rkd_cli.events import Event, Note
from rkd_cli.models.embedding_net import EmbeddingNet, in_teacher_space, to_device
from rkd_cli.models.given import Preprocessing, from_module
from rkd_cli.models.sources import digest_of
from rkd_cli.runtime.context import Context, make_context
from rkd_cli.schemas import Fit, Header
from rkd_cli.settings import InferenceSettings
from rkd_cli.settings.resolve import resolve

Embeddings = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True)
class LoadedModel:
    """A network that embeds images as ``rkd embed`` and ``rkd evaluate`` do."""

    embedder: NetworkEmbedder  # its network is on the device
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
    def digest(self) -> str:
        """What vectors files of this model name as ``model``: a digest of weights and preprocessing."""
        return self.embedder.made_by

    @property
    def size(self) -> int:
        """Number of dimensions of an embedding."""
        return self.embedder.size

    def embed(self, images: ImageLike | Iterable[ImageLike]) -> Embeddings:
        """Embed images, resized and center-cropped as for evaluation.

        The EXIF orientation and the color profile are applied, also to PIL images that have them.

        Args:
            images: one image or an iterable of N, of which one batch is in memory at a time: paths (members of archives
                too), encoded files as bytes or binary file objects, PIL images of any mode, uint8 arrays (H, W, 3) RGB
                or (H, W) gray, and uint8 tensors. A tensor of three dimensions is (3, H, W) or (1, H, W) if its first
                is 3 or 1, else (H, W, 3); one of two is gray.
        Returns:
            (N, D) float32 embeddings in the order of the images; (1, D) for one image.
        Raises:
            DataError: an image cannot be read, or has another type; names the first.
            RunError: embeddings are not finite, or memory is full.
        """
        numbered = enumerate(cast(Iterable[ImageLike], [images] if is_one_image(images) else images))
        found = [np.empty((0, self.size), np.float32)]
        network, what = self.embedder.network.eval(), f"{self.name}: embedding images"
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
        file, name = image_of(image, f"images[{number}]"), f"images[{number}]"
        if isinstance(file, Path):
            name = str(file)
        elif known := getattr(image, "filename", "") or getattr(image, "name", ""):
            name += f" ({known})"
        return evaluated(file, resize, image_size, name, self.decoding)


def load(
    name: str | os.PathLike[str] | nn.Module,
    *,
    weights: str | os.PathLike[str] | None = None,
    device: str | None = None,
    precision: str | None = None,
    batch: int | None = None,
    fit: Fit | None = None,
    max_pixels: int | None = None,
    teacher_space: bool = False,
    **preprocessing: Unpack[Preprocessing],
) -> LoadedModel:
    """Open a network to embed images: ``rkd_cli.load("student").embed(["a.jpg", "b.jpg"])``.

    Args:
        name: a run directory (its best checkpoint), a checkpoint, an exported .onnx (runs on the CPU),
            ``timm:NAME`` or ``torchvision:NAME`` (pretrained features, unit length), ``hf:ORG/NAME``, or a network of
            yours. It takes (N, 3, S, S) float images, normalized, and returns (N, D). It is not copied: it moves to
            the device, and embedding puts it into evaluation mode.
        weights: a weights file of a pretrained network, in its library's format; by default downloaded once.
        device: auto, cpu, cuda or cuda:N; by default auto, or where a network of yours is. A CUDA device becomes the
            current device of the process, and the use of TF32 is set for the whole process.
        precision: auto (default), fp32, tf32 or bf16, as ``--precision``.
        batch: images per forward pass, as ``--batch``; affects only speed and memory.
        fit: how an image becomes a square: square (squashed), crop (center) or pad (border); by default as the
            model was trained.
        max_pixels: largest image to decode, in pixels, as ``--max-pixels``.
        teacher_space: return (N, Dt) embeddings of a student in its teacher's space, to search the teacher's
            embeddings. Needs a student that was trained for it.
        preprocessing: ``image_size`` and ``resize``, as the flags; for a network of yours also ``mean`` and ``std`` (by
            default ImageNet's, or what timm says) and ``l2normalize`` (by default True).
    Raises:
        CheckpointError: there is no such file, it is damaged, or it has no teacher space.
        WeightsError: an unknown network, or weights that cannot be downloaded or do not fit.
        SettingsError: the machine lacks the device or precision, ONNX Runtime is not installed, or a network of yours
            does not take or return what it should.
    """
    if device is None and isinstance(name, nn.Module):
        device = next((str(parameter.device) for parameter in name.parameters()), None)
    flags = {
        "weights": None if weights is None else Path(weights),
        "device": device,
        "precision": precision,
        "batch": batch,
        "fit": fit,
        "max_pixels": max_pixels,
        **{side: preprocessing.get(side) for side in ("resize", "image_size")},
    }
    settings = resolve(InferenceSettings, {flag: value for flag, value in flags.items() if value is not None})
    if unknown := preprocessing.keys() - Preprocessing.__annotations__:
        raise SettingsError(*(f"load(): unknown argument {one}" for one in sorted(unknown)))
    embedder = _opened(name, settings, preprocessing)
    path = embedder.path
    if settings.weights and embedder.is_checkpoint:
        raise CheckpointError(f"{path}: contains its weights. Omit the weights argument.")
    context = make_context(settings.device, settings.precision)
    embedder = embedder.with_preprocessing(settings.resize, settings.image_size, settings.fit)
    network, header = embedder.network, embedder.header
    if teacher_space:
        if not isinstance(network, EmbeddingNet):
            raise CheckpointError(f"{path}: is exported. Load the checkpoint, or export it with --teacher-space.")
        try:
            network, header = in_teacher_space(network, header)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.problems[0]}") from None
        embedder = replace(embedder, changes=f"{embedder.changes} teacher space")
    opened = network.to(context.device) if isinstance(name, nn.Module) else to_device(network, context.device)
    embedder = replace(embedder, header=header, opened=opened)
    return LoadedModel(embedder, context, settings.batch, Decoding(header.fit, max_pixels=settings.max_pixels))


def _opened(name: object, settings: InferenceSettings, preprocessing: Preprocessing) -> NetworkEmbedder:
    if isinstance(name, nn.Module):
        network, header = from_module(name, **preprocessing)
        own = type(name).__name__
        return NetworkEmbedder(own, own, digest_of(network, header), header, network)
    if wrong := sorted(preprocessing.keys() - {"resize", "image_size"}):
        raise SettingsError(f"load(): {', '.join(wrong)}: {name} has its own. Omit the argument.")
    embedder = open_embedder(os.fspath(cast(str, name)), settings.weights, report=_warn)
    if not isinstance(embedder, NetworkEmbedder):
        raise CheckpointError(f"{embedder.path}: is a vectors file without a network. Name a checkpoint.")
    return embedder


def _warn(event: Event) -> None:
    """Turn a note into a Python warning."""
    if isinstance(event, Note):
        warnings.warn(event.text, stacklevel=2)
