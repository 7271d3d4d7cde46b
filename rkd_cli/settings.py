"""Settings of all commands: name, type, default, bounds and help of every flag. All defaults are here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)
from pydantic.fields import FieldInfo

from rkd_cli.schemas import BASE, MAX_EMBEDDING, MAX_PIXELS, MAX_SIDE, Fit, fit_of

Dataset = Literal["cub200", "cars196", "sop", "folder", "images", "list", "demo"]
AnyDataset = Literal["auto", Dataset]
Precision = Literal["auto", "fp32", "tf32", "bf16"]
Cache = Literal["auto", "none", "disk", "device"]
Loss = Literal[
    "l2_triplet",
    "l1_triplet",
    "contrastive",
    "multi_similarity",
    "proxy_anchor",
    "softmax",
    "arcface",
    "smooth_ap",
]
Sample = Literal["random", "hard", "all", "semihard", "distance", "distance-published"]


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError(f"must be in ascending order, got {','.join(map(str, values))}")
    return values


def _some_once(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ValueError("must name at least one, got nothing")
    return tuple(dict.fromkeys(values))


def _matching(pattern: str, form: str, value: str) -> str:
    if not re.fullmatch(pattern, value):
        raise ValueError(f"must be {form}, got {value}")
    return value


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("must name a file or folder, got nothing")
    return value


def _with_one(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({1, *values}))


Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Workers = Annotated[int, Field(ge=0, le=256)]  # processes
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]  # pixels
Size = Annotated[int, Field(ge=1, le=MAX_EMBEDDING)]
Epochs = Annotated[tuple[Count, ...], BeforeValidator(_split), AfterValidator(_ascending)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_split), AfterValidator(_ascending)]
Vectors = Annotated[
    tuple[Literal["float", "int8", "binary"], ...],
    BeforeValidator(_split),
    AfterValidator(_some_once),
]
Loggers = Annotated[tuple[Literal["csv", "tensorboard"], ...], BeforeValidator(_split)]
Ks = Annotated[tuple[Count, ...], BeforeValidator(_split), AfterValidator(_with_one)]
File = Annotated[Path, Strict(False), BeforeValidator(_not_empty)]
Teacher = Annotated[str, BeforeValidator(_not_empty)]
Base = Annotated[str, AfterValidator(partial(_matching, BASE, "the name of a network"))]
Device = Annotated[str, AfterValidator(partial(_matching, r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N"))]
Md5 = Annotated[str, AfterValidator(partial(_matching, r"[0-9a-f]{32}|none", "32 hex digits or none"))]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


# settings that may change when a run is resumed: none affects results; epochs can only be added
CHANGE_ON_RESUME = ("epochs", "device", "nproc", "workers", "cache", "cache_dir", "save_every", "log", "max_pixels")


_DATASET = (
    "Data set: auto is what --data holds, folder is one folder per class, images is photos without classes "
    "(`rkd distill`), list is a file that lists images."
)


ADVANCED = "Advanced"  # panels whose title starts with this are shown by --help-all only

# flags of trainings that --help shows, in this order; all others are advanced
_COMMON = (
    "teacher",
    "dataset",
    "data",
    "base",
    "weights",
    "embedding_size",
    "l2normalize",
    "loss",
    "dist_ratio",
    "angle_ratio",
    "epochs",
    "batch",
    "lr",
    "save_dir",
    "resume",
    "overwrite",
    "device",
)


# advanced flags of the other commands with many flags
_RARE = (
    "resize",
    "image_size",
    "workers",
    "cache",
    "cache_dir",
    "skip_damaged",
    "batch",
    "precision",
    "base",
    "embedding_size",
    "calibration_images",
    "num_image_per_class",
    "compile",
    "nproc",
    "l2normalize",
)

SPELLINGS = {"teacher_load": "teacher"}  # {alias: field}, for flags, configuration files and older runs


def flag_name(field: str) -> str:
    """``num_image_per_class`` -> ``--num-image-per-class``."""
    return "--" + field.replace("_", "-")


def one_spelling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace aliases by the names of their fields; a ValueError if a field is given under both."""
    renamed = {name: value for name, value in values.items() if name not in SPELLINGS}
    for other, name in SPELLINGS.items():
        if values.get(other) is None:
            continue
        if renamed.get(name) is not None:
            raise ValueError(f"{flag_name(name)} and {flag_name(other)} are the same flag. Give one of them.")
        renamed[name] = str(values[other])
    return renamed


def _shared(panel: str, help: str) -> Any:
    """A flag of several commands, each with its own default."""
    return Field(description=help, json_schema_extra={"panel": panel})


def _flag(default: Any, panel: str, help: str) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel})


DecodeWorkers = Annotated[
    Workers | None, _shared("Data", "Number of processes that decode images. 0: decode in the main process.")
]
ReadCache = Annotated[Cache, _shared("Data", "Cache for decoded images. auto: read an existing file, write none.")]
ReadCacheFolder = Annotated[
    File | None, _shared("Data", "Folder of the file of decoded images. Default: the user's cache folder.")
]
ReadBatch = Annotated[Count, _shared("Data", "Number of images in a batch. Changes only speed and memory.")]
SkipDamaged = Annotated[bool, _shared("Data", "Leave out damaged images. Decodes all images first.")]
MaxPixels = Annotated[
    int,
    Field(ge=1, le=2**31 - 1),
    _shared("Data", "Largest image to decode, in pixels (width times height). A larger one is an error."),
]
DeviceName = Annotated[Device, _shared("Run", "Device: auto, cpu, cuda or cuda:N.")]
OverwriteOut = Annotated[bool, _shared("Run", "Overwrite an existing --out file.")]

# excluded from settings.json, because it is not a property of the run
Overwrite = Annotated[
    bool,
    Field(description="Overwrite an existing run in --save-dir.", json_schema_extra={"panel": "Run"}, exclude=True),
]

