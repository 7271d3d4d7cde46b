"""Download, verify and unpack CUB-200-2011."""

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
    """Create ``data/CUB_200_2011``, unless it is complete, and return it.

    The archive is the local file ``archive``, or ``data/CUB_200_2011.tgz``, downloaded if missing. ``md5`` None skips
    the check; so does an ``archive`` whose length is not ``size``, which is not the official one.
    """
    folder, source = data / CUB_FOLDER, archive or data / f"{CUB_FOLDER}.tgz"
    try:
        check_cub(folder)
        report(Note(f"{folder} is already complete"))
        return folder
    except DataError:
        pass
    try:
        if archive:
            _check_local(archive, md5, size, report)
        elif not _is_here(source, md5, size, report):
            instead = "download it manually and pass --archive FILE"
            fetch(url, source, md5=md5, size=size, report=report, instead=instead)
    except OSError as error:
        raise DownloadError(f"{source}: cannot be read ({error.strerror}). Fix that and run it again.") from error

    def whole(unpacked: Path) -> None:
        try:
            check_cub(unpacked)
        except DataError as error:
            here = [line.replace(str(unpacked), str(folder)) for line in error.problems]
            here = [line.replace(str(unpacked.parent), str(data)) for line in here]
            raise DataError(f"{source}: does not contain the whole data set", *here) from error

    extract(source, data, CUB_FOLDER, report, whole)
    if not archive:
        report(Note(f"{folder} is complete. You can delete the archive {source}"))
    return folder


def _check_local(archive: Path, md5: str | None, size: int | None, report: Reporter) -> None:
    if not archive.is_file():
        raise DownloadError(f"{archive}: no such file. --archive needs a copy of {CUB_FOLDER}.tgz.")
    if size not in (None, archive.stat().st_size):
        report(Note(f"{archive} is not the official archive (its length differs), so its md5 is not checked"))
    elif md5 and (got := md5_of(archive)) != md5:
        raise DownloadError(f"{archive}: damaged (the md5 is {got}, not {md5}). Download it again.")


def _is_here(path: Path, md5: str | None, size: int | None, report: Reporter) -> bool:
    if not path.is_file() or not (md5 or size):
        return False
    right = size in (None, path.stat().st_size) and (not md5 or md5_of(path) == md5)
    report(Note(f"{path} exists already" if right else f"{path} is not the expected archive and is downloaded again"))
    return right
