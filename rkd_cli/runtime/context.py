"""The context of a process: device, precision, seed, ranks, clock and stop requests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rkd_cli.errors import RunError, SettingsError, first_line
from rkd_cli.runtime import signals
from rkd_cli.runtime.distributed import ALONE, Ranks, ranks
from rkd_cli.runtime.seeds import derive_seed


@dataclass(frozen=True)
class Context:
    """Device, precision, seed and ranks of this process."""

    device: torch.device
    precision: str  # of networks in training: fp32, tf32 or bf16; losses and metrics use float32 or float64
    seed: int = 1
    ranks: Ranks = ALONE
    clock: Callable[[], float] = time.monotonic  # seconds
    stop_requested: Callable[[], bool] = signals.stop_requested
    bf16_inference: bool = False  # see ``inference_precision``

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast context for networks in training; losses run outside it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def inference_autocast(self, network: Callable[[Tensor], Tensor]) -> AbstractContextManager[object]:
        """The autocast context for a frozen network."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.inference_precision(network) == "bf16")

    def inference_precision(self, network: Callable[[Tensor], Tensor]) -> str:
        """The precision of a frozen network: bf16 also where it is much faster.

        Depthwise convolutions gain little from it on a CPU, and lose more digits.
        """
        if not self.bf16_inference or not isinstance(network, nn.Module) or has_depthwise(network):
            return self.precision
        return "bf16" if any(True for _ in network.parameters()) else self.precision  # without: in another runtime

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy to the device, asynchronously if the tensor is in pinned memory."""
        return tensor.to(self.device, non_blocking=True)

    def store(self, rows: Tensor) -> Tensor:
        """Rows that many batches read: on the GPU if they fit there (``fits_on``), else where they are."""
        return self.to_device(rows) if fits_on(self.device, rows.nbytes) else rows

    def seed_torch(self, *purpose: object) -> None:
        """Seed torch's generators for one purpose."""
        torch.manual_seed(derive_seed(self.seed, *purpose))

    @contextmanager
    def own_draws(self) -> Iterator[None]:
        """Draw from a generator of this rank inside the block (dropout), and restore torch's generators after it.

        Draws over the whole batch (miners) therefore agree in all processes.
        """
        if self.ranks.size == 1:
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(torch.initial_seed(), "rank", self.ranks.rank))
            yield


def make_context(device: str, precision: str, seed: int = 1) -> Context:
    """Create the context of this process and set the process's CUDA device and TF32 mode.

    ``device`` is auto (CUDA if available), cpu, cuda (the first device, or one per process) or cuda:N; ``precision`` is
    auto (bf16 on CUDA devices that support it, else fp32; on CPUs with bf16 instructions, fp32 in training and bf16 for
    most frozen networks), fp32, tf32 or bf16.
    """
    where = _pick_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    who = ranks()
    stop_requested = signals.stop_requested if who.size == 1 else who.stop_requested
    bf16_inference = precision == "auto" and where.type == "cpu" and cpu_has_bf16()
    return Context(where, _pick_precision(precision, where), seed, who, time.monotonic, stop_requested, bf16_inference)


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices faster than float32 ones: AVX-512 BF16 or AMX."""
    found: Mapping[str, Any] = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def has_depthwise(network: nn.Module) -> bool:
    """Whether a network has depthwise (or other grouped) convolutions."""
    return any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in network.modules())


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
            raise SettingsError(f"--device {name}: each of the {here} processes needs its own. Use --device cuda.")
        if here > count:
            remedy = f"--nproc {count}" if count else "--device cpu"
            raise SettingsError(f"{here} processes, but {count} CUDA devices are visible. Use {remedy}.")
        index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise SettingsError(f"--device {name}: {count} CUDA devices are visible. Try --device auto.")
    return torch.device("cuda", index)


def _pick_precision(name: str, device: torch.device) -> str:
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bf16" if device.type == "cuda" and bf16 else "fp32"
    if name == "bf16" and not bf16:
        raise SettingsError(f"--precision bf16: not supported by {device_name(device)}. Use fp32 or tf32.")
    if name == "tf32" and device.type != "cuda":
        raise SettingsError("--precision tf32: only supported by CUDA devices. Use fp32.")
    if device.type == "cuda":
        _switch_tf32(name == "tf32")
    return name


def _switch_tf32(on: bool) -> None:
    # set the old flags too: reading them raises if they disagree with the new ones
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    switches: Any = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    for switch in switches:
        switch.fp32_precision = "tf32" if on else "ieee"


def fits_on(device: torch.device, size: int) -> bool:
    """Whether the device is a GPU and ``size`` bytes take less than a quarter of its free memory."""
    return device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4


def device_name(device: torch.device) -> str:
    """A readable name: the GPU's, or CPU with its threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


@contextmanager
def naming_memory(what: str, remedy: str = "use a smaller --batch or --image-size") -> Iterator[None]:
    """Turn an out-of-memory error into a RunError that says what filled the memory and what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = first_line(error).rstrip(".")
        raise RunError(f"{what}: {first}. {remedy[0].upper()}{remedy[1:]}.") from None


def processes_here() -> int:
    """The number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks().size > 1 else 1


def check_compiler(device: torch.device) -> None:
    """Raise a SettingsError if torch.compile does not work on this machine."""
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(8, device=device))
    except Exception as error:  # missing and old compilers raise many types
        first = first_line(error)
        raise SettingsError(f"--compile: torch.compile fails on this machine ({first}). Omit the flag.") from None


def worker_count(workers: int | None, training_on: torch.device | None = None) -> int:
    """The number of worker processes that decode images: ``workers``, or by default one per core, up to 16.

    While a device trains, up to 8 for a GPU and 2 for a CPU.
    """
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes_here())
    return min(cores, 16 if training_on is None else 8 if training_on.type == "cuda" else 2)
