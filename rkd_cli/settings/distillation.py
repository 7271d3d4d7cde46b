"""Settings of ``rkd distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rkd_cli.settings import fields as f
from rkd_cli.settings.names import flag_name
from rkd_cli.settings.training import Sample, TrainSettings


class DistillSettings(TrainSettings):
    """``rkd distill``."""

    command: ClassVar[str] = "distill"
    ratios: ClassVar[tuple[str, ...]] = (  # the weights of its losses
        "dist_ratio", "angle_ratio", "triplet_ratio", "dark_ratio", "at_ratio", "fitnet_ratio", "relaxed_ratio",
        "pkt_ratio", "match_ratio", "csd_ratio", "queue_ratio", "d3_ratio",
    )  # fmt: skip

    # defaults of a student that differ from those of a teacher
    base: f.Base = f.model("resnet18", "Backbone: a torchvision network, inception_v1bn, or timm:NAME.")
    embedding_size: f.Size = f.model(64, "Number of dimensions of an embedding.")
    l2normalize: bool = f.model(False, "Scale embeddings to unit length.")
    lr: f.Positive = f.optim(1e-4, "Peak learning rate.")
    lr_decay_epochs: f.Epochs = f.optim((40, 60), "Epochs at which --schedule step lowers the learning rate.")
    lr_decay_gamma: f.Positive = f.optim(0.1, "Factor of the learning rate at --lr-decay-epochs.")
    epochs: f.Count = f.optim(80, "Number of epochs to train.")
    save_dir: f.File = f.run(Path("student"), "Directory for the files of the run.")

    teacher: Annotated[
        f.Teachers,
        f.shared(
            "Distillation",
            "Teacher: a run directory, a checkpoint, timm:NAME, torchvision:NAME, hf:ORG/NAME, an exported model or a "
            "vectors file; may be repeated. Also spelled --teacher-load.",
        ),
    ]
    combine: Literal["joined", "averaged"] = f.distill(
        "joined",
        "How several teachers teach: joined puts their embeddings into one space, averaged averages each loss over "
        "them.",
    )
    teacher_weights: f.File | None = f.distill(None, "Weights file of a pretrained teacher. Default: downloaded once.")
    teacher_views: Annotated[int, Field(ge=0, le=10**6)] = f.distill(
        0,
        "Compute the teacher once, on this many crops of each image, and train the student on those "
        "crops. 0: run the teacher on each batch.",
    )
    views_precision: Literal["fp16", "fp32"] = f.distill(
        "fp16", "Precision of the teacher's stored embeddings (--teacher-views)."
    )
    init: Literal["random", "pca", "teacher"] = f.model(
        "random",
        "Start of the embedding layer: random, the principal components of the training images' features, or the "
        "least-squares fit of these features to the teacher's embeddings.",
    )
    mixup: Annotated[float, Field(ge=0, le=1e6)] = f.data(
        0.0, "Alpha of mixup: blends of two images in proportions from Beta(alpha, alpha)."
    )
    dist_ratio: f.Ratio = f.distill(1.0, "Weight of the distance-wise loss RKD-D.")
    angle_ratio: f.Ratio = f.distill(2.0, "Weight of the angle-wise loss RKD-A.")
    triplet_ratio: f.Ratio = f.distill(0.0, "Weight of the triplet loss on labels.")
    triplet_sample: Sample = f.distill("distance", "Sampling of negatives for the triplet loss.")
    triplet_margin: f.Ratio = f.distill(0.2, "Margin of the triplet loss.")

    dark_ratio: f.Ratio = f.distill(0.0, "Weight of hard DarkRank.")
    dark_alpha: f.Positive = f.distill(3.0, "Scale of distances in DarkRank.")
    dark_beta: f.Positive = f.distill(3.0, "Exponent of distances in DarkRank.")
    at_ratio: f.Ratio = f.distill(0.0, "Weight of attention transfer on the last three of four stages.")
    fitnet_ratio: f.Ratio = f.distill(0.0, "Weight of FitNet hints on the last three of four stages and the embedding.")
    hint_epochs: Annotated[int, Field(ge=0)] = f.distill(
        0, "Number of first epochs with FitNet hints only; the other losses follow. 0: all together."
    )
    relaxed_ratio: f.Ratio = f.distill(0.0, "Weight of the relaxed contrastive loss.")
    pkt_ratio: f.Ratio = f.distill(0.0, "Weight of probabilistic knowledge transfer (PKT).")

    match_ratio: f.Ratio = f.space(0.0, "Weight of embedding matching. A learned projection joins different sizes.")
    match_kind: Literal["cosine", "squared"] = f.space("cosine", "Distance of --match-ratio.")
    csd_ratio: f.Ratio = f.space(0.0, "Weight of contextual similarity distillation (CSD).")
    csd_temperature: f.Positive = f.space(1.0, "Temperature of the student in CSD.")
    csd_teacher_temperature: f.Positive = f.space(0.01, "Temperature of the teacher in CSD.")
    csd_neighbors: f.Count = f.space(255, "Number of neighbors per image in CSD.")
    queue_ratio: f.Ratio = f.space(0.0, "Weight of the KL divergence over a queue of past teacher embeddings.")
    queue_temperature: f.Positive = f.space(0.07, "Temperature of --queue-ratio.")
    d3_ratio: f.Ratio = f.space(0.0, "Weight of decoupled differential distillation (D3still).")
    d3_neighbors: f.Count = f.space(9, "Number of neighbors per image in D3still.")
    d3_feature: f.Ratio = f.space(100.0, "Weight of feature matching within D3still.")
    d3_inconsistent: f.Ratio = f.space(5.0, "Weight of pairs in a different order within D3still.")
    d3_consistent: f.Ratio = f.space(1.0, "Weight of pairs in the same order within D3still.")
    queue_size: Annotated[int, Field(ge=1, le=65536)] | None = f.space(
        None, "Number of past teacher embeddings for CSD, the queue and D3still. Default: 2048, and 0 for D3still."
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
            self._check_triplets()
        if self.mixup and self.triplet_ratio:
            raise ValueError("--mixup: blended images have no label for --triplet-ratio. Omit one of them.")
        if self.hint_epochs and not self.fitnet_ratio:
            raise ValueError("--hint-epochs: needs --fitnet-ratio. Add it, or omit --hint-epochs.")
        if self.hint_epochs and self.epochs > self.hint_epochs and not others:
            raise ValueError(f"--hint-epochs {self.hint_epochs}: no loss remains for later epochs. Add another ratio.")
        return self

    @model_validator(mode="after")
    def _each_teacher(self) -> Self:
        if self.teacher_weights and len(self.teachers) > 1:
            raise ValueError("--teacher-weights: there are several teachers. Name checkpoints, or omit the flag.")
        if self.teacher_weights and not self.teacher.startswith(("timm:", "torchvision:")):
            raise ValueError(f"--teacher-weights: {self.teacher} contains its weights. Omit the flag.")
        for name in self.teachers:
            teacher = Path(name)  # a file or a run directory
            is_name = name.startswith(("timm:", "torchvision:", "hf:"))
            if not is_name and self.save_dir.resolve() in (teacher.resolve(), teacher.parent.resolve()):
                raise ValueError(f"--save-dir {self.save_dir}: contains the teacher {name}. Choose another.")
        return self

    @model_validator(mode="after")
    def _several_teachers(self) -> Self:
        several = len(self.teachers) > 1
        for name in self.active_ratios:
            if several and name in ("at_ratio", "fitnet_ratio"):
                raise ValueError(f"{flag_name(name)}: compares feature maps, of one teacher only. Omit the others.")
            if self.is_averaged and name in ("match_ratio", "csd_ratio", "queue_ratio", "d3_ratio"):
                raise ValueError(f"{flag_name(name)}: needs one space of all teachers. Use --combine joined.")
        return self

    @model_validator(mode="after")
    def _cached_views(self) -> Self:
        for flag, ratio in (("--at-ratio", self.at_ratio), ("--fitnet-ratio", self.fitnet_ratio)):
            if ratio and self.teacher_views:
                raise ValueError(f"{flag}: feature maps are not cached. Use --teacher-views 0.")
        if self.mixup and self.teacher_views:
            raise ValueError("--mixup: blended images are not cached. Use --teacher-views 0.")
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        """Each teacher."""
        is_one = Path(self.teacher).exists()  # perhaps with commas in its name
        return (self.teacher,) if is_one else tuple(self.teacher.split(","))

    @property
    def is_averaged(self) -> bool:
        """Whether losses are averaged over several teachers."""
        return len(self.teachers) > 1 and self.combine == "averaged"

    @property
    def active_ratios(self) -> list[str]:
        """The fields of the losses that are learned."""
        return [name for name in self.ratios if getattr(self, name)]

    @property
    def direction_flags(self) -> tuple[str, ...]:
        """The losses in use that ignore the length of the teacher's embeddings."""
        names = ["relaxed", "pkt", *(["match"] if self.match_kind == "cosine" else []), "csd", "queue", "d3"]
        return tuple(flag_name(f"{name}_ratio") for name in names if getattr(self, f"{name}_ratio"))
