"""Measure time and memory, of two implementations in turn."""

from __future__ import annotations

import gc
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rkd_cli.bench.apart import Apart
from rkd_cli.runtime.allocator import keep_memory
from rkd_cli.runtime.context import make_context
from rkd_cli.runtime.timing import times_of
from rkd_cli.settings import BenchSettings

_TRACED = 3  # steps under the profiler
_STEP = "rkd step"
_SECONDS = 0.3  # of repeated work in a turn


def _silent(what: str) -> None:
    """A Meter's default ``tell``."""


@dataclass(frozen=True)
class Measurement:
    """Median seconds, and peak bytes above the start; None if not measured."""

    work: str
    seconds: float
    textbook_seconds: float | None = None
    bytes: int | None = None
    textbook_bytes: int | None = None
    note: str = ""

    @property
    def faster(self) -> float | None:
        """Textbook time divided by rkd's."""
        return self.textbook_seconds / self.seconds if self.textbook_seconds else None

    @property
    def leaner(self) -> float | None:
        """Textbook memory divided by rkd's."""
        return self.textbook_bytes / self.bytes if self.textbook_bytes and self.bytes else None


Work = Callable[[], object] | Apart


@dataclass(frozen=True)
class Meter:
    """Measures on a device; ``tell`` is called with the name of each piece of work before it starts."""

    device: torch.device
    repeats: int = 3  # turns of each side
    tell: Callable[[str], None] = _silent

    def compare(
        self, work: str, ours: Work, theirs: Work | None, memory: bool = True, resident: bool = False
    ) -> Measurement:
        """Measure both in turns, so that other load of the machine affects both."""
        self.tell(work)
        sides = [side for side in (ours, theirs) if side is not None]
        bytes = [self.peak(side, resident) if memory else None for side in sides]
        taken: list[list[float]] = [[] for _ in sides]
        for _ in range(self.repeats):
            for side, times in zip(sides, taken, strict=True):
                times += self.times(side)
        medians: list[float | None] = [statistics.median(times) for times in taken]
        (own, other), (own_bytes, other_bytes) = [*medians, None][:2], [*bytes, None][:2]
        assert own is not None
        return Measurement(work, own, other, own_bytes, other_bytes)

    def once(self, work: str, ours: Callable[[], object]) -> Measurement:
        """Measure a single run without warm-up: its time, and on CUDA its memory."""
        self.tell(work)
        cuda, before = self.device.type == "cuda", 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        seconds = seconds_of(ours, self.device)
        bytes = torch.cuda.max_memory_allocated(self.device) - before if cuda else None
        return Measurement(work, seconds, bytes=bytes)

    def times(self, work: Work, seconds: float = _SECONDS) -> list[float]:
        """Seconds of each run, which never overlap; of a single run if ``seconds`` is 0."""
        if isinstance(work, Apart):
            return work.times(seconds)
        if not seconds:
            return [seconds_of(work, self.device)]

        def whole() -> None:
            work()
            wait(self.device)

        return times_of(whole, seconds)

    def peak(self, work: Work, resident: bool) -> int | None:
        """Peak bytes of a run: resident memory of all processes if ``resident``, else torch's allocations."""
        if isinstance(work, Apart):
            return work.peak()
        if resident and self.device.type == "cpu":
            return resident_peak(work)
        return allocated_peak(work, self.device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Synchronize the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated_peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes of torch's allocator above the start."""
    work()  # allocates what stays between runs
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    steps = [(event["ts"], event["args"]) for event in events_of(trace) if event.get("name") == "[memory]"]
    if not steps:
        return None
    steps.sort(key=lambda step: step[0])
    first = steps[0][1]
    return int(max(step["Total Allocated"] for _, step in steps) - (first["Total Allocated"] - first["Bytes"]))


def events_of(trace: profile) -> list[dict[str, Any]]:
    """The events of torch's profiler in Chrome's trace format."""
    with NamedTemporaryFile(suffix=".json") as file:
        trace.export_chrome_trace(file.name)
        events: list[dict[str, Any]] = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    return events


def resident_peak(work: Callable[[], object]) -> int | None:
    """Peak bytes of resident memory of this process and its workers above the start."""
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    with _watched() as seen:
        work()
    return max(seen) - seen[0]


@contextmanager
def _watched() -> Iterator[list[int]]:
    gc.collect()
    seen, stop = [_resident()], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(_resident())
            stop.wait(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        seen.append(_resident())
        stop.set()
        thread.join()


def _resident() -> int:
    """Bytes of this process and its children; memory that they share counts once."""
    total = 0
    me = os.getpid()
    for process in (me, *_children(me)):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        except OSError:  # the process has ended
            continue
        total += 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


def _children(process: int) -> list[int]:
    found: list[int] = []
    for tasks in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += map(int, tasks.read_text(encoding="ascii").split())
        except OSError:
            continue
    return [*found, *(grandchild for child in found for grandchild in _children(child))]


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # in torch's cache
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


@dataclass(frozen=True)
class Trace:
    """Device activity per step, and how often the program waited for it."""

    kernels: float
    copies: float  # between host and device
    waits: float
    busy: float  # seconds

    def told(self, seconds: float) -> str:
        """A text. ``seconds`` is the time of a step without the profiler, which slows the program, not the kernels."""
        idle = max(0.0, 1 - self.busy / seconds)
        counts = f"{self.kernels:.0f} kernels, {self.copies:.0f} copies over the bus, {self.waits:.0f} waits"
        return f"{counts}, GPU idle {idle:.1%}" if self.kernels else "no kernels seen"


def traced(step: Callable[[], object], device: torch.device) -> Trace:
    """Profile some steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as trace:
        for _ in range(_TRACED):
            with record_function(_STEP):
                step()
        wait(device)
    return trace_of(events_of(trace), _TRACED)


def trace_of(events: Sequence[dict[str, Any]], steps: int) -> Trace:
    """Means over steps, from the events of torch's profiler. Events of the host only count within a step."""
    spans = [_span(event) for event in events if event.get("cat") == "user_annotation" and event["name"] == _STEP]
    host = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    waits = [e for e in host if "Synchronize" in e["name"] and any(a <= e["ts"] <= b for a, b in spans)]
    moves = [event for event in events if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    copies = [event for event in moves if "HtoD" in event["name"] or "DtoH" in event["name"]]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    busy, end = 0.0, 0.0
    for first, last in sorted(map(_span, [*kernels, *moves])):  # streams may overlap
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return Trace(len(kernels) / steps, len(copies) / steps, len(waits) / steps, busy / 1e6 / steps)


def _span(event: dict[str, Any]) -> tuple[float, float]:
    start = float(event["ts"])  # microseconds
    return start, start + float(event.get("dur", 0))


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_precision(device: torch.device) -> Iterator[None]:
    """torch's default precision: on CUDA, TF32 in convolutions only."""
    if device.type != "cuda":
        yield
        return
    switches: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch, precision in zip(switches, ("none", "tf32"), strict=True):
        switch.fp32_precision = precision
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def begin(side: str, settings: str, threads: str) -> tuple[BenchSettings, Meter]:
    """Set this process up as ``side``, which is ours or the reference."""
    if side == "ours":
        keep_memory()  # as the commands do
    torch.set_num_threads(int(threads))
    found = BenchSettings.model_validate_json(settings)
    return found, Meter(make_context(found.device, "fp32").device)
