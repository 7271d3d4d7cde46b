"""README and manual: what they show parses and runs, what they name exists, and the README is short."""

from __future__ import annotations

import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import typer
from PIL import Image

from rkd_cli.cli import app, main
from rkd_cli.manual import PAGES, flags_page, read_page
from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.schemas import Header

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TEXTS = {"README": README, **{name: read_page(name) for name in PAGES}}
COMMANDS: dict[str, typer.core.TyperCommand] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
Rkd = Callable[..., str]


def blocks(text: str, language: str = "sh") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands_in(block: str) -> list[list[str]]:
    """The words of each `rkd` command of a block, without variables of the shell."""
    lines = block.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|\s)(?:rkd|-m rkd_cli) ([a-z-]+ .*|[a-z-]+$)", line) for line in lines]
    return [shlex.split(one[1].split("  #")[0]) for one in found if one]


def flags_of(command: str) -> set[str]:
    return {flag for param in COMMANDS[command].params for flag in (*param.opts, *param.secondary_opts)} | {"--help"}


EXAMPLES = [(name, words) for name, text in TEXTS.items() for block in blocks(text) for words in commands_in(block)]


@pytest.mark.parametrize(("page", "words"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_command_that_is_shown_has_its_flags(page: str, words: list[str]) -> None:
    command, *rest = words
    if command.startswith("-"):
        assert command in ("--help", "--version", "--install-completion")
        return
    assert command in COMMANDS
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= flags_of(command)


@pytest.mark.parametrize("page", TEXTS)
def test_every_flag_that_a_page_names_exists(page: str) -> None:
    known = {flag for command in COMMANDS for flag in flags_of(command)}
    known |= {"--help", "--version", "--install-completion", "--NAME", "--no-NAME"}
    foreign = {"--max-restarts", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
    named = " ".join(re.findall(r"`[^`]*`", re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)))
    named = named.replace("--[no-]", "--")
    flags = set(re.findall(r"(?<![\w-])--[A-Za-z][A-Za-z0-9-]*", named))
    assert flags - foreign <= known


def test_the_readme_is_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_pictures_of_a_page_are_there(page: str) -> None:
    folder = ROOT if page == "README" else ROOT / "rkd_cli/manual"
    for target in re.findall(r"\]\(([^)#\s]+)\)", TEXTS[page]):
        assert target.startswith("https://") or (folder / target).is_file(), target


@pytest.mark.parametrize("page", PAGES)
def test_a_page_starts_with_a_command(page: str) -> None:
    title, _, fence, *_ = read_page(page).splitlines()
    assert title.startswith("# ")
    assert fence in ("```sh", "```python")


def test_the_pages_of_the_manual_are_its_files() -> None:
    names = {file.name for file in resources.files("rkd_cli.manual").iterdir() if file.name.endswith(".md")}
    assert names == {f"{name}.md" for name in PAGES}


def test_the_page_of_flags_is_current() -> None:
    assert read_page("flags") == flags_page(), "run `make manual`"


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    texts = [README, read_page("benchmarks"), read_page("resume"), (ROOT / ".github/CONTRIBUTING.md").read_text()]
    targets = {name for text in texts for name in re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)}
    assert {"demo", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_dependency_has_its_reason() -> None:
    table = read_page("files").split("## Dependencies")[1]
    named = {name for row in table.splitlines() if row.startswith("|") for name in re.split(r"[ ,|()`']+", row)}
    project = (ROOT / "pyproject.toml").read_text()
    needed = set(re.findall(r'"([a-z-]+)>=', project))
    assert len(needed) > 20
    assert needed <= named


def test_the_manual_lists_its_pages(rkd: Rkd) -> None:
    assert [line.split()[:3] for line in rkd("manual").splitlines()] == [["rkd", "manual", name] for name in PAGES]


def test_a_page_is_printed_as_it_is_where_no_terminal_is(rkd: Rkd) -> None:
    assert rkd("manual photos") == read_page("photos")


def test_a_page_that_does_not_exist_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name, says in (("phots", "Did you mean photos?"), ("zzz", "Run `rkd manual` to list the pages.")):
        with pytest.raises(SystemExit) as end:
            main(["manual", name])
        assert end.value.code == 2
        assert capsys.readouterr().err == f"rkd: error: {name}: no such page. {says}\n"


@pytest.fixture
def rkd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Rkd:
    """A command as it is shown; returns what it prints."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(line: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(shlex.split(line))
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        return out

    return run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the examples have it: photos, a run of a student, and weights in place of what is downloaded."""
    root = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    for label in range(8):
        color = random.integers(0, 256, 3)
        (root / f"photos/class{label}").mkdir(parents=True)
        for number in range(10):
            pixels = (color + random.integers(-40, 40, (40, 40, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"photos/class{label}/{number}.jpg", quality=90)
    shutil.copy(root / "photos/class0/0.jpg", root / "new.jpg")
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(root / "new.jpg", root / name)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), root / "resnet18.pth")
    return root


def save_student(folder: Path, dataset: str = "folder") -> None:
    model = build_model("resnet18", 64, l2normalize=False)
    header = Header(
        base="resnet18", embedding_size=64, l2normalize=False, resize=72, image_size=64, mean=(0.0,) * 3,
        std=(1.0,) * 3, dataset=dataset, epoch=1, train_recall={1: 0.5}, eval_recall={1: 0.5},
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_model(folder / "best.safetensors", model.state_dict(), header)


# flags that are added, in place of what would be downloaded or take long
SIDES = "--resize 48 --image-size 48"
TRAIN = f"--weights none --epochs 1 --iter-per-epoch 2 {SIDES} --batch 20 --eval-every 1"
SMALL = {"embed": f"--weights resnet18.pth {SIDES}", "train-teacher": TRAIN, "distill": TRAIN}


def made_small(words: list[str]) -> str:
    line = shlex.join(words).replace("torchvision:resnet50", "torchvision:resnet18").replace("--pca 128", "--pca 40")
    return f"{line} --workers 0 {SMALL.get(words[0], '')}"


@pytest.mark.parametrize("page", ["README", "photos"])
def test_the_example_of_your_own_photos_runs(
    page: str, rkd: Rkd, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    text = README.split("## Your own photos")[1] if page == "README" else read_page("photos")
    words = commands_in(blocks(text)[0])
    assert [command for command, *_ in words] == ["check-data", "train-teacher", "distill", "export", "search"]
    if page == "photos":  # the same, and without classes
        assert words == commands_in(blocks(README.split("## Your own photos")[1])[0])
        words = commands_in(blocks(text)[1])
    place = shutil.copytree(workplace, tmp_path / "place")
    monkeypatch.chdir(place)
    for one in words:
        rkd(f"{made_small(one)} --quiet")
    made = {"teacher", "student", "student.onnx", "found.html"} if page == "README" else {"teacher.npz", "student"}
    assert made <= {path.name for path in place.iterdir()}


# the first example of a page, where it needs no download, no long training and no other machine
RUN = {"evaluate": "--data photos --workers 0", "search": "--workers 0", "losses": "", "files": ""}


@pytest.mark.parametrize("page", RUN)
def test_the_first_example_of_a_page_runs(
    page: str, rkd: Rkd, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(workplace, tmp_path / "place")
    monkeypatch.chdir(place)
    monkeypatch.setenv("RKD_CACHE_DIR", str(tmp_path / "cache"))
    save_student(place / "student")
    for words in commands_in(blocks(read_page(page))[0]):
        assert rkd(f"{shlex.join(words)} {RUN[page]}")


def test_the_python_examples_run(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = shutil.copytree(workplace, tmp_path / "place")
    monkeypatch.chdir(place)
    save_student(place / "student")
    examples = blocks(README, "python") + blocks(read_page("python"), "python")
    assert len(examples) == 6
    for example in examples:
        exec(compile(example, "an example", "exec"), {})


def test_the_example_of_lightning_runs(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    monkeypatch.chdir(shutil.copytree(workplace, tmp_path / "place"))
    save_student(tmp_path / "place/student")
    (example,) = [text for text in blocks(read_page("python"), "py") if "import lightning" in text]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lightning, about workers and loggers
        exec(compile(example, "an example", "exec"), {"__name__": "example"})
