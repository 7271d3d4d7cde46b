"""Folders of other libraries: of timm, of transformers, and of sentence-transformers, which runs timm's networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError, SettingsError, WeightsError, first_line
from rkd_cli.models.backbones import timm_folder
from rkd_cli.models.embedding_net import EmbeddingNet, header_of, normalization_of
from rkd_cli.models.hugging_face import open_transformers
from rkd_cli.runtime.files import write_json
from rkd_cli.schemas import OWN_FIT, Fit, Header

CONFIG, WEIGHTS, CARD, DENSE = "config.json", "model.safetensors", "README.md", "1_Dense/model.safetensors"
# every file of a layout, as patterns of a model hub
FILES = (CONFIG, WEIGHTS, CARD, "modules.json", "*_sentence_transformers.json", "sentence_bert_config.json", "?_*/*")
CROP_MODES: dict[Fit, str] = {"square": "squash", "crop": "center", "pad": "border"}

# torchvision networks that timm has with the same tensors in the same order: prefixes of equal names, and other names
_EQUAL = ("resnet", "wide_resnet", "resnext", "densenet", "efficientnet_b")
_OTHER = {
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mnasnet0_5": "mnasnet_050",
    "mnasnet0_75": "mnasnet_075",
    "mnasnet1_0": "mnasnet_100",
    "efficientnet_v2_s": "efficientnetv2_s",
    "efficientnet_v2_m": "efficientnetv2_m",
    "efficientnet_v2_l": "efficientnetv2_l",
}
_EPSILON = ("mobilenet_v3", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2")  # 0.001
_SHIFT = 4.0  # hard-swish is the identity from 3 on, and no mean of its values is below -0.375


def write_layout(folder: Path, model: EmbeddingNet, header: Header, card: str, has_modules: bool) -> None:
    """Write a network as timm reads it; with ``has_modules`` its backbone, and modules of sentence-transformers.

    Raises a SettingsError if timm does not have the network.
    """
    name, arguments = _timm_name(header)
    network = _timm_network(model, header.base, name, arguments)
    head, size = network.get_classifier(), network.num_classes
    side, fit = header.input_size or header.image_size, CROP_MODES[header.fit]
    resize = round(header.resize * side / header.image_size)
    fraction = side / resize
    state, classifier = network.state_dict(), network.pretrained_cfg.get("classifier")
    if has_modules:
        _write_modules(folder, head if size else None, header.l2normalize)
        state, size = {key: value for key, value in state.items() if not key.startswith(f"{classifier}.")}, 0
    published = {key: network.pretrained_cfg.get(key) for key in ("first_conv", "classifier")}
    config = {
        "architecture": name.partition(".")[0],
        "num_classes": size,
        "num_features": network.num_features,
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            **published,
            "custom_load": False,
            "input_size": (3, side, side),
            "fixed_input_size": header.input_size is not None,
            "interpolation": "bilinear",
            # timm rounds the resized side down
            "crop_pct": fraction if int(side / fraction) == resize else side / (resize + 0.5),
            "crop_mode": fit,
            "mean": header.mean,
            "std": header.std,
            "num_classes": size,
        },
        "rkd": json.loads(header.model_dump_json()),
    }
    write_json(folder / CONFIG, config)
    _write_tensors(folder / WEIGHTS, state)
    (folder / CARD).write_text(card, encoding="utf-8")


def is_layout(path: Path) -> bool:
    """Whether a folder holds a network of another library."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def open_layout(folder: Path) -> tuple[EmbeddingNet, Header]:
    """The network of a folder and its header; of a folder that ``write_layout`` wrote, as it was exported.

    The embeddings of a network that is none of ours are its pooled features, scaled to unit length.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        header = Header.model_validate_json(json.dumps(config["rkd"])) if "rkd" in config else None
    except (OSError, ValueError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
        raise CheckpointError(f"{folder / CONFIG}: is damaged or from a newer rkd ({reason})") from None
    if "architecture" not in config:
        if "model_type" in config:
            return open_transformers(folder)
        raise CheckpointError(
            f"{folder}: is a model of another library than timm and transformers. Write its embeddings into a vectors "
            "file: rkd manual teachers."
        )
    try:
        backbone = timm_folder(folder, has_head=header is not None)
        dense = load_file(folder / DENSE) if (folder / DENSE).is_file() else None
    except (SafetensorError, OSError, WeightsError) as error:
        raise CheckpointError(f"{folder}: {first_line(error)}") from None
    unit, expects = (header.l2normalize, normalization_of(header)) if header else (True, backbone.normalization)
    size = len(dense["linear.weight"]) if dense else None
    model = EmbeddingNet(backbone.network, backbone.features, size, unit, expects)
    if dense:
        model.linear.load_state_dict({key.removeprefix("linear."): value for key, value in dense.items()})
    if header:
        model.embedding_size = header.embedding_size
        return model.eval(), header
    base = f"timm:{config['architecture']}"
    return model.eval(), header_of(model, base, *backbone.sides, dataset="", fit=OWN_FIT)


def _timm_name(header: Header) -> tuple[str, dict[str, Any]]:
    """timm's name of a network, and the arguments to build it with."""
    try:
        import timm
    except ImportError:
        raise SettingsError("--to: timm is not installed. Run `pip install 'rkd-cli[timm]'`.") from None
    base = header.base.removeprefix("torchvision:")
    if base.startswith("timm:"):
        name = base.removeprefix("timm:")
        published, side = timm.get_pretrained_cfg(name), header.input_size
        return name, {"img_size": side} if side and published and published.input_size[1] != side else {}
    arguments: dict[str, Any] = {"bn_eps": 1e-3} if base.startswith(_EPSILON) else {}
    if base in _OTHER or (base.startswith(_EQUAL) and timm.is_model(base)):
        return _OTHER.get(base, base), arguments
    raise SettingsError(
        f"--to: timm has no network with the tensors of {base}. Export it with --to onnx, or train timm:NAME, resnet, "
        "mobilenet or efficientnet."
    )


