"""Make image-embedding models small: relational knowledge distillation for image retrieval."""

from importlib import import_module
from typing import TYPE_CHECKING

from rkd_cli.runtime.allocator import keep_memory

if TYPE_CHECKING:
    from rkd_cli.api import distill, train_teacher
    from rkd_cli.embedding.loaded import load

__all__ = ["__version__", "distill", "keep_memory", "load", "train_teacher"]
__version__ = "0.2.0"
_LATER = {"load": "embedding.loaded", "distill": "api", "train_teacher": "api"}  # imported when used: they need torch


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(f"rkd_cli.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
