"""Files of embeddings: written and read as they are, and every way in which one is wrong is one line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rkd_cli.data import ImageSet
from rkd_cli.embedding.embedder import open_embedder
from rkd_cli.embedding.formats import check_writer
from rkd_cli.embedding.vectors import Vectors, conversion, is_vectors, read_vectors, write_vectors
from rkd_cli.errors import CheckpointError, DataError, RunError, SettingsError

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
        (written(embeddings=ROWS * spoiled(1, np.nan)), "1 embeddings are not finite, first that of a/"),
        (written(embeddings=ROWS * spoiled(2, np.inf)), "1 embeddings are not finite, first that of b/"),
        (written(paths=np.array(["a", "b", "a"])), "1 paths are duplicates, first a"),
        (written(embeddings=ROWS.astype(np.int8)), "the embeddings are int8 of shape (3, 2)"),
        (written(embeddings=ROWS[0]), "float32 of shape (2,)"),
        (written(embeddings=np.ones((3, 2), np.float32)), "its 3 embeddings are all equal"),
        (written(embeddings=np.zeros((3, 2), np.float32)), "its 3 embeddings are all zeros"),
        (written(embeddings=np.zeros((1, 2), np.float32), paths=np.array(["a"])), "its 1 embeddings are all zeros"),
        (written(embeddings=ROWS[:0], paths=np.array([], dtype=str)), "0 embeddings of 2 dimensions"),
        (written(paths=None), "paths"),
        (written(pca_map=PCA[1]), "its PCA is damaged"),
        (written(pca_map=PCA[1], pca_mean=PCA[0][:2]), "its PCA is damaged"),
        (written(pca_map=PCA[1][:1], pca_mean=PCA[0]), "its PCA is damaged"),
        (written(pca_map=PCA[1], pca_mean=PCA[0] * np.float32(np.nan)), "its PCA is damaged"),
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
    with pytest.raises(DataError, match=r"cannot be read|not a vectors file"):
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


FORMS = (".npy", ".npz", ".parquet", ".safetensors")
KINDS = [(form, kind) for form in FORMS for kind in ("float", "float16", "int8", "binary")]
KINDS = [(form, kind) for form, kind in KINDS if form != ".npy" or kind.startswith("float")]


@pytest.mark.parametrize(("suffix", "kind"), KINDS)
@pytest.mark.parametrize("at_once", [1 << 22, 30])  # of what is read at once, in numbers: all of it, or 3 rows
def test_each_form_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: str, at_once: int
) -> None:
    monkeypatch.setattr("rkd_cli.compress._BLOCK_ELEMENTS", at_once)
    monkeypatch.setattr("rkd_cli.embedding.formats._NAMES_AT_ONCE", 2)
    rows = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
    rows[:, 4] = 0
    names = [f"{'é' * (n % 3)}/{n}.jpg" for n in range(20)]
    expected = np.empty_like(rows)
    for j in range(10):
        largest, mean = max(abs(rows[:, j])), sum(map(float, rows[:, j])) / 20
        for i in range(20):
            x = float(rows[i, j])
            expected[i, j] = {
                "float": x,
                "float16": float(np.float16(x)),
                "int8": round(x / (largest / 127)) * largest / 127 if largest else 0,
                "binary": 1 if x > mean else -1,
            }[kind]
    pca = None if suffix == ".npy" else (np.arange(12.0), np.eye(10, 12))
    path = tmp_path / f"v{suffix}"
    write_vectors(path, rows, names, pca, kind)
    assert is_vectors(path)
    found = read_vectors(path)
    assert (found.kind, list(found.row)) == (kind, names)
    assert found.embeddings.dtype == np.float32
    assert found.embeddings == pytest.approx(expected, abs=1e-6)
    if pca:
        assert found.pca is not None
        assert [part.tolist() for part in found.pca] == [part.tolist() for part in pca]
    beside = [f"v{suffix}.paths.txt"] if suffix == ".npy" else []
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, *beside]
    bytes_each = {"float": 40, "float16": 20, "int8": 10, "binary": 2}[kind]
    shorter = tmp_path / f"short{suffix}"
    write_vectors(shorter, rows[:1], names[:1], None, kind)
    if suffix == ".npy":
        assert path.stat().st_size - shorter.stat().st_size == 19 * bytes_each


def test_other_programs_read_them(tmp_path: Path) -> None:
    for suffix in FORMS:
        write_vectors(tmp_path / f"v{suffix}", ROWS, NAMES, None, "float" if suffix == ".npy" else "int8")
    assert np.load(tmp_path / "v.npy").tolist() == ROWS.tolist()
    assert (tmp_path / "v.npy.paths.txt").read_text().splitlines() == NAMES
    with np.load(tmp_path / "v.npz") as file:
        assert (str(file["vectors"]), file["paths"].tolist(), file["embeddings"].dtype) == ("int8", NAMES, np.int8)
        assert file["embeddings"] * file["scales"] == pytest.approx(ROWS, abs=0.03)
    tensors = load_file(tmp_path / "v.safetensors")
    assert tensors["embeddings"] * tensors["scales"] == pytest.approx(ROWS, abs=0.03)
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "v.parquet")
    assert table.column("path").to_pylist() == NAMES
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert str(table.schema.field("embedding").type).endswith("[2]")
    facts = json.loads(table.schema.metadata[b"rkd vectors"])
    assert np.array(table.column("embedding").to_pylist()) * facts["scales"] == pytest.approx(ROWS, abs=0.03)


def test_the_digest_is_of_the_scales_too(tmp_path: Path) -> None:
    digests = set()
    for factor in (1, 2):  # the same codes
        write_vectors(tmp_path / "v.npz", ROWS * np.float32(factor), NAMES, None, "int8")
        digests.add(read_vectors(tmp_path / "v.npz").digest)
    assert len(digests) == 2


def codes_of(path: Path) -> np.ndarray:
    """The rows of an int8 npz as their codes say."""
    with np.load(path) as file:
        return np.asarray(file["embeddings"] * file["scales"])


@pytest.mark.parametrize("size", [3, 16, 128])
@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
@pytest.mark.parametrize("unit", [True, None])
def test_int8_rows_of_unit_length_have_it_when_read(tmp_path: Path, suffix: str, size: int, unit: bool | None) -> None:
    rows = np.random.default_rng(size).normal(size=(40, size)).astype(np.float32)
    rows[:, size // 2] = 0
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = [str(n) for n in range(40)]
    write_vectors(tmp_path / "codes.npz", rows, names, None, "int8", unit=unit)
    codes = codes_of(tmp_path / "codes.npz")
    lengths = np.linalg.norm(codes, axis=1, keepdims=True)
    assert abs(lengths - 1).max() > 1e-3  # rounding has changed them by more than float16 would
    write_vectors(tmp_path / f"v{suffix}", rows, names, None, "int8", unit=unit)
    found = read_vectors(tmp_path / f"v{suffix}").embeddings
    assert found == pytest.approx(codes / lengths, abs=1e-6)
    assert open_embedder(str(tmp_path / f"v{suffix}")).unit


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
def test_int8_rows_of_other_lengths_are_read_as_they_are(tmp_path: Path, suffix: str) -> None:
    path, names = tmp_path / f"v{suffix}", [str(n) for n in range(40)]
    rows = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    nearly = rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.linspace(0.997, 1.003, 40)[:, None]
    for one, unit in ((rows, False), (rows, None), (nearly, False)):  # only the file can say so of the last
        write_vectors(tmp_path / "codes.npz", one, names, None, "int8")
        write_vectors(path, one, names, None, "int8", unit=unit)
        assert read_vectors(path).embeddings == pytest.approx(codes_of(tmp_path / "codes.npz"), abs=1e-6)
        assert not open_embedder(str(path)).unit


@pytest.mark.parametrize(("suffix", "kind"), KINDS)
def test_rows_of_unit_length_have_it_when_read_except_bits(tmp_path: Path, suffix: str, kind: str) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    write_vectors(tmp_path / f"v{suffix}", rows, [str(n) for n in range(40)], None, kind, unit=True)
    assert open_embedder(str(tmp_path / f"v{suffix}")).unit == (kind != "binary")


CODES = np.array([[1], [2], [3]], np.int8)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"vectors": "int4"}, "stores vectors as 'int4', unknown to this version"),
        ({"vectors": "int8"}, "its int8 vectors do not match its `scales`"),
        ({"vectors": "int8", "embeddings": CODES}, "its int8 vectors do not match its `scales`"),
        ({"vectors": "int8", "embeddings": CODES, "scales": np.ones(2)}, "its int8 vectors do not match its `scales`"),
        ({"vectors": "int8", "embeddings": CODES, "scales": np.array([np.nan])}, "its `scales` are not finite"),
        ({"vectors": "binary", "embeddings": np.uint8(CODES), "threshold": np.ones(9)}, "do not match its `threshold`"),
        ({"vectors": "binary", "embeddings": CODES, "threshold": np.ones(8)}, "do not match its `threshold`"),
    ],
    ids=str,
)  # fmt: skip
def test_codes_that_do_not_fit_are_one_line(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    path = tmp_path / "v.npz"
    np.savez(path, **({"embeddings": ROWS, "paths": np.array(NAMES)} | arrays))
    with pytest.raises(DataError) as caught:
        read_vectors(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ")
    assert says in problem


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_damaged_others_are_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    write_vectors(path, ROWS, NAMES)
    whole = path.read_bytes()
    spoiled_files = [whole[:length] for length in (0, 1, 10, len(whole) // 2, len(whole) - 1)]
    if suffix == ".npy":
        spoiled_files.append(whole + b"x")
    else:
        at = whole.index(ROWS.tobytes())
        spoiled_files.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for spoiled_file in spoiled_files:
        path.write_bytes(spoiled_file)
        with pytest.raises(DataError) as caught:
            read_vectors(path)
        assert len(str(caught.value).splitlines()) == 1


def test_an_npy_wants_its_paths(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    write_vectors(path, ROWS, NAMES)
    beside = tmp_path / "v.npy.paths.txt"
    beside.write_bytes("\r\n".join(NAMES).encode())  # as an editor may leave it
    assert list(read_vectors(path).row) == NAMES
    beside.write_text("a\nb\n")
    with pytest.raises(DataError, match="3 embeddings and 2 paths"):
        read_vectors(path)
    beside.unlink()
    with pytest.raises(DataError, match=r"v\.npy: npy contains no paths, and v\.npy\.paths\.txt cannot be"):
        read_vectors(path)
    write_vectors(tmp_path / "n.npy", ROWS, NAMES)
    with (tmp_path / "n.npy").open("wb") as file:
        np.save(file, np.array([{}]))
    with pytest.raises(DataError, match="cannot be read as npy"):
        read_vectors(tmp_path / "n.npy")


def test_parquet_of_others(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "v.parquet"

    def written_by_others(**columns: Any) -> None:
        parquet.write_table(arrow.table(columns), path)

    written_by_others(path=NAMES, embedding=ROWS.astype(np.float64).tolist(), more=[1, 2, 3])
    assert read_vectors(path).embeddings.tolist() == ROWS.tolist()
    for columns, says in (
        ({"path": NAMES}, "has no column embedding"),
        ({"file": NAMES, "vec": ROWS.tolist()}, "no column embedding and no path, only file, vec. Store paths in"),
        ({"path": NAMES, "embedding": [[1.0], [1.0, 2.0], [3.0]]}, "sizes of embeddings differ"),
        ({"path": NAMES, "embedding": [[1.0], None, [3.0]]}, "values are missing"),
        ({"path": NAMES, "embedding": [[1.0], [None], [3.0]]}, "values are missing"),
        ({"path": ["a", None, "b"], "embedding": [[1.0], [2.0], [3.0]]}, "paths or values are missing"),
        ({"path": NAMES, "embedding": [1.0, 2.0, 3.0]}, "not a vectors file in parquet format"),
        ({"path": NAMES, "embedding": [[1], [2], [3]]}, "the embeddings are int64"),
    ):
        written_by_others(**columns)
        with pytest.raises(DataError) as caught:
            read_vectors(path)
        assert says in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_what_a_form_does_not_hold_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix, name in ((".npy", "a\nb.jpg"), (".parquet", "\udcff.jpg")):
        with pytest.raises(SettingsError, match=r"Use \.npz"):
            check_writer(tmp_path / f"v{suffix}", ["good.jpg", name])
        check_writer(tmp_path / "v.npz", [name])
    with pytest.raises(RunError, match="values exceed the float16 maximum of 65,504"):
        write_vectors(tmp_path / "v.npz", ROWS * np.float32(1e5), NAMES, None, "float16")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("rkd_cli.embedding.formats._MAX_HEADER", (1 << 20) + 20)
    with pytest.raises(SettingsError, match="the paths exceed the 100 MB limit of safetensors"):
        check_writer(tmp_path / "v.safetensors", NAMES)
    check_writer(tmp_path / "v.parquet", NAMES)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(SettingsError, match=r"parquet needs pyarrow. Run `pip install pyarrow`, or use \.npz"):
        check_writer(tmp_path / "v.parquet", NAMES)


@pytest.mark.parametrize("suffix", FORMS)
def test_rows_of_zeros_are_named_and_left_out(tmp_path: Path, suffix: str) -> None:
    rows = ROWS.copy()
    rows[1] = 0
    write_vectors(tmp_path / f"v{suffix}", rows, NAMES)
    found = read_vectors(tmp_path / f"v{suffix}")
    assert found.zeros == ("a/2.jpg",)
    assert found.row == {"a/1.jpg": 0, "b/ü 3.png": 1}
    assert found.embeddings.tolist() == [[0, 1], [4, 5]]
    joined = found.join(ImageSet(tuple(tmp_path / name for name in [*NAMES, "c.jpg"]), None, ()), tmp_path)
    assert (joined.rows, joined.absent, joined.zeros) == ((0, None, 1, None), ("c.jpg",), ("a/2.jpg",))


NFC, NFD = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("in_file", "on_disk", "rows"),
    [
        ([NFC], [NFD], (0,)),
        ([NFD], [NFC], (0,)),
        ([NFC, NFD], [NFC, NFD], (0, 1)),
        ([NFC, NFD], [NFD, NFC], (1, 0)),
        ([NFC], [NFC, NFD], (0, None)),
        ([NFD], [NFC, NFD], (None, 0)),
        (["\u1e0b\u0323", "\u1e0d\u0307"], ["d\u0323\u0307"], (None,)),  # either may be meant
        (["d\u0323\u0307"], ["\u1e0b\u0323", "\u1e0d\u0307"], (None, None)),
    ],
)
def test_names_match_in_either_unicode_form_where_one_alone_can_be_meant(
    tmp_path: Path, in_file: list[str], on_disk: list[str], rows: tuple[int | None, ...]
) -> None:
    embeddings = np.eye(len(in_file), 2, dtype=np.float32)
    vectors = Vectors(tmp_path / "v.npz", embeddings, {name: i for i, name in enumerate(in_file)}, "")
    for name in on_disk:
        (tmp_path / name).touch()
    paths = tuple(tmp_path / name for name in on_disk)
    assert vectors.join(ImageSet(paths, None, ()), tmp_path).rows == rows


def test_a_row_whose_own_image_is_in_another_split_is_not_taken(tmp_path: Path) -> None:
    for name in (NFC, NFD):
        (tmp_path / name).touch()
    vectors = Vectors(tmp_path / "v.npz", ROWS[:1], {NFD: 0}, "")
    assert vectors.join(ImageSet((tmp_path / NFC,), None, ()), tmp_path).rows == (None,)


def test_a_row_of_zeros_is_found_in_either_unicode_form(tmp_path: Path) -> None:
    vectors = Vectors(tmp_path / "v.npz", ROWS[:1], {"a.jpg": 0}, "", zeros=(NFD,))
    assert vectors.join(ImageSet((tmp_path / NFC,), None, ()), tmp_path).zeros == (NFC,)


FORMS_OF_OTHERS = {
    "v.csv": "path,e0,e1\na/1.jpg,0,1\na/2.jpg,2,3\nb/ü 3.png,4,5\n",
    "bare.csv": "a/1.jpg,0,1\na/2.jpg,2,3\nb/ü 3.png,4,5\n",
    "v.tsv": "path\te0\te1\na/1.jpg\t0\t1\na/2.jpg\t2\t3\nb/ü 3.png\t4\t5\n",
    "v.json": json.dumps([{"path": n, "embedding": r} for n, r in zip(NAMES, ROWS.tolist(), strict=True)]),
    "v.jsonl": "\n".join(
        json.dumps({"path": n, "embedding": r}) for n, r in zip(NAMES, ROWS.tolist(), strict=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FORMS_OF_OTHERS, "v.pt"])
def test_the_line_that_is_named_converts_a_file_of_another_form(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "v.pt":
        torch.save({"embeddings": torch.from_numpy(ROWS), "paths": NAMES}, path)
    else:
        path.write_text(FORMS_OF_OTHERS[name])
    with pytest.raises(CheckpointError) as caught:
        open_embedder(str(path))
    (problem,) = caught.value.problems
    assert ".npy, .npz, .parquet, .safetensors" in problem
    assert len(problem.splitlines()) == 1
    _, command = problem.split("Convert them with: ")
    python, *words = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *words], check=True)
    found = read_vectors(path.with_suffix(".npz"))
    assert list(found.row) == NAMES
    assert found.embeddings.tolist() == ROWS.tolist()


def test_other_files_are_not_taken_for_embeddings(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert conversion(tmp_path / "a.jpg") is None
    assert conversion(tmp_path / "not-there.csv") is None


@pytest.mark.parametrize(
    "arrays", [{"embeddings": None}, {"paths": None}, {"embeddings": None, "paths": None}], ids=str
)
def test_columns_of_pandas_are_refused_with_the_line_that_writes_them(tmp_path: Path, arrays: dict[str, None]) -> None:
    columns: dict[str, Any] = {"embeddings": np.empty(3, object), "paths": np.array(NAMES, object)}
    columns["embeddings"][:] = [*ROWS]
    plain: dict[str, Any] = {"embeddings": ROWS, "paths": NAMES}
    np.savez(tmp_path / "v.npz", **plain | {name: columns[name] for name in arrays})
    with pytest.raises(
        DataError, match=r"Python objects, such as a pandas column.*np\.stack\(t\['embedding'\]\)"
    ) as caught:
        read_vectors(tmp_path / "v.npz")
    assert len(str(caught.value).splitlines()) == 1


def test_paths_of_bytes_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", embeddings=ROWS, paths=np.array([name.encode() for name in NAMES]))
    assert list(read_vectors(tmp_path / "v.npz").row) == NAMES
