"""Write vectors files (npy, npz, safetensors, parquet) in blocks, so that they may be larger than memory."""

from __future__ import annotations

import importlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkd_cli.compress import Rows, blocks_of, column_mean, int8_scales, to_codes, to_signs
from rkd_cli.errors import RunError, SettingsError
from rkd_cli.runtime.files import replace_file, write_text

PCA = ("pca_mean", "pca_map")
MODEL = "rkd_model"  # key of the network's digest
UNIT = "l2normalize"  # key of whether int8 rows had unit length before rounding
CONSTANTS = {"int8": "scales", "binary": "threshold"}  # needed to decode these kinds
_NAMES_AT_ONCE = 1 << 14
_MAX_HEADER = 100_000_000  # bytes, the limit of safetensors; the paths are in the header
_TYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True)
class _Stored:
    """The content of a file: (N, D) codes of one dtype, computed in blocks, and small arrays."""

    kind: str
    rows: Rows
    dtype: np.dtype[Any]
    columns: int  # of the codes
    small: dict[str, np.ndarray]
    path: Path
    model: str
    unit: bool | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[0], self.columns

    def metadata(self) -> dict[str, str]:
        """The kind, unless float, the model, if known, and of int8 whether rows had unit length, if known."""
        kind = {} if self.kind == "float" else {"vectors": self.kind}
        unit = {UNIT: str(self.unit).lower()} if self.kind == "int8" and self.unit is not None else {}
        return kind | unit | ({MODEL: self.model} if self.model else {})

    def blocks(self) -> Iterator[np.ndarray]:
        """The codes in blocks."""
        for rows in blocks_of(self.rows):
            yield np.ascontiguousarray(self._codes(rows).cpu().numpy(), self.dtype)

    def _codes(self, rows: Tensor) -> Tensor:
        if self.kind == "int8":
            return to_codes(rows, torch.from_numpy(self.small["scales"]).to(rows.device))
        if self.kind == "binary":
            signs = to_signs(rows, torch.from_numpy(self.small["threshold"]).to(rows.device))
            return torch.from_numpy(np.packbits((signs > 0).cpu().numpy(), axis=1))
        if self.kind == "float16":
            rows = rows.half()
            if not bool(rows.isfinite().all()):
                raise RunError(f"{self.path}: values exceed the float16 maximum of 65,504. Store float32 instead.")
        return rows


def check_writer(path: Path, names: Sequence[str]) -> None:
    """Raise a SettingsError if this format needs a missing package or cannot store these paths."""
    if path.suffix == ".parquet":
        parquet(path)
        if bad := next((name for name in names if not _is_unicode(name)), None):
            raise SettingsError(f"--out {path}: parquet stores UTF-8 paths only, got {bad!r}. Use .npz.")
    elif path.suffix == ".npy":
        if bad := next((name for name in names if "\n" in name or "\r" in name), None):
            raise SettingsError(f"--out {path}: .npy stores one path per line, got {bad!r}. Use .npz.")
    elif path.suffix == ".safetensors" and len(json.dumps(json.dumps(list(names)))) > _MAX_HEADER - (1 << 20):
        raise SettingsError(f"--out {path}: the paths exceed the 100 MB limit of safetensors. Use .npz.")


def write_vectors(
    path: Path,
    embeddings: np.ndarray | Rows,
    names: Sequence[str],
    pca: tuple[np.ndarray, np.ndarray] | None = None,
    kind: str = "float",
    model: str = "",
    unit: bool | None = None,
) -> None:
    """Write a vectors file atomically; the suffix selects the format.

    ``names`` are N ``relative_names``, ``pca`` is as in ``Vectors``, ``kind`` is float (unchanged), float16, int8 or
    binary, ``model`` the digest of the network, if known: in parquet also a column. ``unit`` is whether the rows have
    unit length, if known, which int8 rounding hides. npy stores no ``pca``; paths and ``model`` are in other files.
    """
    rows = torch.from_numpy(embeddings) if isinstance(embeddings, np.ndarray) else embeddings
    small = dict(zip(PCA, pca or (), strict=False))
    columns = rows.shape[1]
    dtype: np.dtype[Any] = rows[0:1].cpu().numpy().dtype
    if kind == "int8":
        small["scales"], dtype = int8_scales(rows).cpu().numpy(), np.dtype(np.int8)
    elif kind == "binary":
        small["threshold"], dtype = column_mean(rows).float().cpu().numpy(), np.dtype(np.uint8)
        columns = (columns + 7) // 8
    elif kind == "float16":
        dtype = np.dtype(np.float16)
    stored = _Stored(kind, rows, dtype, columns, small, path, model, unit)
    write = {".npy": _npy, ".npz": _npz, ".parquet": _parquet, ".safetensors": _safetensors}[path.suffix]
    replace_file(path, lambda partial: write(partial, stored, names))


