"""Celery as a peer: beat, a worker with two processes, and a Redis between them, all with their own settings.

Beat knows no absolute times for jobs of every second: a run is due one second after beat sent the one before. So its
lateness does not add up, but it makes fewer runs than there are seconds, and `missed` says how many.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.bench_lib.cron_runs import Run, parse_relative
from tools.bench_lib.redis_cluster import REDIS, RedisProcess
from tools.lib import debian_package
from tools.lib.daemons import Daemon
from tools.lib.local_cluster import wait_until
from tools.lib.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
APP = "tools.bench_lib.cron_celery_app"
READY_TIMEOUT_S = 60.0


class _Celery(Daemon):
    """One of Celery's programs; Daemon's methods start and end it."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        super().__init__("celery", name, log, log)
        self._arguments = arguments
        self._environment = environment

    @property
    def command(self) -> list[str]:
        variables = [f"{name}={value}" for name, value in self._environment.items()]
        # `env` gives way to the program, so signals reach that.
        return ["env", *variables, sys.executable, "-m", "celery", "-A", APP, *self._arguments]


class CelerySystem:
    """Broker, worker and beat in a directory. Raises PackageError when Redis cannot be had."""

    def __init__(self, directory: Path, start: str, jobs: int) -> None:
        program = debian_package.install(REDIS)
        (port,) = free_ports(1)
        directory.mkdir(parents=True, exist_ok=True)
        self._sink = directory / "sink"
        environment = {
            "PYTHONPATH": str(ROOT),
            "CRON_BENCH_BROKER": f"redis://127.0.0.1:{port}/0",
            "CRON_BENCH_JOBS": str(jobs),
            "CRON_BENCH_START": start,
            "CRON_BENCH_SINK": str(self._sink),
        }
        worker = ["worker", "--concurrency", "2", "--loglevel", "WARNING"]
        beat = ["beat", "--schedule", str(directory / "beat"), "--pidfile=", "--loglevel", "WARNING"]
        self._broker = RedisProcess(program, port, directory / "redis", {})
        self._worker = _Celery("worker", worker, environment, directory / "worker.log")
        self._beat = _Celery("beat", beat, environment, directory / "beat.log")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Everything runs, and the first jobs have."""
        try:
            for process in (self._broker, self._worker, self._beat):
                process.start()
            wait_until(lambda: self._lives() and len(self.runs()) > 0, READY_TIMEOUT_S, "Celery runs its jobs")
            yield
        finally:
            # The worker's processes end with it only when it is asked to.
            for process in (self._beat, self._worker, self._broker):
                process.stop()

    def _lives(self) -> bool:
        for process in (self._broker, self._worker, self._beat):
            if process.process_id is None:
                raise RuntimeError(f"{process.id} of Celery ended: {process.last_words()}")
        return True

    def runs(self) -> list[Run]:
        """What ran until now."""
        if not os.path.exists(self._sink):
            return []
        return parse_relative(self._sink.read_text())
