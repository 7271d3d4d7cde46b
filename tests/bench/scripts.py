"""How tests run the benchmarks of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def script(name: str, *arguments: object) -> tuple[str, str]:
    """What a script prints, and its progress."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
