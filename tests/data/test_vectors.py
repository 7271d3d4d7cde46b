"""Files of embeddings: written and read as they are, and every way in which one is wrong is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rkd_cli.data.vectors import is_vectors, read_vectors, write_vectors
from rkd_cli.errors import DataError

SUFFIXES = (".npz", ".safetensors")
NAMES = ["a/1.jpg", "a/2.jpg", "b/ü 3.png"]
ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)
PCA = np.arange(3, dtype=np.float32), np.eye(2, 3, dtype=np.float32)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("pca", [None, PCA])
def test_what_was_written_is_read(tmp_path: Path, suffix: str, pca: tuple[np.ndarray, np.ndarray] | None) -> None:
    path = tmp_path / f"v{suffix}"
    write_vectors(path, ROWS, NAMES, pca)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert is_vectors(path)
    found = read_vectors(path)
    assert found.embeddings.tolist() == ROWS.tolist()
    assert found.row == {name: index for index, name in enumerate(NAMES)}
    assert found.size == 2
    assert (found.pca is None) == (pca is None)
    if found.pca and pca:
        assert [part.tolist() for part in found.pca] == [part.tolist() for part in pca]


def test_the_digest_is_of_everything(tmp_path: Path) -> None:
    other = PCA[0] + 1, PCA[1]
    kinds = [(ROWS, NAMES, None), (ROWS + 1, NAMES, None), (ROWS, NAMES[::-1], None), (ROWS, NAMES, PCA)]
    digests = set()
    for rows, names, pca in [*kinds, (ROWS, NAMES, other)]:
        write_vectors(tmp_path / "v.npz", rows, names, pca)
        digests.add(read_vectors(tmp_path / "v.npz").digest)
    assert len(digests) == 5


def test_what_others_write_is_read(tmp_path: Path) -> None:
    """Without a checksum, in another precision."""
    save_file({"embeddings": ROWS.astype(np.float16)}, tmp_path / "v.safetensors", {"paths": json.dumps(NAMES)})
    np.savez(tmp_path / "v.npz", embeddings=ROWS.astype(np.float64), paths=NAMES, model="theirs")
    for suffix in SUFFIXES:
        found = read_vectors(tmp_path / f"v{suffix}")
        assert found.embeddings.dtype == np.float32
        assert found.embeddings.tolist() == ROWS.tolist()


def written(**changes: Any) -> Callable[[Path], None]:
    """A file with some of its arrays replaced, or without those that are None."""

    def write(path: Path) -> None:
        arrays = {"embeddings": ROWS, "paths": np.array(NAMES)} | changes
        arrays = {name: array for name, array in arrays.items() if array is not None}
        if path.suffix == ".npz":
            np.savez(path, **arrays)
        else:
            names = arrays.pop("paths", None)
            facts = {} if names is None else {"paths": json.dumps(np.asarray(names).tolist())}
            save_file(arrays, path, facts)

    return write


def spoiled(row: int, value: float) -> np.ndarray:
    factors = np.ones((3, 1), np.float32)
    factors[row] = value
    return factors


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("write", "says"),
    [
        (written(paths=np.array(NAMES[:2])), "3 embeddings and 2 paths"),
        (written(embeddings=ROWS * spoiled(1, np.nan)), "1 embeddings are not finite, the first that of a/"),
        (written(embeddings=ROWS * spoiled(2, np.inf)), "1 embeddings are not finite, the first that of b/"),
        (written(paths=np.array(["a", "b", "a"])), "1 paths come more than once, the first a"),
        (written(embeddings=ROWS.astype(np.int8)), "its embeddings are int8 of the shape (3, 2)"),
        (written(embeddings=ROWS[0]), "float32 of the shape (2,)"),
        (written(embeddings=ROWS[:0], paths=np.array([], dtype=str)), "0 embeddings of the size 2"),
        (written(paths=None), "paths"),
        (written(pca_map=PCA[1]), "its PCA map is damaged"),
        (written(pca_map=PCA[1], pca_mean=PCA[0][:2]), "its PCA map is damaged"),
        (written(pca_map=PCA[1][:1], pca_mean=PCA[0]), "its PCA map is damaged"),
        (written(pca_map=PCA[1], pca_mean=PCA[0] * np.float32(np.nan)), "its PCA map is damaged"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_one_line(
    tmp_path: Path, suffix: str, write: Callable[[Path], None], says: str
) -> None:
    path = tmp_path / f"v{suffix}"
    write(path)
    with pytest.raises(DataError) as caught:
        read_vectors(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ")
    assert says in problem
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    write_vectors(path, ROWS, NAMES, PCA)
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            read_vectors(path)
        assert len(str(caught.value).splitlines()) == 1
    with path.open("wb") as file:
        np.save(file, ROWS)
    with pytest.raises(DataError, match=r"that can be read|not a safetensors file"):
        read_vectors(path)
    at = whole.index(PCA[1].tobytes()) + 1
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DataError, match=r"v\."):
        read_vectors(path)


def test_what_is_no_file_of_embeddings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_vectors(tmp_path / "v.npz")
    save_file({"embeddings": ROWS}, tmp_path / "model.safetensors", {"rkd": "{}"})
    save_file({"w": ROWS}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    assert not any(map(is_vectors, tmp_path.iterdir()))
