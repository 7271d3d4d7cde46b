"""Embedding networks: a backbone with pooling, an optional linear layer, and optional l2 normalization."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError, WeightsError
from rkd_cli.events import Reporter, silent
from rkd_cli.geometry import is_unit, unit_rows
from rkd_cli.models import checkpoint
from rkd_cli.models.backbones import build_backbone, fold_batch_norms, join_frozen_norms
from rkd_cli.models.features import pooled, run_stages, with_stages
from rkd_cli.models.normalization import Normalization
from rkd_cli.schemas import Fit, Header, Selection

_TAKES = "EmbeddingNet takes (N, 3, H, W) images, uint8 RGB or floating RGB in [0, 1], not normalized"
_Net = TypeVar("_Net", bound=nn.Module)
_OVERSHOOT = 0.5  # tolerance for bicubic resizing of floats; normalized images exceed it


@dataclass(frozen=True)
class TeacherSpace:
    """The teacher's embedding space of a student.

    Args:
        size: Dt, the teacher's embedding size.
        unit: whether teacher embeddings are compared at unit length.
        projections: {d: (Dt, d)} from the first d dimensions of the student, if learned.
    """

    size: int
    unit: bool
    projections: Mapping[int, Tensor]

    def project(self, embeddings: Tensor) -> Tensor:
        """Map the student's (N, d) embeddings to (N, Dt) queries, in their dtype; unchanged without a projection."""
        weight = self.projections.get(embeddings.shape[1])
        if weight is None:
            return self.scale(embeddings)
        found = embeddings.double() @ weight.detach().to(embeddings.device).double().T
        return (unit_rows(found) if self.unit else found).to(embeddings.dtype)

    def scale(self, embeddings: Tensor) -> Tensor:
        """(N, D) rows scaled to unit length if the space requires it and they are not."""
        return embeddings if not self.unit or is_unit(embeddings) else unit_rows(embeddings).to(embeddings.dtype)


