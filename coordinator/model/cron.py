"""Cron jobs and their launches."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from coordinator.model.clock import NEVER_MS, WallMs
from coordinator.model.keys import key_hash


class OverlapPolicy(enum.Enum):
    """What to do when the previous run still goes on; the value is the number in types.proto."""

    SKIP = 1
    ALLOW = 2
    QUEUE = 3
    CANCEL_PREVIOUS = 4


class CatchUpPolicy(enum.Enum):
    """What to do with scheduled times that passed while nobody could launch; numbers as in types.proto."""

    NONE = 1
    LATEST = 2
    ALL = 3


class RetryPolicy(enum.Enum):
    """When a launch may be tried again; the value is the number in types.proto."""

    NEVER = 1
    ON_LOST = 2
    ON_FAILURE = 3


class LaunchState(enum.Enum):
    """How a launch stands; the value is the number in types.proto."""

    COMMITTED = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    TIMED_OUT = 5
    LOST = 6
    MISSED = 7
    SKIPPED = 8
    WAITING = 9
    CANCELLED = 10

    @property
    def has_ended(self) -> bool:
        """True when nothing more will happen."""
        return self not in _OPEN


_OPEN = (LaunchState.WAITING, LaunchState.COMMITTED, LaunchState.RUNNING)
"""Made once: this is asked of every launch at every look."""


class LaunchTrigger(enum.Enum):
    """What asked for a launch; the value is the number in types.proto."""

    SCHEDULE = 1
    MANUAL = 2


@dataclass(frozen=True, slots=True)
class CronJobSpec:
    """What a job is and when it runs; written by people. Fields and units as in `CronJobSpec` of types.proto."""

    id: str
    schedule: str
    time_zone: str = "UTC"
    priority_class: int = 5
    command: tuple[str, ...] = ()
    python: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 300.0
    working_directory: str = ""
    user: str = ""
    memory_bytes_max: int = 0
    processor_s_max: float = 0.0
    open_files_max: int = 0
    required_labels: tuple[tuple[str, str], ...] = ()
    jitter_s: float = 0.0
    overlap: OverlapPolicy = OverlapPolicy.SKIP
    overlap_limit: int = 10
    catch_up: CatchUpPolicy = CatchUpPolicy.LATEST
    catch_up_window_s: float = 3600.0
    catch_up_limit: int = 10
    start_deadline_s: float = 60.0
    retry: RetryPolicy = RetryPolicy.ON_LOST
    attempts_max: int = 3
    retry_backoff_s: float = 1.0
    retry_backoff_s_max: float = 300.0
    description: str = ""

    @property
    def jitter_ms(self) -> int:
        """How long after each scheduled time the job starts: always the same, below `jitter_s`, from the job's id."""
        below_ms = round(self.jitter_s * 1_000)
        return key_hash(self.id) % below_ms if below_ms > 0 else 0


@dataclass(frozen=True, slots=True)
class PassedTimes:
    """A stretch of time in which nothing is launched by a schedule. Fields as in `PassedTimes` of types.proto."""

    until_ms: WallMs
    schedule: str
    time_zone: str
    reason: str


@dataclass(frozen=True, slots=True)
class CronJob:
    """A job with what the cluster decided about it. Fields as in `CronJob` of types.proto."""

    spec: CronJobSpec
    owner: str = ""
    backups: tuple[str, ...] = ()
    paused: bool = False
    source: str = "api"
    decided_until_ms: WallMs = NEVER_MS
    created_ms: WallMs = NEVER_MS
    updated_ms: WallMs = NEVER_MS
    generation: int = 0
    passed: tuple[PassedTimes, ...] = ()
    """Invariant: the ends ascend, and are later than `decided_until_ms`."""

    @property
    def id(self) -> str:
        """The job's name."""
        return self.spec.id

    @property
    def closed_until_ms(self) -> WallMs:
        """Nothing that is scheduled up to here is launched any more: it is decided, or has passed."""
        return self.passed[-1].until_ms if self.passed else self.decided_until_ms


@dataclass(frozen=True, slots=True)
class LaunchAttempt:
    """An attempt that was followed by another one. Fields as in `LaunchAttempt` of types.proto."""

    attempt: int
    worker: str
    state: LaunchState
    reason: str = ""
    started_ms: WallMs = NEVER_MS
    finished_ms: WallMs = NEVER_MS
    exit_status: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """One run of one job at one scheduled time, or why there was none. Fields as in `Launch` of types.proto."""

    job_id: str
    scheduled_at_ms: WallMs
    attempt: int = 1
    worker: str = ""
    state: LaunchState = LaunchState.COMMITTED
    trigger: LaunchTrigger = LaunchTrigger.SCHEDULE
    reason: str = ""
    committed_ms: WallMs = NEVER_MS
    started_ms: WallMs = NEVER_MS
    finished_ms: WallMs = NEVER_MS
    exit_status: int = 0
    output: bytes = b""
    cause: str = ""
    due_ms: WallMs = NEVER_MS
    not_before_ms: WallMs = NEVER_MS
    cancel_reason: str = ""
    earlier_attempts: tuple[LaunchAttempt, ...] = ()

    @property
    def key(self) -> tuple[str, WallMs]:
        """The identity of the launch."""
        return (self.job_id, self.scheduled_at_ms)

    @property
    def attempts_counted(self) -> int:
        """How many attempts it made, this one included: not those that a worker declined, which never started."""
        # A launch between two attempts has no worker, and so has one that ended there: its number is a declined one's.
        return len(self.earlier_attempts) + (self.attempt > 0 and self.worker != "")

    @property
    def lateness_ms(self) -> int | None:
        """How long after it was due its first process started; None while none has. Below 0 when clocks differ."""
        times = [attempt.started_ms for attempt in self.earlier_attempts] + [self.started_ms]
        started_ms = next((time_ms for time_ms in times if time_ms), None)
        return None if started_ms is None else started_ms - (self.due_ms or self.scheduled_at_ms)
