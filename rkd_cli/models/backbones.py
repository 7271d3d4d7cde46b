"""Networks by name, without their classifier: torchvision's, Inception-BN, and timm's."""

from __future__ import annotations

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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

# Networks of our own, by name: modules with build(), FEATURES, NORMALIZATION, URL (of ImageNet weights, or None),
# UNUSED (how the names of weights begin that it does not take) and renamed(state), the published weights renamed.
OWN: dict[str, Any] = {"inception_v1bn": inception_v1bn}
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # classifiers that GoogLeNet and Inception use while ImageNet trains them


@dataclass(frozen=True)
class Backbone:
    """A network from normalized images to ``features`` numbers each."""

    network: nn.Module
    features: int
    normalization: Normalization
    sides: tuple[int, int] = (256, 224)  # what its evaluation on ImageNet resizes and crops to


def build_backbone(name: str, weights: str, image_size: int | None = None, report: Reporter = silent) -> Backbone:
    """A network without its classifier.

    Args:
        name: a torchvision classification network, ``inception_v1bn``, or ``timm:`` and a name of timm's.
        weights: ``imagenet``, ``none``, or a file with the state dict of the network, perhaps wrapped: see
            ``load_weights``.
        image_size: side of the images that it is going to see. A transformer that takes one size alone is built for
            it, its position embeddings interpolated, as its library does; None: for the size it was published with.
        report: told what of a file was taken, where that is not all.
    Raises:
        WeightsError: an unknown name, or weights that cannot be had or do not fit.
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
        hint = f"do you mean {' or '.join(close)}?" if close else "give a network of torchvision's, or timm:NAME"
        raise WeightsError(f"--base {name}: no such network: {hint}")
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
    """Merge every batch norm that directly follows a convolution into it, in place, for use in evaluation mode alone.

    A network that cannot be traced stays as it is.
    """
    network.eval()
    try:
        nodes = torch.fx.symbolic_trace(network).graph.nodes
    except Exception:  # tracing runs the network's own code on stand-ins, and any of it may object
        return
    modules, calls = dict(network.named_modules()), Counter(node.target for node in nodes)
    for node in nodes:
        before = node.args[0] if node.args else None
        # a subclass of BatchNorm2d may do more than normalize
        if type(modules.get(str(node.target))) is not nn.BatchNorm2d or not isinstance(before, torch.fx.Node):
            continue
        convolution, norm = modules.get(str(before.target)), modules[node.target]
        only = len(before.users) == 1 and calls[node.target] == calls[before.target] == 1
        if type(convolution) is nn.Conv2d and only:
            network.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            network.set_submodule(str(node.target), nn.Identity())


def _torchvision_backbone(name: str, image_size: int | None) -> tuple[Backbone, tuple[str, ...]]:
    transform = next(iter(torchvision.models.get_model_weights(name))).transforms()
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # the published ImageNet weights of both were trained on other statistics, to which they transform their input
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
    """The largest side up to ``side`` that patches cover without a rest."""
    return max(side - side % patch, patch)


def _cut_head(network: nn.Module) -> tuple[tuple[str, ...], int]:
    """Take off the classifier from its first linear layer on; pooling and normalization before it stay.

    Returns:
        How the names of the weights begin that are no more, and how many features are left.
    """
    name = next(n for n in ("fc", "classifier", "heads", "head") if hasattr(network, n))
    head = getattr(network, name)
    layers = list(head.children()) if isinstance(head, nn.Sequential) else [head]
    position, first = next((i, layer) for i, layer in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d))
    if isinstance(first, nn.Conv2d):  # SqueezeNet classifies by a convolution, then pools
        setattr(network, name, nn.AdaptiveAvgPool2d(1))
        return (f"{name}.",), first.in_channels
    kept = layers[:position]
    if all(isinstance(layer, nn.Dropout) for layer in kept):
        setattr(network, name, nn.Identity())
        return (f"{name}.",), first.in_features
    setattr(network, name, nn.Sequential(*kept))  # in their places, so that their weights keep their names
    return tuple(f"{name}.{i}." for i in range(position, len(layers))), first.in_features


def _v1_url(name: str) -> str | None:
    weights = torchvision.models.get_model_weights(name).__members__.get("IMAGENET1K_V1")
    return str(weights.url) if weights else None


def _fetched(name: str, url: str | None) -> Path:
    if url is None:
        raise WeightsError(f"--base {name}: it has no ImageNet weights (V1): use --weights none or a file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hash_prefix = path.stem.rsplit("-", 1)[1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"the ImageNet weights of {name} are not here and could not be fetched ({error}): "
                f"fetch {url} elsewhere and put it at {path}, or start from random weights with --weights none"
            ) from None
    return path


def _timm_backbone(name: str, weights: str, image_size: int | None, report: Reporter) -> Backbone:
    try:
        import timm
    except ImportError:
        raise WeightsError(f"--base timm:{name}: timm is not installed: pip install timm") from None
    if not timm.is_model(name.split(".")[0]):  # behind the dot stands which weights
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"do you mean {' or '.join(close)}?" if close else "`timm.list_models()` has them all"
        raise WeightsError(f"--base timm:{name}: no such network: {hint}")
    network, side, note = _timm_network(name, weights, image_size)
    if note:
        report(Note(note))
    expects: dict[str, Any] = timm.data.resolve_model_data_config(network)  # type: ignore[attr-defined,no-untyped-call]
    normalization = Normalization(tuple(expects["mean"]), tuple(expects["std"]), input_size=side)
    usual = expects["input_size"][1]
    # some networks widen their features once more between pooling and classifier
    features = getattr(network, "head_hidden_size", None) or network.num_features
    return Backbone(network, features, normalization, (round(usual / expects["crop_pct"]), usual))


def _timm_network(name: str, weights: str, image_size: int | None) -> tuple[Any, int | None, str | None]:
    """A network with its weights, the only side it takes, and what to say of the weights.

    For another side than the published one it is built where its kind can be: where timm takes ``img_size``, and
    interpolates what the weights know of positions.
    """
    import timm

    published = timm.get_pretrained_cfg(name)
    fixed = published.input_size[1] if published and published.fixed_input_size else None
    if fixed and image_size and image_size != fixed:
        try:
            network, side = _timm_for_side(name, image_size)
            return network, side, _take_weights(network, name, weights)
        except WeightsError as error:  # its kind, or its weights, are for the published size alone
            if weights == "imagenet" and not isinstance(error, _OtherSizeError):  # could not be fetched
                raise
    network = timm.create_model(name, num_classes=0)
    return network, fixed, _take_weights(network, name, weights)


class _OtherSizeError(WeightsError):
    """A network, or weights of it, that are not for images of another size."""


def _timm_for_side(name: str, side: int) -> tuple[Any, int]:
    """The network for images of this side, or of the next smaller one that its patches cover without a rest.

    Raises:
        _OtherSizeError: its kind has none.
    """
    import timm

    try:
        network = timm.create_model(name, num_classes=0, img_size=side)
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        whole = _whole_patches(side, patch[0]) if patch else side
        if whole != side:
            network = timm.create_model(name, num_classes=0, img_size=whole)
        images = torch.zeros(1, 3, whole, whole)
        with torch.inference_mode():
            if not images.is_meta:  # a checkpoint's, which has seen such images
                network.eval()(images)
    except Exception as error:  # each kind objects in its own way
        raise _OtherSizeError(f"timm:{name}: takes no images of {side} pixels ({first_line(error)})") from error
    return network.train(), whole


def _take_weights(network: Any, name: str, weights: str) -> str | None:
    if weights == "imagenet":
        _fetch_timm(network, name)
    elif weights != "none":
        return _load_timm(network, name, Path(weights))
    return None


def _fetch_timm(network: Any, name: str) -> None:
    """Weights as timm publishes them; it keeps them in the user's cache."""
    from timm.models import load_pretrained

    where = network.pretrained_cfg.get("hf_hub_id") or network.pretrained_cfg.get("url")
    if not where:
        raise WeightsError(f"timm:{name}: there are no pretrained weights of it: name others, or give a file")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells of each of its tries
    try:
        with quiet():
            load_pretrained(network, num_classes=0, filter_fn=_checkpoint_filter(network))
    except Exception as error:  # whatever the hub it fetches from raises
        if "size mismatch" in str(error):
            raise _OtherSizeError(f"timm:{name}: {first_line(error)}") from None
        reason = first_line(error)
        reason = reason.partition(". ")[0]
        page = where if "://" in where else f"https://huggingface.co/{where} (its model.safetensors)"
        raise WeightsError(
            f"timm:{name}: its weights are not here and could not be fetched ({reason}): fetch {page} elsewhere and "
            "give the file by --weights, for a teacher by --teacher-weights"
        ) from None


def _load_timm(network: Any, name: str, path: Path) -> str | None:
    """Weights from a file as timm or the network's authors publish it, its classifier left out; what to say of them."""
    renamed = _checkpoint_filter(network)
    classifiers = network.pretrained_cfg.get("classifier") or "head"
    heads = tuple(f"{head}." for head in ((classifiers,) if isinstance(classifiers, str) else classifiers))

    def adapt(state: dict[str, Tensor]) -> dict[str, Tensor]:
        if renamed is not None:
            # it takes what it expects for granted; the names will say what is wrong
            with suppress(Exception), quiet():
                state = renamed(dict(state), network)
        return {key: value for key, value in state.items() if not key.startswith(heads)}

    return load_weights(network, f"timm:{name}", path, adapt)


def _checkpoint_filter(network: nn.Module) -> Callable[..., dict[str, Tensor]] | None:
    """What renames published weights to those of timm's network: its module's, where it has one."""
    return getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
