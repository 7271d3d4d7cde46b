"""Settings of the commands that run a trained network on images."""

from __future__ import annotations

import re
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rkd_cli.schemas import MAX_EMBEDDING, MAX_PIXELS, Fit
from rkd_cli.settings import fields as f
from rkd_cli.settings.names import flag_name

MAX_TOP = 100  # answers that a server gives at once


class ImageSettings(f.Settings):
    """Settings of commands that run a network on images. Defaults of None are read from the checkpoint."""

    data: f.DataFolder = Path("data")
    resize: f.Side | None = f.data(
        None, "Side of the square to resize to. Default: as in training, in proportion to --image-size."
    )
    image_size: f.Side | None = f.data(None, "Side of the crop. Default: as in training.")
    fit: Fit | None = f.data(
        None, "How an image becomes a square: squashed, its middle, or padded. Default: as in training."
    )
    max_pixels: f.MaxPixels = MAX_PIXELS
    workers: f.DecodeWorkers = None
    cache: f.ReadCache = "auto"
    cache_dir: f.ReadCacheFolder = None
    skip_damaged: f.SkipDamaged = False
    batch: f.ReadBatch = 128

    weights: f.File | None = f.model(None, "Weights file of a pretrained network. Default: downloaded once.")
    l2normalize: bool | None = f.model(
        None,
        "Scale embeddings to unit length. Default: the checkpoint's setting; yes for a pretrained "
        "network, no for a vectors file.",
    )


class InferenceSettings(ImageSettings):
    """Settings of commands that embed images."""

    device: f.DeviceName = "auto"
    precision: f.Precision = f.run("auto", "Precision of the network. auto: bf16 where it is faster.")


class EvaluateSettings(InferenceSettings):
    """``rkd evaluate``."""

    dataset: f.AnyDataset | None = f.data(
        None, "Data set to evaluate on; auto: what --data holds. Default: that of the checkpoint."
    )
    base: f.Base | None = f.model(None, "Expected backbone: an error if the checkpoint has another.")
    embedding_size: f.Size | None = f.model(
        None, "Expected number of dimensions: an error if the checkpoint has another."
    )

    gallery: str | None = f.measure(
        None,
        "Also measure asymmetric Recall@K in the embeddings of this model or file. With --query: folder or list of "
        "images.",
    )
    query: f.File | None = f.measure(None, "Folder or list of queries for the images in --gallery.")
    nproc: f.Processes = 1
    dims: f.Sizes = f.measure((), "Also measure these prefixes of the embedding, for example 16,32.")
    vectors: f.Storages = f.measure(
        ("float",), "Storage of the gallery to measure: float, int8, binary (Hamming distance, and rescored)."
    )
    recall: f.Recalls = (1, 2, 4, 8)
    bootstrap: Annotated[int, Field(ge=0, le=10**7)] = f.measure(
        0,
        "95 % interval of the first model's difference in Recall@1 from each other, by N resamples of the "
        "classes. 0: off.",
    )
    bootstrap_seed: f.Seed = f.measure(1, "Seed of the resamples.")


