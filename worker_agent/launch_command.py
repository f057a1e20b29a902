"""What a launch executes: its program and arguments, its environment, and what its end means.

Pure but for `os.environ`, which runs inherit.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TypeAlias

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.control.schedule import format_wall
from coordinator.model import WallMs
from worker_agent import run_limited
from worker_agent.launch_output import LaunchKey
from worker_agent.run_limited import NOT_STARTED_STATUS

IS_POSIX = os.name == "posix"
SECRET_VARIABLES = ("CONSUL_HTTP_TOKEN",)
"""The agent's own secrets; runs do not inherit them."""
USER_VARIABLES = ("HOME", "USER", "LOGNAME", "SHELL", "MAIL")
"""Those of the agent's own user; runs of other users get their own."""


Named: TypeAlias = (
    types_pb2.Launch | session_pb2.LaunchReport | session_pb2.LaunchReportReceipt | session_pb2.LaunchToken
)
"""The messages that name an attempt of a launch."""


def key_of(launch: Named) -> LaunchKey:
    """The fencing token."""
    return LaunchKey(launch.job_id, launch.scheduled_at_unix_ms, launch.attempt)


def token_of(launch: Named) -> str:
    """The fencing token as runs are told it: job/scheduled_at_ms/attempt."""
    return key_of(launch).token


def arguments_of(spec: types_pb2.CronJobSpec) -> list[str]:
    """The program and its arguments, through run_limited.py where the job asks for what that sets."""
    program = [sys.executable, "-m", "worker_agent.run_python", spec.python] if spec.python else list(spec.command)
    options = _options(spec)
    if not options:
        return program
    # -I and -S: neither the job's environment nor the site's packages decide what runs before the limits are set.
    return [sys.executable, "-I", "-S", str(Path(run_limited.__file__)), *options, "--", *program]


def refusal_of(spec: types_pb2.CronJobSpec) -> str:
    """Why a job cannot run on this system at all; empty when it can."""
    if IS_POSIX or not _options(spec):
        return ""
    return (
        "working_directory, user, memory_bytes_max, processor_s_max and open_files_max need a POSIX system, and this"
        f" worker runs on {sys.platform}; leave them out, or keep the job away with required_labels"
    )


def _options(spec: types_pb2.CronJobSpec) -> list[str]:
    wanted = {
        "--memory": str(spec.memory_bytes_max or ""),
        "--processor": f"{spec.processor_s_max:g}" if spec.processor_s_max else "",
        "--files": str(spec.open_files_max or ""),
        "--user": spec.user,
        "--directory": spec.working_directory,
    }
    return [part for name, value in wanted.items() if value for part in (name, value)]


def environment_of(order: session_pb2.LaunchOrder, worker_id: str) -> dict[str, str]:
    """The environment of a run: the agent's own, the job's, and which launch it is."""
    launch, spec = order.launch, order.spec
    left_out = (*SECRET_VARIABLES, *USER_VARIABLES) if spec.user else SECRET_VARIABLES
    environment = dict(os.environ)
    for name in left_out:
        environment.pop(name, None)
    environment["PYTHONUNBUFFERED"] = "1"  # Else a run that is killed takes its last lines with it.
    environment.update(spec.environment)
    environment.update(
        LAUNCH_JOB=launch.job_id,
        LAUNCH_SCHEDULED_AT=format_wall(WallMs(launch.scheduled_at_unix_ms)),
        LAUNCH_ATTEMPT=str(launch.attempt),
        LAUNCH_TOKEN=token_of(launch),
        LAUNCH_WORKER=worker_id,
    )
    return environment


def failure_of(status: int, spec: types_pb2.CronJobSpec, output: bytes) -> str:
    """Why a run with this exit status failed; empty when it did not."""
    if status == 0:
        return ""
    if status == NOT_STARTED_STATUS and _options(spec) and output.startswith(run_limited.FAULT.encode()):
        return output.partition(b"\n")[0].decode("utf-8", errors="replace")
    if status > 0:
        return f"exit status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"
