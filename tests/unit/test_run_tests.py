"""What tools/test has run behind the rest: it yields to everything else, and does not outlive its block."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tools.lib.run_tests import NICE, behind

SAYS = "import os; print(os.nice(0), os.getsid(0), flush=True)"
STAYS = "; import time; time.sleep(600)"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="only POSIX knows how to be nice")


@contextmanager
def python_behind(code: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A Python behind the rest, and the first line that it says; it starts as fast as a Python can."""
    reading, writing = os.pipe()
    with open(reading, "rb") as said, open(writing, "wb") as output:
        with behind([sys.executable, "-I", "-S", "-c", code], dict(os.environ), output) as process:
            yield process, said.readline().decode()


def test_it_yields_to_everything_else() -> None:
    """It is as nice as can be, and in a session of its own, which may be so too."""
    with python_behind(SAYS) as (process, said):
        assert said.split() == [str(NICE), str(process.pid)]
        assert process.wait() == 0


def test_it_ends_with_its_block() -> None:
    """Whoever interrupts the tests in front leaves nothing behind that goes on."""

    def interrupted() -> None:
        with python_behind(SAYS + STAYS) as (process, _):
            started.append(process)
            raise KeyboardInterrupt

    started: list[subprocess.Popen[bytes]] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0].poll() is not None


def test_its_output_is_kept() -> None:
    """What it says is in the file, for those who read it in the end."""
    with tempfile.TemporaryFile() as output:
        with behind([sys.executable, "-I", "-S", "-c", SAYS], dict(os.environ), output) as process:
            assert process.wait() == 0
        output.seek(0)
        assert output.read().startswith(f"{NICE} ".encode())
