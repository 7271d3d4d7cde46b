"""rkd doctor: true figures, one line for each thing that does not work, and no secrets."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rkd_cli import __version__
from rkd_cli.cli import main
from rkd_cli.report.text import doctor_text
from rkd_cli.runtime import doctor
from rkd_cli.runtime.doctor import Device, Diagnosis, Folder, Space, diagnose

DIAGNOSIS = Diagnosis(
    versions={"rkd": "9.9", "timm": "not installed"},
    formats={"JPEG": True, "HEIC": False},
    system="Linux",
    python="/usr/bin/python",
    processor="Abacus",
    cores=8,
    cores_for_us=2,
    threads=1,
    cuda="12.8, cuDNN 9",
    devices=(Device("cuda:0, Good", Space(10**10, 9 * 10**9), None), Device("cuda:1", Space(None, None), "no kernel")),
    memory=Space(2 * 10**9, None),
    memory_limit=10**9,
    shared_memory=Space(64 * 2**20, 0),
    working_directory=Path("/here"),
    disk=Space(10**12, 5 * 10**11),
    caches={"rkd cache": Folder(Path("/c"), 2, 2_300_000_000, Space(10**12, 10**9))},
    environment={"RKD_DEBUG": "1"},
)


def test_the_text_that_is_pasted() -> None:
    assert [line.split(maxsplit=1) for line in doctor_text(DIAGNOSIS).splitlines()] == [
        ["rkd", "9.9"],
        ["timm", "not installed"],
        ["images", "reads JPEG; not HEIC"],
        ["system", "Linux"],
        ["interpreter", "/usr/bin/python"],
        ["processor", "Abacus, 2 of 8 cores, torch threads 1"],
        ["cuda", "12.8, cuDNN 9"],
        ["device", "cuda:0, Good, 10.00 GB, 9.00 GB free, works"],
        ["device", "cuda:1, unknown, does not work: no kernel"],
        ["memory", "2.00 GB, this container's limit 1.00 GB"],
        ["/dev/shm", "0.07 GB, 0.00 GB free"],
        ["directory", "/here, disk 1,000.00 GB, 500.00 GB free"],
        ["rkd", "cache    /c, 2 files, 2.30 GB, disk 1,000.00 GB, 1.00 GB free"],
        ["RKD_DEBUG", "1"],
    ]
    assert "/c, empty or absent," in doctor_text(
        replace(DIAGNOSIS, caches={"a": Folder(Path("/c"), 0, 0, Space(None, None))})
    )


def test_the_figures_are_this_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "new/cache"
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RKD_CACHE_DIR", str(cache))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = tmp_path / "torch/hub/checkpoints/a.pth"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"x" * 1234)
    (weights.parent / "link.pth").symlink_to(weights)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--json"])
    assert not end.value.code
    out = capfd.readouterr().out
    found = json.loads(out)
    assert "hf_secret" not in out
    assert found["versions"]["rkd"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["formats"]["JPEG"]
    assert found["formats"]["PNG"]
    assert found["threads"] == torch.get_num_threads()
    assert found["working_directory"] == str(Path.cwd())
    assert found["disk"]["total"] == shutil.disk_usage(".").total
    torch_cache = found["caches"]["torch weights"]
    assert torch_cache["path"] == str(tmp_path / "torch/hub")
    assert torch_cache["files"] == 2
    assert 1234 < torch_cache["bytes"] < 2 * 1234  # a link counts as itself
    assert found["caches"]["rkd cache"] == {
        "path": str(cache), "files": 0, "bytes": 0, "disk": found["caches"]["rkd cache"]["disk"],
    }  # fmt: skip
    assert found["caches"]["rkd cache"]["disk"]["total"] == shutil.disk_usage(tmp_path).total
    assert found["caches"]["Hugging Face weights"]["path"] == str(tmp_path / "hf/hub")
    assert found["environment"].items() >= {"RKD_CACHE_DIR": str(cache), "HF_HOME": str(tmp_path / "hf")}.items()
    assert not cache.exists()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found["memory"]["total"] == pytest.approx(memory, rel=0.1)
    assert bool(found["devices"]) == torch.cuda.is_available()


def test_a_library_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: Callable[[str], Any] = importlib.import_module

    def fail(name: str) -> Any:
        if name in ("torch", "torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist\nand more")
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    found = diagnose()
    broken = "cannot be imported (operator torchvision::nms does not exist)"
    assert found.versions["torchvision"].endswith(f", {broken}")
    assert found.versions["numpy"][0].isdigit()
    assert found.versions["onnx"] == importlib.metadata.version("onnx")
    assert (found.cuda, found.threads, found.devices) == ("torch cannot be imported", None, ())
    assert list(found.caches) == ["Hugging Face weights"]


def fake_torch(product: float | Exception, init: Exception | None = None) -> Any:
    class Ones:
        def __matmul__(self, other: object) -> Ones:
            return self

        def sum(self) -> float:
            if isinstance(product, Exception):
                raise product
            return product

    def start() -> None:
        if init:
            raise init

    cuda = SimpleNamespace(
        init=start,
        device_count=lambda: 1,
        get_device_properties=lambda index: SimpleNamespace(name="Card", major=9, minor=0),
        mem_get_info=lambda index: (5, 7),
    )
    return SimpleNamespace(
        version=SimpleNamespace(cuda="12.8", hip=None),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 9)),
        cuda=cuda,
        ones=lambda *shape, device: Ones(),
    )


@pytest.mark.parametrize(
    ("product", "problem"),
    [
        (262144.0, None),
        (1.0, "a matrix product gave 1.0 instead of 262144"),
        (RuntimeError("CUDA error: no kernel image is available\nCompile with"), "CUDA error: no kernel image is "
         "available"),
    ],
)  # fmt: skip
def test_a_device_is_tried(product: float | Exception, problem: str | None) -> None:
    says, devices = doctor._cuda(fake_torch(product))
    assert says == "12.8, cuDNN 9"
    assert devices == (Device("cuda:0, Card, compute capability 9.0", Space(7, 5), problem),)


def test_cuda_that_does_not_start_says_why() -> None:
    assert doctor._cuda(fake_torch(0, RuntimeError("Found no NVIDIA driver\nmore"))) == (
        "built for 12.8, but no device works: Found no NVIDIA driver",
        (),
    )
    torch_without = fake_torch(0)
    torch_without.version.cuda = None
    assert doctor._cuda(torch_without) == ("none: torch is built without CUDA", ())


@pytest.mark.cuda
def test_a_real_device_works() -> None:
    found = diagnose()
    assert [device.problem for device in found.devices] == [None] * torch.cuda.device_count()
    assert all(device.memory.total for device in found.devices)
