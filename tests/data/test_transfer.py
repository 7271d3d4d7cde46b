"""Fetching, against servers that drop, stall, refuse ranges and fail for a while."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path

import pytest

from rkd_cli.data import transfer as module
from rkd_cli.errors import DownloadError
from rkd_cli.events import Progress
from servers import (
    BODY,
    HALF,
    Handler,
    Serve,
    answer,
    beside,
    dropping,
    fails,
    get,
    good,
    ignoring_range,
    kept,
    notes,
    serving,
    whole,
)


def test_a_plain_download(serve: Serve, path: Path, pauses: list[float]) -> None:
    url, seen = serve(good)
    events = get(url, path)
    assert whole(path) and len(seen) == 1 and pauses == [] and notes(events) == ""
    done = [event for event in events if isinstance(event, Progress) and event.what == "Downloading"]
    assert (done[-1].done, done[-1].total, done[-1].unit) == (len(BODY), len(BODY), "bytes")


def test_a_dropped_connection_goes_on_where_it_broke(serve: Serve, path: Path, pauses: list[float]) -> None:
    url, seen = serve(dropping(HALF), dropping(HALF + 1000), good)
    events = get(url, path)
    assert whole(path)
    assert [request.get("range") for request in seen] == [None, f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert [request.get("if-range") for request in seen] == [None, '"one"', '"one"']
    assert pauses == [module.BACKOFF] * 2  # each attempt got further: the pause does not grow
    assert f"stopped after {HALF:,} of {len(BODY):,} bytes" in notes(events)


def test_an_earlier_run_is_gone_on_with(serve: Serve, path: Path) -> None:
    url, seen = serve(good)
    kept(path, BODY[:HALF], url)
    assert "resuming after" in notes(get(url, path))
    assert whole(path) and [request.get("range") for request in seen] == [f"bytes={HALF}-"]


def test_a_whole_part_needs_no_network(path: Path) -> None:
    url = "http://127.0.0.1:9/file.tgz"
    kept(path, BODY, url)
    get(url, path)
    assert whole(path)


def test_a_stall_is_a_timeout_and_keeps_what_came(serve: Serve, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stall(handler: Handler) -> None:
        dropping(1000)(handler)
        handler.wfile.flush()
        release.wait(10)

    url, seen = serve(stall, good)
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    try:
        events = get(url, path)
    finally:
        release.set()
    assert whole(path) and seen[1]["range"] == "bytes=1000-" and "timed out" in notes(events)


def test_without_progress_the_attempts_are_bounded_and_the_pauses_grow(
    serve: Serve, path: Path, pauses: list[float]
) -> None:
    url, seen = serve(dropping(HALF))
    fails(url, path, f"{module.ATTEMPTS} attempts", f"resumes after {HALF:,} bytes", "Run the command again")
    assert pauses == [1.0, 1.0, 2.0, 4.0, 8.0, 16.0][: module.ATTEMPTS]
    assert len(seen) == module.ATTEMPTS + 1
    assert path.with_name("file.tgz.part").read_bytes() == BODY[:HALF]


def test_half_a_file_again_and_again_is_no_progress(serve: Serve, path: Path) -> None:
    url, seen = serve(answer(200, BODY[:HALF], Content_Length=str(len(BODY))))
    fails(url, path, "made no progress")
    assert len(seen) == 1 + module.ATTEMPTS


def test_nobody_there(path: Path) -> None:
    with serving(good) as (server, _):
        port = server.server_address[1]
    fails(f"http://127.0.0.1:{port}/file.tgz", path, "the connection failed", "refused", "download it manually")


def test_an_ignored_range_starts_over(serve: Serve, path: Path) -> None:
    url, seen = serve(dropping(HALF), ignoring_range)
    get(url, path)
    assert whole(path) and "range" in seen[1]


def test_a_refused_range_starts_over(serve: Serve, path: Path) -> None:
    url, seen = serve(dropping(HALF), answer(416, Content_Range="bytes */5"), good)
    events = get(url, path)
    assert whole(path) and "restarts" in notes(events) and "range" not in seen[2]


def test_a_refused_range_at_the_very_end_means_whole(serve: Serve, path: Path) -> None:
    url, seen = serve(good)
    kept(path, BODY, url)
    get(url, path, size=None)
    assert whole(path) and len(seen) == 1 and seen[0]["range"] == f"bytes={len(BODY)}-"


@pytest.mark.parametrize("extent", [f"bytes 7-{len(BODY) - 1}/{len(BODY)}", "bytes nonsense", ""])
def test_a_wrong_part_starts_over(serve: Serve, path: Path, extent: str) -> None:
    url, seen = serve(dropping(HALF), answer(206, BODY[7:], Content_Range=extent), good)
    events = get(url, path)
    assert whole(path) and "another range" in notes(events) and "range" not in seen[2]


def test_a_part_of_the_rest_is_taken_and_the_rest_asked_for(serve: Serve, path: Path) -> None:
    some = answer(206, BODY[HALF : HALF + 10], Content_Range=f"bytes {HALF}-{HALF + 9}/{len(BODY)}", ETag='"one"')
    url, seen = serve(dropping(HALF), some, good)
    get(url, path)
    assert whole(path) and seen[2]["range"] == f"bytes={HALF + 10}-"


def test_a_file_changed_on_the_server_starts_over(serve: Serve, path: Path) -> None:
    old = bytes(len(BODY))
    url, seen = serve(partial(good, body=old, etag='"old"', stop=HALF), good)
    get(url, path, md5=None)  # no md5 to tell a mixture
    assert whole(path) and seen[1]["if-range"] == '"old"'


def test_a_server_deaf_to_if_range_is_caught_by_its_etag(serve: Serve, path: Path) -> None:
    rest = answer(206, BODY[HALF:], Content_Range=f"bytes {HALF}-{len(BODY) - 1}/{len(BODY)}", ETag='"new"')
    url, _ = serve(partial(good, body=bytes(len(BODY)), etag='"old"', stop=HALF), rest, good)
    events = get(url, path, md5=None)
    assert whole(path) and "has changed on the server" in notes(events)


def test_a_weak_etag_is_not_used_but_the_date_is(serve: Serve, path: Path) -> None:
    first = answer(
        200,
        BODY[:HALF],
        Content_Length=str(len(BODY)),
        ETag='W/"x"',
        Last_Modified="Sat, 01 Jan 2022 00:00:00 GMT",
    )
    url, seen = serve(first, ignoring_range)
    get(url, path)
    assert whole(path) and seen[1]["if-range"] == "Sat, 01 Jan 2022 00:00:00 GMT"


def test_without_validator_it_resumes_only_under_an_md5(serve: Serve, path: Path) -> None:
    half = answer(200, BODY[:HALF], Content_Length=str(len(BODY)))
    rest = answer(206, BODY[HALF:], Content_Range=f"bytes {HALF}-{len(BODY) - 1}/{len(BODY)}")
    url, seen = serve(half, rest)
    get(url, path)
    assert whole(path) and seen[1]["range"] == f"bytes={HALF}-" and "if-range" not in seen[1]
    path.unlink()
    url, seen = serve(half, ignoring_range)
    get(url, path, md5=None)
    assert whole(path) and "range" not in seen[1]


@pytest.mark.parametrize("note", [None, "nonsense", "[]", '{"url": "http://elsewhere/", "validator": "x"}'])
def test_a_partial_file_of_unknown_origin_is_not_used(serve: Serve, path: Path, note: str | None) -> None:
    url, seen = serve(good)
    path.with_name("file.tgz.part").write_bytes(b"x" * 100)
    if note is not None:
        path.with_name("file.tgz.part.json").write_text(note)
    get(url, path, md5=None)
    assert whole(path) and "range" not in seen[0]


def test_an_unexpected_length_is_final(serve: Serve, path: Path) -> None:
    url, seen = serve(answer(200, b"<html>please log in</html>"))
    fails(url, path, "announces 26 bytes", f"{len(BODY):,} are expected")
    assert len(seen) == 1


def test_a_change_of_length_while_resuming_is_final(serve: Serve, path: Path) -> None:
    url, _ = serve(dropping(HALF), answer(206, BODY[HALF:] + b"x", Content_Range=f"bytes {HALF}-192000/192001"))
    fails(url, path, "announces 192,001 bytes")


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "many"])
def test_an_announced_length_that_is_none(serve: Serve, path: Path, length: str) -> None:
    url, _ = serve(answer(200, BODY, Content_Length=length))
    get(url, path)
    assert whole(path)


def test_no_announced_length(serve: Serve, path: Path) -> None:
    url, _ = serve(answer(200, BODY, Content_Length=""))
    get(url, path, size=None)
    assert whole(path)
    path.unlink()
    url, seen = serve(answer(200, BODY[:HALF], Content_Length="", ETag='"one"'), good)
    get(url, path)  # the expected size tells that it is not the end
    assert whole(path) and len(seen) == 2


def test_more_bytes_than_expected(serve: Serve, path: Path) -> None:
    url, seen = serve(answer(200, BODY + b"x", Content_Length=""))
    fails(url, path, f"more than the {len(BODY):,} bytes", md5=None)
    assert len(seen) == module.ATTEMPTS and beside(path) == set()


def test_broken_chunks(serve: Serve, path: Path) -> None:
    first = b"%x\r\n%s\r\n" % (HALF, BODY[:HALF])
    chunked = {"Content_Length": "", "Transfer_Encoding": "chunked", "ETag": '"one"'}
    url, seen = serve(answer(200, first, **chunked), good)
    get(url, path, size=None)
    assert whole(path) and seen[1]["range"] == f"bytes={HALF}-"


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_passing_status_is_tried_again(serve: Serve, path: Path, pauses: list[float], status: int) -> None:
    url, _ = serve(answer(status), good)
    events = get(url, path)
    assert whole(path) and pauses == [module.BACKOFF] and str(status) in notes(events)


def test_retry_after_is_obeyed_and_capped(serve: Serve, path: Path, pauses: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    values = ["7", "99999999", soon, "Sat, 01 Jan 2000 00:00:00 GMT", "nonsense"]
    url, _ = serve(*(answer(503, Retry_After=value) for value in values), good)
    get(url, path)
    assert whole(path)
    assert pauses[:2] == [7.0, 300.0] and 80 < pauses[2] <= 100
    assert pauses[3:] == [0.0, module.BACKOFF * 2**4]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_other_refusals_are_final(serve: Serve, path: Path, pauses: list[float], status: int) -> None:
    url, seen = serve(answer(status), good)
    fails(url, path, url, str(status), "Check the URL")
    assert len(seen) == 1 and pauses == []


def test_a_status_that_is_no_file_is_final(serve: Serve, path: Path) -> None:
    url, _ = serve(answer(204, Content_Length=""))
    fails(url, path, "204")


def test_a_servers_words_cannot_steer_the_terminal(serve: Serve, path: Path) -> None:
    def hostile(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 404 gone\x1b[2J\x07\r\nContent-Length: 0\r\n\r\n")

    url, _ = serve(hostile)
    with pytest.raises(DownloadError, match="404 gone") as caught:
        get(url, path)
    assert str(caught.value).isprintable()
