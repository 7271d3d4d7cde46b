"""``rkd push``: upload a run, or a folder for another library, to a model hub. ``models/sources.py`` downloads."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.errors import DataError, DownloadError, first_line
from rkd_cli.models.checkpoint import read_header
from rkd_cli.models.joined import TEACHERS
from rkd_cli.models.layouts import CARD, FILES, is_layout
from rkd_cli.models.sources import hub_errors, hub_interface, is_pretrained

# without the settings, which contain paths of this machine, and the resume state
_PUSHED = (CARD, "best.safetensors", "metrics.jsonl", "metrics.csv", "result.json", TEACHERS)


def push_run(run: Path, repository: str, private: bool) -> tuple[str, list[str]]:
    """Upload the best checkpoint of a run directory, its card and its figures; returns the URL and the file names.

    A folder of ``rkd export --to timm`` or ``sentence-transformers`` is uploaded whole. ``repository`` is ORG/NAME and
    is created if it does not exist; only then ``private`` counts.

    Raises:
        DataError: the run has no checkpoint or no card.
        SettingsError: huggingface_hub is not installed.
        DownloadError: the hub cannot be reached, or refuses.
    """
    needed, patterns = ((CARD,), FILES) if is_layout(run) else (_PUSHED[:2], _PUSHED)
    missing = [name for name in needed if not (run / name).is_file()]
    if missing:
        raise DataError(f"{run}: has no {missing[0]}. Name the directory of a finished run.")
    names = [path.relative_to(run).as_posix() for pattern in patterns for path in sorted(run.glob(pattern))]
    if TEACHERS in names and not all(is_pretrained(name) for name, _ in read_header(run / TEACHERS).teachers):
        names.remove(TEACHERS)  # names files of this machine, without which it cannot be used
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
