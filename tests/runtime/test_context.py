"""The process that computes: its device, its precision, its seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from rkd_cli.errors import SettingsError
from rkd_cli.runtime import context as context_module
from rkd_cli.runtime.context import Context, cpu_has_bf16, make_context, worker_count
from rkd_cli.runtime.distributed import Ranks

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Two CUDA devices without bf16, as far as torch tells; gives those that are made the process's own."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield chosen
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", 0), ("auto", 0)])
def test_the_cuda_device_becomes_the_processs_own(cuda: list[torch.device], name: str, index: int) -> None:
    """What torch allocates without being told where must not land on the first device."""
    context = make_context(name, "fp32")
    assert context.device == torch.device("cuda", index)
    assert cuda == [torch.device("cuda", index)]


def test_a_cpu_leaves_cuda_alone(cuda: list[torch.device]) -> None:
    assert make_context("cpu", "fp32").device == CPU
    assert cuda == []


def test_a_device_that_is_not_there_is_one_line(cuda: list[torch.device]) -> None:
    with pytest.raises(SettingsError, match=r"^--device cuda:2: 2 CUDA devices are visible. Try --device auto.$"):
        make_context("cuda:2", "fp32")
    assert cuda == []


@pytest.mark.usefixtures("cuda")
def test_each_of_many_processes_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_module, "ranks", lambda: Ranks(3, 4))  # two machines of two
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert make_context("cuda", "fp32").device == torch.device("cuda", 1)
    with pytest.raises(
        SettingsError, match=r"^--device cuda:0: each of the 2 processes needs its own. Use --device cuda.$"
    ):
        make_context("cuda:0", "fp32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(SettingsError, match=r"^3 processes, but 2 CUDA devices are visible. Use --nproc 2.$"):
        make_context("auto", "fp32")
    assert make_context("cpu", "fp32").device == CPU


@pytest.mark.parametrize(("asked", "found", "tf32"), [("auto", "fp32", False), ("tf32", "tf32", True)])
def test_precision_of_a_device_without_bf16(cuda: list[torch.device], asked: str, found: str, tf32: bool) -> None:
    assert make_context("cuda:1", asked).precision == found
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    with pytest.raises(SettingsError, match=r"^--precision bf16: not supported by Some GPU \(cuda:1\)"):
        make_context("cuda:1", "bf16")


def test_auto_takes_bf16_where_cuda_has_it(cuda: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert make_context("auto", "auto").precision == "bf16"
    assert make_context("cpu", "auto").precision == "fp32"


def test_a_cpu_has_no_tf32() -> None:
    with pytest.raises(SettingsError, match=r"^--precision tf32: only supported by CUDA devices. Use fp32.$"):
        make_context("cpu", "tf32")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_networks_run_in_the_precision_asked_for(precision: str, dtype: torch.dtype) -> None:
    context, layer = make_context("cpu", precision), torch.nn.Linear(3, 2)
    with context.autocast():
        assert layer(torch.ones(4, 3)).dtype == dtype
    assert layer(torch.ones(4, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("cpu", "asked", "plain", "depthwise", "training"),
    [
        ({"avx512_bf16": True}, "auto", "bf16", "fp32", "fp32"),
        ({"amx_bf16": True}, "auto", "bf16", "fp32", "fp32"),
        ({"avx512_f": True, "avx512_bf16": False}, "auto", "fp32", "fp32", "fp32"),
        ({"avx512_bf16": True}, "fp32", "fp32", "fp32", "fp32"),
        ({"avx512_f": True}, "bf16", "bf16", "bf16", "bf16"),
    ],
)
def test_frozen_networks_take_bf16_where_the_cpu_has_it(
    cpu: dict[str, bool], asked: str, plain: str, depthwise: str, training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "cpu_has_bf16", cpu_has_bf16)  # other tests have none
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    context = make_context("cpu", asked)
    layer, grouped = nn.Linear(3, 2), nn.Sequential(nn.Conv2d(4, 4, 1, groups=4))
    found = [context.inference_precision(network) for network in (layer, grouped)]
    assert (*found, context.precision) == (plain, depthwise, training)
    assert context.inference_precision(nn.Identity()) == training  # no weights: another runtime may run it
    with context.inference_autocast(layer):
        assert layer(torch.ones(4, 3)).dtype == (torch.bfloat16 if plain == "bf16" else torch.float32)


def test_each_purpose_has_a_seed_of_its_own() -> None:
    def drawn(seed: int, *purpose: object) -> float:
        Context(CPU, "fp32", seed).seed_torch(*purpose)
        return torch.rand(()).item()

    assert drawn(1, "step", 2, 3) == drawn(1, "step", 2, 3)
    assert len({drawn(1, "step", 2, 3), drawn(1, "step", 3, 2), drawn(1, "weights"), drawn(2, "step", 2, 3)}) == 4


def test_workers_are_as_many_as_asked_for_or_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(40)), raising=False)
    assert [worker_count(n) for n in (0, 3, None)] == [0, 3, 16]
    assert worker_count(None, CPU) == 2
    assert worker_count(None, torch.device("cuda", 1)) == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert [worker_count(None, device) for device in (None, CPU, torch.device("cuda"))] == [1, 1, 1]
