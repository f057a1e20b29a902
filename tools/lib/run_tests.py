"""Every check and test, with the command that continuous integration uses.

The checks come first and do not stop each other; pytest comes last, so that its closing line is the last line. It runs
twice, each time with as many processes as there are cores (pytest-xdist): first what computes, test by test; then what
starts daemons of its own and mostly waits for them, file by file, since the tests of a file may share a cluster, or the
ports of the quickstart. Arguments that are not known here go to one plain pytest: `tools/test -k planner`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVERS_REQUIRED = "COORDINATOR_TESTS_REQUIRE_SERVERS"
"""Set for the tests: one whose server cannot be had then fails, instead of being left out."""


@dataclass(frozen=True, slots=True)
class Step:
    """One check."""

    name: str
    command: tuple[str, ...]


TOGETHER = ("tests/unit", "tests/property", "tests/sim")
"""Folders of tests that wait for nothing but the processor."""

CHECKS = (
    Step("ruff", (sys.executable, "-m", "ruff", "check", ".")),
    Step("mypy --strict", (sys.executable, "-m", "mypy")),
    Step("generated code", (sys.executable, "-m", "tools.lib.generate", "--check")),
    Step("sizes", (sys.executable, "-m", "tools.lib.tidy")),
)


def heading(text: str) -> None:
    """A line that can be found in a long log."""
    print(f"\n== {text} {'=' * max(4, 96 - len(text))}", flush=True)


def run(step: Step, environment: dict[str, str]) -> bool:
    """Runs one step; True when it passed."""
    heading(step.name)
    begun_s = time.monotonic()
    passed = subprocess.run(step.command, cwd=ROOT, env=environment, check=False).returncode == 0
    print(f"-- {step.name}: {'passed' if passed else 'FAILED'} in {time.monotonic() - begun_s:.1f} s", flush=True)
    return passed


def install_servers(environment: dict[str, str]) -> bool:
    """Installs the servers that the integration tests talk to; True when they are there."""
    installer = ROOT / "tools" / "install-consul"
    return run(Step("servers for the tests: Consul", (str(installer),)), environment) if installer.exists() else True


def main(arguments: list[str]) -> int:
    """Entry of `tools/test`: 0 when every check and every test passed."""
    parser = argparse.ArgumentParser(
        prog="tools/test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checks", action="store_true", help="only the checks: ruff, mypy, generated code, sizes")
    which.add_argument("--tests", action="store_true", help="only the tests")
    options, rest = parser.parse_known_args(arguments)
    # The environment's own programs first: the tests start `coordinator`, `worker-agent` and `clusterctl` by name.
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": programs + os.pathsep + os.environ.get("PATH", ""),
        SERVERS_REQUIRED: "1",
    }
    failed = []
    if not options.tests:
        failed = [step.name for step in CHECKS if not run(step, environment)]
    if options.checks:
        return 1 if failed else 0
    if not install_servers(environment):
        failed.append("servers for the tests")
    if failed:
        heading(f"FAILED so far: {', '.join(failed)}; the tests run all the same")
    heading("tests")
    status = 0
    for arguments_of_pytest in (rest,) if rest else (computing(), waiting()):
        # Campaigns (long random runs) have a command of their own.
        selection = [] if "-m" in rest else ["-m", "not campaign"]
        command = [sys.executable, "-m", "pytest", *selection, *arguments_of_pytest]
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode or status
    return status or (1 if failed else 0)


def computing() -> list[str]:
    """pytest's arguments for what computes."""
    return [*TOGETHER, *_shared_by("worksteal")]


def waiting() -> list[str]:
    """pytest's arguments for everything else."""
    return ["tests", *(f"--ignore={folder}" for folder in TOGETHER), *_shared_by("loadfile")]


def _shared_by(distribution: str) -> list[str]:
    return ["--numprocesses", str(os.cpu_count() or 1), "--dist", distribution]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
