"""The page and the API of ``rkd serve``. Whatever a client sends gets an answer, and none of it is trusted."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from asyncio import TimerHandle, Transport
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from rkd_cli.commands.serve import Answer, Service
from rkd_cli.errors import DataError, first_line
from rkd_cli.events import Note, Reporter
from rkd_cli.report.found import name_of
from rkd_cli.report.page import render
from rkd_cli.settings import ServeSettings
from rkd_cli.settings.inference import MAX_TOP

_SECONDS = 30.0  # for a request to arrive, and for those that are running to end
_WAITING = 32  # searches that are received, wait or run; more are refused
_CONNECTIONS = 256
_GROUPS, _MEMBERS = 20, 100  # duplicates in an answer: groups, and images of one
_COOKIE = "rkd"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_RETRY = {"Retry-After": "1"}


class _Guard:
    """Refuses what a page of another site may have sent, and who has no token."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._refusal(Request(scope)) or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        path, token = request.scope["path"], self.settings.token
        host = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]").lower()
        if self.settings.is_local and host not in ("localhost", "127.0.0.1", "::1", self.settings.host):
            return _problem(421, "This host name is not served. Use localhost.")  # DNS rebinding
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and path != "/":
            return _problem(403, "Pages of other sites cannot use this server.")
        sent = (
            request.headers.get("authorization", "").removeprefix("Bearer "),
            request.query_params.get("token", ""),
            request.cookies.get(_COOKIE, ""),
        )
        if not token or path == "/healthz" or any(hmac.compare_digest(one.encode(), token.encode()) for one in sent):
            return None
        text = "A token is needed: open /?token=TOKEN, or send it as Authorization: Bearer TOKEN."
        return _problem(401, text, {"WWW-Authenticate": "Bearer"})


