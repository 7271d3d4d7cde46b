"""Make image-embedding models small: relational knowledge distillation for image retrieval."""

from typing import TYPE_CHECKING

from rkd_cli.runtime.allocator import keep_memory

if TYPE_CHECKING:
    from rkd_cli.embedding.loaded import load

__all__ = ["__version__", "keep_memory", "load"]
__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    if name == "load":  # imported when it is used: it brings torch along
        from rkd_cli.embedding.loaded import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "load"})
