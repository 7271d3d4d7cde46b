"""``rkd embed`` beside the loop that anybody writes: torchvision's ImageFolder, a DataLoader, the same network."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader

from figures import run
from rkd_cli.bench import textbook
from rkd_cli.bench.apart import Apart, answer
from rkd_cli.bench.cases import place_of
from rkd_cli.bench.measure import Measurement, Meter, begin, default_precision
from rkd_cli.commands.embed import embed_file
from rkd_cli.data import load_dataset
from rkd_cli.events import silent
from rkd_cli.settings import BenchSettings, EmbedSettings


def measure_embed(settings: BenchSettings, meter: Meter) -> Iterator[Measurement]:
    """Seconds from the files of images to a file of embeddings, both in turn, with as many workers.

    Args:
        settings: of the benchmark; ``base`` is a network of torchvision's, its weights random. The images are those of
            the folder of class folders that the first one is in.
        meter: whose device is computed on.
    """
    folder = load_dataset(*place_of(settings))[0].paths[0].parent.parent
    what = f"embed with {settings.base}, {settings.resize} to {settings.image_size}, into a file"
    with TemporaryDirectory(prefix="rkd-bench-") as scratch:
        network = torchvision.models.get_model(settings.base, weights=None).eval()
        torch.save(network.state_dict(), Path(scratch, "weights.pth"))
        with _apart(settings, folder, Path(scratch), "plain") as plain:
            meter.tell(f"{what}: memory of the plain loop")
            plain_bytes = plain.peak()
            counts, ours, theirs = list[int](), list[float](), list[float]()
            for number in range(1, meter.repeats + 1):
                meter.tell(f"{what}: ours, then the plain loop's, {number} of {meter.repeats}")
                ours += meter.times(lambda: counts.append(_embed_ours(settings, folder, Path(scratch))), 0)
                theirs += plain.times(0)
        meter.tell(f"{what}: our memory")
        with _apart(settings, folder, Path(scratch), "ours") as afresh:
            bytes = afresh.peak()
        both = [np.load(Path(scratch, f"{side}.npy")) for side in ("ours", "plain")]
    own, other = statistics.median(ours), statistics.median(theirs)
    yield Measurement(
        f"{what}, of {counts[0]:,} images",
        own,
        other,
        bytes,
        plain_bytes,
        note=f"{counts[0] / own:,.0f} images/s, ImageFolder and DataLoader {counts[0] / other:,.0f}; "
        f"worst cosine {(both[0] * both[1]).sum(axis=1).min():.4f}",
    )


def _apart(settings: BenchSettings, folder: Path, scratch: Path, side: str) -> Apart:
    threads = str(torch.get_num_threads())
    return Apart([__file__, "--side", side, settings.model_dump_json(), str(folder), str(scratch), threads])


def _serve(side: str, given: str, folder: str, scratch: str, threads: str) -> None:
    """One side, as the only work of this process."""
    settings, meter = begin(side, given, threads)
    place = Path(folder), Path(scratch)
    plain = cache(lambda: _plain_loop(settings, *place, meter.device))  # its memory is asked for first, network and all

    def work() -> None:
        _embed_ours(settings, *place) if side == "ours" else plain()()

    answer(lambda seconds: meter.times(work, seconds), lambda: meter.peak(work, resident=True))


def _embed_ours(settings: BenchSettings, folder: Path, scratch: Path) -> int:
    """Gives the number of images."""
    shared = {name: getattr(settings, name) for name in ("resize", "image_size", "workers", "batch", "device")}
    asked = EmbedSettings(
        **shared,
        data=folder,
        out=scratch / "ours.npy",
        overwrite=True,
        cache="none",
        weights=scratch / "weights.pth",
        precision=settings.precision,
    )
    return embed_file(f"torchvision:{settings.base}", asked, silent).images


def _plain_loop(settings: BenchSettings, folder: Path, scratch: Path, device: torch.device) -> Callable[[], object]:
    network = torchvision.models.get_model(settings.base, weights=None).eval()
    network.load_state_dict(torch.load(scratch / "weights.pth", weights_only=True))
    plain = _features(network).to(device)
    transform = textbook.Images((), (), settings.resize, settings.image_size, train=False).transform

    def embed() -> None:
        images = torchvision.datasets.ImageFolder(folder, transform)
        loader: Any = DataLoader(images, settings.batch, num_workers=settings.workers)
        with torch.inference_mode(), default_precision(device):
            np.save(scratch / "plain.npy", torch.cat([plain(batch.to(device)).cpu() for batch, _ in loader]).numpy())

    return embed


def _features(network: nn.Module) -> nn.Module:
    """The network without its classifier, at unit length."""
    name, layer = [*network.named_children()][-1]
    last = nn.Identity() if isinstance(layer, nn.Linear) else nn.Sequential(*[*layer.children()][:-1])
    setattr(network, name, last)
    return nn.Sequential(network, textbook.UnitLength())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        _serve(*sys.argv[2:])
    else:
        flags = ("dataset", "data", "base", "batch", "workers", "resize", "image_size", "repeats", "precision")
        run(measure_embed, __doc__, *flags)
