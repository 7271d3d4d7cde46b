"""Settings of a training: those of a teacher, and those that a student shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rkd_cli.schemas import MAX_PIXELS, fit_of
from rkd_cli.settings import fields as f
from rkd_cli.settings.names import flag_name

Loss = Literal[
    "l2_triplet", "l1_triplet", "contrastive", "multi_similarity", "proxy_anchor", "softmax", "arcface", "smooth_ap"
]
Sample = Literal["random", "hard", "all", "semihard", "distance", "distance-published"]

# settings that may change when a run is resumed: none affects results; epochs can only be added
CHANGE_ON_RESUME = (
    "epochs",
    "device",
    "nproc",
    "jobs",
    "workers",
    "cache",
    "cache_dir",
    "save_every",
    "keep_state",
    "log",
    "max_pixels",
)


class TrainSettings(f.Settings):
    """Settings of both trainings. Subclasses override defaults."""

    dataset: f.DatasetName = "auto"
    data: f.DataFolder = Path("data")
    labels: bool = f.data(True, "Use class labels. --no-labels trains from the teacher alone.")
    resize: f.Side = f.data(256, "Side of the square that every image is resized to first, in pixels.")
    image_size: f.Side = f.data(224, "Side of the crop that the network sees, in pixels.")
    fit: Literal["auto", "square", "crop", "pad"] = f.data(
        "auto",
        "How an image becomes a square: square squashes it, crop takes its middle, pad adds a border. auto: square for "
        f"the published data sets, {fit_of('folder')} for your own images.",
    )
    max_pixels: f.MaxPixels = MAX_PIXELS
    crop: Literal["random", "resized"] = f.data(
        "random",
        "Training crops: random position at --image-size, or random area and aspect ratio (3:4 to 4:3) resized to it.",
    )
    crop_scale: Annotated[float, Field(gt=0, le=1)] = f.data(0.25, "Smallest share of the image in a resized crop.")
    jitter: Annotated[float, Field(ge=0, le=1)] = f.data(
        0.0, "Range of random brightness, contrast and saturation: factors of 1 ± this."
    )
    workers: f.DecodeWorkers = None
    cache: f.Cache = f.data("auto", "Cache for decoded images: a file (disk), device memory, or none. auto: what fits.")
    cache_dir: f.File | None = f.data(None, "Folder for the file of decoded images. Default: the user's cache folder.")
    skip_damaged: f.SkipDamaged = False

    base: f.Base = f.model("resnet50", "Backbone: a torchvision network, inception_v1bn, or timm:NAME.")
    weights: str = f.model("imagenet", "Initial weights: imagenet, none (random), or a file.")
    embedding_size: f.Size = f.model(512, "Number of dimensions of an embedding.")
    l2normalize: bool = f.model(True, "Scale embeddings to unit length.")
    load: f.File | None = f.model(None, "Checkpoint of the same network to start from, in place of --weights.")
    matryoshka: f.Sizes = f.model((), "Also train these prefixes of the embedding, for example 16,32,64 (Matryoshka).")

    optimizer: Literal["adam", "adamw"] = f.optim(
        "adam", "Optimizer: Adam, or Adam with decoupled weight decay (AdamW)."
    )
    lr: f.Positive = f.optim(1e-5, "Peak learning rate.")
    schedule: Literal["step", "cosine"] = f.optim(
        "step", "Schedule of the learning rate: steps at --lr-decay-epochs, or a cosine to 0 at --epochs."
    )
    warmup: Annotated[int, Field(ge=0, le=10**9)] = f.optim(
        0, "Number of epochs in which the learning rate rises from 0."
    )
    lr_decay_epochs: f.Epochs = f.optim((25, 30, 35), "Epochs at which --schedule step lowers the learning rate.")
    lr_decay_gamma: f.Positive = f.optim(0.5, "Factor of the learning rate at --lr-decay-epochs.")
    weight_decay: f.Ratio = f.optim(
        1e-5, "Weight decay: added to the gradient (adam) or subtracted from the weights (adamw)."
    )
    epochs: f.Count = f.optim(40, "Number of epochs to train.")
    iter_per_epoch: f.Count = f.optim(100, "Number of batches in an epoch.")
    batch: f.Batch = f.optim(128, "Number of images in a batch. If not given, smaller data sets get smaller batches.")
    num_image_per_class: f.Count = f.optim(5, "Number of images per class in a batch. Not used without labels.")
    chunk: Annotated[int, Field(ge=0, le=10**6)] = f.optim(
        0,
        "Process each batch in chunks of N images (GradCache): less memory, one extra forward pass. Batch"
        " norm uses each chunk. 0: off.",
    )
    sync_bn: bool = f.optim(False, "Compute batch norm over the images of all processes.")
    freeze_bn: bool = f.optim(
        False,
        "Keep the running statistics of batch norms as they were loaded, in training too; their weights still learn.",
    )
    backbone_lr: f.Positive | None = f.optim(
        None, "Learning rate of the backbone; without it, --lr, at which the embedding layer learns."
    )
    seed: f.Seed = f.optim(
        1,
        "Seed of all randomness. 1,2,3 trains one run per seed, in subfolders of --save-dir; so do several values of "
        "other numbers and of --fold (one run per combination).",
    )

    save_dir: f.File = f.run(Path("teacher"), "Directory for the files of the run.")
    overwrite: f.Overwrite = False
    resume: bool = f.run(
        False,
        "Resume the run in --save-dir with its settings. These may differ: "
        f"{', '.join(map(flag_name, CHANGE_ON_RESUME))}.",
        exclude=True,  # from settings.json, as overwrite and nproc are
    )
    save_every: f.Count = f.run(600, "Seconds between saves within an epoch, for --resume.")
    keep_state: bool = f.run(False, "Keep the resume state of a finished run, so that --resume can add --epochs.")
    log: f.Loggers = f.run((), "Also log to csv (steps.csv in --save-dir), tensorboard, wandb or mlflow.")
    device: f.DeviceName = "auto"
    nproc: f.Processes = 1
    jobs: Annotated[int, Field(ge=1, le=256)] = f.run(
        1, "Number of runs to train at once, of several --seed or other values.", exclude=True
    )
    precision: f.Precision = f.run("auto", "Precision of the networks. auto: bf16 on CUDA, and for a CPU's inference.")
    compile: bool = f.run(
        False, "Compile the networks with torch.compile. Takes minutes at the start and needs a C++ compiler."
    )
    recall: f.Ks = f.run((1, 2, 4, 8), "Values of K for Recall@K. 1 is always included.")
    eval_every: f.Count = f.run(1, "Number of epochs between evaluations. The last epoch is always evaluated.")
    eval_train: bool = f.run(True, "Also measure the training split.")
    select_on: Literal["eval", "val"] = f.run(
        "eval",
        "Split that picks the best epoch: eval, as in the paper, or val, a part of the training split "
        "that is not trained on (the last fifth of its classes; without labels, a tenth of its photos).",
    )
    fold: f.Fold | None = f.run(
        None, "Validation split: part I of N parts of the training classes, as 1/3. Turns --select-on val on."
    )
    select_by: f.Figure | None = f.run(
        None,
        "Figure that picks the best epoch: recall@K (a K of --recall), map@r or r-precision. Default: recall@1, or "
        "overlap@10 without labels.",
    )
    patience: f.Count | None = f.run(None, "End the run after this many evaluations without a better one.")

    @model_validator(mode="before")
    @classmethod
    def _fold_is_val(cls, values: Any) -> Any:
        return {"select_on": "val", **values} if isinstance(values, dict) and values.get("fold") else values

    @model_validator(mode="after")
    def _selection(self) -> Self:
        kind, _, k = (self.select_by or "").partition("@")
        if kind == "recall" and int(k) not in self.recall:
            raise ValueError(f"--select-by {self.select_by}: is not measured. Add {k} to --recall.")
        if self.fold and self.select_on == "eval":
            raise ValueError(f"--fold {self.fold}: has no effect with --select-on eval. Omit one of them.")
        evaluations = -(-self.epochs // self.eval_every)
        if self.patience and self.patience >= evaluations:
            raise ValueError(
                f"--patience {self.patience}: has no effect with {evaluations} evaluations in {self.epochs} epochs. "
                "Use a smaller number, or omit it."
            )
        return self

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        if self.image_size > self.resize:
            raise ValueError(f"--image-size {self.image_size}: must be at most --resize {self.resize}")
        if 0 < self.chunk < 4:  # the last chunk could have one image, too few for batch norm
            raise ValueError(f"--chunk {self.chunk}: must be at least 4, or 0 for the whole batch")
        if self.sync_bn and (self.chunk or self.compile):
            other = "--chunk" if self.chunk else "--compile"
            raise ValueError(f"--sync-bn: cannot be combined with {other}. Omit one of them.")
        if self.sync_bn and self.freeze_bn:
            raise ValueError("--sync-bn: has no effect with --freeze-bn. Omit one of them.")
        if self.matryoshka and self.matryoshka[-1] > self.embedding_size:
            raise ValueError(
                f"--matryoshka: {self.matryoshka[-1]} is larger than --embedding-size {self.embedding_size}"
            )
        if self.warmup >= self.epochs:
            raise ValueError(f"--warmup {self.warmup}: must be less than --epochs {self.epochs}")
        return self

    @property
    def selecting_figure(self) -> str | None:
        """The name of the figure of --select-by in results: R@K, MAP@R or R-Precision."""
        kind, _, k = (self.select_by or "").partition("@")
        return {"": None, "recall": f"R@{k}", "map": "MAP@R"}.get(kind, "R-Precision")

    @property
    def sides(self) -> tuple[int, int]:
        """(resize, image_size)."""
        return self.resize, self.image_size

    @property
    def without_labels(self) -> str:
        """The flag that turns labels off, if any."""
        return "--dataset images" if self.dataset == "images" else "" if self.labels else "--no-labels"

    def _check_triplets(self) -> None:
        if self.num_image_per_class < 2 or self.batch <= self.num_image_per_class:
            raise ValueError(
                f"--batch {self.batch} with --num-image-per-class {self.num_image_per_class}: contains no triplets. "
                "Use two or more images per class, and more than one class."
            )


class TeacherSettings(TrainSettings):
    """``rkd train-teacher``."""

    command: ClassVar[str] = "train-teacher"

    init: Literal["random", "pca"] = f.model(
        "random", "Start of the embedding layer: random, or the principal components of the training images' features."
    )
    freeze_base: bool = f.model(
        False, "Train only a linear layer, on features that are computed once on --views crops of each image."
    )
    views: f.Count = f.model(8, "Number of crops per image for --freeze-base.")
    loss: Loss = f.loss("l2_triplet", "Metric-learning loss.")
    sample: Sample = f.loss("distance", "Sampling of negatives for triplet and contrastive losses.")
    margin: f.Ratio = f.loss(0.2, "Margin of triplet and contrastive losses.")
    ms_alpha: f.Positive = f.loss(2.0, "Scale of positives in multi_similarity.")
    ms_beta: f.Positive = f.loss(50.0, "Scale of negatives in multi_similarity.")
    ms_base: f.Cosine = f.loss(0.5, "Cosine threshold between positives and negatives in multi_similarity.")
    ms_epsilon: f.Ratio = f.loss(0.1, "Mining margin of multi_similarity.")
    proxy_alpha: f.Positive = f.loss(32.0, "Scale of proxy_anchor.")
    proxy_margin: f.Ratio = f.loss(0.1, "Margin of proxy_anchor.")
    proxy_lr_ratio: f.Positive = f.loss(100.0, "Learning rate of class proxies, as a multiple of --lr.")
    softmax_temperature: f.Positive = f.loss(0.05, "Temperature of softmax.")
    arcface_scale: f.Positive = f.loss(64.0, "Scale of arcface.")
    arcface_margin: Annotated[float, Field(ge=0, lt=3.14)] = f.loss(0.5, "Angular margin of arcface, in radians.")
    ap_temperature: f.Positive = f.loss(0.01, "Temperature of the sigmoid in smooth_ap.")

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
            self._check_triplets()
        return self
