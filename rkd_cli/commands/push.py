"""``rkd push``: upload a run to a model hub. ``models/sources.py`` downloads."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.errors import DataError, DownloadError, first_line
from rkd_cli.models.sources import hub_errors, hub_interface

# without the settings, which contain paths of this machine, and the resume state
_PUSHED = ("README.md", "best.safetensors", "metrics.jsonl", "metrics.csv", "result.json")


def push_run(run: Path, repository: str, private: bool) -> tuple[str, list[str]]:
    """Upload the best checkpoint of a run directory, its card and its figures; returns the URL and the file names.

    ``repository`` is ORG/NAME and is created if it does not exist; only then ``private`` counts.

    Raises:
        DataError: the run has no checkpoint or no card.
        SettingsError: huggingface_hub is not installed.
        DownloadError: the hub cannot be reached, or refuses.
    """
    missing = [name for name in _PUSHED[:2] if not (run / name).is_file()]
    if missing:
        raise DataError(f"{run}: has no {missing[0]}. Name the directory of a finished run.")
    names = [name for name in _PUSHED if (run / name).is_file()]
    interface = hub_interface()
    try:
        url = interface.create_repo(repository, private=private, exist_ok=True)
        interface.upload_folder(
            repo_id=repository, folder_path=run, allow_patterns=names, commit_message=f"rkd push {run.name}"
        )
    except hub_errors() as error:
        raise DownloadError(
            f"{repository}: {first_line(error).rstrip('.')}. Check the name, and log in with `hf auth login`."
        ) from None
    return str(url), names
