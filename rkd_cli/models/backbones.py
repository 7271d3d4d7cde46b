"""Backbones by name, without their classifier: torchvision, Inception-BN, timm."""

from __future__ import annotations

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.fx
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.vision_transformer import interpolate_embeddings

from rkd_cli.errors import WeightsError, first_line
from rkd_cli.events import Note, Reporter, silent
from rkd_cli.models import inception_v1bn
from rkd_cli.models.exported import quiet
from rkd_cli.models.normalization import Normalization
from rkd_cli.models.weights import Adapt, load_weights

# Networks of this package: modules with build(), FEATURES, NORMALIZATION, URL (of ImageNet weights, or None),
# UNUSED (prefixes of published weights to ignore) and renamed(state), which renames published weights.
OWN: dict[str, Any] = {"inception_v1bn": inception_v1bn}
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # classifiers that GoogLeNet and Inception use in ImageNet training only


@dataclass(frozen=True)
class Backbone:
    """A network from normalized images to ``features`` features."""

    network: nn.Module
    features: int
    normalization: Normalization
    sides: tuple[int, int] = (256, 224)  # resize and crop of its evaluation on ImageNet


def build_backbone(name: str, weights: str, image_size: int | None = None, report: Reporter = silent) -> Backbone:
    """A backbone by name, with ``weights`` imagenet, none, or a file (see ``load_weights``).

    A transformer that takes only one size is built for ``image_size``, with interpolated position embeddings; None for
    its published size. ``report`` receives a note if only a part of a weights file is used.
    """
    if name.startswith("timm:"):
        return _timm_backbone(name.removeprefix("timm:"), weights, image_size, report)
    known = torchvision.models.list_models(module=torchvision.models)
    adapt: Adapt = dict
    if name in OWN:
        module = OWN[name]
        backbone = Backbone(module.build(), module.FEATURES, module.NORMALIZATION)
        url, unused, adapt = module.URL, module.UNUSED, module.renamed
    elif name in known:
        backbone, head = _torchvision_backbone(name, image_size)
        url, unused = _v1_url(name), (*head, *_AUXILIARY)
        if isinstance(backbone.network, torchvision.models.VisionTransformer):
            adapt = partial(interpolate_embeddings, backbone.network.image_size, backbone.network.patch_size)
    else:
        close = difflib.get_close_matches(name, [*known, *OWN], 3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Use a torchvision network, or timm:NAME."
        raise WeightsError(f"--base {name}: no such network. {hint}")
    if weights != "none":
        path = _fetched(name, url) if weights == "imagenet" else Path(weights)
        note = load_weights(
            backbone.network,
            name,
            path,
            lambda state: adapt({k: v for k, v in state.items() if not k.startswith(unused)}),
        )
        if note:
            report(Note(note))
    return backbone


def fold_batch_norms(network: nn.Module) -> None:
    """Fold batch norms into the preceding convolutions, in place and for evaluation mode only.

    A network that cannot be traced is not changed.
    """
    network.eval()
    _join_norms(network, fuse_conv_bn_eval)


def join_frozen_norms(network: nn.Module) -> None:
    """Compute batch norms with frozen statistics in the preceding convolutions, in place, for training.

    norm(conv(x, w)) = conv(x, s w) + t, with s and t of a channel: no activations are read or stored for the norm.
    Parameters and gradients are the same but for rounding; the names of the state dict are not.
    """
    _join_norms(network, _NormedConv)


def compute_out_of_place(network: nn.Module) -> None:
    """Let activations write to new memory, which changes no bit.

    In place, autograd first copies the input of those whose backward pass reads it, and the ONNX exporter takes twice
    as long.
    """
    for module in network.modules():
        if isinstance(module, nn.Hardtanh | nn.Hardswish | nn.Hardsigmoid | nn.SiLU | nn.Mish):  # ReLU6 is a Hardtanh
            module.inplace = False


class _NormedConv(nn.Module):
    """A convolution and its frozen batch norm in one convolution, with the parameters of both."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x: Tensor) -> Tensor:
        """Return norm(convolution(x))."""
        convolution, norm = self.convolution, self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias
        weights = {"weight": convolution.weight * scale.view(-1, 1, 1, 1), "bias": shift}
        found: Tensor = torch.func.functional_call(convolution, weights, x)
        return found


def _join_norms(network: nn.Module, join: Callable[[nn.Conv2d, nn.BatchNorm2d], nn.Module]) -> None:
    """Replace convolutions whose output only a batch norm reads by ``join`` of both; nothing if tracing fails."""
    try:
        nodes = _Tracer().trace(network).nodes
    except Exception:  # tracing runs the network's code on proxies, which may raise any type
        return
    modules, calls = dict(network.named_modules()), Counter(node.target for node in nodes)
    for node in nodes:
        before, norm = node.args[0] if node.args else None, modules.get(str(node.target))
        rest = _after_norm(norm)
        if rest is None or not isinstance(norm, nn.BatchNorm2d) or not isinstance(before, torch.fx.Node):
            continue
        convolution = modules.get(str(before.target))
        only = len(before.users) == 1 and calls[node.target] == calls[before.target] == 1
        if only and isinstance(convolution, nn.Conv2d) and _is_plain(convolution):
            network.set_submodule(str(before.target), join(convolution, norm))
            network.set_submodule(str(node.target), rest)


class _Tracer(torch.fx.Tracer):
    """Does not look into timm's batch norms and convolutions, which cannot be traced."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.BatchNorm2d | nn.Conv2d) or super().is_leaf_module(module, name)


def _after_norm(norm: nn.Module | None) -> nn.Module | None:
    """What a batch norm does after normalizing; None for another module, or a subclass that may do anything."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    return norm.get_submodule("act") if _is_of_timm(norm, "BatchNormAct2d") and norm else None


def _is_plain(convolution: nn.Conv2d) -> bool:
    """Whether a convolution uses its weights as they are; a subclass may standardize them."""
    return type(convolution) is nn.Conv2d or _is_of_timm(convolution, "Conv2dSame")


def _is_of_timm(module: nn.Module | None, name: str) -> bool:
    return type(module).__name__ == name and type(module).__module__.startswith("timm.")


def _torchvision_backbone(name: str, image_size: int | None) -> tuple[Backbone, tuple[str, ...]]:
    transform = next(iter(torchvision.models.get_model_weights(name))).transforms()
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # their ImageNet weights were trained with other statistics, to which they transform the input
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    if name.startswith("vit_"):
        options["image_size"] = _whole_patches(image_size or transform.crop_size[0], int(name.rpartition("_")[2]))
    network = torchvision.models.get_model(name, weights=None, **options)
    head, features = _cut_head(network)
    fixed = transform.crop_size[0] if isinstance(network, torchvision.models.MaxVit) else None
    normalization = Normalization(
        tuple(transform.mean), tuple(transform.std), input_size=options.get("image_size", fixed)
    )
    sides = transform.resize_size[0], transform.crop_size[0]
    return Backbone(network, features, normalization, sides), head


def _whole_patches(side: int, patch: int) -> int:
    """The largest multiple of ``patch`` up to ``side``."""
    return max(side - side % patch, patch)


def _cut_head(network: nn.Module) -> tuple[tuple[str, ...], int]:
    """Remove the classifier from its first linear layer on. Returns prefixes of removed weights, and the features."""
    name = next(n for n in ("fc", "classifier", "heads", "head") if hasattr(network, n))
    head = getattr(network, name)
    layers = list(head.children()) if isinstance(head, nn.Sequential) else [head]
    position, first = next((i, layer) for i, layer in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d))
    if isinstance(first, nn.Conv2d):  # SqueezeNet classifies with a convolution, then pools
        setattr(network, name, nn.AdaptiveAvgPool2d(1))
        return (f"{name}.",), first.in_channels
    remaining = layers[:position]
    if all(isinstance(layer, nn.Dropout) for layer in remaining):
        setattr(network, name, nn.Identity())
        return (f"{name}.",), first.in_features
    setattr(network, name, nn.Sequential(*remaining))  # at the same positions, so that names of weights do not change
    return tuple(f"{name}.{i}." for i in range(position, len(layers))), first.in_features


def _v1_url(name: str) -> str | None:
    weights = torchvision.models.get_model_weights(name).__members__.get("IMAGENET1K_V1")
    return str(weights.url) if weights else None


def _fetched(name: str, url: str | None) -> Path:
    if url is None:
        raise WeightsError(f"--base {name}: torchvision has no ImageNet weights (V1). Use --weights none or a file.")
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hash_prefix = path.stem.rsplit("-", 1)[1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"the ImageNet weights of {name} cannot be downloaded ({error}). Download {url} elsewhere and save it "
                f"as {path}, or start from random weights with --weights none."
            ) from None
    return path


def _timm_backbone(name: str, weights: str, image_size: int | None, report: Reporter) -> Backbone:
    try:
        import timm
    except ImportError:
        raise WeightsError(f"--base timm:{name}: timm is not installed. Run `pip install timm`.") from None
    if not timm.is_model(name.split(".")[0]):  # the name of the weights follows the dot
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = (
            f"Did you mean {' or '.join(f'timm:{one}' for one in close)}?"
            if close
            else "`timm.list_models()` lists all."
        )
        raise WeightsError(f"--base timm:{name}: no such network. {hint}")
    network, side, note = _timm_network(name, weights, image_size)
    if note:
        report(Note(note))
    return _timm_facts(network, side)


def timm_folder(folder: Path, has_head: bool) -> Backbone:
    """A network with its weights from a folder of timm's layout; ``has_head``: with its classifier."""
    try:
        import timm
    except ImportError:
        raise WeightsError("timm is not installed. Run `pip install timm`.") from None
    try:
        with quiet():
            options: dict[str, Any] = {} if has_head else {"num_classes": 0}
            network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    except Exception as error:  # timm raises different types for damaged folders
        raise WeightsError(f"timm cannot load it ({first_line(error)})") from None
    config = network.pretrained_cfg
    found = _timm_facts(network, config["input_size"][1] if config.get("fixed_input_size") else None)
    return replace(found, features=network.num_classes) if has_head and network.num_classes else found


def _timm_facts(network: Any, side: int | None) -> Backbone:
    normalization, sides = timm_preprocessing(network)
    # some networks have another layer between pooling and classifier
    features = getattr(network, "head_hidden_size", None) or network.num_features
    return Backbone(network, features, replace(normalization, input_size=side), sides)


def timm_preprocessing(network: nn.Module) -> tuple[Normalization, tuple[int, int]]:
    """The normalization of a network of timm, and (resize, crop) of its evaluation."""
    import timm

    expects: dict[str, Any] = timm.data.resolve_model_data_config(network)  # type: ignore[attr-defined,no-untyped-call]
    side = expects["input_size"][1]
    return Normalization(tuple(expects["mean"]), tuple(expects["std"])), (round(side / expects["crop_pct"]), side)


def _timm_network(name: str, weights: str, image_size: int | None) -> tuple[Any, int | None, str | None]:
    """A network with its weights, the only side it takes (if any), and a note about the weights.

    It is built for ``image_size`` if timm supports that, with interpolated position embeddings, else for its published
    size.
    """
    import timm

    published = timm.get_pretrained_cfg(name)
    fixed = published.input_size[1] if published and published.fixed_input_size else None
    if fixed and image_size and image_size != fixed:
        try:
            network, side = _timm_for_side(name, image_size)
            return network, side, _take_weights(network, name, weights)
        except WeightsError as error:  # the architecture or the weights only support the published size
            if weights == "imagenet" and not isinstance(error, _OtherSizeError):  # the download failed
                raise
    network = timm.create_model(name, num_classes=0)
    return network, fixed, _take_weights(network, name, weights)


class _OtherSizeError(WeightsError):
    """A network, or its weights, does not support this image size."""


def _timm_for_side(name: str, side: int) -> tuple[Any, int]:
    """The network for this side, or the next smaller multiple of its patch size."""
    import timm

    try:
        network = timm.create_model(name, num_classes=0, img_size=side)
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        whole = _whole_patches(side, patch[0]) if patch else side
        if whole != side:
            network = timm.create_model(name, num_classes=0, img_size=whole)
        images = torch.zeros(1, 3, whole, whole)
        with torch.inference_mode():
            if not images.is_meta:  # meta: a checkpoint is loaded, which was trained with this size
                network.eval()(images)
    except Exception as error:  # architectures raise different types
        raise _OtherSizeError(f"timm:{name}: does not take images of {side} pixels ({first_line(error)})") from error
    return network.train(), whole


def _take_weights(network: Any, name: str, weights: str) -> str | None:
    if weights == "imagenet":
        _fetch_timm(network, name)
    elif weights != "none":
        return _load_timm(network, name, Path(weights))
    return None


def _fetch_timm(network: Any, name: str) -> None:
    """Load timm's weights, downloaded once into the user's cache."""
    from timm.models import load_pretrained

    where = network.pretrained_cfg.get("hf_hub_id") or network.pretrained_cfg.get("url")
    if not where:
        raise WeightsError(f"timm:{name}: has no pretrained weights. Name other weights, or a file.")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs every retry
    try:
        with quiet():
            load_pretrained(network, num_classes=0, filter_fn=_checkpoint_filter(network))
    except Exception as error:  # hubs raise different types
        if "size mismatch" in str(error):
            raise _OtherSizeError(f"timm:{name}: {first_line(error)}") from None
        reason = first_line(error)
        reason = reason.partition(". ")[0]
        page = where if "://" in where else f"https://huggingface.co/{where} (its model.safetensors)"
        raise WeightsError(
            f"timm:{name}: its weights cannot be downloaded ({reason}). Download {page} elsewhere, and pass the file "
            "with --weights, or --teacher-weights for a teacher."
        ) from None


def _load_timm(network: Any, name: str, path: Path) -> str | None:
    """Load a weights file of timm or of the network's authors without its classifier; returns a note, if any."""
    renamed = _checkpoint_filter(network)
    classifiers = network.pretrained_cfg.get("classifier") or "head"
    heads = tuple(f"{head}." for head in ((classifiers,) if isinstance(classifiers, str) else classifiers))

    def adapt(state: dict[str, Tensor]) -> dict[str, Tensor]:
        if renamed is not None:
            # the filter raises for unexpected names, which load_weights reports better
            with suppress(Exception), quiet():
                state = renamed(dict(state), network)
        return {key: value for key, value in state.items() if not key.startswith(heads)}

    return load_weights(network, f"timm:{name}", path, adapt)


def _checkpoint_filter(network: nn.Module) -> Callable[..., dict[str, Tensor]] | None:
    """The function of timm's module that renames published weights, if it has one."""
    return getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
