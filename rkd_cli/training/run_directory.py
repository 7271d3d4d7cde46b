"""The files of a run: settings, metrics, checkpoints, resume state and result."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError, RunError, SettingsError
from rkd_cli.models import EmbeddingNet
from rkd_cli.models.checkpoint import read_checksum, read_header, read_tensors, save_model
from rkd_cli.models.embedding_net import tensors_of
from rkd_cli.models.joined import TEACHERS, JoinedSpace
from rkd_cli.runtime.distributed import remember_begun
from rkd_cli.runtime.files import check_folder, is_locked, locked_with, write_text
from rkd_cli.schemas import EpochDone, Header, Position, Result
from rkd_cli.training.state import read_position, restore, save_state

_OF_RUN = ("metrics.jsonl", "best.safetensors", "last.safetensors", "state.safetensors")
# {input: its name in errors}
_SAID = {
    "images": "names or labels of the images", "content": "content of the images", "space": "space of the teachers",
}  # fmt: skip


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run. All files are written atomically."""

    path: Path
    settings: str = ""  # JSON
    inputs: Mapping[str, str] = field(default_factory=dict)  # {input: digest}
    resumed: Position | None = None
    writes: bool = True  # False: methods write nothing, because the main process does

    @classmethod
    def find(cls, path: Path, overwrite: bool, resume: bool) -> RunDirectory:
        """Check a directory without changing it.

        Raises:
            SettingsError: it is locked, cannot be written, has a run and neither flag is set, or is to be resumed and
                has no resume state any more.
            CheckpointError: the resume state is damaged.
        """
        found = [name for name in _OF_RUN if (path / name).exists()]
        if found and not overwrite and not resume:
            raise SettingsError(
                f"--save-dir {path}: already has a run ({', '.join(found)}). Pass --resume or --overwrite, or choose "
                "another folder."
            )
        try:
            if is_locked(path / ".lock"):
                raise _busy(path)
            check_folder(path)
        except OSError as error:
            raise _unusable(path, error) from None
        state = path / "state.safetensors"
        if resume and not state.exists() and (path / "result.json").exists():
            raise SettingsError(
                f"--resume: the run in {path} is finished, and kept no resume state (--keep-state). Start "
                f"another run with --load {path / 'last.safetensors'}, or repeat it with --keep-state."
            )
        # a run stopped before it was first saved has no resume state and starts again
        return cls(path, resumed=read_position(state) if resume and state.exists() else None)

    def of_run(self, settings: str, inputs: Mapping[str, str], writes: bool) -> RunDirectory:
        """The directory for a run with these settings (JSON) and inputs. Only the main process ``writes``.

        Raises:
            CheckpointError: the images or the teacher are not those of the resumed run.
        """
        if self.resumed:
            _check_inputs(self.path, self.resumed, inputs)
        return replace(self, settings=settings, inputs=inputs, writes=writes)

    def make(self) -> None:
        """Create the directory if it does not exist.

        Raises:
            SettingsError: another process has locked it, or it cannot be created.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.locked():
                pass
        except OSError as error:
            raise _unusable(self.path, error) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory for this process.

        Raises:
            SettingsError: another process has locked it.
        """
        with locked_with(self.path / ".lock", _busy(self.path)) if self.writes else nullcontext():
            yield

    def restore(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load network, losses and optimizer from the resume state, if the run is resumed.

        Raises:
            CheckpointError: the resume state is damaged, or the best checkpoint is missing.
        """
        if self.resumed:
            restore(self.path / "state.safetensors", learner, optimizer)
            self._check_best(self.resumed)

    def read_space(self, space: JoinedSpace) -> str:
        """Read the map of a resumed run's ``JoinedSpace`` and return the digest of its file.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = self.path / TEACHERS
        if not path.exists():
            raise CheckpointError(
                f"{path}: is missing and cannot be recomputed. Put it back, or start again with --overwrite."
            )
        space.read(path)
        return read_checksum(path)

    def begin(self, model: EmbeddingNet, header: Header) -> Position:
        """Return the position to train from, after ``restore``. A new run replaces an old one.

        The resume state of a finished epoch is saved before its other files. If the run was killed in between, they
        are written here.

        Raises:
            RunError: the directory cannot be written.
        """
        at = self.resumed
        if not self.writes:
            return at or Position()
        try:
            for pattern in (".*.part", ".tmp*"):  # temporary files of rkd and safetensors, of a killed process
                for left in self.path.glob(pattern):
                    left.unlink()
            (self.path / "result.json").unlink(missing_ok=True)
            if at is None:
                (self.path / "state.safetensors").unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}). Check its permissions.") from None
        write_text(self.path / "settings.json", self.settings + "\n")
        remember_begun(self.path)
        if at and at.rows:
            if at.step == 0 and not self._is_saved(at.rows[-1], model):
                self.save_models(at.rows, model, header)
            self._save_metrics(at.rows)
        return at or Position()

    def save_models(self, rows: tuple[EpochDone, ...], model: EmbeddingNet, header: Header) -> None:
        """Write ``last``, ``best`` if the newest epoch is the best, and the metrics.

        Raises:
            RunError: a weight is not finite, or the disk cannot be written. The previous files are intact.
        """
        if not self.writes:
            return
        row, tensors = rows[-1], tensors_of(model)
        check_finite(tensors, row.epoch)
        recalls = {f"{split}_recall": _recalls(row, split) for split in ("train", "eval")}
        header = header.model_copy(update={"epoch": row.epoch, **recalls})
        if row.is_best:
            save_model(self.path / "best.safetensors", tensors, header)
        save_model(self.path / "last.safetensors", tensors, header)
        self._save_metrics(rows)

    def save_state(self, position: Position, learner: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write ``state.safetensors``.

        Raises:
            RunError: a weight is not finite, or the disk cannot be written.
        """
        if not self.writes:
            return
        check_finite(learner.state_dict(), position.epoch, position.step)
        position = position.model_copy(update={"inputs": dict(self.inputs)})
        save_state(self.path / "state.safetensors", position, learner, optimizer)

    def save_result(self, result: Result, keep_state: bool) -> None:
        """Write ``result.json``. Then remove the resume state, unless ``keep_state``.

        Raises:
            RunError: the disk cannot be written.
        """
        if not self.writes:
            return
        write_text(self.path / "result.json", result.model_dump_json(indent=2) + "\n")
        if not keep_state:
            (self.path / "state.safetensors").unlink(missing_ok=True)

    def _save_metrics(self, rows: tuple[EpochDone, ...]) -> None:
        # rewriting some 80 lines is cheap and never leaves a torn one
        text = "".join(_shown(row).model_dump_json() + "\n" for row in rows)
        write_text(self.path / "metrics.jsonl", text)
        write_text(self.path / "metrics.csv", _csv([_shown(row) for row in rows]))

    def _check_best(self, at: Position) -> None:
        best = self.path / "best.safetensors"
        rewritten = at.step == 0 and at.rows and at.rows[-1].is_best  # by ``begin``
        if any(row.is_best for row in at.rows) and not rewritten and not best.exists():
            raise CheckpointError(
                f"{best}: is missing and cannot be recomputed. Put it back, or start again with --overwrite."
            )

    def _is_saved(self, row: EpochDone, model: EmbeddingNet) -> bool:
        """Whether the checkpoints are of this epoch and this run."""
        if row.is_best and not (self.path / "best.safetensors").exists():
            return False
        last, tensors = self.path / "last.safetensors", tensors_of(model)  # ``last`` is written last
        try:
            header, found = read_header(last), read_tensors(last, tensors)
        except CheckpointError:
            return False
        same = all(torch.equal(found[name], tensor.cpu()) for name, tensor in tensors.items())
        return same and (header.epoch, header.eval_recall) == (row.epoch, _recalls(row, "eval"))


def _unusable(path: Path, error: OSError) -> SettingsError:
    return SettingsError(f"--save-dir {path}: cannot be used ({error.strerror}). Choose another folder.")


def _busy(path: Path) -> SettingsError:
    return SettingsError(f"--save-dir {path}: another process is writing to it. Choose another folder.")


def check_finite(tensors: Mapping[str, Tensor], epoch: int, step: int | None = None) -> None:
    """Raise a RunError that names the first weight that is NaN or infinite."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):  # a sync
            where = f"epoch {epoch}" if step is None else f"epoch {epoch}, step {step}"
            name = name.removeprefix("network.")
            raise RunError(f"{where}: weight {name} is not finite. Lower --lr. The files saved before are intact.")


def _check_inputs(path: Path, position: Position, inputs: Mapping[str, str]) -> None:
    changed = [name for name, digest in inputs.items() if position.inputs.get(name) != digest]
    is_old = "content" not in position.inputs  # stored by an earlier version
    if is_old or "images" in changed:  # other names imply other content
        changed = [name for name in changed if name != "content"]
    if changed:
        remedy = "Restore them" + (", resume with the version that started the run" if is_old else "")
        raise CheckpointError(
            f"{path}: the {' and the '.join(_SAID.get(name, name) for name in changed)} changed since the run was "
            f"stopped. {remedy}, or start again with --overwrite."
        )


def _shown(row: EpochDone) -> EpochDone:
    return row.model_copy(
        update={"seconds": round(row.seconds, 3), "images_per_second": round(row.images_per_second, 1)}
    )


def _csv(rows: Sequence[EpochDone]) -> str:
    """A row for each epoch and a column for each figure, such as ``eval.R@1``; empty if not measured."""
    flat = [
        {name: value for name, value in row.model_dump().items() if name not in ("losses", "figures")}
        | {f"losses.{term}": loss for term, loss in row.losses.items()}
        | {f"{split}.{name}": value for split, found in row.figures.items() for name, value in found.items()}
        for row in rows
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    return text.getvalue()


def _recalls(row: EpochDone, split: str) -> dict[int, float]:
    """{k: Recall@k} of a split, as in checkpoint headers."""
    found = row.figures.get(split, {})
    return {int(name[2:]): value for name, value in found.items() if name.startswith("R@")}
