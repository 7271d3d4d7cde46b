"""The model card in a run's directory."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.commands.compare import compare_runs
from rkd_cli.commands.runs import read_runs
from rkd_cli.models.checkpoint import read_header
from rkd_cli.report.card import UNFILLED, card_text
from rkd_cli.runtime.files import write_text
from rkd_cli.runtime.processes import is_main_process


def write_card(directory: Path) -> None:
    """Write the run's README.md, unless the user has filled one in."""
    path = directory / "README.md"
    if not is_main_process():
        return
    if path.exists() and UNFILLED not in path.read_text(encoding="utf-8", errors="replace"):
        return
    (run,), _ = read_runs(compare_runs([directory]), [directory])
    write_text(path, card_text(run, read_header(directory / "best.safetensors")))
