"""What can be set: every flag's name, type, default, bounds and help. Nothing else in the program has a default."""

from __future__ import annotations

import re
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
Sample = Literal["random", "hard", "all", "semihard", "distance", "distance-published"]


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError(f"must rise from one to the next, got {','.join(map(str, values))}")
    return values


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
Ks = Annotated[tuple[Count, ...], BeforeValidator(_split), AfterValidator(_with_one)]
File = Annotated[Path, Strict(False), BeforeValidator(_not_empty)]
Base = Annotated[str, AfterValidator(partial(_matching, BASE, "the name of a network"))]
Device = Annotated[str, AfterValidator(partial(_matching, r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N"))]
Md5 = Annotated[str, AfterValidator(partial(_matching, r"[0-9a-f]{32}|none", "32 hex digits or none"))]
Ratio = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


# what may be another when a run goes on: none of it changes what is computed; epochs can only be added
CHANGE_ON_RESUME = ("epochs", "device", "workers", "cache", "cache_dir", "save_every")


_DATASET = "The images; folder: your own, one folder a class; images: your own without classes, for `rkd distill`."


def flag_name(field: str) -> str:
    """``num_image_per_class`` -> ``--num-image-per-class``."""
    return "--" + field.replace("_", "-")


def _flag(default: Any, panel: str, help: str) -> Any:
    return Field(default, description=help, json_schema_extra={"panel": panel})


# a wish of this moment, not a property of the run: settings.json leaves it out
Overwrite = Annotated[
    bool,
    Field(description="Replace a run that --save-dir holds already.", json_schema_extra={"panel": "Run"}, exclude=True),
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


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _TrainSettings(_Settings):
    """What both trainings share. The subclasses hold the defaults that differ."""

    dataset: Dataset = _flag("cub200", "Data", _DATASET)
    data: File = _flag(Path("data"), "Data", "Where the images are; for folder, the folder of class folders itself.")
    labels: bool = _flag(True, "Data", "Use the classes of the set; without, its images are photos, as in images.")
    resize: Side = _flag(256, "Data", "Side of the square every image is resized to first, in pixels.")
    image_size: Side = _flag(224, "Data", "Side of the crop the network sees, in pixels.")
    workers: Workers | None = _flag(None, "Data", "Processes that decode images; 0: none beside.")
    cache: Cache = _flag(
        "auto",
        "Data",
        "Decoded images: kept in a file (disk), on the device, or decoded anew each time (none). auto: what fits.",
    )
    cache_dir: File | None = _flag(
        None, "Data", "Where the file of decoded images goes; without it, into the user's cache folder."
    )
    skip_damaged: bool = _flag(False, "Data", "Leave images out that cannot be read; decodes all of them first.")

    base: Base = _flag(
        "resnet50", "Model", "Backbone: a torchvision classification network, inception_v1bn, timm:NAME."
    )
    weights: str = _flag("imagenet", "Model", "Weights to start from: imagenet, none (random), or a file.")
    embedding_size: Size = _flag(512, "Model", "Length of an embedding.")
    l2normalize: bool = _flag(True, "Model", "Scale embeddings to unit length.")
    load: File | None = _flag(None, "Model", "Start from this checkpoint of the same network instead of --weights.")

    lr: Positive = _flag(1e-5, "Optimization", "Learning rate of Adam.")
    lr_decay_epochs: Epochs = _flag((25, 30, 35), "Optimization", "Epochs at which the learning rate falls.")
    lr_decay_gamma: Positive = _flag(0.5, "Optimization", "What the learning rate is multiplied by, each time.")
    weight_decay: Ratio = _flag(1e-5, "Optimization", "Weight decay of Adam (added to the gradient).")
    epochs: Count = _flag(40, "Optimization", "Epochs to train.")
    iter_per_epoch: Count = _flag(100, "Optimization", "Batches an epoch.")
    batch: Annotated[int, Field(ge=2, le=10**6)] = _flag(128, "Optimization", "Images a batch.")
    num_image_per_class: Count = _flag(5, "Optimization", "Images of each class in a batch; without labels unused.")
    seed: Seed = _flag(1, "Optimization", "Seed of every random draw.")

    save_dir: File = _flag(Path("teacher"), "Run", "Directory for the run's files.")
    overwrite: Overwrite = False
    resume: Resume = False
    save_every: Count = _flag(600, "Run", "Seconds after which a run is saved within an epoch, for --resume.")
    device: Device = _flag("auto", "Run", "auto, cpu, cuda or cuda:N.")
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

    loss: Literal["l2_triplet", "l1_triplet", "contrastive"] = _flag("l2_triplet", "Loss", "Metric-learning loss.")
    sample: Sample = _flag("distance", "Loss", "How negatives are picked.")
    margin: Ratio = _flag(0.2, "Loss", "Margin of the loss.")

    @model_validator(mode="after")
    def _triplets(self) -> Self:
        if self.without_labels:
            raise ValueError(f"{self.without_labels}: `rkd train-teacher` learns from labels: use `rkd distill`")
        _check_triplets(self.batch, self.num_image_per_class)
        return self


class DistillSettings(_TrainSettings):
    """``rkd distill``."""

    base: Base = _flag(
        "resnet18", "Model", "Backbone: a torchvision classification network, inception_v1bn, timm:NAME."
    )
    embedding_size: Size = _flag(64, "Model", "Length of an embedding.")
    l2normalize: bool = _flag(False, "Model", "Scale embeddings to unit length.")
    lr: Positive = _flag(1e-4, "Optimization", "Learning rate of Adam.")
    lr_decay_epochs: Epochs = _flag((40, 60), "Optimization", "Epochs at which the learning rate falls.")
    lr_decay_gamma: Positive = _flag(0.1, "Optimization", "What the learning rate is multiplied by, each time.")
    epochs: Count = _flag(80, "Optimization", "Epochs to train.")
    save_dir: File = _flag(Path("student"), "Run", "Directory for the run's files.")

    teacher: str | None = _flag(
        None,
        "Distillation",
        "What teaches: a checkpoint, timm:NAME or torchvision:NAME (pretrained), or a file of embeddings (.npz, "
        ".safetensors).",
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
        if self.hint_epochs and not self.fitnet_ratio:
            raise ValueError("--hint-epochs: there are no hints without --fitnet-ratio")
        if self.hint_epochs and self.epochs > self.hint_epochs and not others:
            raise ValueError(f"--hint-epochs {self.hint_epochs}: no term is left for the epochs after: add a ratio")
        return self

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if (self.teacher is None) == (self.teacher_load is None):
            raise ValueError(
                "--teacher is required, once: a checkpoint (or --teacher-load), timm:NAME, torchvision:NAME, or a file "
                "of embeddings"
            )
        if self.teacher_weights and not self.teacher_source.startswith(("timm:", "torchvision:")):
            raise ValueError(f"--teacher-weights: {self.teacher_source} has its own: leave the flag out")
        if Path(self.teacher_source).parent.resolve() == self.save_dir.resolve():
            raise ValueError(f"--save-dir {self.save_dir}: holds the teacher {self.teacher_source}: choose another")
        return self

    @model_validator(mode="after")
    def _vectors_alone(self) -> Self:
        for flag, ratio in (("--at-ratio", self.at_ratio), ("--fitnet-ratio", self.fitnet_ratio)):
            if ratio and self.teacher_views:
                raise ValueError(f"{flag}: of views that are kept there are no feature maps: use --teacher-views 0")
        return self

    @property
    def teacher_source(self) -> str:
        """Whichever of the two flags named it."""
        return self.teacher or str(self.teacher_load)


class EvaluateSettings(_Settings):
    """``rkd evaluate``. What is not given is read from the checkpoint."""

    dataset: Dataset | None = _flag(None, "Data", "The images; without it, the set the model was trained on.")
    data: File = _flag(Path("data"), "Data", "Where the images are; for folder, the folder of class folders itself.")
    resize: Side | None = _flag(None, "Data", "Resize to this side first; without it, as in training.")
    image_size: Side | None = _flag(None, "Data", "Crop to this side; without it, as in training.")
    workers: Workers | None = _flag(None, "Data", "Processes that decode images; 0: none beside.")
    cache: Cache = _flag("auto", "Data", "As in training; auto makes no file, but reads one that is there.")
    cache_dir: File | None = _flag(
        None, "Data", "Where the file of decoded images is; without it, in the user's cache folder."
    )
    skip_damaged: bool = _flag(False, "Data", "Leave images out that cannot be read; decodes all of them first.")
    batch: Count = _flag(128, "Data", "Images a batch; changes speed and memory alone.")

    base: Base | None = _flag(None, "Model", "Only to make sure: an error where the checkpoint has another.")
    embedding_size: Size | None = _flag(None, "Model", "Only to make sure, likewise.")
    l2normalize: bool | None = _flag(None, "Model", "Only to make sure, likewise.")

    device: Device = _flag("auto", "Run", "auto, cpu, cuda or cuda:N.")
    precision: Precision = _flag("auto", "Run", "Of the network. auto: bf16 on CUDA.")
    recall: Ks = _flag((1, 2, 4, 8), "Run", "The K of Recall@K.")


class CheckSettings(_Settings):
    """``rkd check-data``."""

    dataset: Dataset = _flag("cub200", "Data", _DATASET)
    data: File = _flag(Path("data"), "Data", "Where the images are; for folder, the folder of class folders itself.")
    workers: Workers | None = _flag(None, "Data", "Processes that decode images; 0: none beside.")


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
    workers: Workers | None = _flag(None, "Data", "Processes that decode images; 0: none beside.")
    seed: Seed = _flag(1, "Run", "Seed of all three trainings; the images never change.")
    save_dir: File = _flag(Path("demo"), "Run", "Directory for the three runs.")
    overwrite: Overwrite = False
    device: Device = _flag("auto", "Run", "auto, cpu, cuda or cuda:N.")


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
    device: Device = _flag("auto", "Run", "auto, cpu, cuda or cuda:N.")
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
    """The group of flags in ``--help`` that a field belongs to."""
    assert isinstance(field.json_schema_extra, dict)
    return str(field.json_schema_extra["panel"])
