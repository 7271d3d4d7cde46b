"""Inception-BN: names, shapes and arithmetic of the published network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rkd_cli.models.inception_v1bn import BLOCKS, InceptionV1BN

# every convolution of the published network, its channels in and out, block by block in the order of its weights file
STEM = "conv1_7x7_s2 3>64  conv2_3x3_reduce 64>64  conv2_3x3 64>192"
PARTS = ("1x1", "3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1", "double_3x3_2", "pool_proj")
PUBLISHED = {
    "3a": "192>64  192>64   64>64    192>64    64>96    96>96    192>32",
    "3b": "256>64  256>64   64>96    256>64    64>96    96>96    256>64",
    "3c": "-       320>128  128>160  320>64    64>96    96>96    -",
    "4a": "576>224 576>64   64>96    576>96    96>128   128>128  576>128",
    "4b": "576>192 576>96   96>128   576>96    96>128   128>128  576>128",
    "4c": "576>160 576>128  128>160  576>128   128>160  160>160  576>128",
    "4d": "608>96  608>128  128>192  608>160   160>192  192>192  608>128",
    "4e": "-       608>128  128>192  608>192   192>256  256>256  -",
    "5a": "1056>352 1056>192 192>320 1056>160  160>224  224>224  1056>128",
    "5b": "1024>352 1024>192 192>320 1024>192  192>224  224>224  1024>128",
}
# published in all: 11,295,240, of which the classifier of 1000 classes has 1024 x 1000 + 1000
PARAMETERS = 11_295_240 - 1_025_000


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Name to shape, in the file's order; the file is older than ``num_batches_tracked``."""
    words = STEM.split()
    convolutions = list(zip(words[::2], words[1::2], strict=True))
    for block, row in PUBLISHED.items():
        convolutions += [(f"inception_{block}_{part}", io) for part, io in zip(PARTS, row.split(), strict=True)]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, io in convolutions:
        if io == "-":
            continue
        given, made = (int(number) for number in io.split(">"))
        kernel = 7 if "7x7" in name else 3 if name.endswith(("3x3", "3x3_1", "3x3_2")) else 1
        shapes[f"{name}.weight"] = (made, given, kernel, kernel)
        shapes[f"{name}.bias"] = (made,)
        shapes |= {f"{name}_bn.{part}": (made,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


@pytest.fixture(scope="module")
def network() -> InceptionV1BN:
    """In evaluation mode and double precision, no normalization left at identity."""
    torch.manual_seed(0)
    network = InceptionV1BN().double().eval()
    for name, tensor in network.state_dict().items():
        if "_bn." in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "running_var")) else tensor.normal_(0, 0.3)
    return network


def test_state_dict_is_named_and_shaped_as_the_published_file() -> None:
    with torch.device("meta"):
        network = InceptionV1BN()
    state = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    tracked = {name: shape for name, shape in state.items() if name.endswith(".num_batches_tracked")}
    assert len(tracked) == 69
    assert [item for item in state.items() if item[0] not in tracked] == list(published_shapes().items())
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS == 10_270_240


def test_loads_a_file_without_batch_counts() -> None:
    state = {name: torch.full(shape, 0.5) for name, shape in published_shapes().items()}
    network = InceptionV1BN()
    network.load_state_dict(state)
    assert torch.equal(network.state_dict()["inception_5b_pool_proj_bn.running_var"], torch.full((128,), 0.5))


def test_normalization_is_the_published_one() -> None:
    with torch.device("meta"):
        normalizations = [m for m in InceptionV1BN().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(n.eps, n.momentum) for n in normalizations} == {(1e-5, 0.9)}


@pytest.mark.parametrize(("side", "maps"), [(224, 7), (64, 2), (32, 1)])
def test_features_of_an_image(side: int, maps: int) -> None:
    with torch.device("meta"):
        network = InceptionV1BN()
        images = torch.empty(2, 3, side, side)
        assert network.features(images).shape == (2, 1024, maps, maps)
        assert network(images).shape == (2, 1024)


@pytest.mark.parametrize("shape", [(224, 224), (64, 64), (100, 48), (81, 112), (16, 16)])
def test_runs_at_any_size(shape: tuple[int, int]) -> None:
    """Also where maps get odd, which the published code cannot."""
    features = InceptionV1BN().eval()(torch.randn(1, 3, *shape))
    assert features.shape == (1, 1024)
    assert features.isfinite().all()


