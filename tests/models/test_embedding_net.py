"""Networks: their shape, where their weights come from, and what a checkpoint brings back."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from rkd_cli.errors import WeightsError
from rkd_cli.models import backbones
from rkd_cli.models.backbones import build_backbone, compute_out_of_place, fold_batch_norms
from rkd_cli.models.embedding_net import (
    EmbeddingNet,
    build_model,
    expose_stages,
    freeze,
    freeze_statistics,
    with_frozen_norms,
)
from rkd_cli.models.normalization import Normalization

# what remains of each network, as its paper counts features after pooling
FEATURES = {
    "resnet18": 512, "resnet50": 2048, "mobilenet_v3_small": 576, "shufflenet_v2_x1_0": 1024, "efficientnet_b0": 1280,
    "convnext_tiny": 768, "vit_b_16": 768, "swin_t": 768, "densenet121": 1024, "squeezenet1_1": 512, "googlenet": 1024,
    "inception_v3": 2048, "maxvit_t": 512, "vgg11": 25088, "regnet_y_400mf": 440, "mnasnet0_5": 1280,
}  # fmt: skip


@pytest.mark.parametrize("base", FEATURES)
def test_the_classifier_is_taken_off_and_nothing_else(base: str) -> None:
    """The torchvision network's logits are its own classifier on our features."""
    backbone = build_backbone(base, "none")
    assert backbone.features == FEATURES[base]
    options = {"aux_logits": False, "transform_input": True, "init_weights": False}
    network = torchvision.models.get_model(base, **(options if base in ("googlenet", "inception_v3") else {})).eval()
    loaded = network.load_state_dict(backbone.network.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    side = backbone.normalization.input_size or (224 if base == "vgg11" else 96)
    images = torch.rand(2, 3, side, side)
    head = next(getattr(network, n) for n in ("fc", "classifier", "heads", "head") if hasattr(network, n))
    layers = list(head.children()) if isinstance(head, torch.nn.Sequential) else [head]
    kept = getattr(backbone.network, next(n for n in ("fc", "classifier", "heads", "head") if hasattr(network, n)))
    dropped = layers[len(kept) :] if isinstance(kept, torch.nn.Sequential) else layers
    with torch.no_grad():
        features = backbone.network.eval()(images)
        logits = network(images)
        if base == "squeezenet1_1":  # its classifier is a convolution before the pooling
            assert features.flatten(1).shape == (2, 512)
            return
        assert features.flatten(1).shape == (2, FEATURES[base])
        assert torch.allclose(torch.nn.Sequential(*dropped).eval()(features.flatten(1)), logits, atol=1e-5)


def test_every_torchvision_classification_network_can_be_cut() -> None:
    for base in torchvision.models.list_models(module=torchvision.models):
        if not base.startswith("regnet"):  # computes while it is built; one of them is tested above
            with torch.device("meta"):
                assert build_backbone(base, "none").features > 0, base


@pytest.mark.parametrize("base", ["vit_b_16", "maxvit_t"])
def test_a_network_of_one_input_size_resizes_to_it(base: str) -> None:
    with torch.device("meta"):
        model = build_model(base, 4, False)
    assert model.normalization.input_size == 224
    shrunk = torch.rand(1, 3, 64, 64)
    expected = F.interpolate(shrunk, (224, 224), mode="bilinear", antialias=True)
    mean, std = torch.tensor(model.normalization.mean), torch.tensor(model.normalization.std)
    assert torch.allclose(model.normalize(shrunk), (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def test_inception_v1bn_reads_blue_first_in_bytes() -> None:
    model = build_model("inception_v1bn", 4, False)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    red, green, blue = (images[:, c].float() / 255 * 255 for c in range(3))
    expected = torch.stack([blue - 104, green - 117, red - 128], dim=1)
    assert torch.equal(model.normalize(images), expected)


def test_a_network_of_ones_own_is_one_module_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = SimpleNamespace(
        build=lambda: torch.nn.AdaptiveAvgPool2d(1),
        FEATURES=3,
        NORMALIZATION=Normalization(),
        URL=None,
        UNUSED=(),
        renamed=dict,
    )
    monkeypatch.setitem(backbones.OWN, "mine", mine)
    with torch.no_grad():
        assert build_model("mine", 5, False)(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    with pytest.raises(WeightsError, match="--base mine: torchvision has no ImageNet weights"):
        build_model("mine", 5, False, "imagenet")


def test_timm_networks_bring_their_own_normalization() -> None:
    pytest.importorskip("timm")
    model = build_model("timm:vit_tiny_patch16_224", 4, False).eval()
    assert model.normalization == Normalization((0.5,) * 3, (0.5,) * 3, input_size=224)
    with torch.no_grad():
        assert model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)).shape == (2, 4)


def test_timm_networks_that_widen_late_and_names_with_a_tag() -> None:
    pytest.importorskip("timm")
    with torch.no_grad():
        assert build_model("timm:mobilenetv3_small_100", 4, False).eval()(torch.rand(2, 3, 64, 64)).shape == (2, 4)
    with torch.device("meta"):
        assert build_backbone("timm:vit_small_patch16_224.dino", "none").features == 384


@pytest.mark.parametrize(("base", "widths"), [("resnet18", [64, 128, 256, 512]), ("resnet50", [256, 512, 1024, 2048])])
def test_feature_maps_of_a_resnet_are_those_of_its_four_blocks(base: str, widths: list[int]) -> None:
    model, images = build_model(base, 4, True).eval(), torch.rand(2, 3, 64, 64)
    names, weights = list(model.state_dict()), {id(p) for p in model.parameters()}
    stem, blocks = ("conv1", "bn1", "relu", "maxpool"), ("layer1", "layer2", "layer3", "layer4")
    with torch.no_grad():
        x, by_hand = model.normalize(images), []
        for name in (*stem, *blocks):
            x = model.base.get_submodule(name)(x)
            by_hand.append(x)
        expected = model(images)
        assert expose_stages(model)
        embeddings, maps = model(images, with_features=True)
        assert torch.equal(model(images), expected)
    assert torch.equal(embeddings, expected)
    assert all(torch.equal(one, other) for one, other in zip(maps, by_hand[4:], strict=True))
    assert [m.shape[1] for m in maps] == widths
    assert sorted(model.state_dict()) == sorted(names)
    assert {id(p) for p in model.parameters()} == weights


@pytest.mark.parametrize(
    ("base", "shapes"),
    [
        ("mobilenet_v3_small", [(16, 56), (24, 28), (48, 14), (576, 7)]),
        ("inception_v1bn", [(192, 56), (320, 28), (608, 14), (1024, 7)]),
        ("timm:resnet10t", [(64, 56), (128, 28), (256, 14), (512, 7)]),
        ("timm:vit_tiny_patch16_224", [(192, 14)] * 4),
    ],
)
def test_feature_maps_of_other_networks(base: str, shapes: list[tuple[int, int]]) -> None:
    if base.startswith("timm:"):
        pytest.importorskip("timm")
    model, images = build_model(base, 4, True).eval(), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
        assert expose_stages(model)
        embeddings, maps = model(images, with_features=True)
        assert torch.equal(embeddings, expected)
        assert torch.equal(model(images), expected)
    assert [(m.shape[1], m.shape[2]) for m in maps] == shapes


def test_the_modes_of_layers_hold_where_stages_are_exposed() -> None:
    model, images = build_model("mobilenet_v3_small", 4, True), torch.rand(4, 3, 64, 64)
    assert expose_stages(model)
    model.train()
    model(images, with_features=True)
    moved = model.state_dict()["base.features.0.1.running_mean"]
    assert moved.abs().sum() > 0
    kept = moved.clone()
    model.eval()
    model(images, with_features=True)
    assert torch.equal(model.state_dict()["base.features.0.1.running_mean"], kept)


def test_networks_without_four_stages_say_so_and_stay_as_they_are() -> None:
    model = build_model("vit_b_32", 4, True).eval()
    before = model.base
    assert not expose_stages(model)
    assert model.base is before


def test_l2_normalized_embeddings_have_unit_length() -> None:
    free, unit = build_model("resnet18", 4, False).eval(), build_model("resnet18", 4, True).eval()
    unit.load_state_dict(free.state_dict())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(unit(images), F.normalize(free(images)), atol=1e-6)
        assert torch.allclose(unit(images).norm(dim=1), torch.ones(3))


def test_embeddings_keep_their_digits_under_autocast() -> None:
    model = build_model("resnet18", 4, True).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embeddings = model(torch.rand(2, 3, 32, 32))
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2), atol=1e-6)


