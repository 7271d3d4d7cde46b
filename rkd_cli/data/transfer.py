"""Download a file over an unreliable connection: resume, retry, verify, and never leave a damaged file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import unquote, urljoin
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import Retry, make_headers, parse_url

from rkd_cli.data.archive import meter
from rkd_cli.errors import DownloadError
from rkd_cli.events import Note, Reporter, silent
from rkd_cli.runtime.files import locked, move_into_place

TIMEOUT = 30.0  # seconds without data
REDIRECTS = 10
ATTEMPTS = 6  # in a row without progress
BACKOFF = 1.0  # seconds before the second attempt, doubled before each later one
RETRY = Retry(
    ATTEMPTS - 1,
    status_forcelist={408, 425, 429, *range(500, 600)},
    backoff_factor=BACKOFF,
    backoff_max=60,
    retry_after_max=300,  # seconds
)
# incomplete responses are detected here, so that their data are not lost
ASK: dict[str, Any] = {
    "preload_content": False, "redirect": False, "retries": False, "enforce_content_length": False,
}  # fmt: skip
CHUNK = 1 << 20


def fetch(
    url: str,
    path: Path,
    *,
    md5: str | None,
    size: int | None,
    report: Reporter = silent,
    instead: str = "download it manually",
) -> None:
    """Download ``url`` to ``path``, resuming an earlier partial download if the server supports it.

    ``path`` appears when the file is complete and matches ``md5`` and ``size`` (None if unknown). ``instead`` completes
    errors with an alternative.
    """
    _check_address(url)
    job = _Job(url, path.with_name(path.name + ".part"), md5, size, report, instead)
    busy = DownloadError(f"{path}: another process is downloading it. Wait for it, then run the command again.")
    try:
        if path.is_dir():
            raise DownloadError(f"{path}: is a folder; {url} would be saved there. Move it away.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, busy):
            _fetch_right(job)
            move_into_place(job.part, path)
            job.note.unlink(missing_ok=True)
    except OSError as error:
        why = f"cannot be saved ({error.filename or path}: {error.strerror or error})"
        raise job.failure(why, "Fix that and run the command again") from error


def md5_of(path: Path) -> str:
    """The md5 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


class _PassingError(Exception):
    """A temporary failure: the reason, and the seconds that the server asks to wait, or None."""


