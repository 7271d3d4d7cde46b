"""Embeddings in a file, joined to images by their paths: what stands in for a network that is not here."""

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

import numpy as np
from safetensors import SafetensorError, safe_open

from rkd_cli.data.splits import ImageSet
from rkd_cli.embedding.formats import CONSTANTS, MODEL, PCA, checksum, parquet, paths_beside
from rkd_cli.embedding.formats import write_vectors as write_vectors
from rkd_cli.errors import DataError, first_line
from rkd_cli.schemas import MAX_EMBEDDING

SUFFIXES = (".npy", ".npz", ".parquet", ".safetensors")
_BESIDE = ("vectors", MODEL, *CONSTANTS.values(), *PCA)
_FORM = "(N, D) floating embeddings under `embeddings` and N paths, relative to --data, under `paths`"
_OBJECTS = (
    "Python objects, as a pandas column of lists is: write it by np.savez(FILE, embeddings=np.stack(t['embedding']), "
    "paths=t['path'].to_numpy(str))"
)
_ZEROS = -1  # in place of a row
# the statements that turn another form, read from {path!r}, into the paths and embeddings of an npz
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
    """(N, D) float32 embeddings, and the image of each by its path relative to the data folder, in POSIX form.

    ``pca`` is the map that reduced them, if one did: the (D0,) mean and the (D, D0) components. ``kind`` is how the
    file stores them: float, float16, int8 (here times its scales), or binary (here 1 and -1).
    ``model`` is the digest of the network that made them, empty where the file does not say. ``zeros`` names the images
    whose row is all zeros: such a row has no direction and is left out of the others.
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
        """Find the row of each image of a split below ``root``.

        A name that the file spells in another Unicode form (NFC, NFD) is that of the image, where only one row and one
        image can be meant.
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
    """The row of each image of a split, None where there is none: ``absent`` from the file, or all ``zeros`` there."""

    rows: tuple[int | None, ...]
    absent: tuple[str, ...]
    zeros: tuple[str, ...]


def missing_notes(path: Path, absent: Sequence[str], zeros: Sequence[str], of: str, then: str) -> list[str]:
    """What to say of images that a file has no usable embedding of.

    Args:
        path: of the file.
        absent, zeros: names, as ``Joined`` has them.
        of: what they are images of; may be empty.
        then: what follows.
    """
    return [
        f"{path}: {what} {len(names):,} {of}{'image' if len(names) == 1 else 'images'}, the first {names[0]}: {then}"
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
    """Whether ``path`` is a file, and not that image; some file systems take both spellings for one."""
    with suppress(OSError):
        return not path.samefile(image)
    return False


def relative_names(paths: Sequence[Path], root: Path) -> list[str]:
    """How a file of embeddings calls images: their paths relative to ``root``, with forward slashes."""
    return [path.relative_to(root).as_posix() for path in paths]


def is_vectors(path: Path) -> bool:
    """Whether a file is one of embeddings, by its suffix and, for safetensors, its tensors; a damaged one is none."""
    if path.suffix != ".safetensors":
        return path.suffix in SUFFIXES
    try:
        with safe_open(path, framework="np") as file:
            return "rkd" not in (file.metadata() or {}) and "embeddings" in file.keys()  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError):
        return False


def conversion(path: Path) -> str | None:
    """What to say of a file that may hold embeddings in a form that is not read; None of other files."""
    if path.suffix not in _CONVERT or not path.is_file():
        return None
    module, read, arrays = _CONVERT[path.suffix]
    code = read.format(path=str(path), skip="[1:]" if "{skip}" in read and _has_header(path) else "")
    line = f"import numpy as np, {module}; {code}; np.savez({str(path.with_suffix('.npz'))!r}, {arrays})"
    network = "a network comes by `rkd import-checkpoint`; " if module == "torch" else ""
    return (
        f"{path}: {path.suffix} is not read: {network}embeddings are read from {', '.join(SUFFIXES)}, and this line "
        f'converts them: python -c "{line}"'
    )


def _has_header(path: Path) -> bool:
    """Whether the first line of a table has no numbers behind the path."""
    with path.open(errors="replace") as file:
        last = file.readline().rstrip().replace("\t", ",").rpartition(",")[2]
    try:
        float(last)
    except ValueError:
        return True
    return False


