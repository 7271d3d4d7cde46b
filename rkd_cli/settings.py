"""What can be set: every flag's name, type, default, bounds and help. Nothing else in the program has a default."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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

from rkd_cli.schemas import BASE, MAX_EMBEDDING, MAX_SIDE

Dataset = Literal["cub200", "cars196", "sop", "folder", "images", "demo"]
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
        raise ValueError(f"must rise from one to the next, got {','.join(map(str, values))}")
    return values


def _some_once(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ValueError("must name one at least, got nothing")
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
Workers = Annotated[int, Field(ge=0, le=256)]  # a process each
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
Base = Annotated[str, AfterValidator(partial(_matching, BASE, "the name of a network"))]
Device = Annotated[str, AfterValidator(partial(_matching, r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N"))]
Md5 = Annotated[str, AfterValidator(partial(_matching, r"[0-9a-f]{32}|none", "32 hex digits or none"))]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


# what may be another when a run goes on: none of it changes what is computed; epochs can only be added
CHANGE_ON_RESUME = ("epochs", "device", "nproc", "workers", "cache", "cache_dir", "save_every", "log")


_DATASET = "The images; folder: your own, one folder a class; images: your own without classes, for `rkd distill`."


# what trainings show first in --help, in this order; the rest comes under "Advanced"
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


def flag_name(field: str) -> str:
    """``num_image_per_class`` -> ``--num-image-per-class``."""
    return "--" + field.replace("_", "-")


def _shared(panel: str, help: str) -> Any:
    """What several commands say of a flag; each has its own default."""
    return Field(description=help, json_schema_extra={"panel": panel})


def _flag(default: Any, panel: str, help: str) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel})


DecodeWorkers = Annotated[Workers | None, _shared("Data", "Processes that decode images; 0: none beside.")]
ReadCache = Annotated[Cache, _shared("Data", "As in training; auto makes no file, but reads one that is there.")]
ReadCacheFolder = Annotated[
    File | None, _shared("Data", "Where the file of decoded images is; without it, in the user's cache folder.")
]
ReadBatch = Annotated[Count, _shared("Data", "Images a batch; changes speed and memory alone.")]
SkipDamaged = Annotated[bool, _shared("Data", "Leave images out that cannot be read; decodes all of them first.")]
DeviceName = Annotated[Device, _shared("Run", "auto, cpu, cuda or cuda:N.")]
OverwriteOut = Annotated[bool, _shared("Run", "Replace --out where it is there already.")]

# a wish of this moment, not a property of the run: settings.json leaves it out
Overwrite = Annotated[
    bool,
    Field(description="Replace a run that --save-dir holds already.", json_schema_extra={"panel": "Run"}, exclude=True),
]

Processes = Annotated[
    int,
    Field(
        ge=1,
        le=256,
        description="Processes on this machine, one a GPU, that share the images, as torchrun starts them on many "
        "machines too. Losses are of the whole batch; batch norm takes statistics of each share.",
        json_schema_extra={"panel": "Run"},
        exclude=True,
    ),
]

Resume = Annotated[
    bool,
    Field(
        description="Go on with the run in --save-dir; its settings hold, but for "
        f"{', '.join(map(flag_name, CHANGE_ON_RESUME))}.",
        json_schema_extra={"panel": "Run"},
        exclude=True,
    ),
]


# the order of groups in --help
_PANELS = (
    "Data",
    "Source",
    "Model",
    "Measure",
    "Loss",
    "Distillation",
    "Teacher's space",
    "Optimization",
    "Fidelity",
    "Run",
)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _TrainSettings(_Settings):
    """What both trainings share. The subclasses hold the defaults that differ."""

    dataset: Dataset = _flag("cub200", "Data", _DATASET)
    data: File = _flag(Path("data"), "Data", "Where the images are; for folder, the folder of class folders itself.")
    labels: bool = _flag(True, "Data", "Use the classes of the set; without, its images are photos, as in images.")
    resize: Side = _flag(256, "Data", "Side of the square every image is resized to first, in pixels.")
    image_size: Side = _flag(224, "Data", "Side of the crop the network sees, in pixels.")
    crop: Literal["random", "resized"] = _flag(
        "random",
        "Data",
        "Training crops: random places at --image-size; or resized, of random areas and aspect ratios (3:4 to 4:3), "
        "brought to it.",
    )
    crop_scale: Annotated[float, Field(gt=0, le=1)] = _flag(
        0.25, "Data", "Smallest share of an image that a resized crop shows; the largest is all of it."
    )
    jitter: Annotated[float, Field(ge=0, le=1)] = _flag(
        0.0, "Data", "How much brightness, contrast and saturation of training images vary: by factors 1 ± this."
    )
    workers: DecodeWorkers = None
    cache: Cache = _flag(
        "auto",
        "Data",
        "Decoded images: kept in a file (disk), on the device, or decoded anew each time (none). auto: what fits.",
    )
    cache_dir: File | None = _flag(
        None, "Data", "Where the file of decoded images goes; without it, into the user's cache folder."
    )
    skip_damaged: SkipDamaged = False

    base: Base = _flag(
        "resnet50", "Model", "Backbone: a torchvision classification network, inception_v1bn, timm:NAME."
    )
    weights: str = _flag("imagenet", "Model", "Weights to start from: imagenet, none (random), or a file.")
    embedding_size: Size = _flag(512, "Model", "Length of an embedding.")
    l2normalize: bool = _flag(True, "Model", "Scale embeddings to unit length.")
    load: File | None = _flag(None, "Model", "Start from this checkpoint of the same network instead of --weights.")
    matryoshka: Sizes = _flag(
        (), "Model", "Lengths, as 16,32,64: have the first so many numbers of an embedding be good ones too."
    )

    optimizer: Literal["adam", "adamw"] = _flag("adam", "Optimization", "Adam, or Adam with decoupled weight decay.")
    lr: Positive = _flag(1e-5, "Optimization", "Learning rate, the highest one.")
    schedule: Literal["step", "cosine"] = _flag(
        "step",
        "Optimization",
        "How the learning rate falls: at --lr-decay-epochs, or with every step along a cosine, to 0 at --epochs.",
    )
    warmup: Annotated[int, Field(ge=0, le=10**9)] = _flag(
        0, "Optimization", "Epochs in which the learning rate rises first, with every step."
    )
    lr_decay_epochs: Epochs = _flag((25, 30, 35), "Optimization", "Epochs at which the learning rate falls, by step.")
    lr_decay_gamma: Positive = _flag(0.5, "Optimization", "What the learning rate is multiplied by then.")
    weight_decay: Ratio = _flag(
        1e-5, "Optimization", "Weight decay: adam adds it to the gradient, adamw takes it off the weights."
    )
    epochs: Count = _flag(40, "Optimization", "Epochs to train.")
    iter_per_epoch: Count = _flag(100, "Optimization", "Batches an epoch.")
    batch: Annotated[int, Field(ge=2, le=10**6)] = _flag(
        128, "Optimization", "Images a batch; not given, fewer where the images fill no more."
    )
    num_image_per_class: Count = _flag(5, "Optimization", "Images of each class in a batch; without labels unused.")
    chunk: Annotated[int, Field(ge=0, le=10**6)] = _flag(
        0,
        "Optimization",
        "Have so many images in memory at once: those of a --batch pass in chunks, once more for their gradients, and "
        "losses are of all of them. Batch norm takes statistics of each chunk. 0: the batch.",
    )
    sync_bn: bool = _flag(
        False,
        "Optimization",
        "Of many processes: batch norm takes its statistics of all their images, not of each share.",
    )
    seed: Seed = _flag(
        1, "Optimization", "Seed of every random draw. 1,2,3 trains one after another, each below --save-dir."
    )

    save_dir: File = _flag(Path("teacher"), "Run", "Directory for the run's files.")
    overwrite: Overwrite = False
    resume: Resume = False
    save_every: Count = _flag(600, "Run", "Seconds after which a run is saved within an epoch, for --resume.")
    log: Loggers = _flag((), "Run", "Write curves for other programs too: steps.csv, tensorboard/ in --save-dir.")
    device: DeviceName = "auto"
    nproc: Processes = 1
    precision: Literal["auto", "fp32", "tf32", "bf16"] = _flag(
        "auto", "Run", "Of the networks; losses are in fp32. auto: bf16 on CUDA."
    )
    compile: bool = _flag(
        False, "Run", "Compile the networks with torch.compile; takes minutes first, needs a C++ compiler."
    )
    recall: Ks = _flag((1, 2, 4, 8), "Run", "The K of Recall@K; 1 is always among them, it picks the best epoch.")
    eval_every: Count = _flag(1, "Run", "Epochs from one evaluation to the next; the last epoch is always evaluated.")
    eval_train: bool = _flag(True, "Run", "Measure the training classes (or photos) too.")
    select_on: Literal["eval", "val"] = _flag(
        "eval",
        "Run",
        "Whose Recall@1 picks the best epoch: eval, the evaluation classes, as in the paper; or val, the last fifth of "
        "the training classes (two or more), which are then not trained on. Without labels: whose overlap@10 with the "
        "teacher, and a tenth of the training photos.",
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.image_size > self.resize:
            raise ValueError(f"--image-size {self.image_size} is larger than --resize {self.resize}")
        return self

    @model_validator(mode="after")
    def _chunk_is_some(self) -> Self:
        if 0 < self.chunk < 4:  # of which batch norm could be left with one
            raise ValueError(f"--chunk {self.chunk}: takes 4 images or more, or 0 for the whole batch")
        if self.sync_bn and (self.chunk or self.compile):
            other = "--chunk" if self.chunk else "--compile"
            raise ValueError(f"--sync-bn: does not go with {other}: leave one of them out")
        return self

    @model_validator(mode="after")
    def _prefixes_fit(self) -> Self:
        if self.matryoshka and self.matryoshka[-1] > self.embedding_size:
            raise ValueError(f"--matryoshka: {self.matryoshka[-1]} is above --embedding-size {self.embedding_size}")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup >= self.epochs:
            raise ValueError(f"--warmup {self.warmup} leaves none of the {self.epochs} --epochs: warm up for fewer")
        return self

    @property
    def sides(self) -> tuple[int, int]:
        """What images are resized and cropped to."""
        return self.resize, self.image_size

    @property
    def without_labels(self) -> str:
        """The flag that says so, if one does."""
        return "--dataset images" if self.dataset == "images" else "" if self.labels else "--no-labels"


def _check_triplets(batch: int, images_per_class: int) -> None:
    if images_per_class < 2 or batch <= images_per_class:
        raise ValueError(
            f"--batch {batch} with --num-image-per-class {images_per_class} holds no triplet: it takes two images of a "
            "class and one of another"
        )


class TeacherSettings(_TrainSettings):
    """``rkd train-teacher``."""

    freeze_base: bool = _flag(
        False, "Model", "Train the linear layer alone, on features that the backbone computes once of --views crops."
    )
    views: Count = _flag(8, "Model", "Crops of each image whose features --freeze-base computes.")
    loss: Loss = _flag("l2_triplet", "Loss", "Metric-learning loss.")
    sample: Sample = _flag("distance", "Loss", "How triplets and contrastive pairs pick negatives.")
    margin: Ratio = _flag(0.2, "Loss", "Margin of triplets and contrastive pairs.")
    ms_alpha: Positive = _flag(2.0, "Loss", "multi_similarity: scale of positives.")
    ms_beta: Positive = _flag(50.0, "Loss", "multi_similarity: scale of negatives.")
    ms_base: Annotated[float, Field(ge=-1, le=1)] = _flag(1.0, "Loss", "multi_similarity: the cosine they part at.")
    ms_epsilon: Ratio = _flag(0.1, "Loss", "multi_similarity: margin of the pairs that are mined.")
    proxy_alpha: Positive = _flag(32.0, "Loss", "proxy_anchor: scale.")
    proxy_margin: Ratio = _flag(0.1, "Loss", "proxy_anchor: margin.")
    proxy_lr_ratio: Positive = _flag(100.0, "Loss", "Learning rate of class proxies, as a multiple of --lr.")
    softmax_temperature: Positive = _flag(0.05, "Loss", "softmax: temperature.")
    arcface_scale: Positive = _flag(64.0, "Loss", "arcface: scale.")
    arcface_margin: Annotated[float, Field(ge=0, lt=3.14)] = _flag(0.5, "Loss", "arcface: angular margin, in radians.")
    ap_temperature: Positive = _flag(0.01, "Loss", "smooth_ap: temperature of the sigmoid.")

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.without_labels:
            raise ValueError(f"{self.without_labels}: `rkd train-teacher` learns from labels: use `rkd distill`")
        if self.freeze_base and self.jitter:
            raise ValueError("--jitter: --freeze-base computes features once, of images as they are: leave one out")
        if self.loss not in ("proxy_anchor", "softmax", "arcface"):  # those compare with proxies
            _check_triplets(self.batch, self.num_image_per_class)
        return self


class DistillSettings(_TrainSettings):
    """``rkd distill``."""

    base: Base = _flag(
        "resnet18", "Model", "Backbone: a torchvision classification network, inception_v1bn, timm:NAME."
    )
    embedding_size: Size = _flag(64, "Model", "Length of an embedding.")
    l2normalize: bool = _flag(False, "Model", "Scale embeddings to unit length.")
    lr: Positive = _flag(1e-4, "Optimization", "Learning rate, the highest one.")
    lr_decay_epochs: Epochs = _flag((40, 60), "Optimization", "Epochs at which the learning rate falls, by step.")
    lr_decay_gamma: Positive = _flag(0.1, "Optimization", "What the learning rate is multiplied by then.")
    epochs: Count = _flag(80, "Optimization", "Epochs to train.")
    save_dir: File = _flag(Path("student"), "Run", "Directory for the run's files.")

    teacher: str | None = _flag(
        None,
        "Distillation",
        "What teaches (required): a checkpoint, timm:NAME or torchvision:NAME (pretrained), or a file of embeddings "
        "(.npz, .safetensors).",
    )
    teacher_load: File | None = _flag(None, "Distillation", "The same, for a checkpoint alone.")
    teacher_weights: File | None = _flag(
        None, "Distillation", "Weights of a pretrained teacher, in its library's format; without it, fetched once."
    )
    teacher_views: Annotated[int, Field(ge=0, le=10**6)] = _flag(
        0,
        "Distillation",
        "Compute the teacher once on so many crops of each image, and draw the student's crops among those. 0: anew "
        "for each batch.",
    )
    views_precision: Literal["fp16", "fp32"] = _flag("fp16", "Distillation", "How the teacher's views are kept.")
    mixup: Annotated[float, Field(ge=0, le=1e6)] = _flag(
        0.0,
        "Data",
        "Alpha of mixup: teacher and student see blends of two images each, in shares drawn from Beta(alpha, alpha).",
    )
    dist_ratio: Ratio = _flag(1.0, "Distillation", "Weight of the distance-wise loss, RKD-D.")
    angle_ratio: Ratio = _flag(2.0, "Distillation", "Weight of the angle-wise loss, RKD-A.")
    triplet_ratio: Ratio = _flag(0.0, "Distillation", "Weight of the triplet loss on the labels.")
    triplet_sample: Sample = _flag("distance", "Distillation", "How the triplet loss picks negatives.")
    triplet_margin: Ratio = _flag(0.2, "Distillation", "Margin of the triplet loss.")

    dark_ratio: Ratio = _flag(0.0, "Distillation", "Weight of hard DarkRank.")
    dark_alpha: Positive = _flag(3.0, "Distillation", "DarkRank's scale of a distance.")
    dark_beta: Positive = _flag(3.0, "Distillation", "DarkRank's exponent of a distance.")
    at_ratio: Ratio = _flag(0.0, "Distillation", "Weight of attention transfer on the last three of four stages.")
    fitnet_ratio: Ratio = _flag(
        0.0, "Distillation", "Weight of FitNet's hints, on the last three of four stages and the embedding."
    )
    hint_epochs: Annotated[int, Field(ge=0)] = _flag(
        0, "Distillation", "Epochs of FitNet's hints alone; after them the other terms alone. 0: all terms together."
    )
    relaxed_ratio: Ratio = _flag(0.0, "Distillation", "Weight of the relaxed contrastive loss.")
    pkt_ratio: Ratio = _flag(0.0, "Distillation", "Weight of probabilistic knowledge transfer, PKT.")

    match_ratio: Ratio = _flag(
        0.0, "Teacher's space", "Weight of embedding matching; of other sizes through a projection that is learned."
    )
    match_kind: Literal["cosine", "squared"] = _flag("cosine", "Teacher's space", "What matching compares by.")
    csd_ratio: Ratio = _flag(0.0, "Teacher's space", "Weight of contextual similarity distillation, CSD.")
    csd_temperature: Positive = _flag(0.05, "Teacher's space", "CSD's temperature of the student.")
    csd_teacher_temperature: Positive = _flag(0.05, "Teacher's space", "CSD's temperature of the teacher.")
    csd_neighbors: Count = _flag(256, "Teacher's space", "CSD's neighbors of an image.")
    queue_ratio: Ratio = _flag(0.0, "Teacher's space", "Weight of the divergence over a queue of past embeddings.")
    queue_temperature: Positive = _flag(0.07, "Teacher's space", "Its temperature.")
    d3_ratio: Ratio = _flag(0.0, "Teacher's space", "Weight of decoupled differential distillation, D3still.")
    d3_neighbors: Count = _flag(9, "Teacher's space", "D3still's neighbors of an image.")
    d3_feature: Ratio = _flag(200.0, "Teacher's space", "D3still's weight of the feature itself.")
    d3_inconsistent: Ratio = _flag(10.0, "Teacher's space", "D3still's weight of pairs in another order.")
    d3_consistent: Ratio = _flag(2.0, "Teacher's space", "D3still's weight of pairs in the same order.")
    queue_size: Annotated[int, Field(ge=1, le=65536)] = _flag(
        2048, "Teacher's space", "Past embeddings of the teacher that CSD, the queue and D3still compare with."
    )

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        ratios = [name for name in type(self).model_fields if name.endswith("_ratio")]
        others = [name for name in ratios if name != "fitnet_ratio" and getattr(self, name)]
        if not others and not self.fitnet_ratio:
            raise ValueError(f"all of {', '.join(map(flag_name, ratios))} are 0: nothing to learn from")
        if self.triplet_ratio and self.without_labels:
            raise ValueError(
                f"--triplet-ratio {self.triplet_ratio:g}: learns from labels, and {self.without_labels} goes without"
            )
        if self.triplet_ratio:
            _check_triplets(self.batch, self.num_image_per_class)
        if self.mixup and self.triplet_ratio:
            raise ValueError("--mixup: a blend of two images has no label for --triplet-ratio: leave one of them out")
        if self.hint_epochs and not self.fitnet_ratio:
            raise ValueError("--hint-epochs: there are no hints without --fitnet-ratio")
        if self.hint_epochs and self.epochs > self.hint_epochs and not others:
            raise ValueError(f"--hint-epochs {self.hint_epochs}: no term is left for the epochs after: add a ratio")
        return self

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.teacher is not None and self.teacher_load is not None:
            raise ValueError("--teacher and --teacher-load: are one setting, and both are given: leave one of them out")
        if self.teacher is None and self.teacher_load is None:
            raise ValueError(
                "--teacher is required, once: a checkpoint (or --teacher-load), timm:NAME, torchvision:NAME, or a file "
                "of embeddings"
            )
        if self.teacher_weights and not self.teacher_source.startswith(("timm:", "torchvision:")):
            raise ValueError(f"--teacher-weights: {self.teacher_source} has its own: leave the flag out")
        teacher = Path(self.teacher_source)  # a file, or the directory of its run
        if self.save_dir.resolve() in (teacher.resolve(), teacher.parent.resolve()):
            raise ValueError(f"--save-dir {self.save_dir}: holds the teacher {self.teacher_source}: choose another")
        return self

    @model_validator(mode="after")
    def _vectors_alone(self) -> Self:
        for flag, ratio in (("--at-ratio", self.at_ratio), ("--fitnet-ratio", self.fitnet_ratio)):
            if ratio and self.teacher_views:
                raise ValueError(f"{flag}: of views that are kept there are no feature maps: use --teacher-views 0")
        if self.mixup and self.teacher_views:
            raise ValueError("--mixup: of blends no views are kept: use --teacher-views 0")
        return self

    @property
    def teacher_source(self) -> str:
        """Whichever of the two flags named it."""
        return self.teacher or str(self.teacher_load)


class ImageSettings(_Settings):
    """What commands share that show images to a network. What is not given is read from the checkpoint."""

    data: File = _flag(Path("data"), "Data", "Where the images are; for folder, the folder of class folders itself.")
    resize: Side | None = _flag(None, "Data", "Resize to this side first; without it, as in training.")
    image_size: Side | None = _flag(None, "Data", "Crop to this side; without it, as in training.")
    workers: DecodeWorkers = None
    cache: ReadCache = "auto"
    cache_dir: ReadCacheFolder = None
    skip_damaged: SkipDamaged = False
    batch: ReadBatch = 128

    weights: File | None = _flag(
        None, "Model", "Weights of the pretrained network, in its library's format; without it, fetched once."
    )
    l2normalize: bool | None = _flag(
        None,
        "Model",
        "Scale embeddings to unit length: of a pretrained network (yes, if not given), of a file (as they are). A "
        "checkpoint says itself.",
    )


class InferenceSettings(ImageSettings):
    """Those that embed images, and where."""

    device: DeviceName = "auto"
    precision: Precision = _flag("auto", "Run", "Of the network. auto: bf16 on CUDA.")


class EvaluateSettings(InferenceSettings):
    """``rkd evaluate``."""

    dataset: Dataset | None = _flag(None, "Data", "The images; without it, the set the model was trained on.")
    base: Base | None = _flag(None, "Model", "Only to make sure: an error where a checkpoint has another.")
    embedding_size: Size | None = _flag(None, "Model", "Only to make sure, likewise.")

    gallery: str | None = _flag(
        None, "Measure", "Search this network's (or file's) embeddings by each model's too: asymmetric Recall@K."
    )
    nproc: Processes = 1
    dims: Sizes = _flag((), "Measure", "Measure the first so many dimensions too, a row each.")
    vectors: Vectors = _flag(
        ("float",), "Measure", "How a gallery is stored: float, int8, binary (by Hamming distance, and rescored)."
    )
    recall: Ks = _flag((1, 2, 4, 8), "Measure", "The K of Recall@K.")


class EmbedSettings(InferenceSettings):
    """``rkd embed``."""

    dataset: Dataset | None = _flag(None, "Data", "The images of this set; without it, all below --data.")
    pca: str | None = _flag(
        None, "Model", "Reduce to so many principal components; or by the map that another FILE of embeddings keeps."
    )
    out: File = Field(
        description="The file to write: .npy (paths beside it), .npz, .safetensors or .parquet.",
        json_schema_extra={"panel": "Run"},
    )
    overwrite: OverwriteOut = False
    nproc: Processes = 1
    vectors: Literal["float", "float16", "int8", "binary"] = _flag(
        "float", "Model", "What is stored of a number: 32 or 16 bits, 8 with a scale a dimension, or the sign alone."
    )

    @property
    def pca_size(self) -> int | None:
        """How many components, where --pca is a number."""
        return int(self.pca) if self.pca and _is_number(self.pca) else None

    @property
    def pca_file(self) -> Path | None:
        """Whose map, where it is not."""
        return Path(self.pca) if self.pca and not _is_number(self.pca) else None

    @model_validator(mode="after")
    def _writable(self) -> Self:
        if self.out.suffix not in (".npy", ".npz", ".parquet", ".safetensors"):
            raise ValueError(f"--out {self.out}: must end in .npy, .npz, .parquet or .safetensors")
        if self.out.suffix == ".npy" and self.vectors in ("int8", "binary"):
            raise ValueError(
                f"--out {self.out}: an npy keeps numbers alone, and --vectors {self.vectors} need their scales too: "
                "name an .npz, .safetensors or .parquet"
            )
        if self.pca is not None and not self.pca:
            raise ValueError("--pca: must be a number or a file, got nothing")
        if self.pca_size is not None and not 1 <= self.pca_size <= MAX_EMBEDDING:
            raise ValueError(f"--pca: must be from 1 to {MAX_EMBEDDING}, got {self.pca}")
        return self


class SearchSettings(InferenceSettings):
    """``rkd search``."""

    gallery: File = Field(
        description="Search among the images below this folder, or a file of their embeddings (whose images are below "
        "--data).",
        json_schema_extra={"panel": "Data"},
    )
    query: File | None = _flag(None, "Data", "Search for this image, or for each below this folder.")
    top: Count = _flag(5, "Measure", "How many of the nearest images to show of each query.")
    duplicates: bool = _flag(False, "Measure", "Show what the gallery has twice, in place of a query's answers.")
    threshold: Annotated[float, Field(ge=-1, le=1)] = _flag(
        0.95, "Measure", "Cosine from which two images are duplicates."
    )
    exact: bool = _flag(
        False, "Measure", "Compare with every image. Else faiss, if installed, spares most of a billion comparisons."
    )
    asymmetric: bool = _flag(
        False,
        "Measure",
        "Search a file of another network's embeddings, in whose space this one embeds: its teacher's.",
    )
    html: File | None = _flag(None, "Run", "Write a page of pictures for a browser to this file too.")
    overwrite: bool = _flag(False, "Run", "Replace --html where it is there already.")

    @model_validator(mode="after")
    def _one_task(self) -> Self:
        if (self.query is not None) == self.duplicates:
            both = "both are given: leave one out" if self.duplicates else "name an image, or ask for duplicates"
            raise ValueError(f"--query or --duplicates: {both}")
        return self


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+", text) is not None


class ExportSettings(ImageSettings):
    """``rkd export``. It computes on the CPU, in float32."""

    to: Literal["onnx", "torch"] | None = _flag(
        None, "Model", "ONNX, or a program of torch.export; without it, by the suffix of --out: .onnx or .pt2."
    )
    int8: bool = _flag(False, "Model", "Quantize it (static, ONNX alone): a fourth of the size, faster on most CPUs.")
    calibration_images: Count = _flag(256, "Model", "Training images that --int8 finds the ranges of numbers by.")
    dataset: Dataset | None = _flag(
        None, "Data", "The images to compare by; without it, the set the model was trained on."
    )
    recall: Ks = _flag((1, 2, 4, 8), "Measure", "The K of Recall@K.")
    out: File = Field(description="The file to write, .onnx or .pt2.", json_schema_extra={"panel": "Run"})
    overwrite: OverwriteOut = False

    @model_validator(mode="after")
    def _agree(self) -> Self:
        suffix = {"onnx": ".onnx", "torch": ".pt2"}.get(self.to or "")
        if self.out.suffix not in ((suffix,) if suffix else (".onnx", ".pt2")):
            to = f" with --to {self.to}" if self.to else ""
            raise ValueError(f"--out {self.out}: must end in {suffix or '.onnx or .pt2'}{to}")
        if self.int8 and self.out.suffix != ".onnx":
            raise ValueError("--int8: onnxruntime quantizes, so it is for ONNX alone: name an --out that ends in .onnx")
        return self


class CheckSettings(_Settings):
    """``rkd check-data``."""

    dataset: Dataset = _flag("cub200", "Data", _DATASET)
    data: File = _flag(Path("data"), "Data", "Where the images are; for folder, the folder of class folders itself.")
    workers: DecodeWorkers = None


class CompareSettings(_Settings):
    """``rkd compare``."""

    csv: File | None = _flag(None, "Run", "Write the table to this file too, a row a run.")
    html: File | None = _flag(None, "Run", "Write the table to this file too, as a page for a browser.")
    overwrite: bool = _flag(False, "Run", "Replace --csv and --html where they are there already.")


class ReportSettings(_Settings):
    """``rkd report``."""

    data: File | None = _flag(None, "Data", "Where the images are; without it, where the runs had them.")
    workers: DecodeWorkers = None
    cache: ReadCache = "auto"
    cache_dir: ReadCacheFolder = None
    skip_damaged: SkipDamaged = False
    batch: ReadBatch = 128
    gallery: Annotated[int, Field(ge=0, le=100)] = _flag(
        6, "Measure", "Queries of each kind (hardest, easiest, ...) in the gallery; 0: no gallery."
    )
    map: Literal["pca", "tsne", "umap"] = _flag(
        "pca", "Measure", "How embeddings come onto a plane; tsne needs scikit-learn, umap needs umap-learn."
    )
    seed: Seed = _flag(1, "Measure", "Seed of what is drawn: random queries, points and classes of the map.")
    out: File = _flag(Path("report.html"), "Run", "The file to write.")
    overwrite: OverwriteOut = False
    device: DeviceName = "auto"
    precision: Precision = _flag("auto", "Run", "Of the networks. auto: bf16 on CUDA.")

    def inference(self, data: Path) -> InferenceSettings:
        """How images below ``data`` are embedded."""
        shared = type(self).model_fields.keys() & InferenceSettings.model_fields.keys() - {"data"}
        return InferenceSettings(data=data, **{name: getattr(self, name) for name in shared})


class PushSettings(_Settings):
    """``rkd push``."""

    private: bool = _flag(True, "Run", "A repository that is made here can be seen by its owners alone.")


class CacheSettings(_Settings):
    """``rkd cache``."""

    cache_dir: File | None = _flag(None, "Data", "The folder; without it, the user's cache folder (RKD_CACHE_DIR).")
    clear: bool = _flag(False, "Run", "Remove the files. A run that reads one now is not disturbed.")


class ImportSettings(_Settings):
    """``rkd import-checkpoint``: what a state dict does not say of itself."""

    base: Base = _flag("resnet50", "Model", "Backbone of the network that was saved.")
    embedding_size: Size = _flag(512, "Model", "Length of its embedding.")
    l2normalize: bool = _flag(True, "Model", "Whether it scales embeddings to unit length.")
    resize: Side = _flag(256, "Model", "What its images were resized to.")
    image_size: Side = _flag(224, "Model", "Side of the crop it saw.")
    dataset: Dataset = _flag("cub200", "Model", "The set it was trained on.")
    output: File | None = _flag(None, "Run", "Where to write; without it, beside the file, as .safetensors.")
    overwrite: Overwrite = False


class DemoSettings(_Settings):
    """``rkd demo``."""

    data: File = _flag(Path("data"), "Data", "Where the drawn images go (in a folder of their own).")
    workers: DecodeWorkers = None
    seed: Seed = _flag(1, "Run", "Seed of all three trainings; the images never change.")
    save_dir: File = _flag(Path("demo"), "Run", "Directory for the three runs.")
    overwrite: Overwrite = False
    device: DeviceName = "auto"


class BenchSettings(_Settings):
    """``rkd bench``."""

    dataset: Dataset | None = _flag(None, "Data", "The images; without it, drawn JPEGs as large as CUB's.")
    data: File = _flag(Path("data"), "Data", "Where the images are, or where drawn ones go.")
    resize: Side = _flag(72, "Data", "Side that images are resized to in steps and epochs, in pixels.")
    image_size: Side = _flag(64, "Data", "Side of their crop, in pixels.")
    workers: Workers = _flag(2, "Data", "Processes that the textbook's DataLoader decodes with.")
    teacher_base: Base = _flag("resnet18", "Model", "Backbone of the teacher.")
    base: Base = _flag("resnet18", "Model", "Backbone of the student.")
    batch: Annotated[int, Field(ge=2, le=10**6)] = _flag(64, "Optimization", "Images a batch.")
    num_image_per_class: Count = _flag(5, "Optimization", "Images of each class in a batch.")
    iter_per_epoch: Count = _flag(100, "Optimization", "Batches an epoch.")
    lr: Positive = _flag(1e-4, "Optimization", "Learning rate of Adam.")
    seed: Seed = _flag(1, "Run", "Seed of every random draw.")
    repeats: Count = _flag(3, "Run", "Epochs measured of each.")
    quick: bool = _flag(False, "Run", "Toy sizes: whether it works, not how fast.")
    out: File | None = _flag(None, "Run", "Write what --json prints into this file too, in place of one that is there.")
    device: DeviceName = "auto"
    precision: Precision = _flag("auto", "Run", "Of our networks; the textbook's have fp32. auto: bf16 on CUDA.")
    compile: bool = _flag(False, "Run", "Compile our networks with torch.compile.")
    teacher_load: File | None = _flag(None, "Fidelity", "Teacher of all students; without it, one is trained first.")
    seeds: Annotated[int, Field(ge=2, le=1000)] = _flag(8, "Fidelity", "Students of each loop, seeds 1 to this.")
    jobs: Count | None = _flag(None, "Fidelity", "Students trained at once; without it, one a core.")
    save_dir: File = _flag(Path("fidelity"), "Fidelity", "Directory for results; those it holds are not made again.")


class DownloadSettings(_Settings):
    """``rkd download-cub``. No ``--url`` means the official archive."""

    data: File = _flag(Path("data"), "Data", "Directory to put CUB_200_2011 into.")
    archive: File | None = _flag(None, "Source", "A CUB_200_2011.tgz you already have; no network is used.")
    url: str | None = _flag(None, "Source", "A mirror of the official archive.")
    md5: Annotated[str, AfterValidator(partial(_matching, r"[0-9a-f]{32}|none", "32 hex digits or none"))] | None = (
        _flag(None, "Source", "md5 the download must have, or none; without it, the official one.")
    )


def panel_of(field: FieldInfo) -> str:
    """The group of flags that a field belongs to."""
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra["panel"])


def help_panels(model: type[BaseModel]) -> dict[str, str]:
    """Each field of a command's settings, in the order of its ``--help``, with the title that it stands under there."""
    of = {name: panel_of(field) for name, field in model.model_fields.items()}
    ordered = sorted(of, key=lambda name: _PANELS.index(of[name]))
    if not issubclass(model, _TrainSettings):
        return {name: of[name] for name in ordered}
    common = [name for name in _COMMON if name in of]
    return dict.fromkeys(common, "Common") | {
        name: f"Advanced: {of[name].lower()}" for name in ordered if name not in common
    }


