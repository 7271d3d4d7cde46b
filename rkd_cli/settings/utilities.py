"""Settings of the commands that look after runs, files and data sets, and of the demo and the benchmark."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.schemas import MAX_PIXELS
from rkd_cli.settings import fields as f


class CheckSettings(f.Settings):
    """``rkd check-data``."""

    dataset: f.DatasetName = "auto"
    data: f.DataFolder = Path("data")
    max_pixels: f.MaxPixels = MAX_PIXELS
    workers: f.DecodeWorkers = None


class CompareSettings(f.Settings):
    """``rkd compare``."""

    csv: f.File | None = f.run(None, "Also write the table as CSV, one row per run.")
    html: f.File | None = f.run(None, "Also write the table as an HTML page.")
    overwrite: bool = f.run(False, "Overwrite existing --csv and --html files.")
    concatenate: bool = f.measure(
        False,
        "Also measure the concatenated embeddings of the models of all --fold parts. Embeds the evaluation split.",
    )
    data: f.File | None = f.data(None, "Directory of the images for --concatenate. Default: that of the runs.")
    device: f.DeviceName = "auto"


class PushSettings(f.Settings):
    """``rkd push``."""

    private: bool = f.run(True, "Make a new repository private.")


class CacheSettings(f.Settings):
    """``rkd cache``."""

    cache_dir: f.File | None = f.data(None, "Cache folder. Default: the user's cache folder, or RKD_CACHE_DIR.")
    clear: bool = f.run(False, "Remove the files. Runs that read one continue.")


class ImportSettings(f.Settings):
    """``rkd import-checkpoint``: facts that a state dict does not contain."""

    base: f.Base = f.model("resnet50", "Backbone of the saved network.")
    embedding_size: f.Size = f.model(512, "Number of dimensions of its embedding.")
    l2normalize: bool = f.model(True, "Set if it scales embeddings to unit length.")
    resize: f.Side = f.model(256, "Side that its images were resized to, in pixels.")
    image_size: f.Side = f.model(224, "Side of the crop that it was trained on, in pixels.")
    dataset: f.Dataset = f.model("cub200", "Data set that it was trained on.")
    output: f.File | None = f.run(None, "File to write. Default: next to FILE, as .safetensors.")
    overwrite: f.Overwrite = False


class DemoSettings(f.Settings):
    """``rkd demo``."""

    data: f.File = f.data(Path("data"), "Directory for the drawn images (in their own folder).")
    workers: f.DecodeWorkers = None
    seed: f.Seed = f.run(1, "Seed of all trainings. The images are always the same.")
    save_dir: f.File = f.run(Path("demo"), "Directory for the runs.")
    overwrite: f.Overwrite = False
    device: f.DeviceName = "auto"


class BenchSettings(f.Settings):
    """``rkd bench``."""

    dataset: f.Dataset | None = f.data(None, "Data set to measure on. Default: drawn JPEGs of CUB's size.")
    data: f.File = f.data(Path("data"), "Directory of the images, or for drawn ones.")
    resize: f.Side = f.data(72, "Side that images are resized to, in pixels.")
    image_size: f.Side = f.data(64, "Side of the crop, in pixels.")
    workers: f.Workers = f.data(2, "Number of decoding processes of the textbook's DataLoader.")
    teacher_base: f.Base = f.model("resnet18", "Backbone of the teacher.")
    base: f.Base = f.model("resnet18", "Backbone of the student.")
    batch: f.Batch = f.optim(64, "Number of images in a batch.")
    num_image_per_class: f.Count = f.optim(5, "Number of images per class in a batch.")
    iter_per_epoch: f.Count = f.optim(100, "Number of batches in an epoch.")
    lr: f.Positive = f.optim(1e-4, "Learning rate of Adam.")
    freeze_bn: bool = f.optim(False, "Freeze the statistics of batch norms, on both sides.")
    seed: f.Seed = f.run(1, "Seed of all randomness.")
    repeats: f.Count = f.run(3, "Number of times to measure each side, in turn. 1: a first figure, sooner.")
    quick: bool = f.run(False, "Use toy sizes, to test that it works.")
    out: f.File | None = f.run(None, "Also write the JSON into this file, replacing it.")
    device: f.DeviceName = "auto"
    precision: f.Precision = f.run("auto", "Precision of our networks; the textbook's: fp32. auto: bf16 where faster.")
    compile: bool = f.run(False, "Compile our networks with torch.compile.")


class DownloadSettings(f.Settings):
    """``rkd download-cub``. No ``--url`` means the official archive."""

    data: f.File = f.data(Path("data"), "Directory for CUB_200_2011.")
    archive: f.File | None = f.source(None, "Local CUB_200_2011.tgz to unpack, without a download.")
    url: str | None = f.source(None, "Address of a mirror of the official archive.")
    md5: f.Md5 | None = f.source(None, "Expected md5 of the download, or none. Default: the official one.")
