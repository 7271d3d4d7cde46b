"""Run work in several processes at once, each of which ends with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from rkd_cli.runtime import signals
from rkd_cli.runtime.processes import print_errors


def run_jobs(jobs: Mapping[str, Callable[[], object]], at_once: int) -> int:
    """Run named jobs, each in a process of its own, and return the exit code of the first that fails, or 0.

    The others go on after a failure. If this process is stopped, the jobs get SIGTERM; if it is killed, they end.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # starting it later would unblock the signals
    waiting, running, code = dict(jobs), dict[str, BaseProcess](), 0
    threads = max(1, (os.cpu_count() or 1) // at_once)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = next(iter(waiting))
                started = context.Process(target=_run, args=(waiting.pop(name), threads))
                with signals.blocked():
                    started.start()
                    running[name] = started
            wait([process.sentinel for process in running.values()])
            for name, process in [(name, process) for name, process in running.items() if not process.is_alive()]:
                del running[name]
                found = process.exitcode or 0
                if found < 0:
                    reason = f"was killed (signal {-found}), perhaps because memory ran out"
                    print_errors([f"error: {name}: {reason}. Run the command again, with --resume."])
                code = code or (found if found >= 0 else 128 - found)
    except signals.Stopped:
        for process in running.values():
            process.terminate()
        try:
            for process in running.values():
                process.join()
        except signals.Stopped:  # the second signal
            for process in running.values():
                process.kill()
        raise
    return code


def _run(job: Callable[[], object], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    signal.signal(signal.SIGTERM, signals.stop)
    signals.set_distributed()  # a second SIGTERM is ignored
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torch is imported later
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        signals.unblock()
        job()
    except signals.Stopped as stopped:  # before the job handles it
        sys.exit(128 + stopped.args[0])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    with suppress(InterruptedError):
        parent.join()
    os._exit(1)
