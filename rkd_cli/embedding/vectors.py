"""Read vectors files, and match their embeddings to images by path. They replace a network as the teacher."""

from __future__ import annotations

import json
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from rkd_cli.data.splits import ImageSet, relative_names
from rkd_cli.embedding.formats import CONSTANTS, MODEL, PCA, UNIT, checksum, npy_model, npy_paths, parquet
from rkd_cli.embedding.formats import write_vectors as write_vectors
from rkd_cli.errors import DataError, first_line
from rkd_cli.geometry import is_unit
from rkd_cli.schemas import MAX_EMBEDDING

SUFFIXES = (".npy", ".npz", ".parquet", ".safetensors")
_TEXTS = {"vectors": "float", MODEL: "", UNIT: ""}  # optional, with what is meant without them
_OPTIONAL = (*_TEXTS, *CONSTANTS.values(), *PCA)
_FORM = "It must contain (N, D) floating `embeddings` and N `paths`, relative to --data."
_OBJECTS = (
    "Python objects, such as a pandas column of lists; write it with np.savez(FILE, "
    "embeddings=np.stack(t['embedding']), paths=t['path'].to_numpy(str))"
)
_ZEROS = -1  # instead of a row
# code that converts another format, read from {path!r}, to an npz
_OF_ROWS = "paths=[x[0] for x in r], embeddings=np.array([x[1:] for x in r], 'f4')"
_OF_DICTS = "paths=[x['path'] for x in r], embeddings=np.array([x['embedding'] for x in r], 'f4')"
_OF_TABLE = "paths=t['path'].to_numpy(str), embeddings=np.stack(t['embedding'])"
_CONVERT = {
    ".csv": ("csv", "r = list(csv.reader(open({path!r}))){skip}", _OF_ROWS),
    ".tsv": ("csv", "r = list(csv.reader(open({path!r}), delimiter='\\t')){skip}", _OF_ROWS),
    ".json": ("json", "r = json.load(open({path!r}))", _OF_DICTS),
    ".jsonl": ("json", "r = [json.loads(x) for x in open({path!r})]", _OF_DICTS),
    ".ndjson": ("json", "r = [json.loads(x) for x in open({path!r})]", _OF_DICTS),
    ".pkl": ("pandas", "t = pandas.read_pickle({path!r})", _OF_TABLE),
    ".pickle": ("pandas", "t = pandas.read_pickle({path!r})", _OF_TABLE),
    ".feather": ("pandas", "t = pandas.read_feather({path!r})", _OF_TABLE),
    ".h5": ("h5py", "f = h5py.File({path!r})", "paths=f['paths'].asstr()[:], embeddings=f['embeddings'][:]"),
    ".hdf5": ("h5py", "f = h5py.File({path!r})", "paths=f['paths'].asstr()[:], embeddings=f['embeddings'][:]"),
    ".pt": ("torch", "d = torch.load({path!r})", "paths=d['paths'], embeddings=d['embeddings'].numpy()"),
    ".pth": ("torch", "d = torch.load({path!r})", "paths=d['paths'], embeddings=d['embeddings'].numpy()"),
}


@dataclass(frozen=True)
class Vectors:
    """(N, D) float32 embeddings, and the row of each image by its POSIX path relative to the data folder.

    ``pca`` is the (D0,) mean and the (D, D0) components of the PCA that reduced them, if any. ``kind`` is how the file
    stores them: float, float16, int8 (here multiplied by its scales, and at unit length if the rows had it before
    rounding) or binary (here 1 and -1). ``model`` is the digest of the network, if known. ``zeros`` are the images
    whose row is all zeros; such rows have no direction and are left out of ``embeddings``.
    """

    path: Path
    embeddings: np.ndarray
    row: dict[str, int]
    digest: str
    pca: tuple[np.ndarray, np.ndarray] | None = None
    kind: str = "float"
    model: str = ""
    zeros: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """D."""
        return int(self.embeddings.shape[1])

    def join(self, images: ImageSet, root: Path) -> Joined:
        """Find the row of each image of a split in ``root``.

        Names in another Unicode form (NFC, NFD) match if exactly one row and one image are possible.
        """
        known = self.row | dict.fromkeys(self.zeros, _ZEROS)
        names = relative_names(images.paths, root)
        rows = [known.get(name) for name in names]
        if None in rows:
            spelled = _by_form(known.keys() - set(names))
            asked = Counter(_form(name) for name, row in zip(names, rows, strict=True) if row is None)
            for place, (name, row) in enumerate(zip(names, rows, strict=True)):
                others = spelled.get(_form(name), ()) if row is None else ()
                if len(others) == asked[_form(name)] == 1 and not _is_another(root / others[0], images.paths[place]):
                    rows[place] = known[others[0]]
        return Joined(
            tuple(None if row == _ZEROS else row for row in rows),
            tuple(name for name, row in zip(names, rows, strict=True) if row is None),
            tuple(name for name, row in zip(names, rows, strict=True) if row == _ZEROS),
        )


