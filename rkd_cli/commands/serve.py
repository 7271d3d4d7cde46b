"""``rkd serve``: answer queries from a gallery, one small batch at a time."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from rkd_cli.commands.search import Search, find_duplicates, open_search
from rkd_cli.data.decode import Decoding, evaluated
from rkd_cli.data.loader import Batch
from rkd_cli.data.sets.folder import split_folders
from rkd_cli.data.splits import names_folder
from rkd_cli.embedding.batches import check_finite, embed_batch
from rkd_cli.errors import DataError, SettingsError
from rkd_cli.events import Event, Progress, Reporter
from rkd_cli.models.embedding_net import to_device
from rkd_cli.models.inference import folded
from rkd_cli.report.found import name_of, within
from rkd_cli.report.gallery import thumbnail
from rkd_cli.settings import ServeSettings

_BATCH = 8  # questions that are answered together
_SMALL, _LARGE = 256, 1280  # pixels of a picture
_PICTURES = 2000  # small ones that are cached, some 10 KB each


class Answer(NamedTuple):
    """What is known about a question."""

    embedding: list[float]  # by the network; empty for a row of the gallery
    measure: str
    rows: list[tuple[int, float]]  # of the gallery, with values by ``measure``, nearest first


class _Question(NamedTuple):
    image: bytes | int  # a file's content, or a row of the gallery
    top: int  # 0: embed it only
    answer: Future[Answer]


class Service:
    """The search of a gallery. One thread embeds and compares, two make pictures, one finds duplicates."""

    def __init__(self, search: Search, settings: ServeSettings) -> None:
        self.settings, self.embedder, self.index = settings, search.embedder, search.index()
        self._context, self._header = search.context, search.embedder.header
        self._network = folded(to_device(search.embedder.network, search.context.device).eval())
        self._decoding = Decoding(self._header.fit, max_pixels=settings.max_pixels)
        root = settings.gallery if settings.gallery.is_dir() else names_folder(settings.data)
        self._roots: tuple[Path, ...] = (root,)  # of class folders; the last one is that of all images
        with suppress(DataError, OSError):
            self._roots = (*(split_folders(root) or ()), root)
        self.pictures, self._finder = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
        self.thumbnail = lru_cache(_PICTURES)(partial(self.picture, side=_SMALL, whole=False))
        self._duplicates: Future[list[list[tuple[int, float]]]] | None = None
        self._compared, self._is_open = 0.0, True
        self._questions: SimpleQueue[_Question | None] = SimpleQueue()
        self._thread = Thread(target=self._work)
        self._thread.start()

    def close(self) -> None:
        """Answer what was asked, then end the threads."""
        self._is_open = False
        self._questions.put(None)
        self._thread.join()
        for pool in (self.pictures, self._finder):
            pool.shutdown(cancel_futures=True)

    def ask(self, image: bytes | int, top: int) -> Future[Answer]:
        """The ``top`` nearest images of a file's content, or of a row of the gallery without itself."""
        question = _Question(image, top, Future())
        self._questions.put(question)
        return question.answer

    def duplicates(self) -> list[list[tuple[int, float]]] | float:
        """Groups of near-duplicates, or the fraction of the comparisons that are done; the first call starts them."""
        if self._duplicates is None:
            what = self.index.embeddings, self.settings.threshold
            self._duplicates = self._finder.submit(find_duplicates, *what, self._compare)
        return self._duplicates.result() if self._duplicates.done() else self._compared

    def _compare(self, event: Event) -> None:
        if not self._is_open:
            raise InterruptedError
        if isinstance(event, Progress):
            self._compared = event.done / event.total

    def picture(self, row: int, side: int = _LARGE, whole: bool = True) -> bytes | None:
        """A WebP of an image of the gallery, None if it cannot be read."""
        return thumbnail(self.index.path(row), side, not whole)

    def name(self, row: int) -> str:
        """The path of an image, relative to the gallery."""
        return within(self.index.paths[row], self._roots[-1])

    def label(self, row: int) -> str | None:
        """The class folder of an image."""
        path = self.index.paths[row]
        inner = next((path.relative_to(root) for root in self._roots if path.is_relative_to(root)), Path())
        return name_of(Path(inner.parts[0])) if len(inner.parts) > 1 else None

    def _work(self) -> None:
        is_open = True
        while is_open:
            questions = [self._questions.get()]
            with suppress(Empty):
                while len(questions) < _BATCH:
                    questions.append(self._questions.get_nowait())
            is_open = None not in questions
            self._answer([one for one in questions if one and one.answer.set_running_or_notify_cancel()])

    def _answer(self, questions: Sequence[_Question]) -> None:
        crops, uploads = list[Tensor](), list[_Question]()
        for question in questions:
            if isinstance(question.image, bytes):
                try:
                    crops.append(self._crop(question.image))
                    uploads.append(question)
                except DataError as error:
                    question.answer.set_exception(error)
        asked = uploads + [question for question in questions if isinstance(question.image, int)]
        try:
            for question, answer in zip(asked, self._answers(asked, crops), strict=True):
                question.answer.set_result(answer)
        except Exception as error:  # the memory is full, or the network failed: the thread goes on
            for question in asked:
                question.answer.set_exception(error)

    def _answers(self, asked: Sequence[_Question], crops: Sequence[Tensor]) -> list[Answer]:
        """The answers to questions; those with ``crops`` come first."""
        rows = [question.image for question in asked if isinstance(question.image, int)]
        vectors, embeddings = self.index.embeddings[rows], [list[float]()] * len(asked)
        if crops:
            none = torch.full((len(crops),), -1)
            batch = Batch(torch.stack([*crops]).permute(0, 3, 1, 2), none, none, none)
            own = embed_batch(self._network, batch, self._context).float()
            check_finite(own, self.embedder.name)
            embeddings[: len(crops)] = own.tolist()
            vectors = torch.cat([self.index.projected(own).to(vectors), vectors])
        top = max((question.top for question in asked), default=0)
        if not top:
            return [Answer(embedding, "", []) for embedding in embeddings]
        found = self.index.nearest(vectors, [None] * len(crops) + [self.index.path(row) for row in rows], top)
        each = zip(asked, embeddings, found.rows, strict=True)
        return [Answer(embedding, found.measure, near[: question.top]) for question, embedding, near in each]

    def _crop(self, content: bytes) -> Tensor:
        """(S, S, 3) uint8, as in the evaluation of the network."""
        resize, image_size = self._header.resize, self._header.image_size
        return evaluated(BytesIO(content), resize, image_size, "the image", self._decoding)


def open_service(name: str, settings: ServeSettings, report: Reporter) -> tuple[Service, socket.socket]:
    """Open the port, and embed the images that are not in the cached index."""
    for package in ("starlette", "uvicorn", "python_multipart"):
        if find_spec(package) is None:
            raise SettingsError(f"rkd serve: {package} is not installed. Run `pip install 'rkd-cli[serve]'`.")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with ExitStack() as stack:
        try:
            port = stack.enter_context(socket.create_server((settings.host, settings.port), family=family))
        except OSError as error:
            where = f"--host {settings.host} --port {settings.port}"
            raise SettingsError(f"{where}: cannot be used ({error.strerror}). Choose others.") from None
        service = Service(open_search(name, settings, report), settings)
        stack.pop_all()
    return service, port
