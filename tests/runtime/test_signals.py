"""SIGINT and SIGTERM: what a signal asks for is heeded, even where its exception is lost."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# the handlers of the program, and a way to lose what they raise, as Python does while a process is forked
SETUP = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path
from rkd_cli.errors import Interrupted
from rkd_cli.runtime.signals import Stopped, if_stopped, raise_if_stopped, saving, stop, stop_requested

def send(signum):
    os.kill(os.getpid(), signum)

def lose(signum):
    try:
        send(signum)
    except Stopped:
        print("lost")

for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, stop)
"""


def said(script: str) -> tuple[list[str], str]:
    """The lines that a process of its own prints, and its complaints."""
    command = [sys.executable, "-c", SETUP + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_outside_a_run_stops_at_once(name: str) -> None:
    lines, errors = said(f"""
        raise_if_stopped()
        try:
            send(signal.{name})
            print("went on")
        except Stopped as stopped:
            print(stopped.args[0] == signal.{name}, stopped.outcome == "", stop_requested())
    """)
    assert lines == ["True True True"]
    assert errors == ""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_whose_exception_is_lost_stops_at_the_next_border(name: str) -> None:
    lines, _ = said(f"""
        lose(signal.{name})
        try:
            raise_if_stopped()
        except Stopped as stopped:
            print("stopped", stopped.args[0] == signal.{name})
    """)
    assert lines == ["lost", "stopped True"]


@pytest.mark.parametrize("workers", [0, 1])
def test_work_for_a_loader_ends_at_the_next_item(workers: int) -> None:
    """The signal comes while the plan is read: beside workers that is where they are started, with signals blocked."""
    lines, _ = said(f"""
        from rkd_cli.data.workers import in_workers

        def plan():
            yield 1
            lose(signal.SIGTERM)
            yield from range(2, 100)

        try:
            for result in in_workers(abs, plan(), {workers}):
                print(result)
        except Stopped:
            print("stopped")
    """)
    assert [line for line in lines if line not in ("1", "2", "lost")] == ["stopped"]
    assert "lost" in lines or workers  # beside workers it comes as soon as they are started


def test_workers_get_no_signal_before_they_have_their_own_handlers() -> None:
    """A worker would print a traceback of the exception that its parent's handler raises."""
    lines, _ = said("""
        from rkd_cli.data import workers

        own = workers._leave_signals_to_the_parent

        def late(worker):
            send(signal.SIGTERM)  # the parent's handler is still in place
            print("alive", flush=True)
            own(worker)

        workers._leave_signals_to_the_parent = late
        try:
            print(*workers.in_workers(abs, [1], 1))
        except Exception as error:
            print("exited unexpectedly" in str(error))
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """)
    assert lines == ["alive", "True", "set()"]


def test_a_signal_at_the_entry_of_a_block_leaves_no_signal_blocked() -> None:
    lines, _ = said("""
        from rkd_cli.runtime import signals

        def masked(how, mask, own=signal.pthread_sigmask):
            before = own(how, mask)
            if mask and how == signal.SIG_BLOCK:
                raise Stopped(signal.SIGTERM)  # as the call does after it has changed the mask
            return before

        signal.pthread_sigmask = masked
        with suppress(Stopped), signals.blocked():
            print("went on")
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """)
    assert lines == ["set()"]


def test_a_signal_lost_before_a_run_stops_it_before_its_first_step() -> None:
    lines, _ = said("""
        lose(signal.SIGTERM)
        try:
            with saving("distill", Path("run")):
                print("began")
        except Stopped:
            print("stopped")
    """)
    assert lines == ["lost", "stopped"]


def test_a_signal_lost_in_the_last_line_of_a_block_is_found_at_its_end() -> None:
    lines, _ = said("""
        try:
            with if_stopped(": half of it is kept"):
                lose(signal.SIGINT)
            print("went on")
        except Stopped as stopped:
            print("stopped" + stopped.outcome)
    """)
    assert lines == ["lost", "stopped: half of it is kept"]


def test_a_run_saves_first_and_says_how_to_go_on() -> None:
    lines, errors = said("""
        try:
            with saving("train-teacher", Path("my run")):
                send(signal.SIGTERM)
                print("saving", stop_requested())
                raise_if_stopped()  # of its loader: not now
                raise Interrupted
        except Stopped as stopped:
            print(stopped.args[0] == signal.SIGTERM, stopped.outcome)
    """)
    assert lines == [
        "saving True",
        "True  and saved. Resume with `rkd train-teacher --resume --save-dir 'my run'`.",
    ]
    assert errors == "rkd: saving after this step, then stopping; press again to stop at once\n"


def test_a_second_signal_stops_a_run_at_once() -> None:
    lines, _ = said("""
        try:
            with saving("distill", Path("run")):
                send(signal.SIGTERM)
                send(signal.SIGINT)
                print("went on")
        except Stopped as stopped:
            print(stopped.args[0] == signal.SIGINT, stopped.outcome)
    """)
    assert lines == ["True  without saving. Resume from the last save with `rkd distill --resume --save-dir run`."]


def test_a_second_signal_that_is_lost_leaves_the_first_ones_wish() -> None:
    lines, _ = said("""
        with suppress(Stopped), saving("distill", Path("run")):
            send(signal.SIGTERM)
            lose(signal.SIGTERM)
            print("to be saved", stop_requested())
    """)
    assert lines == ["lost", "to be saved True"]


def test_a_signal_stops_what_comes_after_a_run_too() -> None:
    """A run that was at its end when the signal came: what would follow it does not begin."""
    lines, _ = said("""
        with saving("distill", Path("run")):
            send(signal.SIGTERM)
        print("finished")
        try:
            raise_if_stopped()
        except Stopped:
            print("stopped")
    """)
    assert lines == ["finished", "stopped"]
