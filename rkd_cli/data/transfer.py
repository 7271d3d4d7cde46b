"""Fetching a file over a line that drops, stalls and lies: the file is whole in the end, or absent."""

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
from rkd_cli.runtime.files import land, locked

TIMEOUT = 30.0  # seconds without a byte after which a connection counts as stalled
REDIRECTS = 10
ATTEMPTS = 6  # in a row, none of which gets further than any before
BACKOFF = 1.0  # seconds before the second attempt, doubled before each later one
RETRY = Retry(
    ATTEMPTS - 1,
    status_forcelist={408, 425, 429, *range(500, 600)},
    backoff_factor=BACKOFF,
    backoff_max=60,
    retry_after_max=300,  # seconds; a server may ask for no longer pause than this
)
# a short answer is told by our own count
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
    instead: str = "fetch it by hand",
) -> None:
    """Download ``url`` to ``path``, going on with the partial file of an earlier try where the server can.

    Args:
        url: http or https.
        path: appears by rename once the file is whole and right.
        md5: of the file, None where it is not known.
        size: likewise; the length that the server announces always counts.
        report: told how far it is.
        instead: ends the error messages: what else one can do.
    Raises:
        DownloadError: one line: a bad address, a server that refuses or keeps failing, a file that is not the expected
            one, a full disk, another process fetching to the same place.
    """
    _check_address(url)
    job = _Job(url, path.with_name(path.name + ".part"), md5, size, report, instead)
    busy = DownloadError(f"{path}: another process is fetching it; wait for it to end, then run the same command again")
    try:
        if path.is_dir():
            raise DownloadError(f"{path}: is a folder where the file from {url} should go; move it away")
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, busy):
            _fetch_right(job)
            land(job.part, path)
            job.note.unlink(missing_ok=True)
    except OSError as error:
        why = f"cannot be saved ({error.filename or path}: {error.strerror or error})"
        raise job.failure(why, "mend that and run the same command again") from error


