"""``rkd embed`` beside the loop that anybody writes: torchvision's ImageFolder, a DataLoader, the same network."""

from __future__ import annotations

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader

from rkd_cli.bench import textbook
from rkd_cli.bench.measure import Measurement, default_precision, seconds_of
from rkd_cli.commands.embed import embed_file
from rkd_cli.data import load_dataset
from rkd_cli.events import silent
from rkd_cli.settings import BenchSettings, EmbedSettings


def measure_embed(settings: BenchSettings, dataset: str, data: Path, device: torch.device) -> Measurement:
    """Seconds from the files of images to a file of embeddings, both in turn, with as many workers.

    Args:
        settings: of the benchmark; ``base`` is a network of torchvision's, its weights random.
        dataset, data: the images: those of the folder of class folders that the first one is in.
        device: to compute on.
    """
    folder = load_dataset(dataset, data)[0].paths[0].parent.parent
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        network = torchvision.models.get_model(settings.base, weights=None).eval()
        torch.save(network.state_dict(), Path(scratch, "weights.pth"))
        shared = {name: getattr(settings, name) for name in ("resize", "image_size", "workers", "batch", "device")}
        asked = EmbedSettings(
            **shared,
            data=folder,
            out=Path(scratch, "ours.npy"),
            overwrite=True,
            cache="none",
            weights=Path(scratch, "weights.pth"),
            precision=settings.precision,
        )
        plain = _features(network).to(device)
        counts, ours, theirs = [], [], []
        for _ in range(settings.repeats):
            ours.append(
                seconds_of(
                    lambda: counts.append(embed_file(f"torchvision:{settings.base}", asked, silent).images), device
                )
            )
            theirs.append(
                seconds_of(lambda: _embed(plain, folder, settings, device, Path(scratch, "theirs.npy")), device)
            )
        cosine = float((np.load(Path(scratch, "ours.npy")) * np.load(Path(scratch, "theirs.npy"))).sum(axis=1).min())
    own, other = statistics.median(ours), statistics.median(theirs)
    return Measurement(
        f"embed {counts[0]:,} images with {settings.base}, {settings.resize} to {settings.image_size}, into a file",
        own,
        other,
        note=f"{counts[0] / own:,.0f} images/s, ImageFolder and DataLoader {counts[0] / other:,.0f}; "
        f"worst cosine {cosine:.4f}",
    )


def _features(network: nn.Module) -> nn.Module:
    """The network without its classifier, at unit length."""
    name, layer = [*network.named_children()][-1]
    last = nn.Identity() if isinstance(layer, nn.Linear) else nn.Sequential(*[*layer.children()][:-1])
    setattr(network, name, last)
    return nn.Sequential(network, textbook.UnitLength())


def _embed(network: nn.Module, folder: Path, settings: BenchSettings, device: torch.device, out: Path) -> None:
    transform = textbook.Images((), (), settings.resize, settings.image_size, train=False).transform
    images = torchvision.datasets.ImageFolder(folder, transform)
    loader: Any = DataLoader(images, settings.batch, num_workers=settings.workers)
    with torch.inference_mode(), default_precision(device):
        np.save(out, torch.cat([network(batch.to(device)).cpu() for batch, _ in loader]).numpy())
