"""Work in a process of its own, which answers questions about it, a line of JSON each.

A process of ours has another allocator than torch's users (``runtime/allocator.py``), and its memory has grown already.
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
    """The side that asks. Ends the process on leaving the ``with`` block.

    Args:
        arguments: for Python: a module or script that calls ``answer``.
    Raises:
        RunError: the process ended before it was ready.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        path = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the same code there as here
        self._process = subprocess.Popen(
            [sys.executable, *arguments], env=path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._next()  # it is ready: nothing of its start falls into what is measured
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
        self._process.communicate()  # nobody asks any more: it ends by itself

    def times(self, seconds: float) -> list[float]:
        """Seconds of runs, see ``times_of``; of a single run, not warmed up, where ``seconds`` is 0."""
        found: list[float] = self._ask(seconds)
        return found

    def peak(self) -> int | None:
        """Bytes at the peak of a run, beyond what was there before; None where that cannot be measured."""
        found: int | None = self._ask("peak")
        return found

    def _ask(self, question: object) -> Any:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it has said of that comes with the next line
        return self._next()

    def _next(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"a process of the benchmark ended with {self._process.wait()}: see its message above")
        return json.loads(line)


def answer(times: Callable[[float], list[float]], peak: Callable[[], int | None]) -> None:
    """The side that is asked, until nobody asks any more.

    Args:
        times, peak: see ``Apart``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print stays out of the answers
    print("null", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(peak() if question == "peak" else times(question)), file=answers, flush=True)
