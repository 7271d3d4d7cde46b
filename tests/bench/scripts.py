"""How tests run the benchmarks of this folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from forked import Forked


def script(name: str, *arguments: object) -> tuple[str, str]:
    """What a script prints, and its progress."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = Forked([Path(__file__).with_name(f"{name}.py"), *arguments], environment)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out, err
