"""CUB-200-2011, fetched or brought along, verified and unpacked."""

from __future__ import annotations

from pathlib import Path

from rkd_cli.data.archive import extract
from rkd_cli.data.sets.cub200 import check_cub
from rkd_cli.data.transfer import fetch, md5_of
from rkd_cli.errors import DataError, DownloadError
from rkd_cli.events import Note, Reporter, silent

CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
CUB_SIZE = 1_150_585_339
CUB_FOLDER = "CUB_200_2011"


def download_cub(
    data: Path,
    *,
    url: str = CUB_URL,
    md5: str | None = CUB_MD5,
    size: int | None = CUB_SIZE,
    archive: Path | None = None,
    report: Reporter = silent,
) -> Path:
    """Put CUB-200-2011 in place as ``data/CUB_200_2011`` and return that; do nothing when it is complete.

    With ``archive``, a local file, no network is used; when its length is not ``size`` it is taken for an
    archive of the user's own and its md5 is not compared. Else ``data/CUB_200_2011.tgz`` is used, or fetched,
    and kept.

    Args:
        data: where the folder goes.
        url: of the archive.
        md5: of the archive; None: not compared.
        size: of the archive; None: not known.
        archive: a local copy.
        report: told how far it is.
    Returns:
        ``data/CUB_200_2011``.
    Raises:
        DownloadError: see ``fetch`` and ``extract``; or an ``archive`` that is missing or has a wrong md5.
        DataError: an archive that is damaged, unsafe or lacks parts of the data set.
    """
    folder, source = data / CUB_FOLDER, archive or data / f"{CUB_FOLDER}.tgz"
    try:
        check_cub(folder)
        report(Note(f"{folder} is complete: nothing to do"))
        return folder
    except DataError:
        pass
    try:
        if archive:
            _check_local(archive, md5, size, report)
        elif not _is_here(source, md5, size, report):
            instead = "fetch it by hand and pass --archive FILE"
            fetch(url, source, md5=md5, size=size, report=report, instead=instead)
    except OSError as error:
        raise DownloadError(f"{source}: cannot be read ({error.strerror}); mend that") from error

    def whole(unpacked: Path) -> None:
        try:
            check_cub(unpacked)
        except DataError as error:
            here = [line.replace(str(unpacked), str(folder)) for line in error.problems]
            here = [line.replace(str(unpacked.parent), str(data)) for line in here]
            raise DataError(f"{source}: does not hold the whole data set", *here) from error

    extract(source, data, CUB_FOLDER, report, whole)
    if not archive:
        report(Note(f"{folder} is complete; the archive {source} is kept and may be deleted"))
    return folder


def _check_local(archive: Path, md5: str | None, size: int | None, report: Reporter) -> None:
    if not archive.is_file():
        raise DownloadError(f"{archive}: no such file; --archive takes a copy of {CUB_FOLDER}.tgz")
    if size not in (None, archive.stat().st_size):
        report(Note(f"{archive} is not the official archive (its length differs): taken as it is"))
    elif md5 and (got := md5_of(archive)) != md5:
        raise DownloadError(f"{archive}: damaged: the md5 is {got}, not {md5}; fetch it again")


def _is_here(path: Path, md5: str | None, size: int | None, report: Reporter) -> bool:
    if not path.is_file() or not (md5 or size):
        return False
    right = size in (None, path.stat().st_size) and (not md5 or md5_of(path) == md5)
    found = "whole: not fetched again" if right else "not the archive expected: fetched again"
    report(Note(f"{path} is here already and {found}"))
    return right