def test_bytes_and_fractions_are_the_same_image() -> None:
    model = EmbeddingNet(torch.nn.Flatten(), 3 * 4, 2, False)
    images = torch.randint(0, 256, (2, 3, 2, 2), dtype=torch.uint8)
    before = images.clone()
    assert torch.equal(model(images), model(images.float() / 255))
    assert torch.equal(images, before)


def test_parameter_counts_are_the_known_ones() -> None:
    assert build_model("resnet18", 64, False).parameter_count() == 11_176_512 + 512 * 64 + 64
    assert build_model("resnet50", 512, True).parameter_count() == 23_508_032 + 2048 * 512 + 512


@pytest.fixture
def network() -> torch.nn.Module:
    made: torch.nn.Module = torchvision.models.resnet18()
    return made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights cache, and no way to fetch anything."""

    def refuse(url: str, *args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_imagenet_weights_are_v1_from_torchs_own_cache(hub: Path, network: torch.nn.Module) -> None:
    torch.save(network.state_dict(), hub / "resnet18-f37072fd.pth")
    model = build_model("resnet18", 8, False, "imagenet")
    for name, tensor in model.base.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


@pytest.mark.parametrize(
    ("base", "file"), [("resnet18", "resnet18-f37072fd.pth"), ("resnet50", "resnet50-0676ba61.pth")]
)
def test_weights_that_cannot_be_fetched_name_file_and_place(hub: Path, base: str, file: str) -> None:
    with pytest.raises(WeightsError) as caught:
        build_model(base, 8, False, "imagenet")
    (problem,) = caught.value.problems
    assert f"https://download.pytorch.org/models/{file}" in problem
    assert str(hub / file) in problem
    assert "no network in tests" in problem
    assert "--weights none" in problem


@pytest.mark.parametrize("base", ["maxvit_t", "convnext_tiny", "mobilenet_v3_small", "googlenet", "densenet121"])
def test_weights_of_the_whole_network_fit_what_is_left_of_it(tmp_path: Path, base: str) -> None:
    """The files that torchvision publishes hold the classifier, GoogLeNet's the auxiliary ones too."""
    options = {"init_weights": False} if base == "googlenet" else {}
    state = torchvision.models.get_model(base, **options).state_dict()
    torch.save(state, tmp_path / "w.pth")
    backbone = build_backbone(base, str(tmp_path / "w.pth"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.network.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_from_a_file(tmp_path: Path, network: torch.nn.Module, name: str) -> None:
    path = tmp_path / name
    save_file(network.state_dict(), path) if path.suffix == ".safetensors" else torch.save(network.state_dict(), path)
    model = build_model("resnet18", 8, False, str(path))
    assert torch.equal(model.base.state_dict()["layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_wrong_weights_are_one_line(tmp_path: Path, network: torch.nn.Module) -> None:
    text, other, evil, lists = (tmp_path / name for name in ("t.pth", "o.pth", "e.pth", "l.pth"))
    text.write_text("hello")
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), other)
    torch.save({"conv1.weight": Evil()}, evil)
    torch.save([1, 2], lists)
    says = {
        tmp_path / "absent.pth": "no such file",
        text: "cannot be read",
        other: "not the weights of a resnet18",
        evil: "cannot be read",
        lists: "not a state dict",
    }
    for path, words in says.items():
        with pytest.raises(WeightsError, match=words) as caught:
            build_model("resnet18", 8, False, str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("resnet19", "--base resnet19: no such network. Did you mean resnet1"),
        ("zzz", "--base zzz: no such network. Use a torchvision network"),
        ("timm:resnet19", "--base timm:resnet19: no such network"),
    ],
)
def test_unknown_networks_are_one_line(base: str, says: str) -> None:
    with pytest.raises(WeightsError, match=says) as caught:
        build_model(base, 8, False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "base",
    ["resnet18", "mobilenet_v3_small", "googlenet", "vit_b_32"]
    + [f"timm:{name}" for name in ("resnetv2_50", "resnet10t", "tf_efficientnet_lite0", "mobilenetv3_small_050")],
)
def test_a_frozen_network_embeds_as_before(base: str) -> None:
    model = build_model(base, 8, False)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias)
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        before = model.eval()(images)
        frozen = freeze(model)
        torch.testing.assert_close(frozen(images), before, rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    left = sum(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())
    assert left == 0 or base == "timm:resnetv2_50"


def test_folding_keeps_feature_maps() -> None:
    model = build_model("resnet18", 8, True).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        frozen = freeze(copy.deepcopy(model))
        assert expose_stages(model)
        embeddings, maps = model(images, with_features=True)
        assert expose_stages(frozen)
        folded, folded_maps = frozen(images, with_features=True)
    for before, after in zip([*maps, embeddings], [*folded_maps, folded], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


def test_a_batch_norm_that_others_read_too_is_not_folded() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
            assert self.norm.running_mean is not None
            self.norm.running_mean.normal_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            read_twice: torch.Tensor = self.norm(y) + y
            return read_twice

    network, x = Twice().eval(), torch.randn(2, 3, 4, 4)
    before = network(x)
    fold_batch_norms(network)
    assert torch.equal(network(x), before)


class _Bare(torch.nn.Module):
    """A convolution with a bias, and a batch norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 6, 3, groups=3), torch.nn.BatchNorm2d(6, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.norm(self.conv(x)).relu()
        return maps.mean((2, 3))


@pytest.mark.parametrize(
    ("base", "left"),
    [("mobilenet_v2", 0), ("timm:tf_efficientnet_b0", 0), ("resnet18", 0), ("densenet121", 62), ("bare", 0)],
)
def test_frozen_norms_within_convolutions_have_the_same_gradients(base: str, left: int) -> None:
    """``left``: the batch norms that do not follow a convolution of their own."""
    if base.startswith("timm:"):
        pytest.importorskip("timm")
    model = EmbeddingNet(_Bare(), 6, 4, True) if base == "bare" else build_model(base, 4, True)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            for parameter in module.parameters():
                torch.nn.init.uniform_(parameter, 0.2, 1)
    names = list(model.state_dict())
    joined = with_frozen_norms(model.double())
    found: list[list[torch.Tensor]] = []
    images = torch.rand(2, 3, 48, 48, dtype=torch.float64)
    for network in (model, joined):
        freeze_statistics(network.train())
        torch.manual_seed(1)  # of dropout
        embeddings = network(images)
        loss = (embeddings @ embeddings.T).exp().sum() + embeddings.sum()
        found.append([embeddings, *torch.autograd.grad(loss, list(model.parameters()))])
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-10)
    assert list(model.state_dict()) == names
    norms = [module for module in joined.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    of_convolutions = [module for module in joined.modules() if type(module).__name__ == "_NormedConv"]
    assert len(norms) - len(of_convolutions) == left


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts copies of tensors."""

    count = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += call is torch.ops.aten.clone.default
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("base", "copies"), [("mobilenet_v2", 35), ("mobilenet_v3_small", 18), ("efficientnet_b0", 49)]
)
def test_training_copies_no_activations_and_learns_the_same(base: str, copies: int) -> None:
    model = build_model(base, 4, True).train()
    images = torch.rand(4, 3, 32, 32)
    found: list[list[torch.Tensor]] = []
    for expected in (copies, 0):
        if not expected:
            compute_out_of_place(model)
        torch.manual_seed(1)  # of dropout
        with _Copies() as counted:  # type: ignore[no-untyped-call]
            embeddings = model(images)
        assert counted.count == expected
        found.append([embeddings, *torch.autograd.grad((embeddings @ embeddings.T).exp().sum(), [*model.parameters()])])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("images", "error", "got"),
    [
        ("photo.jpg", TypeError, "str"),
        (Image.new("RGB", (8, 8)), TypeError, "Image"),
        (np.zeros((1, 3, 8, 8), np.uint8), TypeError, "ndarray"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), TypeError, "a tensor of torch.int64"),
        (torch.zeros(3, 8, 8), ValueError, "(3, 8, 8)"),
        (torch.zeros(1, 8, 8, 3), ValueError, "(1, 8, 8, 3)"),
        (torch.linspace(0, 255, 192).view(1, 3, 8, 8), ValueError, "values from 0 to 255"),
        (torch.linspace(-2, 1, 192).view(1, 3, 8, 8), ValueError, "values from -2 to 1"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: Any, error: type[Exception], got: str) -> None:
    model = build_model("shufflenet_v2_x0_5", 4, False)
    for takes in (model, model.features, model.normalize):
        with pytest.raises(error) as caught:
            takes(images)
        assert str(caught.value).startswith("EmbeddingNet takes (N, 3, H, W)")
        assert str(caught.value).endswith(f", got {got}")


def test_empty_batches_and_floats_that_overshoot_a_little_or_are_nan_are_images() -> None:
    model = build_model("shufflenet_v2_x0_5", 4, False).eval()
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 4)
    assert model(torch.linspace(-0.2, 1.2, 3 * 32 * 32).view(1, 3, 32, 32)).isfinite().all()
    assert model(torch.full((1, 3, 32, 32), torch.nan)).isnan().all()
