"""Embeddings in a file, joined to images by their paths: what stands in for a network that is not here."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rkd_cli.data.splits import ImageSet
from rkd_cli.errors import DataError
from rkd_cli.runtime.files import replace_file
from rkd_cli.schemas import MAX_EMBEDDING

SUFFIXES = (".npz", ".safetensors")
_PCA = ("pca_mean", "pca_map")
_FORM = "(N, D) floating embeddings under `embeddings` and N paths, relative to --data, under `paths`"


@dataclass(frozen=True)
class Vectors:
    """(N, D) float32 embeddings, and the image of each by its path relative to the data folder, in POSIX form.

    ``pca`` is the map that reduced them, if one did: the (D0,) mean and the (D, D0) components.
    """

    path: Path
    embeddings: np.ndarray
    row: dict[str, int]
    digest: str
    pca: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def size(self) -> int:
        """D."""
        return int(self.embeddings.shape[1])

    def rows_of(self, images: ImageSet, root: Path) -> list[int | None]:
        """The row of each image of a split below ``root``, None where the file has none."""
        return [self.row.get(name) for name in relative_names(images.paths, root)]


def relative_names(paths: Sequence[Path], root: Path) -> list[str]:
    """How a file of embeddings calls images: their paths relative to ``root``, with forward slashes."""
    return [path.relative_to(root).as_posix() for path in paths]


def write_vectors(
    path: Path, embeddings: np.ndarray, names: Sequence[str], pca: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    """Write a file of embeddings, npz or safetensors by its suffix, whole or not at all.

    Args:
        path: of the file.
        embeddings: (N, D) floating.
        names: N, of ``relative_names``.
        pca: the map that reduced them, as in ``Vectors``.
    Raises:
        RunError: the disk is full, or the folder read-only or gone.
    """

    tensors = {"embeddings": embeddings, **dict(zip(_PCA, pca or (), strict=False))}

    def write(partial: Path) -> None:
        if path.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez(file, paths=np.array(names), **tensors)  # type: ignore[arg-type]  # of its flags
        else:
            facts = {"paths": json.dumps(list(names)), "checksum": _checksum(names, *tensors.values())}
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial, metadata=facts)

    replace_file(path, write)


def is_vectors(path: Path) -> bool:
    """Whether a file is one of embeddings, by its suffix and, for safetensors, its tensors; a damaged one is none."""
    if path.suffix != ".safetensors":
        return path.suffix == ".npz"
    try:
        with safe_open(path, framework="np") as file:
            return "rkd" not in (file.metadata() or {}) and "embeddings" in file.keys()  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError):
        return False


def read_vectors(path: Path) -> Vectors:
    """Read a file of embeddings, every value looked at.

    Raises:
        DataError: the file is absent, damaged, or not of that form: (N, D) finite embeddings and N different paths; and
            if it keeps a PCA map, that of these embeddings.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file: it is to hold {_FORM}")
    tensors, names, said = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    embeddings = tensors["embeddings"]
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        found = f"{embeddings.dtype} of the shape {embeddings.shape}"
        raise DataError(f"{path}: its embeddings are {found}: it is to hold {_FORM}")
    count, size = embeddings.shape
    if count != len(names):
        raise DataError(f"{path}: {count} embeddings and {len(names)} paths: it is to hold {_FORM}")
    if not count or not 1 <= size <= MAX_EMBEDDING:
        raise DataError(f"{path}: {count} embeddings of the size {size}: make it again")
    wrong = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(wrong):
        raise DataError(f"{path}: {len(wrong)} embeddings are not finite, the first that of {names[wrong[0]]}")
    row = {name: index for index, name in enumerate(names)}
    if len(row) < count:
        twice = next(name for index, name in enumerate(names) if row[name] != index)
        raise DataError(f"{path}: {count - len(row)} paths come more than once, the first {twice}: keep one of each")
    pca = _pca_of(path, tensors, size)
    digest = _checksum(names, embeddings, *(pca or ()))
    if said not in (None, digest):
        raise DataError(f"{path}: its checksum is wrong: the file is damaged, make it again")
    return Vectors(path, embeddings.astype(np.float32, copy=False), row, digest, pca)


def _pca_of(path: Path, tensors: dict[str, np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray] | None:
    found = [tensors[name] for name in _PCA if name in tensors]
    if not found:
        return None
    shapes = [array.shape for array in found]
    whole = len(found) == 2 and len(shapes[1]) == 2 and shapes[1][0] == size and shapes[0] == shapes[1][1:]
    if not whole or not all(np.issubdtype(a.dtype, np.floating) and np.isfinite(a).all() for a in found):
        raise DataError(
            f"{path}: its PCA map is damaged: it is to hold a finite (D0,) `pca_mean` and ({size}, D0) `pca_map`"
        )
    return found[0], found[1]


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    try:
        # opened here, for np.load leaves a file open that is no zip
        with path.open("rb") as opened, np.lib.npyio.NpzFile(opened, allow_pickle=False) as file:
            missing = {"embeddings", "paths"} - set(file.files)
            if missing:
                raise DataError(f"{path}: holds no {' and no '.join(sorted(missing))}: it is to hold {_FORM}")
            tensors = {name: file[name] for name in ("embeddings", *_PCA) if name in file.files}
            return tensors, [str(name) for name in file["paths"].ravel()], None  # a zip has checksums
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError, MemoryError) as error:
        raise DataError(f"{path}: not an npz file that can be read ({_reason(error)})") from None


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    try:
        with safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
            kept = set(file.keys()) & {*_PCA}
            tensors = {name: file.get_tensor(name) for name in ("embeddings", *sorted(kept))}
        names = json.loads(facts["paths"])
    except KeyError:
        raise DataError(
            f"{path}: its metadata hold no `paths`, a JSON list of strings: it is to hold {_FORM}"
        ) from None
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise DataError(f"{path}: not a safetensors file of embeddings ({_reason(error)})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: its `paths` are no JSON list of strings: it is to hold {_FORM}")
    return tensors, names, facts.get("checksum")


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _checksum(names: Sequence[str], *tensors: np.ndarray) -> str:
    value = zlib.crc32("\n".join(names).encode(errors="surrogateescape"))
    for tensor in tensors:
        value = zlib.crc32(np.ascontiguousarray(tensor).data, value)
    return f"{value:08x}"