class EmbeddingNet(nn.Module):
    """A network from images to embeddings. It normalizes images itself, so one batch serves teacher and student.

    ``teacher_space`` is set for a student trained in its teacher's embedding space. Its projections are not in the
    state dict; ``tensors_of`` returns both.

    Args:
        base: network from normalized images to (N, features) or (N, features, 1, 1).
        features: number of features of ``base``.
        embedding_size: D; None for no linear layer, so that embeddings are the features.
        l2normalize: whether embeddings are scaled to unit length.
        normalization: what ``base`` expects of its images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        base: nn.Module,
        features: int,
        embedding_size: int | None,
        l2normalize: bool,
        normalization: Normalization = Normalization(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__()
        self.base = base
        self.linear: nn.Module = nn.Linear(features, embedding_size) if embedding_size else nn.Identity()
        self.embedding_size = embedding_size or features
        self.l2normalize = l2normalize
        self.normalization = normalization
        self.teacher_space: TeacherSpace | None = None
        # not in the state dict: a checkpoint stores them in its header
        with torch.device("cpu"):
            self.register_buffer("mean", torch.tensor(normalization.mean).view(3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(normalization.std).view(3, 1, 1), persistent=False)

    @overload
    def __call__(self, images: Tensor, with_features: Literal[False] = False) -> Tensor: ...
    @overload
    def __call__(self, images: Tensor, with_features: Literal[True]) -> tuple[Tensor, list[Tensor]]: ...
    def __call__(self, *args: object, **kwargs: object) -> object:
        """``forward``, with the hooks and compiled code of ``nn.Module``."""
        return super().__call__(*args, **kwargs)

    def forward(self, images: Tensor, with_features: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Embed a batch.

        Args:
            images: (N, 3, H, W), uint8 RGB, or floating RGB in [0, 1].
            with_features: also return the feature maps of the backbone's four stages; needs ``expose_stages``.
        Returns:
            (N, D) embeddings, and if requested four maps (N, C, h, w) from fine to coarse.
        """
        if not with_features:
            return self.embed_features(self.features(images))
        features, last = run_stages(self.base, self.normalize(images))
        return self.embed_features(last), features

    def features(self, images: Tensor) -> Tensor:
        """Return the backbone's pooled features of a batch.

        Args:
            images: (N, 3, H, W), uint8 RGB, or floating RGB in [0, 1].
        Returns:
            (N, F).
        """
        return pooled(self.base(self.normalize(images))).flatten(1)  # (N, F, 1, 1) -> (N, F)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images for the backbone, equal to the bit to torchvision's ToTensor and Normalize.

        Args:
            images: (N, 3, H, W), uint8 RGB, or floating RGB in [0, 1].
        Returns:
            (N, 3, H, W) float32, resized if the network takes only one size.
        Raises:
            TypeError: not a tensor, or another dtype.
            ValueError: another shape, or values out of range (checked on the CPU only).
        """
        _check_images(images)
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        if self.normalization.bgr255:
            images = images[:, [2, 1, 0]] * 255
        side = self.normalization.input_size
        if side and images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return (images - self.mean).div_(self.std)

    def embed_features(self, features: Tensor) -> Tensor:
        """Compute (N, D) embeddings from (N, F) or (N, F, 1, 1) features of the backbone."""
        # distances need more digits than bf16 has, so the last layer runs without autocast
        with torch.autocast(features.device.type, enabled=False):
            features = features.flatten(1).to(self.mean.dtype)  # (N, F, 1, 1) -> (N, F)
            embeddings: Tensor = self.linear(features)
            return F.normalize(embeddings, dim=1) if self.l2normalize else embeddings

    def parameter_count(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        got = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{_TAKES}, got {got}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{_TAKES}, got {tuple(images.shape)}")
    # on the CPU only, where it is cheap; on a GPU it would synchronize
    if images.is_floating_point() and images.is_cpu and images.numel() and not torch.compiler.is_compiling():
        low, high = images.detach().aminmax()
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
            raise ValueError(f"{_TAKES}, got values from {float(low):.3g} to {float(high):.3g}")


class Head(nn.Module):
    """The layers after the backbone of ``model``, with the same parameters, as a network of its features."""

    def __init__(self, model: EmbeddingNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor) -> Tensor:
        """(N, F) features to (N, D) embeddings."""
        return self.model.embed_features(features)


def expose_stages(model: EmbeddingNet) -> bool:
    """Enable ``model(images, with_features=True)`` without changing the state dict.

    Returns False and changes nothing if the backbone does not have four stages of feature maps.
    """
    base = with_stages(model.base)
    if base is not None:
        model.base = base
    return base is not None


def freeze(model: EmbeddingNet) -> EmbeddingNet:
    """Prepare a network for inference only: evaluation mode, no gradients, batch norms folded into convolutions.

    Embeddings change by rounding only. Its state dict no longer fits the architecture, so do not save it.
    """
    fold_batch_norms(model.base)
    return model.requires_grad_(False).eval()


def freeze_statistics(model: nn.Module) -> int:
    """Put the batch norms of a network into evaluation mode and return their number; their parameters still train."""
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    for norm in norms:
        norm.eval()
    return len(norms)


def with_frozen_norms(model: EmbeddingNet) -> EmbeddingNet:
    """The network with the same parameters in a form that trains faster with frozen batch-norm statistics."""
    same: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    found = copy.deepcopy(model, same)
    join_frozen_norms(found.base)
    return found


class _UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


def in_teacher_space(model: EmbeddingNet, header: Header) -> tuple[EmbeddingNet, Header]:
    """A network with the student's parameters that returns (N, Dt) embeddings in its teacher's space, and its header.

    Raises a CheckpointError if the student was not trained for that.
    """
    space = model.teacher_space
    if space is None:
        raise CheckpointError(
            "was not trained in its teacher's space. Use --match-ratio, --csd-ratio, --queue-ratio or --d3-ratio."
        )
    unit, weight = space.unit, space.projections.get(model.embedding_size)
    parts = [model.linear]
    if weight is not None:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.detach().clone()
        parts += [_UnitLength(), linear] if model.l2normalize else [linear]
    elif model.l2normalize:
        unit = True
    found = EmbeddingNet(model.base, space.size, None, unit, model.normalization)
    found.linear = nn.Sequential(*parts)
    found.teacher_space = TeacherSpace(space.size, space.unit, {})
    facts = {"embedding_size": space.size, "l2normalize": unit, "projections": ()}
    return found.train(model.training), header.model_copy(update=facts)


def tensors_of(model: EmbeddingNet) -> dict[str, Tensor]:
    """{name: tensor} of a checkpoint: the state dict, and the projections into the teacher's space."""
    space = model.teacher_space
    return model.state_dict() | {
        _projection(size): weight for size, weight in (space.projections if space else {}).items()
    }