@dataclass(frozen=True)
class _Job:
    """A file to download. ``part`` contains the data so far, ``note`` their URL and version."""

    url: str
    part: Path
    md5: str | None
    size: int | None
    report: Reporter
    instead: str

    @property
    def note(self) -> Path:
        return self.part.with_name(self.part.name + ".json")

    def length(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def usable(self) -> int:
        """The number of bytes that can be resumed from. Without a validator, only an md5 detects mixed versions."""
        return self.length() if self.validator() or (self.md5 and self.note.exists()) else 0

    def validator(self) -> str | None:
        """The ETag or date of the version of the data so far."""
        try:
            known = json.loads(self.note.read_text(encoding="utf-8"))
            return str(known["validator"]) if known["url"] == self.url and known["validator"] else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def begin(self, validator: str | None) -> None:
        self.discard()
        self.note.write_text(json.dumps({"url": self.url, "validator": validator}), encoding="utf-8")

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def start_over(self, why: str) -> _PassingError:
        self.discard()
        return _PassingError(f"{why}, so the download restarts", None)

    def failure(self, why: str, remedy: str = "Run the command again") -> DownloadError:
        resumes = f" (resumes after {self.usable():,} bytes)" if self.usable() else ""
        return DownloadError(f"{_line(self.url)}: {why}. {remedy}{resumes}, or {self.instead}.")


def _fetch_right(job: _Job) -> None:
    """Complete ``job.part`` and check its md5; if that is wrong, download once more from the start."""
    got = ""
    for _ in range(2):
        _fetch_whole(job)
        if not job.md5 or (got := md5_of(job.part)) == job.md5:
            return
        job.discard()
        job.report(Note(f"{job.url}: the md5 is {got}, not {job.md5}. The download is discarded"))
    raise job.failure(f"the md5 is {got}, not {job.md5}, twice", "Check the URL")


def _fetch_whole(job: _Job) -> None:
    """Try until ``job.part`` is complete."""
    furthest, retry = job.usable(), RETRY
    if not furthest:
        job.discard()
    else:
        job.report(Note(f"{job.part}: resuming after {furthest:,} bytes"))
    while job.size is None or job.usable() != job.size:
        try:
            _attempt(job, job.usable())
            return
        except _PassingError as fault:
            why, asked = fault.args
            if job.length() > furthest:
                furthest, retry = job.length(), RETRY
            elif retry.total:
                retry = retry.increment("GET", job.url, error=fault)
            else:
                raise job.failure(f"{why}, and {ATTEMPTS} attempts in a row made no progress") from fault
            pause = max(retry.get_backoff_time(), BACKOFF) if asked is None else asked
            job.report(Note(f"{job.url}: {why}. Retrying in {pause:.0f} s after {job.usable():,} bytes"))
            sleep(pause)


def _attempt(job: _Job, have: int) -> None:
    """Request the data after ``have`` bytes once, and append them. Returns when the file is complete."""
    headers = {"User-Agent": "rkd-cli"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if (tag := job.validator()) else {})
    with _answer(job, headers) as response:
        extent, tag = response.headers.get("Content-Range", "").strip(), _validator(response.headers)
        if response.status == 416 and have:
            if extent == f"bytes */{have}":
                return
            raise job.start_over(f"the server cannot resume after {have:,} bytes")
        status = f"the server returned {response.status} {_line(response.reason or '')}".rstrip()
        if RETRY.is_retry("GET", response.status):
            raise _PassingError(status, RETRY.get_retry_after(response))
        if response.status != 200 and not (response.status == 206 and have):
            raise job.failure(status, "Check the URL")
        if response.status == 206:
            length = re.fullmatch(rf"bytes {have}-\d+/(\d{{1,18}}|\*)", extent)
            if not length:
                raise job.start_over(f"the server sent another range than the one after {have:,} bytes")
            if tag and job.validator() not in (None, tag):
                raise job.start_over("the file has changed on the server")
        else:
            have, length = 0, re.fullmatch(r"(\d{1,18})", response.headers.get("Content-Length", ""))
        total = int(length[1]) if length and length[1] != "*" else job.size
        if job.size not in (None, total):
            why = f"the server announces {total:,} bytes, {job.size:,} are expected"
            raise job.failure(why, "Check the URL")
        free, missing = shutil.disk_usage(job.part.parent).free, (total or 0) - job.length()
        if missing > free:
            why = f"{missing:,} more bytes are needed, and {free:,} are free in {job.part.parent}"
            raise job.failure(why, "Free some space and run the command again")
        if not have:
            job.begin(tag)
        tick = meter(job.report, "Downloading", total or 0)
        with job.part.open("ab") as file:
            # read1(), because read() would lose the data received before a stall
            while (total is None or have <= total) and (block := response.read1(CHUNK, decode_content=False)):
                file.write(block)
                have += len(block)
                tick(have)
    if total is not None and have > total:
        raise job.start_over(f"the server sent more than the {total:,} bytes expected")
    if total is not None and have < total:
        raise _PassingError(f"the server stopped after {have:,} of {total:,} bytes", None)


@contextmanager
def _answer(job: _Job, headers: Mapping[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
    """The response after redirects. Connection errors, also in the block, raise a ``_PassingError``."""
    url = job.url
    try:
        for _ in range(REDIRECTS):
            with _pool(url) as pool, pool.urlopen("GET", url, headers=headers, timeout=TIMEOUT, **ASK) as response:
                target = response.get_redirect_location()
                if not target:
                    yield response
                    return
            before, url = url, urljoin(url, target)
            _check_address(url, before)
    except LocationParseError as error:
        raise job.failure(f"invalid URL ({_line(error)})", "Correct it") from error
    except (HTTPError, ValueError, OverflowError) as error:  # the last two from invalid headers
        if isinstance(reason := error.args and error.args[0], ssl.SSLCertVerificationError):
            why = f"the server's certificate is not trusted ({_line(reason)})"
            raise job.failure(why, "Check this machine's clock and certificates") from error
        raise _PassingError(f"the connection failed ({_line(error)})", None) from error
    raise job.failure(f"the server redirects more than {REDIRECTS} times", "Check the URL")


def _pool(url: str) -> urllib3.PoolManager:
    """A connection pool with this machine's certificates, which are always checked, and proxy."""
    address, tls = parse_url(url), ssl.create_default_context()
    proxy = getproxies().get(address.scheme or "")
    if not proxy or proxy_bypass(address.netloc or ""):
        return urllib3.PoolManager(ssl_context=tls)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    login = make_headers(proxy_basic_auth=unquote(parse_url(proxy).auth or "") or None)
    return urllib3.ProxyManager(proxy, proxy_headers=login, ssl_context=tls)


def _validator(headers: Mapping[str, str]) -> str | None:
    """The value for If-Range: a strong ETag, else the date."""
    tag = headers.get("ETag", "W/")
    return headers.get("Last-Modified") if tag.startswith("W/") else tag


def _line(text: object) -> str:
    """Text of a server as one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _check_address(url: str, before: str = "") -> None:
    """Raise a DownloadError unless ``url`` is http(s) with a host, and no redirect from https to http."""
    try:
        address = parse_url(url)
        usable = address.scheme in ("http", "https") and bool(address.host)
    except LocationParseError:
        usable = False
    line = f"{_line(before)}: redirects to {_line(url)}" if before else _line(url)
    if not usable:
        raise DownloadError(f"{line}: not an http or https URL. Correct it, or download the file manually.")
    if before.startswith("https:") and address.scheme != "https":
        raise DownloadError(f"{line}: redirects from https to http are not followed. Check the URL.")
