"""Networks by name, without their classifier: torchvision's, Inception-BN, and timm's."""

from __future__ import annotations

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rkd_cli.errors import WeightsError, first_line
from rkd_cli.models import inception_v1bn
from rkd_cli.models.normalization import Normalization

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


def build_backbone(name: str, weights: str) -> Backbone:
    """A network without its classifier.

    Args:
        name: a torchvision classification network, ``inception_v1bn``, or ``timm:`` and a name of timm's.
        weights: ``imagenet``, ``none``, or a file with the state dict of the whole network.
    Raises:
        WeightsError: an unknown name, or weights that cannot be had or do not fit.
    """
    if name.startswith("timm:"):
        return _timm_backbone(name.removeprefix("timm:"), weights)
    known = torchvision.models.list_models(module=torchvision.models)
    if name in OWN:
        module = OWN[name]
        backbone = Backbone(module.build(), module.FEATURES, module.NORMALIZATION)
        url, unused, renamed = module.URL, module.UNUSED, module.renamed
    elif name in known:
        backbone, head = _torchvision_backbone(name)
        url, unused, renamed = _v1_url(name), (*head, *_AUXILIARY), dict
    else:
        close = difflib.get_close_matches(name, [*known, *OWN], 3)
        hint = f"do you mean {' or '.join(close)}?" if close else "give a network of torchvision's, or timm:NAME"
        raise WeightsError(f"--base {name}: no such network: {hint}")
    if weights != "none":
        path = _fetched(name, url) if weights == "imagenet" else Path(weights)
        state = {k: v for k, v in read_weights(path).items() if not k.startswith(unused)}
        _load(backbone.network, renamed(state), name, path)
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


def _torchvision_backbone(name: str) -> tuple[Backbone, tuple[str, ...]]:
    options: dict[str, bool] = {}
    if name in ("googlenet", "inception_v3"):
        # the published ImageNet weights of both were trained on other statistics, to which they transform their input
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    network = torchvision.models.get_model(name, weights=None, **options)
    head, features = _cut_head(network)
    recipe = torchvision.models.get_model_weights(name)
    transform = next(iter(recipe)).transforms()
    fixed = isinstance(network, torchvision.models.VisionTransformer | torchvision.models.MaxVit)
    normalization = Normalization(
        tuple(transform.mean), tuple(transform.std), input_size=transform.crop_size[0] if fixed else None
    )
    sides = transform.resize_size[0], transform.crop_size[0]
    return Backbone(network, features, normalization, sides), head


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or pickled file; of a pickle only tensors are read, its code never runs.

    Raises:
        WeightsError: the file is absent, damaged, or holds anything else.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; weights are imagenet, none, or a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs a stranger's pickle
    # a damaged pickle can raise nearly anything from inside torch
    except Exception as error:
        reason = first_line(error)
        raise WeightsError(f"{path}: weights that cannot be read ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(f"{path}: not a state dict of tensors: save it with torch.save(network.state_dict(), ...)")
    return state


def _load(network: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise WeightsError(f"{path}: not the weights of a {name}: {lines[0][:200]}{more}") from None


def _timm_backbone(name: str, weights: str) -> Backbone:
    try:
        import timm
    except ImportError:
        raise WeightsError(f"--base timm:{name}: timm is not installed: pip install timm") from None
    if not timm.is_model(name.split(".")[0]):  # behind the dot stands which weights
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"do you mean {' or '.join(close)}?" if close else "`timm.list_models()` has them all"
        raise WeightsError(f"--base timm:{name}: no such network: {hint}")
    network: Any = timm.create_model(name, num_classes=0)
    if weights == "imagenet":
        _fetch_timm(network, name)
    elif weights != "none":
        _load_timm(network, name, Path(weights))
    expects: dict[str, Any] = timm.data.resolve_model_data_config(network)  # type: ignore[attr-defined,no-untyped-call]
    normalization = Normalization(
        tuple(expects["mean"]),
        tuple(expects["std"]),
        input_size=expects["input_size"][1] if network.pretrained_cfg.get("fixed_input_size") else None,
    )
    side = expects["input_size"][1]
    # some networks widen their features once more between pooling and classifier
    features = getattr(network, "head_hidden_size", None) or network.num_features
    return Backbone(network, features, normalization, (round(side / expects["crop_pct"]), side))


def _fetch_timm(network: Any, name: str) -> None:
    """Weights as timm publishes them; it keeps them in the user's cache."""
    from timm.models import load_pretrained

    where = network.pretrained_cfg.get("hf_hub_id") or network.pretrained_cfg.get("url")
    if not where:
        raise WeightsError(f"timm:{name}: there are no pretrained weights of it: name others, or give a file")
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells of each of its tries
    try:
        load_pretrained(network, num_classes=0, filter_fn=_checkpoint_filter(network))
    except Exception as error:  # whatever the hub it fetches from raises
        reason = first_line(error)
        reason = reason.partition(". ")[0]
        page = where if "://" in where else f"https://huggingface.co/{where} (its model.safetensors)"
        raise WeightsError(
            f"timm:{name}: its weights are not here and could not be fetched ({reason}): fetch {page} elsewhere and "
            "give the file by --weights, for a teacher by --teacher-weights"
        ) from None


def _load_timm(network: Any, name: str, path: Path) -> None:
    """Weights from a file as timm or the network's authors publish it, its classifier left out."""
    state = read_weights(path)
    adapt = _checkpoint_filter(network)
    if adapt is not None:
        try:
            state = adapt(state, network)
        except Exception:  # it takes what it expects for granted; the names below say what is wrong
            state = read_weights(path)
    classifiers = network.pretrained_cfg.get("classifier") or "head"
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    _load(network, state, f"timm:{name}", path)


def _checkpoint_filter(network: nn.Module) -> Callable[..., dict[str, Tensor]] | None:
    """What renames published weights to those of timm's network: its module's, where it has one."""
    return getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
