"""The clock that leases are counted on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SLEPT_S = 1_000
CODE = """
import sys, time
from coordinator.model import SystemClock
from coordinator.raft.engine import now_s
sys.stdout.write(f"{now_s() - time.monotonic()} {SystemClock().monotonic() - time.monotonic()}")
"""


def test_leases_count_the_time_that_the_machine_slept() -> None:
    """In a time namespace of a machine that slept for 1,000 s, consensus and daemons read a clock that has them."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        pytest.skip("needs Linux with `unshare`")
    asleep = ["unshare", "--time", "--boottime", str(SLEPT_S), "--fork"]
    if subprocess.run([*asleep, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("may not make a time namespace")
    ran = subprocess.run(
        [*asleep, sys.executable, "-c", CODE],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert [float(found) for found in ran.stdout.split()] == pytest.approx([SLEPT_S, SLEPT_S], abs=10)
