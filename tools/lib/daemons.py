"""Processes of the daemons on this machine: started, stopped, killed, and their logs read."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

STOP_TIMEOUT_S = 15.0
"""How long a daemon may take to stop cleanly before it is killed: runs that it waits for take 5 s at most."""


class DaemonError(Exception):
    """A daemon cannot be started; one line for people."""


def program(name: str) -> Path:
    """The path of one of the package's programs, beside the Python that runs this. Raises DaemonError."""
    path = Path(sys.executable).with_name(name + (".exe" if os.name == "nt" else ""))
    if not path.exists():
        raise DaemonError(f"{path} is missing; this Python does not have the package installed")
    return path


class Daemon:
    """One daemon: `coordinator` or `worker-agent` with an id."""

    def __init__(self, program_name: str, daemon_id: str, config: Path, log: Path) -> None:
        self.id = daemon_id
        self.config = config
        self.log = log
        self.arguments: tuple[str, ...] = ()
        """Further arguments for the next start."""
        self._program_name = program_name
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def master(cls, daemon_id: str, directory: Path) -> Daemon:
        """A master of a quickstart's directory."""
        return cls("coordinator", daemon_id, directory / "cluster.toml", directory / "logs" / f"{daemon_id}.log")

    @classmethod
    def worker(cls, daemon_id: str, directory: Path) -> Daemon:
        """A worker of a quickstart's directory."""
        return cls("worker-agent", daemon_id, directory / "cluster.toml", directory / "logs" / f"{daemon_id}.log")

    @property
    def command(self) -> list[str]:
        """What is run."""
        return [str(program(self._program_name)), "--config", str(self.config), "--id", self.id, *self.arguments]

    @property
    def process_id(self) -> int | None:
        """The process while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def exit_status(self) -> int | None:
        """How the latest process ended; None while it runs, or before the first."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Starts it, unless it runs. It has a process group of its own: a Ctrl-C at the terminal is not for it."""
        if self.process_id is not None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )

    def ask_to_stop(self) -> None:
        """Sends the signal that stops it cleanly."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Waits for the end; kills it when it takes too long. True when it ended by itself."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout_s)
            return True
        except subprocess.TimeoutExpired:
            self.kill()
            return False

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Stops it cleanly; True when it ended in time by itself."""
        self.ask_to_stop()
        return self.wait(timeout_s)

    def kill(self) -> None:
        """Ends it at once (kill -9)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        """The last line of its log; empty when it said nothing."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""


def running_with(config: Path) -> Iterator[tuple[int, str]]:
    """Daemons on this machine that were started with this configuration: process and id of each."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            # A script shows as its interpreter, its path, and its arguments; other tools name the same file and id.
            programs = {Path(argument).name.removesuffix(".exe") for argument in arguments[:2]}
            is_ours = programs & {"coordinator", "worker-agent"} and str(config) in arguments
            if is_ours and "--id" in arguments[:-1] and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid, arguments[arguments.index("--id") + 1]
