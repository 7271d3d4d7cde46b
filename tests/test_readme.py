"""What the README promises exists: its Python runs, its flags and targets are there, its layout is the layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from pydantic import BaseModel

from rkd_cli.models import build_model
from rkd_cli.models.checkpoint import save_model
from rkd_cli.schemas import Header
from rkd_cli.settings import (
    BenchSettings,
    CheckSettings,
    CompareSettings,
    DemoSettings,
    DistillSettings,
    DownloadSettings,
    EmbedSettings,
    EvaluateSettings,
    ExportSettings,
    ImportSettings,
    PushSettings,
    ReportSettings,
    SearchSettings,
    TeacherSettings,
    flag_name,
)

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SETTINGS: dict[str, type[BaseModel]] = {
    "bench": BenchSettings,
    "check-data": CheckSettings,
    "compare": CompareSettings,
    "train-teacher": TeacherSettings,
    "distill": DistillSettings,
    "evaluate": EvaluateSettings,
    "embed": EmbedSettings,
    "export": ExportSettings,
    "download-cub": DownloadSettings,
    "demo": DemoSettings,
    "import-checkpoint": ImportSettings,
    "push": PushSettings,
    "recipes": DemoSettings,
    "report": ReportSettings,
    "search": SearchSettings,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("resnet18", 64, l2normalize=False)
    header = Header(
        base="resnet18", embedding_size=64, l2normalize=False, resize=256, image_size=224, mean=(0.0,) * 3,
        std=(1.0,) * 3, dataset="cub200", epoch=0, train_recall={}, eval_recall={},
    )  # fmt: skip
    (tmp_path / "student").mkdir()
    save_model(tmp_path / "student/best.safetensors", model.state_dict(), header)
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (90, 60), "teal").save(name)
    examples = blocks("python")
    assert "rkd_cli.load" in examples[0]
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})


def test_no_figure_is_left_open() -> None:
    assert "@@" not in README


def test_every_command_has_its_flags() -> None:
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    commands = re.findall(r"^rkd (\S+)(.*)$", text, re.MULTILINE)
    assert {name for name, _ in commands} >= {"download-cub", "train-teacher", "distill", "evaluate"}
    for name, rest in commands:
        known = {flag_name(field) for field in SETTINGS[name].model_fields} | {"--config", "--json", "--quiet"}
        used = set(re.findall(r"--[a-z0-9-]+", rest.split("#")[0]))
        assert {flag.replace("--no-", "--") for flag in used} <= known


def test_every_flag_that_the_text_names_exists() -> None:
    known = {flag_name(field) for model in SETTINGS.values() for field in model.model_fields}
    known |= {"--config", "--json", "--quiet", "--help", "--dry-run", "--clear", "--install-completion"}
    named = set(re.findall(r"`[^`\n]*`", README))
    flags = {flag for text in named for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)}
    assert flags
    assert {flag.replace("--no-", "--") for flag in flags} <= known


def test_every_target_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_layout_names_every_file() -> None:
    layout = README.split("## Layout")[1].split("### Add your own")[0]
    missing = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "rkd_cli").rglob("*.py")
        if not path.name.startswith("__") and not re.search(rf"\b{path.name}\b", layout)
    ]
    assert not missing
    named = set(re.findall(r"\b(\w+\.py)\b", layout))
    assert named <= {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}


def test_every_dependency_has_its_reason() -> None:
    table = README.split("## Dependencies")[1].split("## ")[0]
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r'"([a-z]+)>=', project):
        assert name in table
