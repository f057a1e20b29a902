"""The Celery application that the benchmark's beat and worker run; environment variables say how."""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

from celery import Celery
from celery.signals import before_task_publish

JOBS, START = int(os.environ["CRON_BENCH_JOBS"]), os.environ["CRON_BENCH_START"]
SETTLE_S = 2.0

app = Celery("bench", broker=os.environ["CRON_BENCH_BROKER"])
app.conf.update(
    task_ignore_result=True,
    timezone="UTC",
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)
_sink = os.open(os.environ["CRON_BENCH_SINK"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.task(bind=True, name="bench.run")  # type: ignore[untyped-decorator]
def run(self: Any, job: str) -> None:
    """Says that it started."""
    start_ns = time.time_ns()
    os.write(_sink, f"{job} {self.request.headers['sent_ns']} {start_ns}\n".encode())


@before_task_publish.connect  # type: ignore[untyped-decorator]
def _stamp(headers: dict[str, Any], **_: object) -> None:
    """Beat counts a second from here to the next run."""
    headers["headers"] = {"sent_ns": time.time_ns()}


def _entry(number: int, begin: datetime.datetime) -> dict[str, Any]:
    offset_s = number / JOBS if START == "spread" else 0.0
    # A second before the first run.
    last = begin + datetime.timedelta(seconds=offset_s - 1.0)
    return {"task": "bench.run", "schedule": 1.0, "args": (f"job-{number}",), "last_run_at": last}


_begin = app.now() + datetime.timedelta(seconds=SETTLE_S)
app.conf.beat_schedule = {f"job-{number}": _entry(number, _begin) for number in range(JOBS)}