Processes = Annotated[
    int,
    Field(
        ge=1,
        le=256,
        description="Number of processes on this machine, one per GPU (torchrun works too). Losses use the whole "
        "batch; batch norm uses the images of each process.",
        json_schema_extra={"panel": "Run"},
        exclude=True,
    ),
]

Resume = Annotated[
    bool,
    Field(
        description="Resume the run in --save-dir with its settings. These may differ: "
        f"{', '.join(map(flag_name, CHANGE_ON_RESUME))}.",
        json_schema_extra={"panel": "Run"},
        exclude=True,
    ),
]


# order of panels in --help
_PANELS = (
    "Data",
    "Source",
    "Model",
    "Measure",
    "Loss",
    "Distillation",
    "Teacher's space",
    "Optimization",
    "Run",
)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)


class _TrainSettings(_Settings):
    """Settings of both trainings. Subclasses override defaults."""

    dataset: AnyDataset = _flag("auto", "Data", _DATASET)
    data: File = _flag(
        Path("data"),
        "Data",
        "Directory of the images (of the class folders), or a list: .csv, .tsv, .jsonl or .parquet.",
    )
    labels: bool = _flag(True, "Data", "Use class labels. --no-labels trains from the teacher alone.")
    resize: Side = _flag(256, "Data", "Side of the square that every image is resized to first, in pixels.")
    image_size: Side = _flag(224, "Data", "Side of the crop that the network sees, in pixels.")
    fit: Literal["auto", "square", "crop", "pad"] = _flag(
        "auto",
        "Data",
        "How an image becomes a square: square squashes it, crop takes its middle, pad adds a border. auto: square for "
        f"the published data sets, {fit_of('folder')} for your own images.",
    )
    max_pixels: MaxPixels = MAX_PIXELS
    crop: Literal["random", "resized"] = _flag(
        "random",
        "Data",
        "Training crops: random position at --image-size, or random area and aspect ratio (3:4 to 4:3) resized to it.",
    )
    crop_scale: Annotated[float, Field(gt=0, le=1)] = _flag(
        0.25, "Data", "Smallest share of the image in a resized crop."
    )
    jitter: Annotated[float, Field(ge=0, le=1)] = _flag(
        0.0, "Data", "Range of random brightness, contrast and saturation: factors of 1 ± this."
    )
    workers: DecodeWorkers = None
    cache: Cache = _flag(
        "auto",
        "Data",
        "Cache for decoded images: a file (disk), device memory, or none. auto: what fits.",
    )
    cache_dir: File | None = _flag(
        None, "Data", "Folder for the file of decoded images. Default: the user's cache folder."
    )
    skip_damaged: SkipDamaged = False

    base: Base = _flag("resnet50", "Model", "Backbone: a torchvision network, inception_v1bn, or timm:NAME.")
    weights: str = _flag("imagenet", "Model", "Initial weights: imagenet, none (random), or a file.")
    embedding_size: Size = _flag(512, "Model", "Number of dimensions of an embedding.")
    l2normalize: bool = _flag(True, "Model", "Scale embeddings to unit length.")
    load: File | None = _flag(None, "Model", "Checkpoint of the same network to start from, in place of --weights.")
    matryoshka: Sizes = _flag(
        (), "Model", "Also train these prefixes of the embedding, for example 16,32,64 (Matryoshka)."
    )

    optimizer: Literal["adam", "adamw"] = _flag(
        "adam", "Optimization", "Optimizer: Adam, or Adam with decoupled weight decay (AdamW)."
    )
    lr: Positive = _flag(1e-5, "Optimization", "Peak learning rate.")
    schedule: Literal["step", "cosine"] = _flag(
        "step",
        "Optimization",
        "Schedule of the learning rate: steps at --lr-decay-epochs, or a cosine to 0 at --epochs.",
    )
    warmup: Annotated[int, Field(ge=0, le=10**9)] = _flag(
        0, "Optimization", "Number of epochs in which the learning rate rises from 0."
    )
    lr_decay_epochs: Epochs = _flag(
        (25, 30, 35), "Optimization", "Epochs at which --schedule step lowers the learning rate."
    )
    lr_decay_gamma: Positive = _flag(0.5, "Optimization", "Factor of the learning rate at --lr-decay-epochs.")
    weight_decay: Ratio = _flag(
        1e-5, "Optimization", "Weight decay: added to the gradient (adam) or subtracted from the weights (adamw)."
    )
    epochs: Count = _flag(40, "Optimization", "Number of epochs to train.")
    iter_per_epoch: Count = _flag(100, "Optimization", "Number of batches in an epoch.")
    batch: Annotated[int, Field(ge=2, le=10**6)] = _flag(
        128, "Optimization", "Number of images in a batch. If not given, smaller data sets get smaller batches."
    )
    num_image_per_class: Count = _flag(
        5, "Optimization", "Number of images per class in a batch. Not used without labels."
    )
    chunk: Annotated[int, Field(ge=0, le=10**6)] = _flag(
        0,
        "Optimization",
        "Process each batch in chunks of N images (GradCache): less memory, one extra forward pass. Batch"
        " norm uses each chunk. 0: off.",
    )
    sync_bn: bool = _flag(
        False,
        "Optimization",
        "Compute batch norm over the images of all processes.",
    )
    freeze_bn: bool = _flag(
        False,
        "Optimization",
        "Keep the running statistics of batch norms as they were loaded, in training too; their weights still learn.",
    )
    backbone_lr: Positive | None = _flag(
        None, "Optimization", "Learning rate of the backbone; without it, --lr, at which the embedding layer learns."
    )
    seed: Seed = _flag(
        1, "Optimization", "Seed of all randomness. 1,2,3 trains one run per seed, in subfolders of --save-dir."
    )

    save_dir: File = _flag(Path("teacher"), "Run", "Directory for the files of the run.")
    overwrite: Overwrite = False
    resume: Resume = False
    save_every: Count = _flag(600, "Run", "Seconds between saves within an epoch, for --resume.")
    log: Loggers = _flag((), "Run", "Also write steps.csv or tensorboard/ in --save-dir.")
    device: DeviceName = "auto"
    nproc: Processes = 1
    precision: Literal["auto", "fp32", "tf32", "bf16"] = _flag(
        "auto", "Run", "Precision of the networks. Losses use fp32 or better. auto: bf16 on CUDA."
    )
    compile: bool = _flag(
        False, "Run", "Compile the networks with torch.compile. Takes minutes at the start and needs a C++ compiler."
    )
    recall: Ks = _flag((1, 2, 4, 8), "Run", "Values of K for Recall@K. 1 is always included.")
    eval_every: Count = _flag(1, "Run", "Number of epochs between evaluations. The last epoch is always evaluated.")
    eval_train: bool = _flag(True, "Run", "Also measure the training split.")
    select_on: Literal["eval", "val"] = _flag(
        "eval",
        "Run",
        "Split that picks the best epoch: eval, as in the paper, or val, a part of the training split "
        "that is not trained on (the last fifth of its classes; without labels, a tenth of its photos).",
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.image_size > self.resize:
            raise ValueError(f"--image-size {self.image_size}: must be at most --resize {self.resize}")
        return self

    @model_validator(mode="after")
    def _chunk_is_some(self) -> Self:
        if 0 < self.chunk < 4:  # the last chunk could have one image, too few for batch norm
            raise ValueError(f"--chunk {self.chunk}: must be at least 4, or 0 for the whole batch")
        if self.sync_bn and (self.chunk or self.compile):
            other = "--chunk" if self.chunk else "--compile"
            raise ValueError(f"--sync-bn: cannot be combined with {other}. Omit one of them.")
        if self.sync_bn and self.freeze_bn:
            raise ValueError("--sync-bn: has no effect with --freeze-bn. Omit one of them.")
        return self

    @model_validator(mode="after")
    def _prefixes_fit(self) -> Self:
        if self.matryoshka and self.matryoshka[-1] > self.embedding_size:
            raise ValueError(
                f"--matryoshka: {self.matryoshka[-1]} is larger than --embedding-size {self.embedding_size}"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup >= self.epochs:
            raise ValueError(f"--warmup {self.warmup}: must be less than --epochs {self.epochs}")
        return self

    @property
    def sides(self) -> tuple[int, int]:
        """(resize, image_size)."""
        return self.resize, self.image_size

    @property
    def without_labels(self) -> str:
        """The flag that turns labels off, if any."""
        return "--dataset images" if self.dataset == "images" else "" if self.labels else "--no-labels"


def _check_triplets(batch: int, images_per_class: int) -> None:
    if images_per_class < 2 or batch <= images_per_class:
        raise ValueError(
            f"--batch {batch} with --num-image-per-class {images_per_class}: contains no triplets. Use two or more "
            "images per class, and more than one class."
        )


class TeacherSettings(_TrainSettings):
    """``rkd train-teacher``."""

    command: ClassVar[str] = "train-teacher"

    freeze_base: bool = _flag(
        False, "Model", "Train only a linear layer, on features that are computed once on --views crops of each image."
    )
    views: Count = _flag(8, "Model", "Number of crops per image for --freeze-base.")
    loss: Loss = _flag("l2_triplet", "Loss", "Metric-learning loss.")
    sample: Sample = _flag("distance", "Loss", "Sampling of negatives for triplet and contrastive losses.")
    margin: Ratio = _flag(0.2, "Loss", "Margin of triplet and contrastive losses.")
    ms_alpha: Positive = _flag(2.0, "Loss", "Scale of positives in multi_similarity.")
    ms_beta: Positive = _flag(50.0, "Loss", "Scale of negatives in multi_similarity.")
    ms_base: Annotated[float, Field(ge=-1, le=1)] = _flag(
        0.5, "Loss", "Cosine threshold between positives and negatives in multi_similarity."
    )
    ms_epsilon: Ratio = _flag(0.1, "Loss", "Mining margin of multi_similarity.")
    proxy_alpha: Positive = _flag(32.0, "Loss", "Scale of proxy_anchor.")
    proxy_margin: Ratio = _flag(0.1, "Loss", "Margin of proxy_anchor.")
    proxy_lr_ratio: Positive = _flag(100.0, "Loss", "Learning rate of class proxies, as a multiple of --lr.")
    softmax_temperature: Positive = _flag(0.05, "Loss", "Temperature of softmax.")
    arcface_scale: Positive = _flag(64.0, "Loss", "Scale of arcface.")
    arcface_margin: Annotated[float, Field(ge=0, lt=3.14)] = _flag(
        0.5, "Loss", "Angular margin of arcface, in radians."
    )
    ap_temperature: Positive = _flag(0.01, "Loss", "Temperature of the sigmoid in smooth_ap.")

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.without_labels:
            raise ValueError(f"{self.without_labels}: `rkd train-teacher` needs labels. Use `rkd distill`.")
        if self.freeze_base and self.jitter:
            raise ValueError("--jitter: --freeze-base computes features once, without augmentation. Omit one of them.")
        if self.freeze_base and (self.freeze_bn or self.backbone_lr):
            flag = "--freeze-bn" if self.freeze_bn else "--backbone-lr"
            raise ValueError(f"{flag}: has no effect with --freeze-base, which does not train the backbone. Omit it.")
        if self.loss not in ("proxy_anchor", "softmax", "arcface"):  # these use proxies instead of pairs
            _check_triplets(self.batch, self.num_image_per_class)
        return self


class DistillSettings(_TrainSettings):
    """``rkd distill``."""

    command: ClassVar[str] = "distill"
    ratios: ClassVar[tuple[str, ...]] = (  # the weights of its losses
        "dist_ratio", "angle_ratio", "triplet_ratio", "dark_ratio", "at_ratio", "fitnet_ratio", "relaxed_ratio",
        "pkt_ratio", "match_ratio", "csd_ratio", "queue_ratio", "d3_ratio",
    )  # fmt: skip

    base: Base = _flag("resnet18", "Model", "Backbone: a torchvision network, inception_v1bn, or timm:NAME.")
    embedding_size: Size = _flag(64, "Model", "Number of dimensions of an embedding.")
    l2normalize: bool = _flag(False, "Model", "Scale embeddings to unit length.")
    lr: Positive = _flag(1e-4, "Optimization", "Peak learning rate.")
    lr_decay_epochs: Epochs = _flag(
        (40, 60), "Optimization", "Epochs at which --schedule step lowers the learning rate."
    )
    lr_decay_gamma: Positive = _flag(0.1, "Optimization", "Factor of the learning rate at --lr-decay-epochs.")
    epochs: Count = _flag(80, "Optimization", "Number of epochs to train.")
    save_dir: File = _flag(Path("student"), "Run", "Directory for the files of the run.")

    teacher: Teacher = Field(
        description="Teacher: a run directory, a checkpoint, timm:NAME, torchvision:NAME or a vectors file. Also "
        "spelled --teacher-load.",
        json_schema_extra={"panel": "Distillation"},
    )
    teacher_weights: File | None = _flag(
        None, "Distillation", "Weights file of a pretrained teacher. Default: downloaded once."
    )
    teacher_views: Annotated[int, Field(ge=0, le=10**6)] = _flag(
        0,
        "Distillation",
        "Compute the teacher once, on this many crops of each image, and train the student on those "
        "crops. 0: run the teacher on each batch.",
    )
    views_precision: Literal["fp16", "fp32"] = _flag(
        "fp16", "Distillation", "Precision of the teacher's stored embeddings (--teacher-views)."
    )
    mixup: Annotated[float, Field(ge=0, le=1e6)] = _flag(
        0.0,
        "Data",
        "Alpha of mixup: blends of two images in proportions from Beta(alpha, alpha).",
    )
    dist_ratio: Ratio = _flag(1.0, "Distillation", "Weight of the distance-wise loss RKD-D.")
    angle_ratio: Ratio = _flag(2.0, "Distillation", "Weight of the angle-wise loss RKD-A.")
    triplet_ratio: Ratio = _flag(0.0, "Distillation", "Weight of the triplet loss on labels.")
    triplet_sample: Sample = _flag("distance", "Distillation", "Sampling of negatives for the triplet loss.")
    triplet_margin: Ratio = _flag(0.2, "Distillation", "Margin of the triplet loss.")

    dark_ratio: Ratio = _flag(0.0, "Distillation", "Weight of hard DarkRank.")
    dark_alpha: Positive = _flag(3.0, "Distillation", "Scale of distances in DarkRank.")
    dark_beta: Positive = _flag(3.0, "Distillation", "Exponent of distances in DarkRank.")
    at_ratio: Ratio = _flag(0.0, "Distillation", "Weight of attention transfer on the last three of four stages.")
    fitnet_ratio: Ratio = _flag(
        0.0, "Distillation", "Weight of FitNet hints on the last three of four stages and the embedding."
    )
    hint_epochs: Annotated[int, Field(ge=0)] = _flag(
        0, "Distillation", "Number of first epochs with FitNet hints only; the other losses follow. 0: all together."
    )
    relaxed_ratio: Ratio = _flag(0.0, "Distillation", "Weight of the relaxed contrastive loss.")
    pkt_ratio: Ratio = _flag(0.0, "Distillation", "Weight of probabilistic knowledge transfer (PKT).")

    match_ratio: Ratio = _flag(
        0.0, "Teacher's space", "Weight of embedding matching. A learned projection joins different sizes."
    )
    match_kind: Literal["cosine", "squared"] = _flag("cosine", "Teacher's space", "Distance of --match-ratio.")
    csd_ratio: Ratio = _flag(0.0, "Teacher's space", "Weight of contextual similarity distillation (CSD).")
    csd_temperature: Positive = _flag(1.0, "Teacher's space", "Temperature of the student in CSD.")
    csd_teacher_temperature: Positive = _flag(0.01, "Teacher's space", "Temperature of the teacher in CSD.")
    csd_neighbors: Count = _flag(255, "Teacher's space", "Number of neighbors per image in CSD.")
    queue_ratio: Ratio = _flag(
        0.0, "Teacher's space", "Weight of the KL divergence over a queue of past teacher embeddings."
    )
    queue_temperature: Positive = _flag(0.07, "Teacher's space", "Temperature of --queue-ratio.")
    d3_ratio: Ratio = _flag(0.0, "Teacher's space", "Weight of decoupled differential distillation (D3still).")
    d3_neighbors: Count = _flag(9, "Teacher's space", "Number of neighbors per image in D3still.")
    d3_feature: Ratio = _flag(100.0, "Teacher's space", "Weight of feature matching within D3still.")
    d3_inconsistent: Ratio = _flag(5.0, "Teacher's space", "Weight of pairs in a different order within D3still.")
    d3_consistent: Ratio = _flag(1.0, "Teacher's space", "Weight of pairs in the same order within D3still.")
    queue_size: Annotated[int, Field(ge=1, le=65536)] | None = _flag(
        None,
        "Teacher's space",
        "Number of past teacher embeddings for CSD, the queue and D3still. Default: 2048, and 0 for D3still.",
    )

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        others = [name for name in self.active_ratios if name != "fitnet_ratio"]
        if not others and not self.fitnet_ratio:
            raise ValueError(f"all of {', '.join(map(flag_name, self.ratios))} are 0. Set at least one.")
        if self.triplet_ratio and self.without_labels:
            raise ValueError(
                f"--triplet-ratio {self.triplet_ratio:g}: needs labels, but {self.without_labels} is given. Omit one "
                "of them."
            )
        if self.triplet_ratio:
            _check_triplets(self.batch, self.num_image_per_class)
        if self.mixup and self.triplet_ratio:
            raise ValueError("--mixup: blended images have no label for --triplet-ratio. Omit one of them.")
        if self.hint_epochs and not self.fitnet_ratio:
            raise ValueError("--hint-epochs: needs --fitnet-ratio. Add it, or omit --hint-epochs.")
        if self.hint_epochs and self.epochs > self.hint_epochs and not others:
            raise ValueError(f"--hint-epochs {self.hint_epochs}: no loss remains for later epochs. Add another ratio.")
        return self

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.teacher_weights and not self.teacher.startswith(("timm:", "torchvision:")):
            raise ValueError(f"--teacher-weights: {self.teacher} contains its weights. Omit the flag.")
        teacher = Path(self.teacher)  # a file or a run directory
        if self.save_dir.resolve() in (teacher.resolve(), teacher.parent.resolve()):
            raise ValueError(f"--save-dir {self.save_dir}: contains the teacher {self.teacher}. Choose another.")
        return self

    @model_validator(mode="after")
    def _vectors_alone(self) -> Self:
        for flag, ratio in (("--at-ratio", self.at_ratio), ("--fitnet-ratio", self.fitnet_ratio)):
            if ratio and self.teacher_views:
                raise ValueError(f"{flag}: feature maps are not cached. Use --teacher-views 0.")
        if self.mixup and self.teacher_views:
            raise ValueError("--mixup: blended images are not cached. Use --teacher-views 0.")
        return self

    @property
    def active_ratios(self) -> list[str]:
        """The fields of the losses that are learned."""
        return [name for name in self.ratios if getattr(self, name)]

    @property
    def direction_flags(self) -> tuple[str, ...]:
        """The losses in use that ignore the length of the teacher's embeddings."""
        names = ["relaxed", "pkt", *(["match"] if self.match_kind == "cosine" else []), "csd", "queue", "d3"]
        return tuple(flag_name(f"{name}_ratio") for name in names if getattr(self, f"{name}_ratio"))


class ImageSettings(_Settings):
    """Settings of commands that run a network on images. Defaults of None are read from the checkpoint."""

    data: File = _flag(
        Path("data"),
        "Data",
        "Directory of the images (of the class folders), or a list: .csv, .tsv, .jsonl or .parquet.",
    )
    resize: Side | None = _flag(None, "Data", "Side of the square to resize to. Default: as in training.")
    image_size: Side | None = _flag(None, "Data", "Side of the crop. Default: as in training.")
    fit: Fit | None = _flag(
        None, "Data", "How an image becomes a square: squashed, its middle, or padded. Default: as in training."
    )
    max_pixels: MaxPixels = MAX_PIXELS
    workers: DecodeWorkers = None
    cache: ReadCache = "auto"
    cache_dir: ReadCacheFolder = None
    skip_damaged: SkipDamaged = False
    batch: ReadBatch = 128

    weights: File | None = _flag(None, "Model", "Weights file of a pretrained network. Default: downloaded once.")
    l2normalize: bool | None = _flag(
        None,
        "Model",
        "Scale embeddings to unit length. Default: the checkpoint's setting; yes for a pretrained "
        "network, no for a vectors file.",
    )


class InferenceSettings(ImageSettings):
    """Settings of commands that embed images."""

    device: DeviceName = "auto"
    precision: Precision = _flag("auto", "Run", "Precision of the network. auto: bf16 on CUDA.")


class EvaluateSettings(InferenceSettings):
    """``rkd evaluate``."""

    dataset: AnyDataset | None = _flag(
        None, "Data", "Data set to evaluate on; auto: what --data holds. Default: that of the checkpoint."
    )
    base: Base | None = _flag(None, "Model", "Expected backbone: an error if the checkpoint has another.")
    embedding_size: Size | None = _flag(
        None, "Model", "Expected number of dimensions: an error if the checkpoint has another."
    )

    gallery: str | None = _flag(
        None,
        "Measure",
        "Also measure asymmetric Recall@K: each model's queries among the embeddings of this model or file.",
    )
    nproc: Processes = 1
    dims: Sizes = _flag((), "Measure", "Also measure these prefixes of the embedding, for example 16,32.")
    vectors: Vectors = _flag(
        ("float",),
        "Measure",
        "Storage of the gallery to measure: float, int8, binary (Hamming distance, and rescored).",
    )
    recall: Ks = _flag((1, 2, 4, 8), "Measure", "Values of K for Recall@K.")


class EmbedSettings(InferenceSettings):
    """``rkd embed``."""

    dataset: Dataset | None = _flag(None, "Data", "Data set to embed. Default: all images below --data.")
    pca: str | None = _flag(
        None, "Model", "Reduce to this many principal components, or by the map stored in this vectors file."
    )
    out: File = Field(
        description="File to write: .npy (paths in a second file), .npz, .safetensors or .parquet.",
        json_schema_extra={"panel": "Run"},
    )
    overwrite: OverwriteOut = False
    nproc: Processes = 1
    vectors: Literal["float", "float16", "int8", "binary"] = _flag(
        "float", "Model", "Storage of a value: 32 bits, 16 bits, 8 bits with a scale per dimension, or its sign."
    )

    @property
    def pca_size(self) -> int | None:
        """--pca as a number of components."""
        return int(self.pca) if self.pca and _is_number(self.pca) else None

    @property
    def pca_file(self) -> Path | None:
        """--pca as a vectors file whose PCA is applied."""
        return Path(self.pca) if self.pca and not _is_number(self.pca) else None

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
        return self


class SearchSettings(InferenceSettings):
    """``rkd search``."""

    gallery: File = Field(
        description="Folder of images to search, or a vectors file (with its images below --data).",
        json_schema_extra={"panel": "Data"},
    )
    query: File | None = _flag(None, "Data", "Image to search for, or a folder of images.")
    top: Count = _flag(5, "Measure", "Number of answers per query.")
    duplicates: bool = _flag(False, "Measure", "Find near-duplicates in the gallery, in place of --query.")
    threshold: Annotated[float, Field(ge=-1, le=1)] = _flag(0.95, "Measure", "Lowest cosine of two near-duplicates.")
    exact: bool = _flag(False, "Measure", "Compare with every image, also where faiss would be faster.")
    asymmetric: bool = _flag(
        False,
        "Measure",
        "Allow a vectors file of another network that shares this model's space, for example its teacher.",
    )
    html: File | None = _flag(None, "Run", "Also write the answers as an HTML page.")
    overwrite: bool = _flag(False, "Run", "Overwrite an existing --html file.")

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if (self.query is not None) == self.duplicates:
            problem = "both are given. Omit one of them." if self.duplicates else "one is required."
            raise ValueError(f"--query or --duplicates: {problem}")
        return self


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


class ExportSettings(ImageSettings):
    """``rkd export``, which runs on the CPU in float32."""

    to: Literal["onnx", "torch"] | None = _flag(
        None, "Model", "Format: ONNX or torch.export. Default: by the suffix of --out."
    )
    int8: bool = _flag(False, "Model", "Quantize to int8 (ONNX only): a fourth of the size, faster on most CPUs.")
    calibration_images: Count = _flag(256, "Model", "Number of training images that calibrate --int8.")
    dataset: AnyDataset | None = _flag(
        None, "Data", "Data set to compare on; auto: what --data holds. Default: that of the checkpoint."
    )
    recall: Ks = _flag((1, 2, 4, 8), "Measure", "Values of K for Recall@K.")
    teacher_space: bool = _flag(
        False, "Model", "Give embeddings in the teacher's space: through the projection that --match-ratio learned."
    )
    out: File = Field(description="File to write: .onnx or .pt2.", json_schema_extra={"panel": "Run"})
    overwrite: OverwriteOut = False

    @model_validator(mode="after")
    def _agree(self) -> Self:
        suffix = {"onnx": ".onnx", "torch": ".pt2"}.get(self.to or "")
        if self.out.suffix not in ((suffix,) if suffix else (".onnx", ".pt2")):
            to = f" with --to {self.to}" if self.to else ""
            raise ValueError(f"--out {self.out}: must end in {suffix or '.onnx or .pt2'}{to}")
        if self.int8 and self.out.suffix != ".onnx":
            raise ValueError("--int8: needs ONNX. Name an --out that ends in .onnx.")
        return self


class CheckSettings(_Settings):
    """``rkd check-data``."""

    dataset: AnyDataset = _flag("auto", "Data", _DATASET)
    data: File = _flag(
        Path("data"),
        "Data",
        "Directory of the images (of the class folders), or a list: .csv, .tsv, .jsonl or .parquet.",
    )
    max_pixels: MaxPixels = MAX_PIXELS
    workers: DecodeWorkers = None


class CompareSettings(_Settings):
    """``rkd compare``."""

    csv: File | None = _flag(None, "Run", "Also write the table as CSV, one row per run.")
    html: File | None = _flag(None, "Run", "Also write the table as an HTML page.")
    overwrite: bool = _flag(False, "Run", "Overwrite existing --csv and --html files.")


class ReportSettings(_Settings):
    """``rkd report``."""

    data: File | None = _flag(None, "Data", "Directory of the images. Default: that of the runs.")
    max_pixels: MaxPixels = MAX_PIXELS
    workers: DecodeWorkers = None
    cache: ReadCache = "auto"
    cache_dir: ReadCacheFolder = None
    skip_damaged: SkipDamaged = False
    batch: ReadBatch = 128
    gallery: Annotated[int, Field(ge=0, le=100)] = _flag(
        6, "Measure", "Number of queries of each kind (hardest, easiest, ...) in the gallery. 0: no gallery."
    )
    map: Literal["pca", "tsne", "umap"] = _flag(
        "pca", "Measure", "Projection of the map. tsne needs scikit-learn, umap needs umap-learn."
    )
    seed: Seed = _flag(1, "Measure", "Seed of random queries and of the points and classes on the map.")
    out: File = _flag(Path("report.html"), "Run", "File to write.")
    overwrite: OverwriteOut = False
    device: DeviceName = "auto"
    precision: Precision = _flag("auto", "Run", "Precision of the networks. auto: bf16 on CUDA.")

    def inference(self, data: Path) -> InferenceSettings:
        """The settings to embed the images in ``data``."""
        common = self.model_fields_set & InferenceSettings.model_fields.keys() - {"data"}
        return InferenceSettings(data=data, **{name: getattr(self, name) for name in common})


class PushSettings(_Settings):
    """``rkd push``."""

    private: bool = _flag(True, "Run", "Make a new repository private.")


class CacheSettings(_Settings):
    """``rkd cache``."""

    cache_dir: File | None = _flag(None, "Data", "Cache folder. Default: the user's cache folder, or RKD_CACHE_DIR.")
    clear: bool = _flag(False, "Run", "Remove the files. Runs that read one continue.")


class ImportSettings(_Settings):
    """``rkd import-checkpoint``: facts that a state dict does not contain."""

    base: Base = _flag("resnet50", "Model", "Backbone of the saved network.")
    embedding_size: Size = _flag(512, "Model", "Number of dimensions of its embedding.")
    l2normalize: bool = _flag(True, "Model", "Set if it scales embeddings to unit length.")
    resize: Side = _flag(256, "Model", "Side that its images were resized to, in pixels.")
    image_size: Side = _flag(224, "Model", "Side of the crop that it was trained on, in pixels.")
    dataset: Dataset = _flag("cub200", "Model", "Data set that it was trained on.")
    output: File | None = _flag(None, "Run", "File to write. Default: next to FILE, as .safetensors.")
    overwrite: Overwrite = False


class DemoSettings(_Settings):
    """``rkd demo``."""

    data: File = _flag(Path("data"), "Data", "Directory for the drawn images (in their own folder).")
    workers: DecodeWorkers = None
    seed: Seed = _flag(1, "Run", "Seed of all trainings. The images are always the same.")
    save_dir: File = _flag(Path("demo"), "Run", "Directory for the runs.")
    overwrite: Overwrite = False
    device: DeviceName = "auto"


class BenchSettings(_Settings):
    """``rkd bench``."""

    dataset: Dataset | None = _flag(None, "Data", "Data set to measure on. Default: drawn JPEGs of CUB's size.")
    data: File = _flag(Path("data"), "Data", "Directory of the images, or for drawn ones.")
    resize: Side = _flag(72, "Data", "Side that images are resized to, in pixels.")
    image_size: Side = _flag(64, "Data", "Side of the crop, in pixels.")
    workers: Workers = _flag(2, "Data", "Number of decoding processes of the textbook's DataLoader.")
    teacher_base: Base = _flag("resnet18", "Model", "Backbone of the teacher.")
    base: Base = _flag("resnet18", "Model", "Backbone of the student.")
    batch: Annotated[int, Field(ge=2, le=10**6)] = _flag(64, "Optimization", "Number of images in a batch.")
    num_image_per_class: Count = _flag(5, "Optimization", "Number of images per class in a batch.")
    iter_per_epoch: Count = _flag(100, "Optimization", "Number of batches in an epoch.")
    lr: Positive = _flag(1e-4, "Optimization", "Learning rate of Adam.")
    seed: Seed = _flag(1, "Run", "Seed of all randomness.")
    repeats: Count = _flag(3, "Run", "Number of times to measure each side, in turn. 1: a first figure, sooner.")
    quick: bool = _flag(False, "Run", "Use toy sizes, to test that it works.")
    out: File | None = _flag(None, "Run", "Also write the JSON into this file, replacing it.")
    device: DeviceName = "auto"
    precision: Precision = _flag(
        "auto", "Run", "Precision of our networks; the textbook's use fp32. auto: bf16 on CUDA."
    )
    compile: bool = _flag(False, "Run", "Compile our networks with torch.compile.")


class DownloadSettings(_Settings):
    """``rkd download-cub``. No ``--url`` means the official archive."""

    data: File = _flag(Path("data"), "Data", "Directory for CUB_200_2011.")
    archive: File | None = _flag(None, "Source", "Local CUB_200_2011.tgz to unpack, without a download.")
    url: str | None = _flag(None, "Source", "Address of a mirror of the official archive.")
    md5: Annotated[str, AfterValidator(partial(_matching, r"[0-9a-f]{32}|none", "32 hex digits or none"))] | None = (
        _flag(None, "Source", "Expected md5 of the download, or none. Default: the official one.")
    )


def panel_of(field: FieldInfo) -> str:
    """The panel of a field in --help."""
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra["panel"])


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The values of a Literal field; empty for other fields."""
    for kind in (field.annotation, *(get_args(field.annotation) if field.default is None else ())):
        if get_origin(kind) is Literal:
            return get_args(kind)
    return ()


def default_text(field: FieldInfo) -> str:
    """The default of a field as help and manual show it; empty if there is none."""
    default = "required" if field.is_required() else field.default
    if isinstance(default, bool):
        return "yes" if default else "no"
    return ",".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else f"{default}"


def help_text(field: FieldInfo) -> str:
    """The help of a field, with its choices."""
    choices = choices_of(field)
    return f"{field.description} One of {', '.join(choices)}." if choices else f"{field.description}"


def help_panels(model: type[BaseModel]) -> dict[str, str]:
    """{field: panel} of a command's settings, in the order of its help; ``ADVANCED`` panels are for ``--help-all``."""
    of = {name: panel_of(field) for name, field in model.model_fields.items()}
    ordered = sorted(of, key=lambda name: _PANELS.index(of[name]))
    if issubclass(model, _TrainSettings):
        common = [name for name in _COMMON if name in of]
        return dict.fromkeys(common, "Common") | {
            name: f"{ADVANCED}: {of[name].lower()}" for name in ordered if name not in common
        }
    rare = _RARE if issubclass(model, ImageSettings | BenchSettings | ReportSettings) else ()
    return {name: of[name] for name in ordered if name not in rare} | {
        name: ADVANCED for name in ordered if name in rare
    }


# settings of the commands, in the order of `rkd --help`
COMMANDS: dict[str, type[BaseModel]] = {
    "train-teacher": TeacherSettings,
    "distill": DistillSettings,
    "demo": DemoSettings,
    "evaluate": EvaluateSettings,
    "compare": CompareSettings,
    "report": ReportSettings,
    "bench": BenchSettings,
    "embed": EmbedSettings,
    "export": ExportSettings,
    "search": SearchSettings,
    "push": PushSettings,
    "check-data": CheckSettings,
    "download-cub": DownloadSettings,
    "import-checkpoint": ImportSettings,
    "cache": CacheSettings,
}

# Flags that only have an effect together with others. Without them, a flag on the command line is an error; a setting
# in a configuration file is not. A new flag must be listed here, or in tests/config/test_given.py as always effective.
_ON: tuple[object, ...] = ()  # any true value
_Condition = Collection[object]

_MINED = {"loss": ("l2_triplet", "l1_triplet", "contrastive")}
_PROXIES = {"loss": ("proxy_anchor", "softmax", "arcface")}
_MULTI_SIMILARITY, _PROXY_ANCHOR, _ARCFACE = ({"loss": (x,)} for x in ("multi_similarity", "proxy_anchor", "arcface"))
_CACHED: dict[str, _Condition] = {"cache": ("auto", "disk", "device")}
_TRAININGS_OF_BENCH = {"parts": ("step", "epoch")}
_MODELS_OF_BENCH = {"parts": ("step", "epoch", "recipe", "gpu")}

# {settings: {flag: {setting: values}}}: the flag has an effect if any of these settings has one of its values
NEEDS: dict[type[BaseModel], dict[str, Mapping[str, _Condition]]] = {
    _TrainSettings: {
        "crop_scale": {"crop": ("resized",)},
        "lr_decay_gamma": {"lr_decay_epochs": _ON},
        "sync_bn": {"nproc": range(2, 10**5)},
        "cache_dir": _CACHED | {"freeze_base": _ON, "teacher_views": _ON},  # cached there too
    },
    TeacherSettings: {
        "views": {"freeze_base": _ON},
        "sample": _MINED,
        "margin": _MINED,
        "ms_alpha": _MULTI_SIMILARITY,
        "ms_beta": _MULTI_SIMILARITY,
        "ms_base": _MULTI_SIMILARITY,
        "ms_epsilon": _MULTI_SIMILARITY,
        "proxy_alpha": _PROXY_ANCHOR,
        "proxy_margin": _PROXY_ANCHOR,
        "proxy_lr_ratio": _PROXIES,
        "softmax_temperature": {"loss": ("softmax",)},
        "arcface_scale": _ARCFACE,
        "arcface_margin": _ARCFACE,
        "ap_temperature": {"loss": ("smooth_ap",)},
    },
    DistillSettings: {
        "views_precision": {"teacher_views": _ON},
        "triplet_sample": {"triplet_ratio": _ON},
        "triplet_margin": {"triplet_ratio": _ON},
        "dark_alpha": {"dark_ratio": _ON},
        "dark_beta": {"dark_ratio": _ON},
        "match_kind": {"match_ratio": _ON},
        "csd_temperature": {"csd_ratio": _ON},
        "csd_teacher_temperature": {"csd_ratio": _ON},
        "csd_neighbors": {"csd_ratio": _ON},
        "queue_temperature": {"queue_ratio": _ON},
        "d3_neighbors": {"d3_ratio": _ON},
        "d3_feature": {"d3_ratio": _ON},
        "d3_inconsistent": {"d3_ratio": _ON},
        "d3_consistent": {"d3_ratio": _ON},
        "queue_size": {"csd_ratio": _ON, "queue_ratio": _ON, "d3_ratio": _ON},
    },
    EvaluateSettings: {"cache_dir": _CACHED},
    EmbedSettings: {"cache_dir": _CACHED},
    ExportSettings: {"cache_dir": _CACHED, "calibration_images": {"int8": _ON}},
    ReportSettings: {"cache_dir": _CACHED},
    SearchSettings: {
        "threshold": {"duplicates": _ON},
        "top": {"query": _ON},
        "exact": {"query": _ON},
        "overwrite": {"html": _ON},
    },
    CompareSettings: {"overwrite": {"csv": _ON, "html": _ON}},
    BenchSettings: {
        "dataset": {"parts": ("step", "epoch", "loader", "gpu")},
        "data": {"parts": ("step", "epoch", "loader", "gpu", "recipe")},
        "resize": _TRAININGS_OF_BENCH,
        "image_size": _TRAININGS_OF_BENCH,
        "workers": _TRAININGS_OF_BENCH,
        "teacher_base": _TRAININGS_OF_BENCH,
        "base": _TRAININGS_OF_BENCH,
        "batch": _TRAININGS_OF_BENCH,
        "num_image_per_class": _TRAININGS_OF_BENCH,
        "iter_per_epoch": {"parts": ("epoch",)},
        "lr": _TRAININGS_OF_BENCH,
        "repeats": {"parts": ("angle", "distance", "miners", "recall", "loader", "step", "epoch")},
        "precision": _MODELS_OF_BENCH,
        "compile": _MODELS_OF_BENCH,
    },
}

# the same for flags that have no effect with a setting
UNUSED_WITH: dict[type[BaseModel], dict[str, Mapping[str, _Condition]]] = {
    _TrainSettings: {
        "weights": {"load": _ON},
        "lr_decay_epochs": {"schedule": ("cosine",)},
        "lr_decay_gamma": {"schedule": ("cosine",)},
        "sync_bn": {"freeze_base": _ON},
        "compile": {"freeze_base": _ON},
    },
    DistillSettings: {
        "labels": {"dataset": ("images",)},
        "num_image_per_class": {"labels": (False,), "dataset": ("images",)},
        "recall": {"labels": (False,), "dataset": ("images",)},
    },
    DownloadSettings: {"url": {"archive": _ON}},
}


def without_effect(model: type[BaseModel], values: Mapping[str, object], flags: Iterable[str]) -> dict[str, str]:
    """{flag: reason} of the flags that have no effect with these values; dependencies on other settings are ignored."""
    found = {}
    for flag in flags:
        if not values.get(flag, True) and values[flag] == model.model_fields[flag].default:
            continue  # off by default
        for kind in model.__mro__:
            needed = NEEDS.get(kind, {}).get(flag, {})
            known = {name: some for name, some in needed.items() if name in values}
            if known and not any(_holds(values[name], some) for name, some in known.items()):
                without = " or ".join(_shown(name, some) for name, some in known.items())
                found[flag] = f"has no effect without {without}. Add it, or omit {flag_name(flag)}."
            for name, some in UNUSED_WITH.get(kind, {}).get(flag, {}).items():
                if name in values and _holds(values[name], some):
                    found[flag] = f"has no effect with {_shown(name, some)}. Omit one of them."
    return found


def _holds(value: object, some: _Condition) -> bool:
    if isinstance(value, list | tuple) and some:
        return any(one in some for one in value)
    return value in some if some else bool(value)


def _shown(name: str, some: _Condition) -> str:
    flag = flag_name(name)
    if isinstance(some, range):
        return f"{flag} {some.start} or more"
    if some == (False,):
        return flag.replace("--", "--no-", 1)
    *most, last = map(str, some) if some else [""]
    values = f"{', '.join(most)} or {last}" if most else last
    return f"PART {values}" if name == "parts" else f"{flag} {values}".strip()
