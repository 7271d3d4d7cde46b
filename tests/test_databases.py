"""The page ``databases``: each recipe, run in the engine itself, gives the ten answers of ``rkd search``."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rkd_cli.manual import read_page
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.models.embedding_net import header_of

Rkd = Callable[..., tuple[int, str, str]]
RECIPES = dict(re.findall(r"^## (.+?)\n\n```python\n(.*?)```", read_page("databases"), re.MULTILINE | re.DOTALL))
PACKAGES = {
    "pandas": ["pandas"], "DuckDB": ["duckdb"], "faiss": ["faiss"], "usearch": ["usearch"], "LanceDB": ["lancedb"],
    "Qdrant": ["qdrant_client"], "PostgreSQL with pgvector": ["psycopg"],
}  # fmt: skip
_LINES = 12


def save_student(folder: Path, photos: list[np.ndarray], seed: int) -> None:
    torch.manual_seed(seed)
    model = build_model("shufflenet_v2_x0_5", 16, l2normalize=True).train()
    for _ in range(30):  # of batch norms: statistics under which photos differ by more than rounding
        model(torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2))
    folder.mkdir()
    header = header_of(model, "shufflenet_v2_x0_5", 36, 32, "images")
    save_model(folder / "best.safetensors", model.state_dict(), header)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the student, photos, their vectors and a query, as the page has it."""
    pytest.importorskip("pyarrow")
    from rkd_cli.commands.embed import embed_file
    from rkd_cli.events import silent
    from rkd_cli.settings import EmbedSettings

    root, random = tmp_path_factory.mktemp("databases"), np.random.default_rng(0)
    (root / "photos").mkdir()
    photos = [random.integers(0, 256, 3) + random.integers(-60, 60, (36, 36, 3)) for _ in range(61)]
    photos = [pixels.clip(0, 255).astype(np.uint8) for pixels in photos]
    for name, pixels in zip([*(f"photos/{n}.png" for n in range(60)), "new.png"], photos, strict=True):
        Image.fromarray(pixels).save(root / name)
    (root / "new.png").rename(root / "new.jpg")  # without loss
    save_student(root / "student", photos, 0)
    save_student(root / "other", photos[:8], 1)
    asked = EmbedSettings(data=root / "photos", out=root / "vectors.parquet", workers=0, device="cpu")
    embed_file(str(root / "student"), asked, silent)
    return root


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "here"))
    return tmp_path / "here"


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server with pgvector for this test: Debian's, or that of the package pgserver."""
    homes = [path.parent.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if found := importlib.util.find_spec("pgserver"):
        homes.append(Path(found.origin or "").parent / "pginstall")
    for home in homes:
        extensions = Path("/usr/share/postgresql", home.name, "extension"), home / "share/postgresql/extension"
        if any((folder / "vector.control").is_file() for folder in extensions):
            break
    else:
        pytest.skip("no PostgreSQL with pgvector here: apt install postgresql-15-pgvector, or pip install pgserver")
    folder = Path(tempfile.mkdtemp(prefix="rkd-pg-"))
    user = None
    if os.getuid() == 0:  # PostgreSQL does not run as root
        user = "postgres" if shutil.which("psql") else "nobody"
        shutil.chown(folder, user)

    def run(*words: str) -> None:
        where = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 120}
        subprocess.run([str(home / "bin" / words[0]), *words[1:]], check=True, user=user, **where)  # type: ignore[call-overload]

    data, quiet = str(folder / "data"), f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"
    try:
        run("initdb", "-D", data, "-U", "rkd", "--auth=trust", "--no-sync", "--no-locale", "-E", "UTF8")
        run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", quiet, "start")
        try:
            run("createdb", "-h", str(folder), "-U", "rkd", "photos")
            monkeypatch.setenv("PGHOST", str(folder))
            monkeypatch.setenv("PGUSER", "rkd")
            yield
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_answers_of_the_search(
    name: str, here: Path, rkd: Rkd, request: pytest.FixtureRequest
) -> None:
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    if name.startswith("PostgreSQL"):
        request.getfixturevalue("postgres")
    words = "--gallery vectors.parquet --data photos --query new.jpg --top 10 --json --workers 0"
    code, out, err = rkd("search", "student", *words.split())
    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(RECIPES[name], f"the recipe {name}", "exec"), {})
    due = [Path(hit["path"]).name for hit in answer["nearest"]]
    assert printed.getvalue().split() == due
    assert len(due) == 10


def test_recipes_are_short() -> None:
    lines = {name: sum(bool(line.strip()) for line in code.splitlines()) for name, code in RECIPES.items()}
    assert RECIPES.keys() == PACKAGES.keys()
    assert max(lines.values()) <= _LINES, lines


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
def test_a_gallery_of_another_model_is_refused(here: Path, rkd: Rkd, suffix: str) -> None:
    out = f"vectors{suffix}"
    assert rkd("embed", "other", "--data", "photos", "--out", out, "--overwrite", "--workers", 0)[0] == 0
    code, _, err = rkd("search", "student", "--gallery", out, "--data", "photos", "--query", "new.jpg")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--gallery {out}: was embedded by another network than student. Name that network" in err
    assert rkd("search", "other", "--gallery", out, "--data", "photos", "--query", "new.jpg", "--workers", 0)[0] == 0


@pytest.mark.parametrize("metadata", [True, False])
def test_rows_of_two_models_are_refused(here: Path, rkd: Rkd, metadata: bool) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    assert rkd("embed", "other", "--data", "photos", "--out", "other.parquet", "--workers", 0)[0] == 0
    first, second = (parquet.read_table(name) for name in ("vectors.parquet", "other.parquet"))
    if not metadata:  # as pandas writes it
        first, second = first.replace_schema_metadata(None), second.replace_schema_metadata(None)
    for name, parts in {"both": [first[:30], second[30:]], "alone": [second]}.items():
        parquet.write_table(arrow.concat_tables(parts, promote_options="permissive"), f"{name}.parquet")
        code, _, err = rkd(
            "search", "student", "--gallery", f"{name}.parquet", "--data", "photos", "--query", "new.jpg"
        )
        assert (code, err.count("\n")) == (2, 1)
        says = {
            "both": "holds embeddings of 2 models (column rkd_model). Keep those of one.",
            "alone": "another network",
        }
        assert says[name] in err
