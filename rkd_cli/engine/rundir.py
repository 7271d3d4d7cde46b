"""The files of a run: settings, metrics, models and the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rkd_cli.checkpoint import Header, save_model, write_json, write_text
from rkd_cli.errors import SettingsError
from rkd_cli.events import EpochDone


@dataclass
class RunDirectory:
    """A directory that belongs to one run; every file in it is whole at any moment."""

    path: Path
    metrics: list[EpochDone] = field(default_factory=list)

    @classmethod
    def create(cls, path: Path, overwrite: bool) -> RunDirectory:
        """
        Raises:
            SettingsError: it holds a run already and is not to be overwritten, or it cannot be made.
        """
        held = [name for name in ("metrics.jsonl", "best.safetensors", "last.safetensors") if (path / name).exists()]
        if held and not overwrite:
            raise SettingsError(
                f"--save-dir {path}: holds a run already ({', '.join(held)}): choose another, or give --overwrite"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--save-dir {path}: cannot be used ({error.strerror}): choose another") from None
        return cls(path)

    def save_settings(self, text: str) -> None:
        """Write ``settings.json``, which ``--config`` takes back; from here on the directory is this run's."""
        (self.path / "result.json").unlink(missing_ok=True)
        write_text(self.path / "settings.json", text + "\n")

    def save_epoch(self, epoch: EpochDone, tensors: Mapping[str, Tensor], header: Header) -> None:
        """Write ``last``, then ``best`` where this epoch is the best, then the metrics that speak of them."""
        save_model(self.path / "last.safetensors", tensors, header)
        if epoch.is_best:
            save_model(self.path / "best.safetensors", tensors, header)
        self.metrics.append(epoch)
        # a run has some 80 epochs: writing the whole file anew costs nothing and leaves no torn last line
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(_row(row)) + "\n" for row in self.metrics))

    def save_result(self, result: Mapping[str, object]) -> None:
        """Write ``result.json``."""
        write_json(self.path / "result.json", result)


def _row(epoch: EpochDone) -> dict[str, object]:
    recalls = {"train": epoch.train_recall, "eval": epoch.eval_recall, "val": epoch.val_recall}
    return {
        "epoch": epoch.epoch,
        "losses": dict(epoch.losses),
        "learning_rate": epoch.learning_rate,
        **{f"{name}_recall": {str(k): v for k, v in recall.items()} for name, recall in recalls.items() if recall},
        "seconds": round(epoch.seconds, 3),
        "images_per_second": round(epoch.images_per_second, 1),
        "is_best": epoch.is_best,
    }