def read_vectors(path: Path) -> Vectors:
    """Read a file of embeddings, every value looked at.

    Raises:
        DataError: the file is absent, damaged, or not of that form: (N, D) finite embeddings that are not all equal and
            N different paths; and if it keeps a PCA map, that of these embeddings.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file: it is to hold {_FORM}")
    read = {".npy": _read_npy, ".npz": _read_npz, ".parquet": _read_parquet}.get(path.suffix, _read_safetensors)
    tensors, names, said = read(path)
    kind, embeddings = _decoded(path, tensors)
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
    zero = np.asarray(~embeddings.any(axis=1))
    if zero.all() or (count > 1 and (embeddings.min(axis=0) == embeddings.max(axis=0)).all()):
        what = "zeros" if zero.all() else "equal"
        raise DataError(
            f"{path}: its {count:,} embeddings are all {what} and tell no image from another: make it again"
        )
    row = {name: index for index, name in enumerate(names)}
    if len(row) < count:
        twice = next(name for index, name in enumerate(names) if row[name] != index)
        raise DataError(f"{path}: {count - len(row)} paths come more than once, the first {twice}: keep one of each")
    pca = _pca_of(path, tensors, size)
    constants = [tensors[CONSTANTS[kind]]] if kind in CONSTANTS else []
    digest = checksum(names, [tensors["embeddings"], *(pca or ()), *constants])
    if said not in (None, digest):
        raise DataError(f"{path}: its checksum is wrong: the file is damaged, make it again")
    if zero.any():
        embeddings = embeddings[~zero]
        row = {names[old]: new for new, old in enumerate(np.flatnonzero(~zero).tolist())}
    zeros = tuple(names[index] for index in np.flatnonzero(zero))
    floats, model = np.require(embeddings, np.float32, "W"), str(tensors.get(MODEL, ""))
    return Vectors(path, floats, row, digest, pca, kind, model, zeros)


def _decoded(path: Path, tensors: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """The kind, and the numbers that the codes stand for.

    Raises:
        DataError: an unknown kind, or codes and constants that are not of it.
    """
    codes, kind = tensors["embeddings"], str(tensors.get("vectors", "float"))
    if kind in ("float", "float16"):
        return kind, codes
    if kind not in CONSTANTS:
        raise DataError(f"{path}: stores vectors as {kind!r}, which this version does not know")
    constant = tensors.get(CONSTANTS[kind], np.empty(0))
    size = len(constant) if constant.ndim == 1 and np.issubdtype(constant.dtype, np.floating) else 0
    dtype, columns = (np.int8, size) if kind == "int8" else (np.uint8, (size + 7) // 8)
    if codes.dtype != dtype or codes.ndim != 2 or not size or codes.shape[1] != columns:
        raise DataError(f"{path}: its {kind} vectors do not fit its `{CONSTANTS[kind]}`: make it again")
    if not np.isfinite(constant).all():
        raise DataError(f"{path}: its `{CONSTANTS[kind]}` are not finite: make it again")
    if kind == "int8":
        return kind, codes * constant.astype(np.float32)
    return kind, np.unpackbits(codes, axis=1, count=size).astype(np.float32) * 2 - 1


def _pca_of(path: Path, tensors: dict[str, np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray] | None:
    found = [tensors[name] for name in PCA if name in tensors]
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
            tensors = {name: file[name] for name in ("embeddings", *_BESIDE) if name in file.files}
            names = file["paths"].ravel()
            names = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names
            return tensors, [str(name) for name in names], None  # a zip has checksums
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError, MemoryError) as error:
        raise DataError(f"{path}: not an npz file that can be read ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return f"it holds {_OBJECTS}" if str(error).startswith("Object arrays") else first_line(error)


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    try:
        with safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
            kept = set(file.keys()) & {*_BESIDE} - {"vectors", MODEL}
            tensors = {name: file.get_tensor(name) for name in ("embeddings", *sorted(kept))}
            tensors |= {"vectors": np.array(facts.get("vectors", "float")), MODEL: np.array(facts.get(MODEL, ""))}
        names = json.loads(facts["paths"])
    except KeyError:
        raise DataError(
            f"{path}: its metadata hold no `paths`, a JSON list of strings: it is to hold {_FORM}"
        ) from None
    except (SafetensorError, OSError, ValueError, RecursionError, TypeError) as error:
        raise DataError(f"{path}: not a safetensors file of embeddings ({first_line(error)})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: its `paths` are no JSON list of strings: it is to hold {_FORM}")
    return tensors, names, facts.get("checksum")


def _read_npy(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    beside = paths_beside(path)
    try:
        names = beside.read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError:
        raise DataError(f"{path}: an npy holds no paths, and {beside.name} beside it cannot be read") from None
    try:
        with path.open("rb") as file:  # read to its end, where np.load would go by the suffix and maybe a zip
            array = np.lib.format.read_array(file, allow_pickle=False)
            rest = file.read(1)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise DataError(f"{path}: not an npy file that can be read ({_reason(error)})") from None
    if rest:
        raise DataError(f"{path}: not an npy file that can be read (something follows its array)")
    kind = np.array("float16" if array.dtype == np.float16 else "float")
    names = [name.removesuffix("\r") for name in names]
    return {"embeddings": array, "vectors": kind}, names if names[-1] else names[:-1], None


def _read_parquet(path: Path) -> tuple[dict[str, np.ndarray], list[str], str | None]:
    reader = parquet(path)
    try:
        table = reader.ParquetFile(path, page_checksum_verification=True).read()
        missing = {"path", "embedding"} - set(table.column_names)
        if missing:
            found = ", ".join(table.column_names[:5]) + (", ..." if len(table.column_names) > 5 else "")
            raise DataError(
                f"{path}: has no column {' and no '.join(sorted(missing))}, but {found or 'none'}: paths are read from "
                "`path`, lists of numbers from `embedding`: t.rename(columns={'OLD': 'path', ...}).to_parquet(FILE)"
            )
        facts = json.loads((table.schema.metadata or {}).get(b"rkd vectors", b"{}"))
        names, lists = table.column("path").to_pylist(), table.column("embedding").combine_chunks()
        flat, lengths = lists.flatten(), set(lists.value_lengths().to_pylist())
        if len(lengths) != 1 or lists.null_count or flat.null_count or not all(isinstance(n, str) for n in names):
            raise DataError(f"{path}: paths or numbers are missing, or embeddings of several sizes: make it again")
        tensors = {"embeddings": flat.to_numpy(zero_copy_only=False).reshape(len(names), lengths.pop())}
        tensors |= {"vectors": np.array(facts.get("vectors", "float")), MODEL: np.array(facts.get(MODEL, ""))}
        for name in set(facts) & {*CONSTANTS.values(), *PCA}:
            tensors[name] = np.array(facts[name], np.float32 if name in CONSTANTS.values() else np.float64)
    except (OSError, ValueError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        raise DataError(f"{path}: not a parquet file of embeddings ({first_line(error)})") from None
    return tensors, names, None  # its pages have checksums
