"""Networks by the name that a user gives them: a checkpoint, an exported file, a pretrained network."""

from __future__ import annotations

import difflib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from rkd_cli.errors import CheckpointError, DownloadError, SettingsError, WeightsError, first_line
from rkd_cli.events import Reporter, silent
from rkd_cli.models.backbones import build_backbone
from rkd_cli.models.checkpoint import checksum, read_checksum, read_header
from rkd_cli.models.embedding_net import EmbeddingNet, header_of, load_model
from rkd_cli.models.exported import ExportedNet, is_exported, open_exported, read_exported
from rkd_cli.models.hugging_face import PROCESSOR
from rkd_cli.models.joined import JoinedNet, JoinedSpace
from rkd_cli.models.layouts import CONFIG, DENSE, WEIGHTS, is_layout, open_layout
from rkd_cli.schemas import OWN_FIT, Header

Network = EmbeddingNet | ExportedNet | JoinedNet
_PRETRAINED = ("timm:", "torchvision:")
_HUB = "hf:"
# fields of a header that do not affect embeddings
_OF_TRAINING = (
    "format", "dataset", "epoch", "train_recall", "eval_recall", "select_on", "seen_classes", "version",
)  # fmt: skip
_REMEDY = "start from random weights with --weights none", "pass it with --weights, or --teacher-weights for a teacher"


def located(name: str) -> str:
    """A run directory's best checkpoint, the download of ``hf:ORG/NAME@REVISION``, or another name as it is."""
    path = _from_hub(name) if name.startswith(_HUB) else Path(name)
    if is_pretrained(name) or path.is_file():
        return name
    best = path / "best.safetensors"
    if best.is_file():
        return str(best)
    if is_layout(path):
        return str(path)
    if path.is_dir():
        where = name if name.startswith(_HUB) else path
        raise CheckpointError(
            f"{where}: contains no best.safetensors, so it is not a run directory, and no network of "
            f"timm or transformers ({CONFIG} and {WEIGHTS}). Name a file."
        )
    close = _likely(name)
    hint = (
        f"Did you mean {' or '.join(close)}?"
        if close
        else "Name a run directory, a checkpoint, timm:NAME, torchvision:NAME, an exported .onnx, or a vectors file."
    )
    raise CheckpointError(f"{name}: no such file or folder. {hint}")


def hub_interface() -> Any:
    """The API of huggingface_hub, which reads ``HF_ENDPOINT`` and ``HF_TOKEN``."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise SettingsError("huggingface-hub is not installed. Run `pip install 'rkd-cli[hub]'`.") from None
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    return HfHubHTTPError, HFValidationError, HTTPError, OSError


def _from_hub(name: str) -> Path:
    """Download the files of a model into the hub's cache; returns their folder."""
    repository, _, revision = name.removeprefix(_HUB).partition("@")
    interface = hub_interface()
    try:
        files = ["best.safetensors", CONFIG, WEIGHTS, DENSE, PROCESSOR]
        return Path(interface.snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except hub_errors() as error:
        raise DownloadError(f"{name}: cannot be downloaded ({first_line(error)}). Check name and network.") from None


def _likely(name: str) -> list[str]:
    """Networks or files in the same folder with a name similar to a missing path."""
    path = Path(name)
    if ":" in name:
        library, _, rest = name.partition(":")
        return [f"{close}{rest}" for close in difflib.get_close_matches(f"{library}:", _PRETRAINED, 1)]
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    files = [str(path.with_name(close)) for close in difflib.get_close_matches(path.name, siblings, 1, 0.75)]
    networks = _networks_like(name) if re.fullmatch(r"[\w.]+", name) else []
    return networks if name in {network.partition(":")[2] for network in networks} else files or networks


def _networks_like(name: str) -> list[str]:
    known = {"torchvision": torchvision.models.list_models(module=torchvision.models)}
    with suppress(ImportError):
        import timm

        known["timm"] = timm.list_models()
    close = {library: difflib.get_close_matches(name, names, 1, 0.85) for library, names in known.items()}
    return [f"{library}:{names[0]}" for library, names in close.items() if names][:1]


def bytes_of(path: Path) -> int:
    """Size of a model's file, or of the files in its folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def is_pretrained(source: str) -> bool:
    """Whether ``source`` is a pretrained network, not a file."""
    return source.startswith(_PRETRAINED)


def read_network(path: Path) -> tuple[Header, str]:
    """The header of a checkpoint, an exported ONNX file or a folder of another library, and a digest."""
    if path.is_dir():
        network, header = open_layout(path)
        return header, digest_of(network, header)
    if path.suffix == ".pt2":
        raise CheckpointError(
            f"{path}: torch.export files may contain pickles, so they are not read. Name the checkpoint, or export it "
            "with --to onnx."
        )
    if is_exported(path):
        exported = read_exported(path)
        return exported.facts.header, exported.digest
    return read_header(path), read_checksum(path)


def open_network(
    source: str,
    weights: Path | None = None,
    l2normalize: bool = True,
    image_size: int | None = None,
    report: Reporter = silent,
) -> tuple[Network, Header]:
    """A network in evaluation mode on the CPU, and its header.

    ``source`` is a checkpoint, an exported ONNX file, a folder, ``timm:NAME`` or ``torchvision:NAME``. The other
    arguments apply to the last two only, whose embeddings are pooled features, scaled to unit length if
    ``l2normalize``. ``weights`` is a file in the format of their library; None downloads them once.
    """
    if not is_pretrained(source):
        path = Path(source)
        if is_exported(path):
            exported = open_exported(path)
            return exported, exported.facts.header
        if path.is_dir():
            return open_layout(path)
        header, _ = read_network(path)
        return _open_joined(path, header) if header.teachers else load_model(path), header
    try:
        name, file = source.removeprefix("torchvision:"), "imagenet" if weights is None else str(weights)
        backbone = build_backbone(name, file, image_size, report)
    except WeightsError as error:  # adapt messages that are about networks to train
        problems = (problem.removeprefix("--base ").replace(*_REMEDY) for problem in error.problems)
        raise WeightsError(*problems) from None
    model = EmbeddingNet(backbone.network, backbone.features, None, l2normalize, backbone.normalization).eval()
    resize, side = backbone.sides
    if image_size:  # crop the same fraction of an image as at the published size
        resize, side = round(resize * image_size / side), image_size
    return model, header_of(model, source, resize, side, dataset="", fit=OWN_FIT)


def _open_joined(path: Path, header: Header) -> JoinedNet:
    """The networks that a file of teachers names, in their space."""
    networks = []
    for name, digest in header.teachers:
        network, own = open_network(located(name))
        found = digest_of(network, own) if is_pretrained(name) else read_network(Path(located(name)))[1]
        check_teacher(path, name, digest, found)
        networks.append(network)
    space = JoinedSpace([network.embedding_size for network in networks], header.embedding_size)
    space.read(path)
    return JoinedNet(networks, space).eval()


def check_teacher(path: Path, name: str, digest: str, found: str) -> None:
    """Raise a CheckpointError if a teacher is not the one that the file of teachers ``path`` was written for."""
    if found != digest:
        raise CheckpointError(f"{path}: its teacher {name} changed. Restore that file, or distil again.")


def digest_of(network: nn.Module, header: Header) -> str:
    """Digest of everything that determines a network's embeddings: weights and header fields.

    Two networks may have equal weights and differ in mean, input size or normalization.
    """
    facts = json.loads(header.model_dump_json(exclude={*_OF_TRAINING}))
    return checksum(facts, {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()})