class EmbedSettings(InferenceSettings):
    """``rkd embed``."""

    dataset: f.Dataset | None = f.data(None, "Data set to embed. Default: all images below --data.")
    pca: str | None = f.model(
        None, "Reduce to this many principal components, or by the map stored in this vectors file."
    )
    half_whiten: bool = f.model(
        False,
        "Divide each principal component by the square root of its standard deviation: better for search, worse for "
        "RKD teachers.",
    )
    out: Annotated[
        f.File, f.shared("Run", "File to write: .npy (paths in a second file), .npz, .safetensors or .parquet.")
    ]
    overwrite: f.OverwriteOut = False
    nproc: f.Processes = 1
    vectors: Literal["float", "float16", "int8", "binary"] = f.model(
        "float", "Storage of a value: 32 bits, 16 bits, 8 bits with a scale per dimension, or its sign."
    )

    @property
    def pca_size(self) -> int | None:
        """--pca as a number of components."""
        return int(self.pca) if self.pca and re.fullmatch(r"-?\d+", self.pca) else None

    @property
    def pca_file(self) -> Path | None:
        """--pca as a vectors file whose PCA is applied."""
        return Path(self.pca) if self.pca and self.pca_size is None else None

    @model_validator(mode="after")
    def _writable(self) -> Self:
        if self.out.suffix not in (".npy", ".npz", ".parquet", ".safetensors"):
            raise ValueError(f"--out {self.out}: must end in .npy, .npz, .parquet or .safetensors")
        if self.out.suffix == ".npy" and self.vectors in ("int8", "binary"):
            raise ValueError(
                f"--out {self.out}: .npy cannot store the scales of --vectors {self.vectors}. Use .npz, .safetensors "
                "or .parquet."
            )
        if self.pca is not None and not self.pca:
            raise ValueError("--pca: must be a number or a file, got nothing")
        if self.pca_size is not None and not 1 <= self.pca_size <= MAX_EMBEDDING:
            raise ValueError(f"--pca: must be from 1 to {MAX_EMBEDDING}, got {self.pca}")
        if self.half_whiten and self.pca_file:
            raise ValueError(f"--half-whiten: --pca {self.pca} applies the map of that file as it is. Leave one out.")
        return self


class GallerySettings(InferenceSettings):
    """Settings of commands that search a gallery."""

    gallery: Annotated[
        f.File, f.shared("Data", "Folder of images to search, or a vectors file (with its images below --data).")
    ]
    top: f.Count = f.measure(5, "Number of answers per query.")
    threshold: f.Cosine = f.measure(0.95, "Lowest cosine of two near-duplicates.")
    asymmetric: bool = f.measure(
        False, "Allow a vectors file of another network that shares this model's space, for example its teacher."
    )


class SearchSettings(GallerySettings):
    """``rkd search``."""

    query: f.File | None = f.data(None, "Image to search for, or a folder of images.")
    duplicates: bool = f.measure(False, "Find near-duplicates in the gallery, in place of --query.")
    exact: bool = f.measure(False, "Compare with every image, also where faiss would be faster.")
    html: f.File | None = f.run(None, "Also write the answers as an HTML page.")
    overwrite: bool = f.run(False, "Overwrite an existing --html file.")

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if (self.query is not None) == self.duplicates:
            problem = "both are given. Omit one of them." if self.duplicates else "one is required."
            raise ValueError(f"--query or --duplicates: {problem}")
        return self


class ServeSettings(GallerySettings):
    """``rkd serve``."""

    max_pixels: f.MaxPixels = 100_000_000  # anyone who reaches the server can make it decode that many
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = f.measure(12, "Number of answers per query.")
    host: str = f.run("127.0.0.1", "Address to listen on. An address that other machines can reach needs --token.")
    port: Annotated[int, Field(ge=0, le=65535)] = f.run(8000, "Port to listen on. 0: any free port.")
    token: str | None = f.run(None, "Secret that clients must send, of 16 characters or more.")
    max_upload: Annotated[int, Field(ge=1, le=1000)] = f.run(20, "Largest picture that clients may send, in MB.")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        with suppress(ValueError):
            return ip_address(self.host).is_loopback
        return self.host == "localhost"

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.token is not None and not re.fullmatch(r"[!-~]{16,}", self.token):
            raise ValueError("--token: must have 16 characters or more, without spaces and accents")
        if not self.is_local and self.token is None:
            raise ValueError(f"--host {self.host}: other machines can reach it. Add --token, or omit --host.")
        return self