def _timm_network(model: EmbeddingNet, base: str, name: str, arguments: dict[str, Any]) -> Any:
    """timm's network with the tensors of ``model``, whose linear layer is its classifier."""
    import timm

    linear = model.linear[0] if isinstance(model.linear, nn.Sequential) and len(model.linear) == 1 else model.linear
    if not isinstance(linear, nn.Linear | nn.Identity):
        raise SettingsError("--teacher-space: timm has no place for the projection. Export it with --to onnx.")
    size = linear.out_features if isinstance(linear, nn.Linear) else 0
    try:
        network: Any = timm.create_model(name, num_classes=size, **arguments)
        state, own = network.state_dict(), model.base.state_dict()
        if base.startswith("timm:"):
            state |= own
        else:
            names = [key for key in state if not key.endswith("num_batches_tracked")]
            tensors = [value for key, value in own.items() if not key.endswith("num_batches_tracked")]
            state |= dict(zip(names, tensors, strict=False))
        network.load_state_dict(state)
        if isinstance(linear, nn.Linear):
            _set_classifier(network, linear.weight.detach(), linear.bias.detach())
    except (RuntimeError, AttributeError, TypeError) as error:
        raise SettingsError(
            f"--to: timm's {name} differs from {base} ({first_line(error)}). Export it with --to onnx."
        ) from None
    return network.eval()


def _set_classifier(network: Any, weight: Tensor, bias: Tensor) -> None:
    features, head = weight.shape[1], network.get_classifier()
    if head.in_features != features:  # MobileNetV3 has a convolution and a hard-swish before it: make them do nothing
        nn.init.dirac_(network.conv_head.weight)
        nn.init.constant_(network.conv_head.bias, _SHIFT)
        bias = (bias.double() - _SHIFT * weight.double().sum(1)).float()
        weight = nn.functional.pad(weight, (0, head.in_features - features))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def _write_modules(folder: Path, linear: nn.Linear | None, unit: bool) -> None:
    """The files of sentence-transformers: timm's network in transformers, a linear layer, and unit length."""
    key = "sentence_embedding"
    ports: dict[str, object] = {"module_input_name": key, "module_output_name": key}
    kinds = [("", "transformer.Transformer")]
    if linear:
        kinds.append(("1_Dense", "dense.Dense"))
        dense = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True, **ports}
        (folder / "1_Dense").mkdir()
        write_json(folder / "1_Dense" / CONFIG, {**dense, "activation_function": "torch.nn.modules.linear.Identity"})
        _write_tensors(folder / DENSE, {f"linear.{name}": value for name, value in linear.state_dict().items()})
    if unit:
        kinds.append(("2_Normalize", "normalize.Normalize"))
        (folder / "2_Normalize").mkdir()
        write_json(folder / "2_Normalize" / CONFIG, ports)
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.base.modules.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    image = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
    transformer = {"transformer_task": "feature-extraction", "modality_config": image, "module_output_name": key}
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", transformer)
    whole = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", whole)


def _write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors makes files readable by their owner only
