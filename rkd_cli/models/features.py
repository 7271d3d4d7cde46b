"""Feature maps of four stages of a backbone, from the pass that makes its pooled features."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor

STAGES = 4
_PROBE = 224  # pixels; large enough that no stage has shrunk to a single one
_POOLED = "pooled"


def with_stages(network: nn.Module) -> nn.Module | None:
    """The network, its layers and their names unchanged, such that ``run_stages`` can run it.

    A stage ends with the last block before height and width shrink; the last four stages count. For a ResNet these are
    its four blocks of layers. timm's networks know their stages themselves.

    Args:
        network: from (N, 3, H, W) normalized images to features.
    Returns:
        None where the network has no four stages of maps, as transformers without a pyramid.
    """
    if hasattr(network, "forward_intermediates"):
        return network
    try:
        *stages, output = _stage_ends(network)
        if len(stages) < STAGES:
            return None
        names = {name: f"stage{number}" for number, name in enumerate(stages[-STAGES:], 1)}
        staged: nn.Module = create_feature_extractor(network, names | {output: _POOLED})
    except Exception:  # tracing runs the network's own code on stand-ins, and any of it may object
        return None
    return staged


def _stage_ends(network: nn.Module) -> list[str]:
    """The names of the nodes that end the stages, then that of the network's output.

    A block ends at a node from which alone everything after it is computed, and whose successor lies in another part
    of the network: "layer1.2" and "layer2.0" are parts, what stands deeper is inside one.
    """
    # torchvision's extractor takes its own operations as leaves, so that they are named here as they are there
    operations = [part for part in vars(torchvision.ops).values() if isinstance(part, type)]
    tracer = NodePathTracer(leaf_modules=[part for part in operations if issubclass(part, nn.Module)])
    graph = tracer.trace(network)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    name_of: dict[fx.Node, str] = tracer.node_to_qualname
    with torch.inference_mode():
        image = torch.zeros(1, 3, _PROBE, _PROBE, device=next(network.parameters()).device)
        training, _ = network.training, network.eval()
        with redirect_stderr(StringIO()):  # it prints a traceback, and raises too
            ShapeProp(fx.GraphModule(network, graph)).propagate(image)
        network.train(training)
    order = {node: position for position, node in enumerate(nodes)}
    ends: dict[int, str] = {}  # by side
    needed_until = 0  # position of the last node that uses something before this one
    for position, node in enumerate(nodes[:-1]):
        shape: Any = getattr(node.meta.get("tensor_meta"), "shape", ())
        alone = needed_until <= position
        needed_until = max([needed_until, *(order[user] for user in node.users if user in order)])
        parts = {".".join(name_of[n].split(".")[:2]) for n in (node, nodes[position + 1])}
        if alone and len(parts) == 2 and len(shape) == 4 and 1 < shape[2] == shape[3] < _PROBE:
            ends.pop(shape[2], None)  # to the end of the order
            ends[shape[2]] = name_of[node]
    return [*ends.values(), name_of[nodes[-1]]]


def run_stages(network: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """What a network of ``with_stages`` makes of images.

    Args:
        network: as ``with_stages`` gave it.
        images: (N, 3, H, W), normalized.
    Returns:
        Four maps (N, C, h, w), and the pooled features.
    """
    if hasattr(network, "forward_intermediates"):
        timm: Any = network
        last, maps = timm.forward_intermediates(images, norm=False, output_fmt="NCHW")
        return maps[-STAGES:], timm.forward_head(last)
    found: dict[str, Tensor] = network(images)
    return [found[f"stage{number}"] for number in range(1, STAGES + 1)], found[_POOLED]


def pooled(found: Tensor | dict[str, Tensor]) -> Tensor:
    """The pooled features of a network's output, whether or not it gives its stages too."""
    return found[_POOLED] if isinstance(found, dict) else found
