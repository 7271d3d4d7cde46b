"""Feature maps of the last four stages of a backbone, from the same forward pass as its pooled features."""

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
_PROBE = 224  # pixels; large enough that every stage is larger than 1 x 1
_POOLED = "pooled"


def with_stages(network: nn.Module) -> nn.Module | None:
    """The network, with the same layers and names, for ``run_stages``; None if it does not have four stages.

    A stage ends with the last block before height and width shrink; the last four are used. For a ResNet these are
    layer1 to layer4. timm's networks define their stages. Transformers without a pyramid have none.
    """
    if hasattr(network, "forward_intermediates"):
        return network
    try:
        *stages, output = _stage_ends(network)
        if len(stages) < STAGES:
            return None
        names = {name: f"stage{number}" for number, name in enumerate(stages[-STAGES:], 1)}
        staged: nn.Module = create_feature_extractor(network, names | {output: _POOLED})
    except Exception:  # tracing runs the network's code on proxies, which may raise any type
        return None
    return staged


def _stage_ends(network: nn.Module) -> list[str]:
    """The names of the last nodes of the stages, then the name of the output node.

    A block ends at a node on which alone all later nodes depend, and whose successor is in another part of the network,
    such as "layer1.2" and "layer2.0".
    """
    # with torchvision's operations as leaves, names match those in create_feature_extractor
    operations = [part for part in vars(torchvision.ops).values() if isinstance(part, type)]
    tracer = NodePathTracer(leaf_modules=[part for part in operations if issubclass(part, nn.Module)])
    graph = tracer.trace(network)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    name_of: dict[fx.Node, str] = tracer.node_to_qualname
    with torch.inference_mode():
        image = torch.zeros(1, 3, _PROBE, _PROBE, device=next(network.parameters()).device)
        training, _ = network.training, network.eval()
        with redirect_stderr(StringIO()):  # ShapeProp prints a traceback before it raises
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
            ends.pop(shape[2], None)  # moves the side to the end
            ends[shape[2]] = name_of[node]
    return [*ends.values(), name_of[nodes[-1]]]


def run_stages(network: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Four maps (N, C, h, w) and the pooled features of normalized images, from a network of ``with_stages``."""
    if hasattr(network, "forward_intermediates"):
        timm: Any = network
        last, maps = timm.forward_intermediates(images, norm=False, output_fmt="NCHW")
        return maps[-STAGES:], timm.forward_head(last)
    found: dict[str, Tensor] = network(images)
    return [found[f"stage{number}"] for number in range(1, STAGES + 1)], found[_POOLED]


def pooled(found: Tensor | dict[str, Tensor]) -> Tensor:
    """The pooled features in a network's output, with or without its stages."""
    return found[_POOLED] if isinstance(found, dict) else found