@dataclass(frozen=True)
class Joined:
    """The row of each image of a split, or None if it is ``absent`` from the file, or ``zeros`` there."""

    rows: tuple[int | None, ...]
    absent: tuple[str, ...]
    zeros: tuple[str, ...]


def missing_notes(path: Path, absent: Sequence[str], zeros: Sequence[str], of: str, then: str) -> list[str]:
    """Notes about images without a usable embedding in the file ``path``; each ends with ``then``.

    ``absent`` and ``zeros`` are as in ``Joined``; ``of`` qualifies the images, and may be empty.
    """
    return [
        f"{path}: {what} {len(names):,} {of}{'image' if len(names) == 1 else 'images'}, first {names[0]}: {then}"
        for what, names in (("no embedding of", absent), ("a row of zeros, which has no direction, for", zeros))
        if names
    ]


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _by_form(names: Iterable[str]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for name in names:
        found[_form(name)].append(name)
    return found


def _is_another(path: Path, image: Path) -> bool:
    """Whether ``path`` is a file other than ``image``; on some file systems both Unicode forms are one file."""
    with suppress(OSError):
        return not path.samefile(image)
    return False


def is_vectors(path: Path) -> bool:
    """Whether a file is a vectors file, by its suffix and, for safetensors, its tensors; False if it is damaged."""
    if path.suffix != ".safetensors":
        return path.suffix in SUFFIXES
    try:
        with safe_open(path, framework="np") as file:
            return "rkd" not in (file.metadata() or {}) and "embeddings" in file.keys()  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError):
        return False


def conversion(path: Path) -> str | None:
    """The error for a file that may contain embeddings in an unsupported format; None for other files."""
    if path.suffix not in _CONVERT or not path.is_file():
        return None
    module, read, arrays = _CONVERT[path.suffix]
    code = read.format(path=str(path), skip="[1:]" if "{skip}" in read and _has_header(path) else "")
    line = f"import numpy as np, {module}; {code}; np.savez({str(path.with_suffix('.npz'))!r}, {arrays})"
    network = " Import a network with `rkd import-checkpoint`." if module == "torch" else ""
    return (
        f"{path}: {path.suffix} is not supported.{network} Embeddings are read from {', '.join(SUFFIXES)}. "
        f'Convert them with: python -c "{line}"'
    )


def _has_header(path: Path) -> bool:
    """Whether the first line of a table does not end in a number."""
    with path.open(errors="replace") as file:
        last = file.readline().rstrip().replace("\t", ",").rpartition(",")[2]
    try:
        float(last)
    except ValueError:
        return True
    return False


