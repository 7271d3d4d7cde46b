"""System information for a bug report. Nothing here raises: a value that cannot be read is replaced by the reason."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rkd_cli import __version__
from rkd_cli.errors import first_line
from rkd_cli.runtime.files import CACHE_FILE, default_cache_folder, nearest

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pillow-heif", "safetensors", "pydantic")
_MODULES = {"pillow": "PIL", "pillow-heif": "pillow_heif"}
_EXTRAS = (  # imports take seconds
    "onnx", "onnxruntime", "huggingface-hub", "tensorboard", "wandb", "mlflow-skinny", "pyarrow", "faiss-cpu",
)  # fmt: skip
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "XDG_CACHE_HOME",
)  # and all RKD_* variables; none contains a secret


@dataclass(frozen=True)
class Space:
    """Bytes of a memory or a disk; None: unknown."""

    total: int | None
    free: int | None


@dataclass(frozen=True)
class Folder:
    """A cache folder, its size, and the disk that it is on (or will be)."""

    path: Path
    files: int
    bytes: int
    disk: Space


@dataclass(frozen=True)
class Device:
    """A CUDA device; ``problem`` is the error of a small matrix product on it, if any."""

    name: str
    memory: Space
    problem: str | None


@dataclass(frozen=True)
class Diagnosis:
    """The output of ``rkd doctor``."""

    versions: dict[str, str]  # or the reason why there is none
    formats: dict[str, bool]  # whether an image format can be read
    system: str
    python: str  # path
    processor: str
    cores: int
    cores_for_us: int
    threads: int | None  # of torch
    cuda: str  # the version that torch was built for, or why there is no device
    devices: tuple[Device, ...]
    memory: Space
    memory_limit: int | None  # of the container
    shared_memory: Space  # /dev/shm
    working_directory: Path
    disk: Space  # of the working directory
    caches: dict[str, Folder]
    environment: dict[str, str]


def diagnose() -> Diagnosis:
    """Collect the diagnosis; imports torch and runs a small matrix product on each CUDA device."""
    modules = {name: _imported(_MODULES.get(name, name)) for name in _PACKAGES}
    torch = modules["torch"]
    cuda, devices = ("torch cannot be imported", ()) if isinstance(torch, str) else _cuda(torch)
    here = Path()
    with suppress(OSError):  # it may have been deleted
        here = Path.cwd()
    return Diagnosis(
        versions={"rkd": __version__, "python": platform.python_version()}
        | {name: _version(name, module) for name, module in modules.items()}
        | {name: _version(name, None) for name in _EXTRAS},
        formats=_formats(modules),
        system=_system(),
        python=sys.executable,
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        cores_for_us=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=None if isinstance(torch, str) else torch.get_num_threads(),
        cuda=cuda,
        devices=devices,
        memory=main_memory(),
        memory_limit=memory_limit(),
        shared_memory=_disk(Path("/dev/shm")),
        working_directory=here,
        disk=_disk(here),
        caches=_caches(torch),
        environment={
            name: value for name, value in sorted(os.environ.items()) if name in _VARIABLES or name.startswith("RKD_")
        },
    )


def processor_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _imported(name: str) -> Any:
    """The module, or why it cannot be imported; incompatible libraries raise any type."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:
        return f"cannot be imported ({first_line(error)})"


def _version(name: str, module: ModuleType | str | None) -> str:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = str(getattr(module, "__version__", ""))
        return version or "not installed"
    if isinstance(module, str):
        return f"{version}, {module}"
    return str(module.__version__) if name == "torch" and module else version  # torch's includes the build (+cu128)


def _formats(modules: dict[str, Any]) -> dict[str, bool]:
    if isinstance(modules["pillow"], str):
        return {}
    from PIL import features

    codecs = {"JPEG": "jpg", "PNG": "zlib", "WebP": "webp", "TIFF": "libtiff", "AVIF": "avif"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # codecs unknown to this Pillow warn
        found = {name: bool(features.check(codec)) for name, codec in codecs.items()}
    return found | {"HEIC": not isinstance(modules["pillow-heif"], str)}


def _system() -> str:
    with suppress(OSError):
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.platform()}"
    return platform.platform()


def _cuda(torch: Any) -> tuple[str, tuple[Device, ...]]:
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return "none: torch is built without CUDA", ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except Exception as error:
            return f"built for {built}, but no device works: {first_line(error)}", ()
        return f"{built}, cuDNN {torch.backends.cudnn.version()}", tuple(
            _device(torch, index) for index in range(torch.cuda.device_count())
        )


def _device(torch: Any, index: int) -> Device:
    name, memory, problem = f"cuda:{index}", Space(None, None), None
    try:
        properties = torch.cuda.get_device_properties(index)
        name = f"cuda:{index}, {properties.name}, compute capability {properties.major}.{properties.minor}"
        free, total = torch.cuda.mem_get_info(index)
        memory = Space(total, free)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        found = float((ones @ ones).sum())  # a sync
        if found != 64**3:
            problem = f"a matrix product gave {found} instead of {64**3}"
    except Exception as error:  # drivers, memory, missing kernels
        problem = first_line(error)
    return Device(name, memory, problem)


def main_memory() -> Space:
    """Total and available memory of the machine."""
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return Space(kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024)
    with suppress(OSError, ValueError, AttributeError):
        return Space(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)
    return Space(None, None)


def memory_limit() -> int | None:
    """Memory limit of this process's container in bytes; None if unlimited or unknown."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limit = int(Path(path).read_text(encoding="utf-8"))
            return limit if limit < 2**60 else None  # cgroup v1 reports no limit as a huge number
    return None


def memory_used() -> tuple[int | None, int | None]:
    """Bytes that this process holds now: of main memory (its peak where that is unknown), and of a GPU in use."""
    torch = sys.modules.get("torch")
    on_gpu = torch.cuda.memory_reserved() if torch and torch.cuda.is_initialized() else None
    return _of_status("VmRSS:") or peak_memory(), on_gpu


def _of_status(name: str) -> int | None:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
    return None


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; None if unknown."""
    if peak_of_linux := _of_status("VmHWM:"):
        return peak_of_linux
    with suppress(ImportError):  # not on Windows
        import resource

        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
    return None


def _disk(path: Path) -> Space:
    with suppress(OSError):
        usage = shutil.disk_usage(path)
        return Space(usage.total, usage.free)
    return Space(None, None)


def _caches(torch: Any) -> dict[str, Folder]:
    huggingface = Path(os.environ.get("HF_HOME") or _user_cache() / "huggingface")
    found = {"Hugging Face weights": Path(os.environ.get("HF_HUB_CACHE") or huggingface / "hub")}
    if not isinstance(torch, str):
        found |= {"torch weights": Path(torch.hub.get_dir()), "rkd cache": default_cache_folder()}
    counted = {"rkd cache": CACHE_FILE.fullmatch}  # as `rkd cache` counts
    return {name: _folder(path.expanduser(), counted.get(name, bool)) for name, path in sorted(found.items())}


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _folder(path: Path, is_counted: Callable[[str], object]) -> Folder:
    files = size = 0
    for folder, _, names in os.walk(path):  # skips unreadable folders
        for name in filter(is_counted, names):
            with suppress(OSError):
                size += (Path(folder) / name).lstat().st_size  # counts linked files once
                files += 1
    return Folder(path, files, size, _disk(nearest(path)))