def npy_paths(path: Path) -> Path:
    """The text file with the paths of an npy, one per line."""
    return path.with_name(f"{path.name}.paths.txt")


def npy_model(path: Path) -> Path:
    """The text file with the digest of the network of an npy."""
    return path.with_name(f"{path.name}.model.txt")


def checksum(names: Sequence[str], blocks: Iterable[np.ndarray]) -> str:
    """CRC-32 of the paths and then the bytes of the arrays."""
    value = zlib.crc32("\n".join(names).encode(errors="surrogateescape"))
    for block in blocks:
        value = zlib.crc32(np.ascontiguousarray(block).data, value)
    return f"{value:08x}"


def parquet(path: Path) -> Any:
    """Import pyarrow.parquet, or raise a SettingsError."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise SettingsError(f"{path}: parquet needs pyarrow. Run `pip install pyarrow`, or use .npz.") from None


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _npy(partial: Path, stored: _Stored, names: Sequence[str]) -> None:
    with partial.open("wb") as file:
        _array(file, stored.dtype, stored.shape, stored.blocks())
    text = "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")
    if stored.model:
        write_text(npy_model(stored.path), f"{stored.model}\n")
    else:
        npy_model(stored.path).unlink(missing_ok=True)
    replace_file(npy_paths(stored.path), lambda file: file.write_bytes(text))  # just before the array


def _npz(partial: Path, stored: _Stored, names: Sequence[str]) -> None:
    longest = np.dtype(f"U{max(map(len, names))}")
    some = (names[start : start + _NAMES_AT_ONCE] for start in range(0, len(names), _NAMES_AT_ONCE))
    small = stored.small | {name: np.array(text) for name, text in stored.metadata().items()}
    with zipfile.ZipFile(partial, "w") as file:
        with file.open("paths.npy", "w", force_zip64=True) as entry:
            _array(entry, longest, (len(names),), (np.array(part, longest) for part in some))
        with file.open("embeddings.npy", "w", force_zip64=True) as entry:
            _array(entry, stored.dtype, stored.shape, stored.blocks())
        for name, array in small.items():
            with file.open(f"{name}.npy", "w") as entry:
                _array(entry, array.dtype, array.shape, [array])


def _array(file: Any, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for block in blocks:
        file.write(block.tobytes())


def _safetensors(partial: Path, stored: _Stored, names: Sequence[str]) -> None:
    """Written by hand (https://huggingface.co/docs/safetensors, "Format"): the library needs whole arrays in memory."""
    small = {name: np.ascontiguousarray(array) for name, array in stored.small.items()}
    parts = [*small.values()]
    facts = {"paths": json.dumps(list(names)), "checksum": checksum(names, _chained(stored, parts))}
    header: dict[str, Any] = {"__metadata__": facts | stored.metadata()}
    at = 0
    shapes = {"embeddings": (stored.dtype, stored.shape)} | {name: (a.dtype, a.shape) for name, a in small.items()}
    for name, (dtype, shape) in shapes.items():
        stop = at + dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": _TYPES[dtype.name], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for block in _chained(stored, parts):
            file.write(block.data)


def _chained(stored: _Stored, small: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    yield from stored.blocks()
    yield from small


def _parquet(partial: Path, stored: _Stored, names: Sequence[str]) -> None:
    writer, arrow = parquet(stored.path), importlib.import_module("pyarrow")
    lists = arrow.list_(arrow.from_numpy_dtype(stored.dtype), stored.columns)
    facts = stored.metadata() | {name: array.tolist() for name, array in stored.small.items()}
    columns = {"path": arrow.string(), "embedding": lists, MODEL: arrow.string()}
    schema = arrow.schema(columns, {"rkd vectors": json.dumps(facts)})
    done, form = 0, {"use_dictionary": [MODEL], "compression": "none", "write_page_checksum": True}
    with partial.open("wb") as file, writer.ParquetWriter(file, schema, **form) as table:
        for block in stored.blocks():
            flat = arrow.FixedSizeListArray.from_arrays(arrow.array(block.reshape(-1)), type=lists)
            texts = names[done : done + len(block)], [stored.model or None] * len(block)
            paths, models = (arrow.array(text, arrow.string()) for text in texts)
            table.write_batch(arrow.record_batch([paths, flat, models], schema=schema))
            done += len(block)
