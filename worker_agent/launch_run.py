"""One order that the launcher has taken, and reports of it."""

from __future__ import annotations

import asyncio
import math
import uuid
from dataclasses import dataclass, field
from typing import Any

from coordinator.api.v1 import session_pb2, types_pb2
from worker_agent.launch_output import LaunchKey, RunOutput
from worker_agent.process import RunProcess


@dataclass(slots=True)
class Run:
    """One order that was taken: it has a slot, and a process soon."""

    order: session_pb2.LaunchOrder
    key: LaunchKey
    output: RunOutput
    stop: asyncio.Event
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: RunProcess | None = None
    running: session_pb2.LaunchReport | None = None
    """What is reported of it while it runs."""
    cancelled: str = ""
    """Why the leader wants it stopped."""
    abandoned: str = ""
    """Why this agent ended it; then it has no result."""
    is_void: bool = False
    """True when it has no result even if it comes to its own end first."""
    grace_s: float = math.inf
    """What it has to end by itself once it is told to; only ever shortened."""

    @property
    def token(self) -> str:
        return self.key.token

    def end_within(self, grace_s: float) -> None:
        """Tells it to end; a stop that goes on already takes no longer than this either."""
        self.grace_s = min(self.grace_s, grace_s)
        if self.process is not None:
            self.process.hasten(grace_s)
        self.stop.set()


def report_of(
    key: LaunchKey, state: types_pb2.LaunchState.ValueType = types_pb2.LAUNCH_STATE_UNSPECIFIED, **fields: Any
) -> session_pb2.LaunchReport:
    """A report of an attempt."""
    return session_pb2.LaunchReport(
        job_id=key.job_id, scheduled_at_unix_ms=key.scheduled_at_ms, attempt=key.attempt, state=state, **fields
    )
