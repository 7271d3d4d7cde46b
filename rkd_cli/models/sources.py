"""Networks by the name that a user gives them: a checkpoint, an exported file, a pretrained network."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection
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
from rkd_cli.schemas import OWN_FIT, Header

Network = EmbeddingNet | ExportedNet  # one that can be trained, or one that another program runs
_PRETRAINED = ("timm:", "torchvision:")
_HUB = "hf:"
# fields of a header that change no vector
_OF_TRAINING = (
    "format", "dataset", "epoch", "train_recall", "eval_recall", "select_on", "seen_classes", "version",
)  # fmt: skip
_REMEDY = "start from random weights with --weights none", "give it by --weights, for a teacher by --teacher-weights"


def located(name: str) -> str:
    """The name of a network, or the path of a file: of a run directory, its best checkpoint.

    Raises:
        DownloadError: an ``hf:ORG/NAME`` that cannot be fetched.
        CheckpointError: nothing is there; where another name is likely to be meant, the error says which.
    """
    if name.startswith(_HUB):
        return str(_from_hub(name.removeprefix(_HUB)))
    path = Path(name)
    if is_pretrained(name) or path.is_file():
        return name
    best = path / "best.safetensors"
    if best.is_file():
        return str(best)
    if path.is_dir():
        raise CheckpointError(f"{path}: holds no best.safetensors, as the directory of a run does: name a file")
    close = _likely(name)
    hint = (
        f"do you mean {' or '.join(close)}?"
        if close
        else "name a checkpoint, timm:NAME, torchvision:NAME, an exported .onnx, or a file of embeddings"
    )
    raise CheckpointError(f"{name}: no such file: {hint}")


def hub_interface() -> Any:
    """Of huggingface_hub; ``HF_ENDPOINT`` and ``HF_TOKEN`` are its own.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise SettingsError("a model hub needs the package: pip install 'rkd-cli[hub]'") from None
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: of its own, of the network, and of a name that is none."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    return HfHubHTTPError, HFValidationError, HTTPError, OSError


def _from_hub(repository: str) -> Path:
    """The best checkpoint of a run that was pushed, kept in the hub's own cache.

    Raises:
        DownloadError: it cannot be had.
    """
    interface = hub_interface()
    try:
        return Path(interface.hf_hub_download(repository, "best.safetensors"))
    except hub_errors() as error:
        raise DownloadError(f"hf:{repository}: {first_line(error)}: look at the name and the network") from None


def _likely(name: str) -> list[str]:
    """What somebody may have meant by a path that is not there: a network, or a file beside it."""
    path = Path(name)
    if ":" in name:
        library, _, rest = name.partition(":")
        return [f"{close}{rest}" for close in difflib.get_close_matches(f"{library}:", _PRETRAINED, 1)]
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    files = [str(path.with_name(close)) for close in difflib.get_close_matches(path.name, beside, 1, 0.75)]
    networks = _networks_like(name) if re.fullmatch(r"[\w.]+", name) else []
    return networks if name in {network.partition(":")[2] for network in networks} else files or networks


def _networks_like(name: str) -> list[str]:
    known = {"torchvision": torchvision.models.list_models(module=torchvision.models)}
    with suppress(ImportError):
        import timm

        known["timm"] = timm.list_models()
    close = {library: difflib.get_close_matches(name, names, 1, 0.85) for library, names in known.items()}
    return [f"{library}:{names[0]}" for library, names in close.items() if names][:1]


def is_pretrained(source: str) -> bool:
    """Whether ``source`` names a pretrained network, not a file."""
    return source.startswith(_PRETRAINED)


def read_network(path: Path) -> tuple[Header, str]:
    """What the file of a network says of it, and the digest of the file.

    Raises:
        CheckpointError: the file is absent, damaged, or neither a checkpoint of this program nor ONNX that it exported.
        SettingsError: ONNX is not installed.
    """
    if path.suffix == ".pt2":
        raise CheckpointError(
            f"{path}: a torch.export program may hold pickles, so it is not read here: name the checkpoint, or export "
            "it --to onnx"
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
    """A network to embed images with, in evaluation mode on the CPU, and what is known of it.

    The embedding of a pretrained network is its pooled feature; its header has no data set and no training classes.

    Args:
        source: a checkpoint of this program or ONNX that it exported, ``timm:NAME`` or ``torchvision:NAME``.
        weights: of a pretrained network, in the file format of its library; None: fetched once, kept by the library.
        l2normalize: whether the features of a pretrained network are scaled to unit length, so that they are compared
            by cosine, as such networks are evaluated; a checkpoint says itself.
        image_size, report: of a pretrained network, as ``build_backbone``.
    Raises:
        WeightsError: an unknown name, or weights that cannot be had or do not fit.
        CheckpointError: a file that is absent, damaged, or of another program.
        SettingsError: ONNX is not installed.
    """
    if not is_pretrained(source):
        path = Path(source)
        if is_exported(path):
            exported = open_exported(path)
            return exported, exported.facts.header
        header, _ = read_network(path)
        return load_model(path), header
    try:
        name, file = source.removeprefix("torchvision:"), "imagenet" if weights is None else str(weights)
        backbone = build_backbone(name, file, image_size, report)
    except WeightsError as error:  # they speak of networks that are going to be trained
        problems = (problem.removeprefix("--base ").replace(*_REMEDY) for problem in error.problems)
        raise WeightsError(*problems) from None
    model = EmbeddingNet(backbone.network, backbone.features, None, l2normalize, backbone.normalization).eval()
    resize, side = backbone.sides
    if image_size:  # the same share of an image as with the published size
        resize, side = round(resize * image_size / side), image_size
    return model, header_of(model, source, resize, side, dataset="", fit=OWN_FIT)


def digest_of(network: nn.Module, header: Header, without: Collection[str] = ()) -> str:
    """Of all that makes a network's vectors: its weights, its name, and what it does to images and embeddings.

    Two networks can share a file of weights and differ in mean, input size or length.

    Args:
        network: with the weights.
        header: of it; its fields count, but for those of training.
        without: more fields of the header that do not count.
    """
    facts = json.loads(header.model_dump_json(exclude={*_OF_TRAINING, *without}))
    return checksum(facts, {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()})