# Which flags have an effect only beside others. Whoever gives one on the command line where it has none is told so;
# a configuration file may hold it. A new flag stands here, or among those of tests/config/test_given.py that always
# have an effect.
_ON: tuple[object, ...] = ()  # any value but 0, no and none
_Condition = Collection[object]

_MINED = {"loss": ("l2_triplet", "l1_triplet", "contrastive")}
_PROXIES = {"loss": ("proxy_anchor", "softmax", "arcface")}
_MULTI_SIMILARITY, _PROXY_ANCHOR, _ARCFACE = ({"loss": (x,)} for x in ("multi_similarity", "proxy_anchor", "arcface"))
_CACHED: dict[str, _Condition] = {"cache": ("auto", "disk", "device")}
_TRAININGS_OF_BENCH = ("step", "epoch", "teachers", "fidelity")
_FIDELITY = {"parts": ("fidelity",)}

# {settings: {flag: {setting: values}}}: the flag has an effect where one of the settings has one of its values
NEEDS: dict[type[BaseModel], dict[str, Mapping[str, _Condition]]] = {
    _TrainSettings: {
        "crop_scale": {"crop": ("resized",)},
        "lr_decay_gamma": {"lr_decay_epochs": _ON},
        "sync_bn": {"nproc": range(2, 10**5)},
        "cache_dir": _CACHED | {"freeze_base": _ON, "teacher_views": _ON},  # which are kept there too
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
        "dataset": {"parts": (*_TRAININGS_OF_BENCH, "loader", "embed", "ranks", "gpu")},
        "data": {"parts": (*_TRAININGS_OF_BENCH, "loader", "embed", "ranks", "gpu", "recipe")},
        "resize": {"parts": (*_TRAININGS_OF_BENCH, "embed", "ranks")},
        "image_size": {"parts": (*_TRAININGS_OF_BENCH, "embed", "ranks", "chunk")},
        "workers": {"parts": (*_TRAININGS_OF_BENCH, "embed")},
        "teacher_base": {"parts": (*_TRAININGS_OF_BENCH, "chunk")},
        "base": {"parts": (*_TRAININGS_OF_BENCH, "embed", "ranks", "chunk")},
        "batch": {"parts": (*_TRAININGS_OF_BENCH, "embed", "ranks")},
        "num_image_per_class": {"parts": (*_TRAININGS_OF_BENCH, "ranks")},
        "iter_per_epoch": {"parts": ("epoch", "teachers", "fidelity", "ranks")},
        "lr": {"parts": (*_TRAININGS_OF_BENCH, "ranks")},
        "repeats": {"parts": ("epoch", "teachers", "embed")},
        "precision": {"parts": (*_TRAININGS_OF_BENCH, "embed", "chunk", "ranks", "recipe", "gpu")},
        "compile": {"parts": (*_TRAININGS_OF_BENCH, "recipe", "gpu")},
        "teacher_load": _FIDELITY,
        "seeds": _FIDELITY,
        "jobs": _FIDELITY,
        "save_dir": _FIDELITY,
    },
}

# the same, where a flag has no effect
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
    """Those flags that change nothing beside the other settings, and why.

    Args:
        model: the settings of a command.
        values: of its settings by name; what depends on others than these is not looked at.
        flags: the names to look at.
    """
    found = {}
    for flag in flags:
        if not values.get(flag, True) and values[flag] == model.model_fields[flag].default:
            continue  # turning off what is off
        for kind in model.__mro__:
            needed = NEEDS.get(kind, {}).get(flag, {})
            known = {name: some for name, some in needed.items() if name in values}
            if known and not any(_holds(values[name], some) for name, some in known.items()):
                without = " or ".join(_shown(name, some) for name, some in known.items())
                found[flag] = f"has no effect without {without}: add that, or leave {flag_name(flag)} out"
            for name, some in UNUSED_WITH.get(kind, {}).get(flag, {}).items():
                if name in values and _holds(values[name], some):
                    found[flag] = f"has no effect with {_shown(name, some)}: leave one of them out"
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