def md5_of(path: Path) -> str:
    """The md5 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


class _PassingError(Exception):
    """A fault that another attempt may not meet: what it is, and the seconds that a server asks to wait, or None."""


@dataclass(frozen=True)
class _Job:
    """One file to fetch. ``part`` holds the bytes so far; a note beside it says whose bytes they are."""

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
        """How many bytes need not come again. Without a validator only the md5 could tell a mixed file."""
        return self.length() if self.validator() or (self.md5 and self.note.exists()) else 0

    def validator(self) -> str | None:
        """The ETag or date of the version that the bytes so far belong to."""
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
        return _PassingError(f"{why}, so the file starts over", None)

    def failure(self, why: str, remedy: str = "run the same command again") -> DownloadError:
        kept = f" (the {self.usable():,} bytes so far are kept)" if self.usable() else ""
        return DownloadError(f"{_line(self.url)}: {why}; {remedy}{kept}, or {self.instead}")


def _fetch_right(job: _Job) -> None:
    """Make ``job.part`` whole and right; a wrong md5 is given one second chance, from the first byte on."""
    got = ""
    for _ in range(2):
        _fetch_whole(job)
        if not job.md5 or (got := md5_of(job.part)) == job.md5:
            return
        job.discard()
        job.report(Note(f"{job.url}: the md5 is {got}, not {job.md5}: what was fetched is thrown away"))
    raise job.failure(f"the md5 is {got}, not {job.md5}, twice", "check the address")


def _fetch_whole(job: _Job) -> None:
    """Attempt after attempt, until ``job.part`` is as long as it should be."""
    furthest, retry = job.usable(), RETRY
    if not furthest:
        job.discard()
    else:
        job.report(Note(f"{job.part}: going on after the {furthest:,} bytes that are here already"))
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
                raise job.failure(f"{why}, and {ATTEMPTS} attempts in a row got no further") from fault
            pause = max(retry.get_backoff_time(), BACKOFF) if asked is None else asked
            here = f"{job.usable():,} bytes are here"
            job.report(Note(f"{job.url}: {why}; trying again in {pause:.0f} s, {here}"))
            sleep(pause)


def _attempt(job: _Job, have: int) -> None:
    """Ask once for what comes after ``have`` bytes, and append it. Returns when the file is whole."""
    headers = {"User-Agent": "rkd-cli"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": tag} if (tag := job.validator()) else {})
    with _answer(job, headers) as response:
        extent, tag = response.headers.get("Content-Range", "").strip(), _validator(response.headers)
        if response.status == 416 and have:
            if extent == f"bytes */{have}":
                return
            raise job.start_over(f"the server cannot go on after {have:,} bytes")
        status = f"the server answers {response.status} {_line(response.reason or '')}".rstrip()
        if RETRY.is_retry("GET", response.status):
            raise _PassingError(status, RETRY.get_retry_after(response))
        if response.status != 200 and not (response.status == 206 and have):
            raise job.failure(status, "check the address")
        if response.status == 206:
            length = re.fullmatch(rf"bytes {have}-\d+/(\d{{1,18}}|\*)", extent)
            if not length:
                raise job.start_over(f"the server sent another part than the one after {have:,} bytes")
            if tag and job.validator() not in (None, tag):
                raise job.start_over("the file has changed on the server")
        else:
            have, length = 0, re.fullmatch(r"(\d{1,18})", response.headers.get("Content-Length", ""))
        total = int(length[1]) if length and length[1] != "*" else job.size
        if job.size not in (None, total):
            why = f"the server announces {total:,} bytes where {job.size:,} are expected"
            raise job.failure(why, "check the address")
        free, missing = shutil.disk_usage(job.part.parent).free, (total or 0) - job.length()
        if missing > free:
            why = f"{missing:,} bytes are still to come and {free:,} are free in {job.part.parent}"
            raise job.failure(why, "make room and run the same command again")
        if not have:
            job.begin(tag)
        tick = meter(job.report, "Downloading", total or 0)
        with job.part.open("ab") as file:
            # not read(): what came before a stall is worth keeping
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
    """What the server answers, its redirects followed. A fault of the line, then or in the block, is a passing one."""
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
        raise job.failure(f"no usable address ({_line(error)})", "correct it") from error
    except (HTTPError, ValueError, OverflowError) as error:  # the last two: of headers that are nonsense
        if isinstance(reason := error.args and error.args[0], ssl.SSLCertVerificationError):
            why = f"the server's certificate is not trusted ({_line(reason)})"
            raise job.failure(why, "check this machine's clock and certificates") from error
        raise _PassingError(f"the connection failed ({_line(error)})", None) from error
    raise job.failure(f"the server redirects more than {REDIRECTS} times", "check the address")


def _pool(url: str) -> urllib3.PoolManager:
    """Connections as this machine is set up: its certificates, which are always asked for, and its proxy."""
    address, tls = parse_url(url), ssl.create_default_context()
    proxy = getproxies().get(address.scheme or "")
    if not proxy or proxy_bypass(address.netloc or ""):
        return urllib3.PoolManager(ssl_context=tls)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    login = make_headers(proxy_basic_auth=unquote(parse_url(proxy).auth or "") or None)
    return urllib3.ProxyManager(proxy, proxy_headers=login, ssl_context=tls)


def _validator(headers: Mapping[str, str]) -> str | None:
    """What If-Range may carry: a strong ETag, else the date."""
    tag = headers.get("ETag", "W/")
    return headers.get("Last-Modified") if tag.startswith("W/") else tag


def _line(text: object) -> str:
    """A server's words as one line that cannot steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _check_address(url: str, before: str = "") -> None:
    """Refuse all but http and https with a host, and the way down to http from the https of ``before``."""
    try:
        address = parse_url(url)
        usable = address.scheme in ("http", "https") and bool(address.host)
    except LocationParseError:
        usable = False
    line = f"{_line(before)}: redirects to {_line(url)}" if before else _line(url)
    if not usable:
        raise DownloadError(f"{line}: not an http or https address; correct it, or fetch the file by hand")
    if before.startswith("https:") and address.scheme != "https":
        raise DownloadError(f"{line}: from https to http, which is refused; check the address")
