"""The soak itself: a short run of it passes. What it is for takes longer: `make soak`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_short_soak_passes() -> None:
    arguments = [sys.executable, "-m", "tests.soak", "--duration", "3s"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("workers: memory", "upgrade 1", "worker killed 1", "failures: 0"):
        assert part in done.stdout, done.stdout