def read_vectors(path: Path) -> Vectors:
    """Read and check a vectors file.

    Raises a DataError unless it contains (N, D) finite embeddings that are not all equal, N different paths and, if
    any, a matching PCA.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. {_FORM}")
    read = {".npy": _read_npy, ".npz": _read_npz, ".parquet": _read_parquet}.get(path.suffix, _read_safetensors)
    tensors, names, expected = read(path)
    kind, embeddings = _decoded(path, tensors)
    if embeddings.ndim != 2 or not np.issubdtype(embeddings.dtype, np.floating):
        found = f"{embeddings.dtype} of shape {embeddings.shape}"
        raise DataError(f"{path}: the embeddings are {found}. {_FORM}")
    count, size = embeddings.shape
    if count != len(names):
        raise DataError(f"{path}: {count} embeddings and {len(names)} paths. {_FORM}")
    if not count or not 1 <= size <= MAX_EMBEDDING:
        raise DataError(f"{path}: {count} embeddings of {size} dimensions. Create the file again.")
    wrong = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(wrong):
        first = names[wrong[0]]
        raise DataError(f"{path}: {len(wrong)} embeddings are not finite, first that of {first}. Create it again.")
    zero = np.asarray(~embeddings.any(axis=1))
    if zero.all() or (count > 1 and (embeddings.min(axis=0) == embeddings.max(axis=0)).all()):
        what = "zeros" if zero.all() else "equal"
        raise DataError(
            f"{path}: its {count:,} embeddings are all {what}, so images cannot be compared. Create the file again."
        )
    row = {name: index for index, name in enumerate(names)}
    if len(row) < count:
        twice = next(name for index, name in enumerate(names) if row[name] != index)
        raise DataError(f"{path}: {count - len(row)} paths are duplicates, first {twice}. Keep one of each.")
    pca = _pca_of(path, tensors, size)
    constants = [tensors[CONSTANTS[kind]]] if kind in CONSTANTS else []
    digest = checksum(names, [tensors["embeddings"], *(pca or ()), *constants])
    if expected not in (None, digest):
        raise DataError(f"{path}: damaged (wrong checksum). Create the file again.")
    if zero.any():
        embeddings = embeddings[~zero]
        row = {names[old]: new for new, old in enumerate(np.flatnonzero(~zero).tolist())}
    zeros = tuple(names[index] for index in np.flatnonzero(zero))
    floats, model = np.require(embeddings, np.float32, "W"), str(tensors.get(MODEL, ""))
    if kind == "int8" and _had_unit_length(floats, tensors):
        floats /= np.linalg.norm(floats, axis=1, keepdims=True)
    return Vectors(path, floats, row, digest, pca, kind, model, zeros)


def _decoded(path: Path, tensors: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """The kind of the vectors, and the decoded embeddings."""
    codes, kind = tensors["embeddings"], str(tensors.get("vectors", "float"))
    if kind in ("float", "float16"):
        return kind, codes
    if kind not in CONSTANTS:
        raise DataError(f"{path}: stores vectors as {kind!r}, unknown to this version. Update rkd-cli.")
    constant = tensors.get(CONSTANTS[kind], np.empty(0))
    size = len(constant) if constant.ndim == 1 and np.issubdtype(constant.dtype, np.floating) else 0
    dtype, columns = (np.int8, size) if kind == "int8" else (np.uint8, (size + 7) // 8)
    if codes.dtype != dtype or codes.ndim != 2 or not size or codes.shape[1] != columns:
        raise DataError(f"{path}: its {kind} vectors do not match its `{CONSTANTS[kind]}`. Create the file again.")
    if not np.isfinite(constant).all():
        raise DataError(f"{path}: its `{CONSTANTS[kind]}` are not finite. Create the file again.")
    if kind == "int8":
        return kind, codes * constant.astype(np.float32)
    return kind, np.unpackbits(codes, axis=1, count=size).astype(np.float32) * 2 - 1


def _had_unit_length(rows: np.ndarray, tensors: dict[str, np.ndarray]) -> bool:
    """Whether int8 rows had unit length before rounding: rounding explains the rest, and the file does not deny it."""
    if str(tensors.get(UNIT, "")).lower() == "false":
        return False
    used = tensors["embeddings"].any(axis=0)  # the scale of a dimension of zeros is 1
    rounding = np.linalg.norm(tensors["scales"][used] / 2)  # of a row, at most
    return is_unit(torch.from_numpy(rows), float(rounding))


def _pca_of(path: Path, tensors: dict[str, np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray] | None:
    found = [tensors[name] for name in PCA if name in tensors]
    if not found:
        return None
    shapes = [array.shape for array in found]
    whole = len(found) == 2 and len(shapes[1]) == 2 and shapes[1][0] == size and shapes[0] == shapes[1][1:]
    if not whole or not all(np.issubdtype(a.dtype, np.floating) and np.isfinite(a).all() for a in found):
        raise DataError(
            f"{path}: its PCA is damaged. It must contain a finite (D0,) `pca_mean` and ({size}, D0) `pca_map`."
        )
    return found[0], found[1]


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    try:
        # opened here, because np.load leaves a file that is not a zip open
        with path.open("rb") as opened, np.lib.npyio.NpzFile(opened, allow_pickle=False) as file:
            missing = {"embeddings", "paths"} - set(file.files)
            if missing:
                raise DataError(f"{path}: contains no {' and no '.join(sorted(missing))}. {_FORM}")
            tensors = {name: file[name] for name in ("embeddings", *_OPTIONAL) if name in file.files}
            names = file["paths"].ravel()
            names = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names
            return tensors, [str(name) for name in names], None  # a zip has checksums
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as npz ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return f"it contains {_OBJECTS}" if str(error).startswith("Object arrays") else first_line(error)


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    try:
        with safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
            optional = set(file.keys()) & {*_OPTIONAL} - _TEXTS.keys()
            tensors = {name: file.get_tensor(name) for name in ("embeddings", *sorted(optional))}
            tensors |= {name: np.array(facts.get(name, text)) for name, text in _TEXTS.items()}
        names = json.loads(facts["paths"])
    except KeyError:
        raise DataError(f"{path}: its metadata has no `paths`, a JSON list of strings. {_FORM}") from None
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise DataError(f"{path}: not a vectors file in safetensors format ({first_line(error)})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: its `paths` are not a JSON list of strings. {_FORM}")
    return tensors, names, facts.get("checksum")


def _read_npy(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    paths_file = npy_paths(path)
    try:
        names = paths_file.read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError:
        raise DataError(f"{path}: npy contains no paths, and {paths_file.name} cannot be read") from None
    try:
        with path.open("rb") as file:  # not np.load, which also accepts zip files and ignores trailing data
            array = np.lib.format.read_array(file, allow_pickle=False)
            rest = file.read(1)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as npy ({_reason(error)})") from None
    if rest:
        raise DataError(f"{path}: cannot be read as npy (data follow the array)")
    kind, model = np.array("float16" if array.dtype == np.float16 else "float"), ""
    with suppress(OSError):
        model = npy_model(path).read_text(encoding="utf-8", errors="replace").strip()
    names = [name.removesuffix("\r") for name in names]
    return {"embeddings": array, "vectors": kind, MODEL: np.array(model)}, names if names[-1] else names[:-1], None


def _read_parquet(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    reader = parquet(path)
    try:
        table = reader.ParquetFile(path, page_checksum_verification=True).read()
        missing = {"path", "embedding"} - set(table.column_names)
        if missing:
            found = ", ".join(table.column_names[:5]) + (", ..." if len(table.column_names) > 5 else "")
            raise DataError(
                f"{path}: has no column {' and no '.join(sorted(missing))}, only {found or 'none'}. Store paths in "
                "`path` and lists of floats in `embedding`: t.rename(columns={'OLD': 'path', ...}).to_parquet(FILE)"
            )
        facts = json.loads((table.schema.metadata or {}).get(b"rkd vectors", b"{}"))
        names, lists = table.column("path").to_pylist(), table.column("embedding").combine_chunks()
        flat, lengths = lists.flatten(), set(lists.value_lengths().to_pylist())
        if len(lengths) != 1 or lists.null_count or flat.null_count or not all(isinstance(n, str) for n in names):
            raise DataError(f"{path}: paths or values are missing, or sizes of embeddings differ. Create it again.")
        tensors = {"embeddings": flat.to_numpy(zero_copy_only=False).reshape(len(names), lengths.pop())}
        facts[MODEL] = _model_of(path, table) or facts.get(MODEL, "")
        tensors |= {name: np.array(facts.get(name, text)) for name, text in _TEXTS.items()}
        for name in set(facts) & {*CONSTANTS.values(), *PCA}:
            tensors[name] = np.array(facts[name], np.float32 if name in CONSTANTS.values() else np.float64)
    except (OSError, ValueError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        raise DataError(f"{path}: not a vectors file in parquet format ({first_line(error)})") from None
    return tensors, names, None  # parquet pages have checksums


def _model_of(path: Path, table: Any) -> str:
    """The network in the column of its digest, which other programs keep where they drop the metadata."""
    models = set(table.column(MODEL).to_pylist()) - {None, ""} if MODEL in table.column_names else set()
    if len(models) > 1:
        raise DataError(f"{path}: holds embeddings of {len(models)} models (column {MODEL}). Keep those of one.")
    return str(models.pop()) if models else ""