class _Api:
    def __init__(self, service: Service, settings: ServeSettings) -> None:
        self.service, self.settings, self.waiting = service, settings, 0
        self.images, model = len(service.index.paths), service.embedder
        self.model = _last(Path(model.name)) if model.is_checkpoint else model.name
        folder = resources.files("rkd_cli.report") / "templates"
        style, form, script, document = (
            (folder / name).read_text(encoding="utf-8")
            for name in ("style.css", "serve.css", "serve.js", "openapi.json")
        )
        facts = settings.model_dump(include={"top", "max_upload", "threshold"})
        gallery = _last(settings.gallery)
        self.html = render("serve.html.j2", gallery=gallery, images=self.images, model=self.model, **facts)
        get = ["GET"]
        self.routes = [
            Route("/", self.page),
            Route("/app.css", Response(style + form, media_type="text/css"), methods=get),
            Route("/app.js", Response(script, media_type="text/javascript"), methods=get),
            Route("/openapi.json", Response(document, media_type="application/json"), methods=get),
            Route("/healthz", JSONResponse({"status": "ok"}), methods=get),
            Route("/search", self.search, methods=["POST"]),
            Route("/search/{index}", self.search_on),
            Route("/embed", self.embed, methods=["POST"]),
            Route("/duplicates", self.duplicates),
            Route("/thumbnails/{index}", self.thumbnail),
            Route("/images/{index}", self.image),
        ]

    async def page(self, request: Request) -> Response:
        response = HTMLResponse(self.html)
        if self.settings.token and "token" in request.query_params:
            response.set_cookie(_COOKIE, self.settings.token, httponly=True, samesite="strict")
        return response

    async def search(self, request: Request) -> Response:
        top = self._top(request)
        with self._place():
            return self._hits(await self._ask(await _upload(request, self.settings.max_upload), top), None)

    async def search_on(self, request: Request) -> Response:
        row, top = self._row(request), self._top(request)
        with self._place():
            return self._hits(await self._ask(row, top), self._image(row))

    async def embed(self, request: Request) -> Response:
        with self._place():
            answer = await self._ask(await _upload(request, self.settings.max_upload), 0)
        digest = self.service.embedder.made_by
        return JSONResponse({"model": self.model, "digest": digest, "embedding": answer.embedding})

    async def duplicates(self, request: Request) -> Response:
        start = _number(request.query_params.get("start", "0"), 10**9)
        found = self.service.duplicates()
        if isinstance(found, float):
            return JSONResponse({"progress": found}, 202, _RETRY)
        groups = [
            {"size": len(group), "images": [self._image(*hit) for hit in group[:_MEMBERS]]}
            for group in found[start : start + _GROUPS]
        ]
        return JSONResponse({"threshold": self.settings.threshold, "total": len(found), "groups": groups})

    async def thumbnail(self, request: Request) -> Response:
        return await self._picture(self.service.thumbnail, self._row(request))

    async def image(self, request: Request) -> Response:
        return await self._picture(self.service.picture, self._row(request))

    async def _picture(self, make: Any, row: int) -> Response:
        webp = await asyncio.get_running_loop().run_in_executor(self.service.pictures, make, row)
        if webp is None:
            raise HTTPException(404, "The image cannot be read.")
        return Response(webp, media_type="image/webp")

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among the searches that wait."""
        if self.waiting >= _WAITING:
            raise HTTPException(503, "Too many searches are waiting. Try again.", _RETRY)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def _ask(self, image: bytes | int, top: int) -> Answer:
        return await asyncio.wrap_future(self.service.ask(image, top))

    def _hits(self, answer: Answer, query: dict[str, object] | None) -> Response:
        facts = {"model": self.model, "images": self.images, "query": query, "measure": answer.measure}
        return JSONResponse(facts | {"hits": [self._image(*hit) for hit in answer.rows]})

    def _image(self, row: int, score: float | None = None) -> dict[str, object]:
        found = {"index": row, "class": self.service.label(row), "path": self.service.name(row), "score": score}
        return {name: value for name, value in found.items() if name != "score" or score is not None}

    def _top(self, request: Request) -> int:
        top = _number(request.query_params.get("k", str(self.settings.top)), MAX_TOP)
        return top or _number("", MAX_TOP)

    def _row(self, request: Request) -> int:
        return _number(request.path_params["index"], self.images - 1, 404)


def _last(path: Path) -> str:
    """The name of a file or folder, without where it is."""
    return name_of(Path(path.resolve().name))


def _number(text: str, most: int, status: int = 400) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > most:
        raise HTTPException(status, f"The number must be at most {most}, and k at least 1.")
    return int(text)


async def _upload(request: Request, megabytes: int) -> bytes:
    """The image in the body, or in the one file of a form."""
    size, files = 0, list[UploadFile]()

    async def receive() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        if size > megabytes * 10**6:
            raise HTTPException(413, f"The upload is larger than {megabytes} MB.")
        return message

    limited = Request(request.scope, receive)
    try:
        async with asyncio.timeout(_SECONDS):
            if not request.headers.get("content-type", "").lower().startswith("multipart/"):
                image = await limited.body()
            else:
                async with limited.form(max_files=1, max_fields=9) as form:
                    files += [value for value in form.values() if isinstance(value, UploadFile)]
                    image = await files[0].read() if files else b""
    except TimeoutError:
        raise HTTPException(408, "The upload took too long.", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "The client left.") from None
    if not image:
        raise HTTPException(400, "The request has no image. Send one as the body, or as a file of a form.")
    return image


class _Protocol(H11Protocol):
    """Ends a connection on which a request takes too long to arrive, whether it was answered or not."""

    late: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self.late = self.late or self.loop.call_later(_SECONDS + 1, self._end)
        elif self.late:
            self.late.cancel()
            self.late = None

    def _end(self) -> None:
        if self.conn.our_state is h11.IDLE:  # nothing was answered yet
            answer = _problem(408, "The request took too long.", {"connection": "close", **_HEADERS})
            head = h11.Response(status_code=answer.status_code, headers=answer.raw_headers)
            self.transport.write(self.conn.send(head) + bytes(answer.body))
        self.transport.close()


def _problem(status: int, what: str, headers: Any = None) -> Response:
    return JSONResponse({"error": what}, status, headers)


def make_server(service: Service, settings: ServeSettings, report: Reporter) -> uvicorn.Server:
    """The server. ``report`` gets what fails here, without its traceback."""

    async def answer(request: Request, error: Exception) -> Response:
        match error:
            case HTTPException():
                return _problem(error.status_code, error.detail, error.headers)
            case DataError():
                return _problem(415, " ".join(error.problems))
        report(Note(f"{request.scope['path']}: {type(error).__name__}: {first_line(error)}"))
        return _problem(500, "The server failed.")

    for name in ("asyncio", "python_multipart"):  # what a client does is nothing to tell
        logging.getLogger(name).setLevel(logging.CRITICAL)
    app = Starlette(
        routes=_Api(service, settings).routes,
        middleware=[Middleware(_Guard, settings)],
        exception_handlers=dict.fromkeys((HTTPException, DataError, Exception), answer),
    )
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",  # it would print tracebacks
        server_header=False,
        headers=[*_HEADERS.items()],
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=int(_SECONDS),
    )
    return uvicorn.Server(config)