class ExportSettings(ImageSettings):
    """``rkd export``, which runs on the CPU in float32."""

    to: Literal["onnx", "torch", "timm", "sentence-transformers"] | None = f.model(
        None, "Format: a file, or a folder that timm or sentence-transformers loads. Default: by the suffix of --out."
    )
    input: Literal["uint8", "float"] = f.model(
        "uint8", "Input of an ONNX file: pixels, or floats that an image processor has normalized."
    )
    int8: bool = f.model(False, "Quantize to int8 (ONNX only): a fourth of the size, faster on most CPUs.")
    fp16: bool = f.model(False, "Store the backbone in float16 (ONNX only): half the size.")
    int8_weights: bool = f.model(False, "Store weights in int8 (ONNX only).")
    calibration_images: f.Count = f.model(256, "Number of training images that calibrate --int8.")
    snippet: Literal["python", "js"] | None = f.run(
        None, "Print a program that uses the exported MODEL (.onnx) without rkd, and export nothing."
    )
    dataset: f.AnyDataset | None = f.data(
        None, "Data set to compare on; auto: what --data holds. Default: that of the checkpoint."
    )
    recall: f.Recalls = (1, 2, 4, 8)
    teacher_space: bool = f.model(
        False, "Give embeddings in the teacher's space: through the projection that --match-ratio learned."
    )
    out: f.File | None = f.run(None, "File to write: .onnx or .pt2. With --to timm: folder. Required.")
    overwrite: f.OverwriteOut = False

    @property
    def is_folder(self) -> bool:
        """Whether a folder is written."""
        return self.to in ("timm", "sentence-transformers")

    @property
    def stored(self) -> Literal["float", "int8", "int8-weights", "fp16"]:
        """How the weights are stored."""
        return "int8" if self.int8 else "int8-weights" if self.int8_weights else "fp16" if self.fp16 else "float"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.snippet:
            if self.out:
                raise ValueError("--out: has no effect with --snippet. Redirect what it prints: > FILE.")
            return self
        if self.out is None:
            raise ValueError("--out: is required")
        suffix = {"onnx": ".onnx", "torch": ".pt2"}.get(self.to or "")
        if self.is_folder and self.out.suffix in (".onnx", ".pt2"):
            raise ValueError(f"--out {self.out}: must be a folder with --to {self.to}")
        if not self.is_folder and self.out.suffix not in ((suffix,) if suffix else (".onnx", ".pt2")):
            to = f" with --to {self.to}" if self.to else ""
            raise ValueError(f"--out {self.out}: must end in {suffix or '.onnx or .pt2'}{to}")
        small = [flag for flag in ("int8", "int8_weights", "fp16") if getattr(self, flag)]
        for flag in (*small, *(["input"] if self.input == "float" else [])):
            if self.out.suffix != ".onnx":
                raise ValueError(f"{flag_name(flag)}: needs ONNX. Name an --out that ends in .onnx.")
        if len(small) > 1:
            raise ValueError(f"{', '.join(map(flag_name, small))}: exclude each other. Keep one.")
        return self


class ReportSettings(f.Settings):
    """``rkd report``."""

    data: f.File | None = f.data(None, "Directory of the images. Default: that of the runs.")
    max_pixels: f.MaxPixels = MAX_PIXELS
    workers: f.DecodeWorkers = None
    cache: f.ReadCache = "auto"
    cache_dir: f.ReadCacheFolder = None
    skip_damaged: f.SkipDamaged = False
    batch: f.ReadBatch = 128
    gallery: Annotated[int, Field(ge=0, le=100)] = f.measure(
        6, "Number of queries of each kind (hardest, easiest, ...) in the gallery. 0: no gallery."
    )
    map: Literal["pca", "tsne", "umap"] = f.measure(
        "pca", "Projection of the map. tsne needs scikit-learn, umap needs umap-learn."
    )
    seed: f.Seed = f.measure(1, "Seed of random queries and of the points and classes on the map.")
    out: f.File = f.run(Path("report.html"), "File to write.")
    overwrite: f.OverwriteOut = False
    device: f.DeviceName = "auto"
    precision: f.Precision = f.run("auto", "Precision of the networks. auto: bf16 where it is faster.")

    def inference(self, data: Path) -> InferenceSettings:
        """The settings to embed the images in ``data``."""
        common = self.model_fields_set & InferenceSettings.model_fields.keys() - {"data"}
        return InferenceSettings(data=data, **{name: getattr(self, name) for name in common})
