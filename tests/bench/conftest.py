"""How the benchmarks of this folder are run in tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def script() -> Callable[..., tuple[str, str]]:
    """Run one of the scripts; gives what it printed, and its progress."""

    def run(name: str, *arguments: object) -> tuple[str, str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(HERE / f"{name}.py"), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run
