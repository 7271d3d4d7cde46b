"""Processes of tests, forked from one that has imported torch: importing takes longer than most of them run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

FORKS = sys.platform == "linux"  # elsewhere system libraries do not stand a fork
CONTEXT: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
_context, _FORK = multiprocessing.get_context, multiprocessing.get_context("fork")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as ``main`` does, which is too late after torch's import
CONTEXT.set_forkserver_preload(
    ["rkd_cli.training.open", "rkd_cli.training.loop", "torch.distributed.launcher.api", "torch._dynamo"]
)


class Forked:
    """``python WORDS``, with the methods of ``subprocess.Popen`` that tests call. What it starts is forked too."""

    def __init__(
        self, words: Sequence[object], environment: dict[str, str] | None = None, pipes: Sequence[Any] = ()
    ) -> None:
        folder = mkdtemp()
        self._printed = [Path(folder, name) for name in ("out", "err")]
        for path in self._printed:
            path.touch()
        arguments = [str(word) for word in words], environment or dict(os.environ), self._printed, pipes
        self._process: Any = CONTEXT.Process(target=_run, args=arguments)
        self._process.start()
        self.pid: int = self._process.pid
        weakref.finalize(self, _clean, self._process, folder)

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        return _wait(self._process, timeout)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it has printed to stdout and stderr."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") for path in self._printed)
        return out, err

    def until(self, line: str, timeout: float) -> None:
        """Wait until it has printed a line that starts so."""
        end = time.monotonic() + timeout
        while not any(read.startswith(line) for read in self._printed[0].read_text(encoding="utf-8").splitlines()):
            assert self.poll() is None, self.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


class Piped(Forked):
    """In place of ``subprocess.Popen`` where that reads and writes lines."""

    def __init__(self, args: Sequence[str], env: dict[str, str], **_: object) -> None:
        (given, questions), (answers, printed) = multiprocessing.Pipe(False), multiprocessing.Pipe(False)
        super().__init__(args[1:], env, (given, printed))
        self.stdin = os.fdopen(os.dup(questions.fileno()), "w", encoding="utf-8")
        self.stdout = os.fdopen(os.dup(answers.fileno()), encoding="utf-8")
        for end in (given, questions, answers, printed):
            end.close()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        with suppress(BrokenPipeError):
            self.stdin.close()
        with self.stdout:
            self.stdout.read()
        return super().communicate(timeout)


PIPED = SimpleNamespace(Popen=Piped, PIPE=subprocess.PIPE)  # for ``rkd_cli.bench.apart``, in place of ``subprocess``


class _Rank:
    """In place of ``subprocess.Popen`` in the agent of torchrun, as a child of it."""

    def __init__(self, args: Sequence[str], env: dict[str, str], **_: object) -> None:
        words = list(args[2:] if args[1] == "-u" else args[1:])
        self._process = _FORK.Process(target=_run, args=(words, env, [], ()))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        return _wait(self._process, timeout)


def _wait(process: Any, timeout: float | None) -> int:
    process.join(timeout)
    if process.exitcode is None:
        raise subprocess.TimeoutExpired(process.name, timeout or 0)
    return int(process.exitcode)


def _clean(process: Any, folder: str) -> None:
    process.kill()
    shutil.rmtree(folder)


def _run(words: list[str], environment: dict[str, str], printed: list[Path], pipes: Sequence[Any]) -> None:
    import torch

    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    for number, pipe in enumerate(pipes):
        os.dup2(pipe.fileno(), number)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        setattr(sys, name, os.fdopen(number, mode, 1 if number == 2 else -1, encoding="utf-8", closefd=False))
    logging.disable(logging.NOTSET)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1)
    if FORKS:
        _fork_too()
    if not printed:
        os.setsid()  # the agent ends a process with its group
    sys.argv = words[1:] if words[0] == "-m" else words if words[0] != "-c" else ["-c", *words[2:]]
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


def _fork_too() -> None:
    """Fork what this process starts: by torchrun, by ``spawn``, and the sides of a benchmark."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from rkd_cli.bench import apart

    patched: list[tuple[object, str, object]] = [
        (subprocess_handler, "Popen", _Rank),
        (apart, "subprocess", PIPED),
        (multiprocessing, "get_context", lambda method=None: CONTEXT if method == "spawn" else _context(method)),
        (forkserver._forkserver, "ensure_running", lambda: None),  # that of the tests is
    ]
    for owner, name, value in patched:
        setattr(owner, name, value)
