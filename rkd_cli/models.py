"""Embedding networks: a torchvision backbone up to its average pooling, one linear layer, perhaps l2 normalisation."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rkd_cli import checkpoint
from rkd_cli.errors import CheckpointError, WeightsError

# backbone: the attribute that holds its classifier, and how many features the classifier reads
BACKBONES = {
    "resnet18": ("fc", 512),
    "resnet50": ("fc", 2048),
    "mobilenet_v3_small": ("classifier", 576),
    "shufflenet_v2_x0_5": ("fc", 1024),
    "shufflenet_v2_x1_0": ("fc", 1024),
}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class EmbeddingNet(nn.Module):
    """Images to embeddings. It normalises its images itself, so teacher and student can share one batch.

    Args:
        base: network from normalised images to (N, features) or (N, features, 1, 1).
        features: what ``base`` gives.
        embedding_size: D.
        l2normalize: whether embeddings are scaled to unit length.
        mean, std: per channel, of RGB in [0, 1].
    Args (of the call):
        images: (N, 3, H, W), uint8 RGB, or floating RGB in [0, 1].
    Returns:
        (N, D) embeddings.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        base: nn.Module,
        features: int,
        embedding_size: int,
        l2normalize: bool,
        mean: tuple[float, ...] = _IMAGENET_MEAN,
        std: tuple[float, ...] = _IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.base = base
        self.linear = nn.Linear(features, embedding_size)
        self.l2normalize = l2normalize
        # constants of the network, but no weights: the checkpoint keeps them in its header
        with torch.device("cpu"):
            self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32, bit for bit what torchvision's ToTensor and Normalize make of the same pixels."""
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        return (images - self.mean).div_(self.std)

    def forward(self, images: Tensor) -> Tensor:
        features = self.base(self.normalise(images)).flatten(1)  # (N, C, 1, 1) -> (N, C)
        embeddings: Tensor = self.linear(features)
        return F.normalize(embeddings, dim=1) if self.l2normalize else embeddings

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.linear.out_features

    def parameter_count(self) -> int:
        """How many numbers training adjusts."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_model(base: str, embedding_size: int, l2normalize: bool, weights: str = "none") -> EmbeddingNet:
    """A new network, its linear layer random from torch's generator.

    Args:
        base: one of ``BACKBONES``.
        embedding_size: D.
        l2normalize: whether embeddings are scaled to unit length.
        weights: ``imagenet`` (torchvision's IMAGENET1K_V1, fetched once into torch's own cache), ``none`` (random),
            or a file with the state dict of the torchvision network (.safetensors or .pth); its classifier is ignored.
    Raises:
        WeightsError: an unknown backbone, or weights that cannot be had or do not fit.
    """
    if base not in BACKBONES:
        raise WeightsError(f"unknown backbone {base}: use one of {', '.join(BACKBONES)}")
    head, features = BACKBONES[base]
    network = torchvision.models.get_model(base, weights=None)
    setattr(network, head, nn.Identity())
    if weights != "none":
        state, source = _imagenet_weights(base) if weights == "imagenet" else _weights_file(Path(weights))
        _load_backbone(network, {k: v for k, v in state.items() if not k.startswith(f"{head}.")}, base, source)
    return EmbeddingNet(network, features, embedding_size, l2normalize)


def load_model(path: str | Path) -> EmbeddingNet:
    """The network of a checkpoint, from the file alone, in evaluation mode on the CPU.

    Raises:
        CheckpointError: the file is absent, damaged, or no checkpoint of this program.
    """
    path = Path(path)
    header = checkpoint.read_header(path)
    if header.base not in BACKBONES:
        raise CheckpointError(f"{path}: its backbone {header.base} is unknown here: a newer rkd may read it")
    with torch.device("meta"):  # shapes without memory: the file is compared with them before any tensor is read
        model = build_model(header.base, header.embedding_size, header.l2normalize)
    state = checkpoint.read_tensors(path, model.state_dict())
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _load_backbone(network: nn.Module, state: dict[str, Tensor], base: str, source: Path) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise WeightsError(f"{source}: not the weights of a {base}: {lines[0][:200]}{more}") from None


def _imagenet_weights(base: str) -> tuple[dict[str, Tensor], Path]:
    url = str(torchvision.models.get_model_weights(base)["IMAGENET1K_V1"].url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            hash_prefix = path.stem.rsplit("-", 1)[1]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=False)
        except (OSError, URLError, RuntimeError) as error:
            raise WeightsError(
                f"the ImageNet weights of {base} are not here and could not be fetched ({error}): "
                f"fetch {url} elsewhere and put it at {path}, or start from random weights with --weights none"
            ) from None
    return _weights_file(path)


def _weights_file(path: Path) -> tuple[dict[str, Tensor], Path]:
    if not path.is_file():
        raise WeightsError(f"--weights {path}: no such file; give imagenet, none, or a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)  # never runs a stranger's pickle
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, Exception) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise WeightsError(f"{path}: weights that cannot be read ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: not a state dict of tensors: save it with torch.save(network.state_dict(), ...)")
    return state, path
