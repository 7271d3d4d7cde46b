"""Frozen networks run by onnxruntime: where, and with the embeddings of torch."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError
from rkd_cli.events import Event, Note, silent
from rkd_cli.models import EmbeddingNet, build_model
from rkd_cli.models.convert import to_onnx
from rkd_cli.models.inference import _LEAST_TO_EXPORT, OnnxNet, for_inference
from rkd_cli.runtime.context import Context, make_context

MANY = _LEAST_TO_EXPORT
SIDE = 32


@pytest.fixture
def context() -> Context:
    return make_context("cpu", "fp32")


@pytest.fixture(scope="module")
def network() -> EmbeddingNet:
    torch.manual_seed(0)
    return build_model("shufflenet_v2_x0_5", 8, l2normalize=True).eval()  # has depthwise convolutions


@pytest.fixture
def images() -> Tensor:
    found = torch.randint(0, 256, (5, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return found.contiguous(memory_format=torch.channels_last)


def test_many_images_are_embedded_by_onnxruntime(network: EmbeddingNet, images: Tensor, context: Context) -> None:
    events: list[Event] = []
    found = for_inference(network, SIDE, MANY, context, events.append)
    assert isinstance(found, OnnxNet)
    assert [type(event) for event in events] == [Note]
    torch.testing.assert_close(found(images), network(images), atol=1e-5, rtol=0)
    assert found(images[:1]).shape == (1, 8)


def check_is_folded(found: nn.Module, network: EmbeddingNet, images: Tensor) -> None:
    """A copy with folded batch norms; the network keeps its own."""
    norms = [sum(isinstance(layer, nn.BatchNorm2d) for layer in one.modules()) for one in (found, network)]
    assert (type(found), norms[0]) == (EmbeddingNet, 0)
    assert norms[1] > 0
    torch.testing.assert_close(found(images), network(images), atol=1e-5, rtol=0)


def test_few_images_are_not_worth_an_export(network: EmbeddingNet, images: Tensor, context: Context) -> None:
    check_is_folded(for_inference(network, SIDE, MANY - 1, context, silent), network, images)
    assert for_inference(network, SIDE, 999, context, silent) is network


def test_without_depthwise_convolutions_onnxruntime_is_not_faster(images: Tensor, context: Context) -> None:
    network = build_model("resnet18", 8, l2normalize=True).eval()
    check_is_folded(for_inference(network, SIDE, MANY, context, silent), network, images)


def test_bf16_is_said_where_it_is_used(context: Context) -> None:
    events: list[Event] = []
    network = build_model("resnet18", 8, l2normalize=True).eval()
    for_inference(network, SIDE, 1, replace(context, bf16_inference=True), events.append)
    for_inference(network, SIDE, 1, context, events.append)
    said = [event.text for event in events if isinstance(event, Note)]
    assert said == ["the network computes in bf16, which is faster on this CPU; --precision fp32 turns that off"]


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_without_the_packages_torch_runs_it(
    package: str, network: EmbeddingNet, images: Tensor, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    check_is_folded(for_inference(network, SIDE, MANY, context, silent), network, images)


def test_a_network_that_cannot_be_exported_is_run_by_torch(
    network: EmbeddingNet, images: Tensor, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise CheckpointError("cannot be exported")

    monkeypatch.setattr("rkd_cli.models.inference.to_onnx", broken)
    check_is_folded(for_inference(network, SIDE, MANY, context, silent), network, images)


def test_other_embeddings_are_not_taken(
    network: EmbeddingNet, images: Tensor, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    graph = to_onnx(build_model("shufflenet_v2_x0_5", 8, l2normalize=True).eval(), SIDE)
    monkeypatch.setattr("rkd_cli.models.inference.to_onnx", lambda *_: graph)
    check_is_folded(for_inference(network, SIDE, MANY, context, silent), network, images)
