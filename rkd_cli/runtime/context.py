"""The process that computes: its device and precision, its clock and its seeds, and whether it is asked to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkd_cli.errors import RunError, SettingsError, first_line
from rkd_cli.runtime import signals
from rkd_cli.runtime.distributed import ALONE, Ranks, ranks
from rkd_cli.runtime.seeds import derive_seed


@dataclass(frozen=True)
class Context:
    """What every part of a run asks about its process, so that many processes can be made to give one answer."""

    device: torch.device
    precision: str  # of the networks: fp32, tf32 or bf16; losses and metrics are in float32 or better
    seed: int = 1
    ranks: Ranks = ALONE
    clock: Callable[[], float] = time.monotonic  # seconds
    stop_requested: Callable[[], bool] = signals.stop_requested

    def autocast(self) -> AbstractContextManager[object]:
        """The context that networks run in. Losses stay outside it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def to_device(self, tensor: Tensor) -> Tensor:
        """Without waiting for the copy, where the tensor's memory is pinned."""
        return tensor.to(self.device, non_blocking=True)

    def seed_torch(self, *purpose: object) -> None:
        """Let torch's generators draw from a seed of this purpose alone."""
        torch.manual_seed(derive_seed(self.seed, *purpose))

    @contextmanager
    def own_draws(self) -> Iterator[None]:
        """What is drawn in the block (dropout) is of this process's images. After it torch's generators stand where
        they stood, which for what is drawn of the whole batch (miners) is one place in all processes."""
        if self.ranks.size == 1:
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(torch.initial_seed(), "rank", self.ranks.rank))
            yield


def make_context(device: str, precision: str, seed: int = 1) -> Context:
    """The context of this process; sets the CUDA device and whether products may use TF32, both for the process.

    Args:
        device: auto (a CUDA device where there is one), cpu, cuda (the first; of many processes each has its own) or
            cuda:N.
        precision: auto (bf16 on a CUDA device that has it, else fp32), fp32, tf32 or bf16.
        seed: of every draw.
    Raises:
        SettingsError: the machine has no such device, or the device no such precision.
    """
    where = _pick_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    who = ranks()
    stop_requested = signals.stop_requested if who.size == 1 else who.stop_requested
    return Context(where, _pick_precision(precision, where), seed, who, stop_requested=stop_requested)


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    index, count = device.index or 0, torch.cuda.device_count()
    here = processes_here()
    if here > 1:
        if device.index is not None:
            raise SettingsError(f"--device {name}: {here} processes need a device each: use --device cuda")
        if here > count:
            remedy = f"--nproc {count}" if count else "--device cpu"
            raise SettingsError(f"{here} processes, and {count} CUDA devices are visible: use {remedy}")
        index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise SettingsError(f"--device {name}: {count} CUDA devices are visible: try --device auto")
    return torch.device("cuda", index)


def _pick_precision(name: str, device: torch.device) -> str:
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bf16" if device.type == "cuda" and bf16 else "fp32"
    if name == "bf16" and not bf16:
        raise SettingsError(f"--precision bf16: {device_name(device)} does not have it: use fp32 or tf32")
    if name == "tf32" and device.type != "cuda":
        raise SettingsError("--precision tf32: only CUDA devices have it: use fp32")
    if device.type == "cuda":
        _switch_tf32(name == "tf32")
    return name


def _switch_tf32(on: bool) -> None:
    # the old switches too: who reads them gets an error where the new ones say something else
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    switches: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    for switch in switches:
        switch.fp32_precision = "tf32" if on else "ieee"


def device_name(device: torch.device) -> str:
    """What a person calls it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


@contextmanager
def naming_memory(what: str, remedy: str = "use a smaller --batch or --image-size") -> Iterator[None]:
    """Have the error of a memory that is full say what filled it, and what to do.

    Raises:
        RunError: it is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = first_line(error).rstrip(".")
        raise RunError(f"{what}: {first}: {remedy}") from None


def processes_here() -> int:
    """How many processes of this run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks().size > 1 else 1


def check_compiler(device: torch.device) -> None:
    """Compile a line and run it.

    Raises:
        SettingsError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(8, device=device))
    except Exception as error:  # a compiler that is missing or too old fails in as many ways as there are compilers
        first = first_line(error)
        raise SettingsError(f"--compile: this machine cannot ({first}): leave it out") from None


def worker_count(workers: int | None, beside: torch.device | None = None) -> int:
    """How many processes decode images: ``workers`` if it is a number, else as many as there are cores, up to 16.

    Args:
        workers: what is asked for.
        beside: the device that trains meanwhile: a CPU spares them two, a GPU is fed by up to eight.
    """
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes_here())
    return min(cores, 16 if beside is None else 8 if beside.type == "cuda" else 2)
