"""Import checkpoints of the published code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rkd_cli.errors import CheckpointError, SettingsError
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import build_model, header_of
from rkd_cli.models.weights import fitting, read_weights

_NAMED = 5  # tensors named in an error


@dataclass(frozen=True)
class Imported:
    """The checkpoint written, and the tensors of the file that were not used; ``note`` describes wrapped weights."""

    path: Path
    tensors: int
    ignored: tuple[str, ...]
    note: str = ""


def import_checkpoint(
    path: Path,
    base: str,
    embedding_size: int,
    l2normalize: bool,
    resize: int,
    image_size: int,
    dataset: str,
    output: Path | None = None,
    overwrite: bool = False,
) -> Imported:
    """Convert a pickled state dict with keys ``base.*`` and ``linear.*`` to a checkpoint; runs no code from the pickle.

    The arguments describe the saved network. ``output`` is by default next to ``path``, as .safetensors.
    """
    output = output or path.with_suffix(".safetensors")
    if output.exists() and not overwrite:
        raise SettingsError(f"{output}: already exists. Choose another --output, or pass --overwrite.")
    model = build_model(base, embedding_size, l2normalize, image_size=image_size)
    expected = model.state_dict()
    state, note = fitting(path, read_weights(path), expected, _renamed)
    state |= {k: v for k, v in expected.items() if k not in state and k.endswith("num_batches_tracked")}  # PyTorch 0.4
    missing = [name for name in expected if name not in state]
    wrong = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the network"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or wrong:
        problems = [f"{name} is not in the file" for name in missing] + wrong
        more = [f"and {len(problems) - _NAMED} more tensors"] if len(problems) > _NAMED else []
        flags = f"--base {base} --embedding-size {embedding_size}"
        raise CheckpointError(
            f"{path}: does not fit {flags}. Describe the network that was saved.",
            *(f"{path}: {problem}" for problem in (*problems[:_NAMED], *more)),
        )
    model.load_state_dict({name: state[name] for name in expected})
    save_model(output, model.state_dict(), header_of(model, base, resize, image_size, dataset))
    return Imported(output, len(expected), tuple(sorted(set(state) - set(expected))), note)


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published Inception-BN wraps its network in ".model"."""
    return {key.replace("base.model.", "base.", 1): value for key, value in state.items()}
