"""Every check and test, with the command that continuous integration uses.

The checks come first and do not stop each other; pytest comes last, so that its closing line is the last line. It runs
three times, each with as many processes as there are cores (pytest-xdist): what computes, test by test; then what
starts daemons of its own and mostly waits for them, file by file, since the tests of a file may share a cluster, or the
ports of the quickstart; and behind both of them, from the start, the simulations. They know no time but their own, so
they take what the others leave of the processor, which is half of it, and are shown when the others are through.
Arguments that are not known here go to one plain pytest: `tools/test -k planner`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
SERVERS_REQUIRED = "COORDINATOR_TESTS_REQUIRE_SERVERS"
"""Set for the tests: one whose server cannot be had then fails, instead of being left out."""


@dataclass(frozen=True, slots=True)
class Step:
    """One check."""

    name: str
    command: tuple[str, ...]


COMPUTING = ("tests/unit", "tests/property")
"""Folders of tests that wait for hardly anything but the processor."""
SIMULATIONS = "tests/sim"
"""The folder of tests in virtual time: however late they get the processor, they see the same."""
NICE = 19
"""As nice as can be."""
SIMULATION_S_MAX = 900
"""For one of them, however little the others leave of the processor."""

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
    if environment.pop("PYTHONDONTWRITEBYTECODE", ""):
        # Nothing in the checkout then; but each of some hundred daemons would compile for a quarter of its start.
        environment["PYTHONPYCACHEPREFIX"] = str(Path(sys.prefix) / "bytecode")
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
    status = run_pytest(rest, environment) if rest else run_all_tests(environment)
    return status or (1 if failed else 0)


def run_pytest(arguments: Sequence[str], environment: dict[str, str]) -> int:
    """One pytest in the foreground; its exit status."""
    return subprocess.run(_pytest(arguments), cwd=ROOT, env=environment, check=False).returncode


def run_all_tests(environment: dict[str, str]) -> int:
    """Every test but the campaigns; 0 when all passed."""
    with tempfile.TemporaryFile() as output, behind(_pytest(simulations()), environment, output) as simulating:
        status = run_pytest(computing(), environment)
        status = run_pytest(waiting(), environment) or status
        _set_nice_of_session(simulating.pid, 0)  # Now it is what is waited for.
        status = simulating.wait() or status
        heading("the simulations, which ran behind these tests")
        output.seek(0)
        shutil.copyfileobj(output, sys.stdout.buffer)
        sys.stdout.flush()
    return status


@contextmanager
def behind(command: Sequence[str], environment: dict[str, str], output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes the processor only where nobody else wants it; ended with the block."""
    is_posix = os.name == "posix"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=is_posix,
        preexec_fn=_stand_back if is_posix else None,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            if is_posix:
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.terminate()
            process.wait()


def _stand_back() -> None:
    """Puts this process and those that it starts behind all others."""
    os.nice(NICE)
    _set_nice_of_session("self", NICE)


def _set_nice_of_session(process: int | str, nice: int) -> None:
    """Linux may share the processor among sessions first, and look at how nice the processes are in each only then."""
    with suppress(OSError):
        Path(f"/proc/{process}/autogroup").write_text(str(nice))


def simulations() -> list[str]:
    """pytest's arguments for what knows virtual time only."""
    return [SIMULATIONS, f"--timeout={SIMULATION_S_MAX}", *_shared_by("worksteal")]


def computing() -> list[str]:
    """pytest's arguments for the rest of what computes."""
    return [*COMPUTING, *_shared_by("worksteal")]


def waiting() -> list[str]:
    """pytest's arguments for everything else."""
    return ["tests", *(f"--ignore={folder}" for folder in (*COMPUTING, SIMULATIONS)), *_shared_by("loadfile")]


def _shared_by(distribution: str) -> list[str]:
    return ["--numprocesses", str(os.cpu_count() or 1), "--dist", distribution]


def _pytest(arguments: Sequence[str]) -> list[str]:
    # Campaigns (long random runs) have a command of their own.
    selection = [] if "-m" in arguments else ["-m", "not campaign"]
    return [sys.executable, "-m", "pytest", *selection, *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
