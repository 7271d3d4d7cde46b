"""Benchmark work in its own process, which is controlled by lines of JSON.

The rkd process has a different allocator (``runtime/allocator.py``), and its memory has already grown.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rkd_cli.errors import RunError


class Apart:
    """The process, which a ``with`` block ends. ``arguments`` name a module or script that calls ``answer``.

    Raises:
        RunError: the process ended before it was ready.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # import the same code
        self._process = subprocess.Popen(
            [sys.executable, *arguments], env=path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._next()  # wait until it is ready: its start is not measured
        except BaseException:
            self._end(at_once=True)
            raise

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(at_once=kind is not None)

    def _end(self, at_once: bool) -> None:
        if at_once:
            self._process.kill()
        self._process.communicate()  # it ends when its input does

    def times(self, seconds: float) -> list[float]:
        """Seconds of runs, see ``times_of``; of a single run without warm-up if ``seconds`` is 0."""
        found: list[float] = self._ask(seconds)
        return found

    def peak(self) -> int | None:
        """Peak bytes of a run above the start, None if not measurable."""
        found: int | None = self._ask("peak")
        return found

    def _ask(self, question: object) -> Any:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # ``_next`` raises the error
        return self._next()

    def _next(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"a benchmark process exited with code {self._process.wait()}. See its message above.")
        return json.loads(line)


def answer(times: Callable[[float], list[float]], peak: Callable[[], int | None]) -> None:
    """Answer the requests of ``Apart`` in this process, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries go to stderr
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(peak() if question == "peak" else times(question)), file=answers, flush=True)