def windows(maps: Tensor, stride: int, before: int, fill: float) -> Tensor:
    """Every 3x3 window, (N, C, h, w, 9), of maps with ``before`` rows and columns of ``fill`` first, and one last."""
    padded = F.pad(maps, (before, 1, before, 1), value=fill)
    return padded.unfold(2, 3, stride).unfold(3, 3, stride).flatten(4)


def unit(state: dict[str, Tensor], name: str, maps: Tensor, stride: int = 1) -> Tensor:
    """Convolution, normalization, rectification, each from its definition."""
    weight = state[f"{name}.weight"]
    made, given, kernel, _ = weight.shape
    columns = F.unfold(maps, kernel, padding=(kernel - 1) // 2, stride=stride)  # (N, C k k, L)
    out = weight.reshape(made, given * kernel * kernel) @ columns + state[f"{name}.bias"][:, None]
    mean, var, scale, shift = (
        state[f"{name}_bn.{p}"][:, None] for p in ("running_mean", "running_var", "weight", "bias")
    )
    out = ((out - mean) / (var + 1e-5).sqrt() * scale + shift).clamp_min(0)
    side = (maps.shape[-1] - 1) // stride + 1
    return out.reshape(len(maps), made, -1, side)


def slow_block(state: dict[str, Tensor], block: str, maps: Tensor) -> Tensor:
    p = f"inception_{block}"
    if block in ("3c", "4e"):
        three = unit(state, f"{p}_3x3", unit(state, f"{p}_3x3_reduce", maps), stride=2)
        double = unit(state, f"{p}_double_3x3_1", unit(state, f"{p}_double_3x3_reduce", maps))
        double = unit(state, f"{p}_double_3x3_2", double, stride=2)
        return torch.cat([three, double, windows(maps, 2, 0, -torch.inf).amax(-1)], 1)
    pooled = windows(maps, 1, 1, -torch.inf).amax(-1) if block == "5b" else windows(maps, 1, 1, 0.0).sum(-1) / 9
    one = unit(state, f"{p}_1x1", maps)
    three = unit(state, f"{p}_3x3", unit(state, f"{p}_3x3_reduce", maps))
    double = unit(state, f"{p}_double_3x3_1", unit(state, f"{p}_double_3x3_reduce", maps))
    double = unit(state, f"{p}_double_3x3_2", double)
    return torch.cat([one, three, double, unit(state, f"{p}_pool_proj", pooled)], 1)


@pytest.mark.parametrize(("block", "given"), [("3a", 192), ("5b", 1024), ("3c", 320), ("4e", 608)])
@torch.no_grad()
def test_a_block_is_its_definition(network: InceptionV1BN, block: str, given: int) -> None:
    """Average pooling, maximum pooling at stride 1, stride 2; on maps below zero too, where padding shows."""
    maps = torch.randn(2, given, 6, 6, dtype=torch.float64) - 1
    expected = slow_block(network.state_dict(), block, maps)
    assert torch.allclose(network.inception(block, maps), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_whole_network_is_its_definition(network: InceptionV1BN) -> None:
    state = network.state_dict()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    maps = windows(unit(state, "conv1_7x7_s2", images, stride=2), 2, 0, -torch.inf).amax(-1)
    maps = unit(state, "conv2_3x3", unit(state, "conv2_3x3_reduce", maps))
    maps = windows(maps, 2, 0, -torch.inf).amax(-1)
    for block in PUBLISHED:
        maps = slow_block(state, block, maps)
    assert list(BLOCKS) == list(PUBLISHED)
    assert torch.allclose(network(images), maps.mean((2, 3)), rtol=1e-9, atol=1e-9)
    assert network(images).std() > 1e-3, "features that say something"


@torch.no_grad()
def test_odd_maps_are_pooled_where_the_convolutions_look(network: InceptionV1BN) -> None:
    maps = torch.randn(1, 320, 7, 5, dtype=torch.float64)
    pooled = network.inception("3c", maps)[:, -320:]
    assert torch.equal(pooled, F.max_pool2d(maps, 3, 2, padding=1))
    assert pooled.shape[-2:] == (4, 3)


def test_gradient_reaches_the_first_convolution() -> None:
    torch.manual_seed(0)
    network = InceptionV1BN().train()
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    gradients = {name: p.grad.abs().max() for name, p in network.named_parameters() if p.grad is not None}
    assert len(gradients) == 69 * 4
    assert gradients["conv1_7x7_s2.weight"] > 0
    assert not any(hasattr(network, name) for name in ("fc", "last_linear", "classifier"))
