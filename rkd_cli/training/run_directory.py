"""The files of a run: settings, metrics, models, the state to go on from, and the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from rkd_cli.errors import CheckpointError, RunError, SettingsError
from rkd_cli.events import EpochDone
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.checkpoint import Header, save_model
from rkd_cli.runtime.files import write_json, write_text
from rkd_cli.training.state import Position, read_position, restore, save_state

_HELD = ("metrics.jsonl", "best.safetensors", "last.safetensors", "state.safetensors")


@dataclass
class RunDirectory:
    """A directory that belongs to one run; every file in it is whole at any moment."""

    path: Path
    settings: str  # JSON
    inputs: dict[str, str] = field(default_factory=dict)  # what the run reads, each with a digest
    resumed: Position | None = None

    @classmethod
    def prepare(cls, path: Path, settings: str, overwrite: bool, resume: bool) -> RunDirectory:
        """Look at the directory, and make it if it is not there. Nothing in it is touched before ``held``.

        Raises:
            SettingsError: it is in use, holds a run already and is not to be overwritten, or cannot be made.
            CheckpointError: the state to go on from is damaged.
        """
        held = [name for name in _HELD if (path / name).exists()]
        if held and not overwrite and not resume:
            raise SettingsError(
                f"--save-dir {path}: holds a run already ({', '.join(held)}): go on with it by --resume, choose "
                "another, or give --overwrite"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            with cls(path, settings)._lock():
                pass
        except OSError as error:
            raise SettingsError(f"--save-dir {path}: cannot be used ({error.strerror}): choose another") from None
        state = path / "state.safetensors"
        # a run that was stopped before its first epoch was saved has no state: it starts again
        position = read_position(state) if resume and state.exists() else None
        if position and any(row.is_best for row in position.rows) and not (path / "best.safetensors").exists():
            raise CheckpointError(
                f"{path / 'best.safetensors'}: is missing, and epochs that are done cannot make it again: put it "
                "back, or start anew with --overwrite"
            )
        return cls(path, settings, resumed=position)

    def going_on(self) -> list[tuple[str, str]]:
        """For the run's header: where it goes on, if it does."""
        at = self.resumed
        if at is None:
            return []
        return [("going on", f"at epoch {at.epoch}" + (f", after step {at.step} of it" if at.step else ""))]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the directory for this process alone, and begin the run.

        Raises:
            SettingsError: another process has it.
            RunError: it cannot be written.
        """
        with self._lock():
            try:
                for pattern in (".*.part", ".tmp*"):  # ours and safetensors' own, of a process killed while it wrote
                    for left in self.path.glob(pattern):
                        left.unlink()
                (self.path / "result.json").unlink(missing_ok=True)
                if self.resumed is None:
                    (self.path / "state.safetensors").unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"{self.path}: cannot be written ({error.strerror})") from None
            write_text(self.path / "settings.json", self.settings + "\n")
            if self.resumed:
                self._save_metrics(self.resumed.rows)
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise SettingsError(f"--save-dir {self.path}: another process is writing to it: choose another") from None
        try:
            yield
        finally:
            lock.release()

    def restore(self, model: EmbeddingNet, optimizer: torch.optim.Optimizer) -> None:
        """Take the model and the optimizer to where the run stood.

        Raises:
            CheckpointError: the state is damaged, or the images or the teacher are not those of the run.
        """
        if self.resumed is None:
            return
        changed = [name for name, digest in self.inputs.items() if self.resumed.inputs.get(name) != digest]
        if changed:
            raise CheckpointError(
                f"{self.path}: the {' and the '.join(changed)} changed since the run was stopped: bring back what it "
                "read, or start anew with --overwrite"
            )
        restore(self.path / "state.safetensors", self.resumed, model, optimizer)

    def save_epoch(self, rows: tuple[EpochDone, ...], model: EmbeddingNet, header: Header) -> None:
        """Write ``last``, then ``best`` where the newest epoch is the best, then the metrics that speak of them."""
        tensors = model.state_dict()
        save_model(self.path / "last.safetensors", tensors, header)
        if rows[-1].is_best:
            save_model(self.path / "best.safetensors", tensors, header)
        self._save_metrics(rows)

    def _save_metrics(self, rows: tuple[EpochDone, ...]) -> None:
        # a run has some 80 epochs: writing the whole file anew costs nothing and leaves no torn last line
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(_row(row)) + "\n" for row in rows))

    def save_state(self, position: Position, model: EmbeddingNet, optimizer: torch.optim.Optimizer) -> None:
        """Write ``state.safetensors``; the files that it speaks of are there already.

        Raises:
            RunError: weights are not finite, so that nobody could go on from there; or the disk cannot be written.
        """
        broken = [name for name, tensor in model.state_dict().items() if not bool(tensor.isfinite().all())]  # syncs
        if broken:
            raise RunError(
                f"epoch {position.epoch}, step {position.step}: {broken[0]} of the network is not finite: lower --lr; "
                "what was saved before is whole"
            )
        position = position.model_copy(update={"inputs": self.inputs})
        save_state(self.path / "state.safetensors", position, model, optimizer)

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
