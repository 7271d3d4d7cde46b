"""Fetching a file over a line that drops, stalls and lies: the file is whole in the end, or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, InvalidURL
from pathlib import Path
from time import sleep
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from rkd_cli.data.archive import meter, only_one
from rkd_cli.errors import DownloadError
from rkd_cli.events import Note, Reporter, silent

TIMEOUT = 30.0  # seconds without a byte after which a connection counts as stalled
ATTEMPTS = 6  # in a row, none of which gets further than any before
BACKOFF, BACKOFF_MAX = 1.0, 60.0  # seconds before the second attempt, doubled before each later one
RETRY_AFTER_MAX = 300.0  # a server may ask for no longer pause than this
PASSING_STATUS = frozenset({408, 425, 429})  # and all from 500 up: worth another attempt
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

    ``path`` appears by rename once its length is ``size`` and its md5 is ``md5`` (None: not known). The
    length that the server announces always counts. ``instead`` ends the error messages: what else one can do.

    Raises DownloadError, one line: a bad address, a server that refuses or keeps failing, a file that is not
    the expected one, a full disk, another process fetching to the same place.
    """
    _check_address(url)
    job = _Job(url, path.with_name(path.name + ".part"), md5, size, report, instead)
    busy = f"{path}: another process is fetching it; wait for it to end, then run the same command again"
    try:
        if path.is_dir():
            raise DownloadError(f"{path}: is a folder where the file from {url} should go; move it away")
        path.parent.mkdir(parents=True, exist_ok=True)
        with only_one(path.with_name(path.name + ".lock"), busy):
            _fetch_right(job)
            job.part.replace(path)
            job.note.unlink(missing_ok=True)
    except OSError as error:
        why = f"cannot be saved ({error.filename or path}: {error.strerror or error})"
        raise job.failure(why, "mend that and run the same command again") from error


