"""Device, precision, seeds and threads."""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager

import torch

from rkd_cli.errors import SettingsError


def derive_seed(seed: int, *what: object) -> int:
    """A seed of its own for each purpose, so that no draw depends on how many others came before it."""
    text = " ".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def pick_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device where there is one.

    Raises:
        SettingsError: a CUDA device is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible: try --device auto")
    return device


def device_name(device: torch.device) -> str:
    """What a person calls it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads"


def pick_precision(name: str, device: torch.device) -> str:
    """``auto`` is bf16 on a CUDA device that has it, else fp32. Turns TF32 on or off, for the process.

    Raises:
        SettingsError: the device cannot do it.
    """
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bf16" if device.type == "cuda" and bf16 else "fp32"
    if name == "bf16" and not bf16:
        raise SettingsError(f"--precision bf16: {device_name(device)} does not have it: use fp32 or tf32")
    if name == "tf32" and device.type != "cuda":
        raise SettingsError("--precision tf32: only CUDA devices have it: use fp32")
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context networks run in. Losses stay outside it, in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_compiler(device: torch.device) -> None:
    """
    Raises:
        SettingsError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(8, device=device))
    except Exception as error:  # a compiler that is missing or too old fails in as many ways as there are compilers
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
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
    return min(cores, 16 if beside is None else 8 if beside.type == "cuda" else 2)