def _projection(size: int) -> str:
    return f"projection.{size}"


def to_device(model: _Net, device: torch.device) -> _Net:
    """Move a model to the device in channels-last format, which images have and which is fastest for convolutions."""
    model.to(device)
    model.to(memory_format=torch.channels_last)
    return model


def header_of(
    model: EmbeddingNet,
    base: str,
    resize: int,
    image_size: int,
    dataset: str,
    select_on: Selection | None = None,
    seen_classes: tuple[str, ...] = (),
    fit: Fit = "square",
) -> Header:
    """The header of a network before training; see ``Header`` for the fields."""
    return Header(
        base=base,
        embedding_size=model.embedding_size,
        l2normalize=model.l2normalize,
        resize=resize,
        image_size=image_size,
        fit=fit,
        **asdict(model.normalization),
        dataset=dataset,
        epoch=0,
        train_recall={},
        eval_recall={},
        select_on=select_on,
        seen_classes=seen_classes,
        **_space_facts(model.teacher_space),
    )


def _space_facts(space: TeacherSpace | None) -> dict[str, Any]:
    if space is None:
        return {}
    how = "unit" if space.unit else "given"
    return {"teacher_space": how, "teacher_size": space.size, "projections": tuple(sorted(space.projections))}


def build_model(
    base: str,
    embedding_size: int,
    l2normalize: bool,
    weights: str = "none",
    image_size: int | None = None,
    report: Reporter = silent,
) -> EmbeddingNet:
    """Build a new network with a random linear layer.

    Args:
        base: a torchvision classification network, ``inception_v1bn``, or ``timm:NAME``.
        embedding_size: D.
        l2normalize: whether embeddings are scaled to unit length.
        weights: ``imagenet`` (torchvision's IMAGENET1K_V1, downloaded once into torch's cache), ``none`` (random), or
            a file with the state dict of the network (.safetensors or .pth), whose classifier is ignored.
        image_size: side of the images, for transformers that take only one size; None for their published size.
        report: receives a note if only a part of a weights file is used.
    Raises:
        WeightsError: an unknown backbone, or weights that cannot be downloaded or do not fit.
    """
    backbone = build_backbone(base, weights, image_size, report)
    return EmbeddingNet(backbone.network, backbone.features, embedding_size, l2normalize, backbone.normalization)


def load_model(path: str | Path) -> EmbeddingNet:
    """Load a network from a checkpoint, in evaluation mode on the CPU. Needs no other file.

    Args:
        path: the checkpoint.
    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of rkd.
    """
    path = Path(path)
    header = checkpoint.read_header(path)
    try:
        model = _skeleton(header)
        size = header.teacher_size or 0
        shapes = {_projection(length): torch.empty(size, length, device="meta") for length in header.projections}
        state = checkpoint.read_tensors(path, model.state_dict() | shapes)
        projections = {length: state.pop(_projection(length)) for length in header.projections}
        if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in state):
            # some networks have constants that are not in the file and must be computed
            model = _described(header)
    except WeightsError as error:
        raise CheckpointError(*(f"{path}: {problem.removeprefix('--base ')}" for problem in error.problems)) from None
    model.load_state_dict(state, assign=True)
    if header.teacher_space:
        model.teacher_space = TeacherSpace(size, header.teacher_space == "unit", projections)
    return model.requires_grad_(True).eval()


def _skeleton(header: Header) -> EmbeddingNet:
    """The network on the meta device, to check the file's shapes before reading its tensors."""
    try:
        with torch.device("meta"):
            return _described(header)
    except NotImplementedError:  # some constructors compute with tensors (RegNet), which needs real memory
        return _described(header)


def _described(header: Header) -> EmbeddingNet:
    backbone = build_backbone(header.base, "none", header.input_size)
    trained_on = normalization_of(header)
    return EmbeddingNet(backbone.network, backbone.features, header.embedding_size, header.l2normalize, trained_on)


def normalization_of(header: Header) -> Normalization:
    """The normalization that a network expects."""
    return Normalization(header.mean, header.std, header.bgr255, header.input_size)