def md5_of(path: Path, report: Reporter = silent) -> str:
    """The md5 of a file, in hexadecimal. Raises OSError where it cannot be read."""
    digest = hashlib.md5(usedforsecurity=False)
    tick = meter(report, "Checking", path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            tick(file.tell())
    return digest.hexdigest()


class _PassingError(Exception):
    """A fault that another attempt may not meet; ``after`` is the pause in seconds that a server asks for."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


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
        try:
            return self.part.stat().st_size
        except OSError:
            return 0

    def usable(self) -> int:
        """How many bytes need not come again. Without a validator only the md5 could tell a mixed file."""
        length = self.length()
        return length if length and (self.validator() or (self.md5 and self.note.exists())) else 0

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
        return _PassingError(f"{why}, so the file starts over")

    def failure(self, why: str, remedy: str = "run the same command again") -> DownloadError:
        kept = f" (the {self.usable():,} bytes so far are kept)" if self.usable() else ""
        return DownloadError(f"{_line(self.url)}: {why}; {remedy}{kept}, or {self.instead}")


def _fetch_right(job: _Job) -> None:
    """Make ``job.part`` whole and right; a wrong md5 is given one second chance, from the first byte on."""
    got = ""
    for _ in range(2):
        _fetch_whole(job)
        if not job.md5 or (got := md5_of(job.part, job.report)) == job.md5:
            return
        job.discard()
        job.report(Note(f"{job.url}: the md5 is {got}, not {job.md5}: what was fetched is thrown away"))
    raise job.failure(f"the md5 is {got}, not {job.md5}, twice", "check the address")


def _fetch_whole(job: _Job) -> None:
    """Attempt after attempt, until ``job.part`` is as long as it should be."""
    furthest, failures = job.usable(), 0
    if not furthest:
        job.discard()
    else:
        job.report(Note(f"{job.part}: going on after the {furthest:,} bytes that are here already"))
    while job.size is None or job.usable() != job.size:
        try:
            _attempt(job, job.usable())
            return
        except _PassingError as fault:
            failures = 0 if job.length() > furthest else failures + 1
            furthest = max(furthest, job.length())
            if failures >= ATTEMPTS:
                raise job.failure(f"{fault}, and {ATTEMPTS} attempts in a row got no further") from fault
            grown = min(BACKOFF * 2 ** max(failures - 1, 0), BACKOFF_MAX)
            pause = grown if fault.after is None else fault.after
            again = f"trying again in {pause:.0f} s, {job.usable():,} bytes are here"
            job.report(Note(f"{job.url}: {fault}; {again}"))
            sleep(pause)


def _attempt(job: _Job, have: int) -> None:
    """Ask once for what comes after ``have`` bytes. Returns when the file is whole."""
    request = Request(job.url, headers={"User-Agent": "rkd-cli"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator := job.validator():
            request.add_header("If-Range", validator)
    try:
        response = build_opener(_Redirects()).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            _judge(job, error, have)
        return
    except (InvalidURL, ValueError) as error:
        raise job.failure(f"no usable address ({_line(error)})", "correct it") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            why = f"the server's certificate is not trusted ({_line(reason)})"
            raise job.failure(why, "check this machine's clock and certificates") from error
        raise _PassingError(f"no answer ({_line(reason)})") from error
    with response:
        start, announced = _extent(job, response, have)
        total = job.size if announced is None else announced
        _check_room(job, total)
        if not start:
            job.begin(_validator(response.headers))
        _receive(job, response, start, total)


def _judge(job: _Job, error: HTTPError, have: int) -> None:
    """Tell whether an error status means whole after all (returns), worth another attempt, or final."""
    if error.code == 416 and have:
        if error.headers.get("Content-Range", "").strip() == f"bytes */{have}":
            return
        raise job.start_over(f"the server cannot go on after {have:,} bytes")
    status = f"the server answers {error.code} {_line(error.reason)}".rstrip()
    if error.code in PASSING_STATUS or error.code >= 500:
        raise _PassingError(status, _retry_after(error.headers.get("Retry-After", "")))
    raise job.failure(status, "check the address")


def _extent(job: _Job, response: Any, have: int) -> tuple[int, int | None]:
    """From which byte on the answer goes, and how long the whole file is, where the server says so."""
    headers = response.headers
    if response.status == 206 and have:
        extent = headers.get("Content-Range", "").strip()
        start, length = have, re.fullmatch(rf"bytes {have}-\d+/(\d{{1,18}}|\*)", extent)
        if not length:
            raise job.start_over(f"the server sent another part than the one after {have:,} bytes")
        now, before = _validator(headers), job.validator()
        if now and before and now != before:
            raise job.start_over("the file has changed on the server")
    elif response.status == 200:
        start, length = 0, re.fullmatch(r"(\d{1,18})", headers.get("Content-Length", ""))
    else:
        raise job.failure(f"the server answers {response.status} where 200 is expected", "check the address")
    total = int(length[1]) if length and length[1] != "*" else None
    if None not in (job.size, total) and total != job.size:
        why = f"the server announces {total:,} bytes where {job.size:,} are expected"
        raise job.failure(why, "check the address")
    return start, total


def _check_room(job: _Job, total: int | None) -> None:
    free, missing = shutil.disk_usage(job.part.parent).free, (total or 0) - job.length()
    if missing > free:
        why = f"{missing:,} bytes are still to come and {free:,} are free in {job.part.parent}"
        raise job.failure(why, "make room and run the same command again")


def _receive(job: _Job, response: Any, done: int, total: int | None) -> None:
    """Append what comes to the ``done`` bytes; the end must be at ``total``, where that is known."""
    tick = meter(job.report, "Downloading", total or 0)
    with job.part.open("ab") as file:
        while (total is None or done <= total) and (block := _read(response)):
            file.write(block)
            done += len(block)
            tick(done)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done > total:
        raise job.start_over(f"the server sent more than the {total:,} bytes expected")
    if total is not None and done < total:
        raise _PassingError(f"the server stopped after {done:,} of {total:,} bytes")


def _read(response: Any) -> bytes:
    try:
        block: bytes = response.read1(CHUNK)  # not read(): what came before a stall is worth keeping
    except (OSError, HTTPException) as error:
        raise _PassingError(f"the connection broke ({_line(error)})") from error
    return block


def _validator(headers: HTTPMessage) -> str | None:
    """What If-Range may carry: a strong ETag, else the date."""
    tag = headers.get("ETag", "W/")
    return headers.get("Last-Modified") if tag.startswith("W/") else tag


def _retry_after(value: str) -> float | None:
    """The seconds that a Retry-After header asks for, by number or by date; None when it is neither."""
    try:
        if value.strip().isdigit():
            seconds = float(value)
        else:
            seconds = (parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_MAX)


def _line(text: object) -> str:
    """A server's words as one line that cannot steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _check_address(url: str, before: str = "") -> None:
    """Refuse all but http and https with a host, and the way down to http from the https of ``before``."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    line = f"{_line(before)}: redirects to {_line(url)}" if before else _line(url)
    if not usable:
        raise DownloadError(f"{line}: not an http or https address; correct it, or fetch the file by hand")
    if before.startswith("https:") and parts.scheme != "https":
        raise DownloadError(f"{line}: from https to http, which is refused; check the address")


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        try:
            _check_address(newurl, req.full_url)
        except DownloadError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)
