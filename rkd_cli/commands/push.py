"""Runs on a model hub: ``rkd push``. The way back is ``models/sources.py``."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.errors import DataError, DownloadError, first_line
from rkd_cli.models.sources import hub_errors, hub_interface

# settings stay here: they hold paths of this machine; the state too, which nobody else needs
_PUSHED = ("README.md", "best.safetensors", "metrics.jsonl", "metrics.csv", "result.json")


def push_run(run: Path, repository: str, private: bool) -> tuple[str, list[str]]:
    """Upload the best model of a run with its card and figures.

    Args:
        run: its directory.
        repository: ORG/NAME; made where it is not there yet.
        private: whether a repository that is made here can be seen by its owners alone.
    Returns:
        The page's address, and the files' names.
    Raises:
        DataError: the run has no model or no card.
        SettingsError: the hub's library is not installed.
        DownloadError: the hub cannot be reached, or refuses.
    """
    missing = [name for name in _PUSHED[:2] if not (run / name).is_file()]
    if missing:
        raise DataError(f"{run}: has no {missing[0]}, as a run that is done has: name its directory")
    names = [name for name in _PUSHED if (run / name).is_file()]
    interface = hub_interface()
    try:
        made = interface.create_repo(repository, private=private, exist_ok=True)
        interface.upload_folder(
            repo_id=repository, folder_path=run, allow_patterns=names, commit_message=f"rkd push {run.name}"
        )
    except hub_errors() as error:
        raise DownloadError(
            f"{repository}: {first_line(error)}: look at the name, and log in by `hf auth login`"
        ) from None
    return str(made), names
