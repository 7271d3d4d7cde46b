"""Run a frozen network faster."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError
from rkd_cli.events import Note, Reporter
from rkd_cli.models.convert import to_onnx
from rkd_cli.models.embedding_net import EmbeddingNet, freeze
from rkd_cli.models.exported import INPUT, OUTPUT, open_session
from rkd_cli.runtime.context import Context, has_depthwise

_LEAST_TO_EXPORT = 3000  # images: exporting a network takes some 5 s
_LEAST_TO_FOLD = 1000  # copying and tracing it takes a second
_LEAST_COSINE = 0.99999


class OnnxNet(nn.Module):
    """A network in a session of onnxruntime: (N, 3, S, S) uint8 RGB to (N, D) float32, on the CPU."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session

    def forward(self, images: Tensor) -> Tensor:
        """See ``EmbeddingNet``."""
        (found,) = self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(found)


@torch.inference_mode()
def for_inference(network: nn.Module, side: int, images: int, context: Context, report: Reporter) -> nn.Module:
    """The network in its fastest form that gives the same embeddings.

    For depthwise convolutions on a CPU that is onnxruntime, if there are enough images to make up for the export.

    Args:
        network: in evaluation mode, on the device.
        side: of the images in pixels.
        images: the number to embed.
    """
    if (precision := context.inference_precision(network)) != context.precision:
        what = f"the network computes in {precision}, which is faster on this CPU; --precision fp32 turns that off"
        report(Note(what))
    is_plain = context.device.type == "cpu" and context.precision == "fp32"
    if not isinstance(network, EmbeddingNet) or not has_depthwise(network) or not is_plain or images < _LEAST_TO_EXPORT:
        return folded(network, images)
    example = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # without the packages, or if exporter or onnxruntime fail; onnxruntime's errors have no common base class
    with suppress(ImportError, CheckpointError, RuntimeError, ValueError):
        __import__("onnxruntime"), __import__("onnxscript")
        report(Note(f"the network is exported to onnxruntime first, which is faster for {images:,} images"))
        found = OnnxNet(open_session(to_onnx(network, side)))
        if float(F.cosine_similarity(found(example), network(example)).min()) >= _LEAST_COSINE:
            return found
    return folded(network, images)


def folded(network: nn.Module, images: int = _LEAST_TO_FOLD) -> nn.Module:
    """A frozen copy of a network with folded batch norms, if that pays for the number of images; else the network."""
    if not isinstance(network, EmbeddingNet) or images < _LEAST_TO_FOLD:
        return network
    return freeze(copy.deepcopy(network))
