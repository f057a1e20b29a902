"""What goes into the worker's session machine and what comes out. See session.py for what it makes of it.

driver (driver.py)  -- events -->  WorkerSession  -- actions -->  driver
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from coordinator.api.v1 import session_pb2
from coordinator.model import Monotonic


class Phase(enum.Enum):
    """What the session waits for; see the table above."""

    WAITING = "waiting"
    LOOKING = "looking"
    DIALING = "dialing"
    GREETING = "greeting"
    OPEN = "open"
    LEAVING = "leaving"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class SessionTimes:
    """Durations, in seconds, that the worker chooses for itself; what the cluster agrees on is in the Welcome."""

    look_s: float = 1.0
    """Longest wait for discovery before the last known masters are used."""
    connect_s: float = 0.75
    """Longest wait for a connection: half of `suspect_s`, so that one frozen master does not cost a role."""
    welcome_s: float = 2.0
    """Longest wait for a Welcome; the leader may commit the registration first."""
    farewell_s: float = 2.0
    """Longest wait for the Farewell after a Goodbye."""
    pause_s_min: float = 0.05
    pause_s_max: float = 1.0
    unanswered_max: int = 3
    """Heartbeats without a grant after which the leader counts as silent. Counted, not timed, so that a worker
    that was paused reads what came in meanwhile before it gives its leader up."""
    repeat_s: float = 5.0
    """How often launch reports without a receipt are sent again."""


# Events


@dataclass(frozen=True, slots=True)
class MastersFound:
    """Discovery's answer: host:port of each master's gRPC server, the leader first where known."""

    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The connection of a stream is up. `launches` are the reports without a receipt, for the Hello."""

    stream: int
    launches: tuple[session_pb2.LaunchReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Received:
    """A message came in on a stream."""

    stream: int
    response: session_pb2.OpenResponse


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """A stream could not be opened, broke, or was closed by the master. `code` is the name of its gRPC status."""

    stream: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class AssignmentApplied:
    """An accepted assignment is on disk and in force."""

    generation: int


@dataclass(frozen=True, slots=True)
class ReportsReady:
    """Reports to send, in order, if a session is open; otherwise the next Welcome asks for them again."""

    replicas: tuple[session_pb2.ReplicaReport, ...] = ()
    launches: tuple[session_pb2.LaunchReport, ...] = ()
    figures: session_pb2.ShardFigures | None = None

    def requests(self) -> Iterator[session_pb2.OpenRequest]:
        """The messages that say so."""
        if self.replicas:
            yield session_pb2.OpenRequest(replica_reports=session_pb2.ReplicaReports(reports=self.replicas))
        for launch in self.launches:
            yield session_pb2.OpenRequest(launch_report=launch)
        if self.figures is not None:
            yield session_pb2.OpenRequest(shard_figures=self.figures)


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The worker stops; `reason` is one sentence for people."""

    reason: str


Event = MastersFound | StreamOpened | Received | StreamEnded | AssignmentApplied | ReportsReady | StopRequested

# Actions


@dataclass(frozen=True, slots=True)
class FindMasters:
    """Ask discovery; answer with MastersFound."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a stream to a master; answer with StreamOpened or StreamEnded."""

    stream: int
    address: str


@dataclass(frozen=True, slots=True)
class HangUp:
    """End a stream; nothing more of it is wanted."""

    stream: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message on a stream."""

    stream: int
    request: session_pb2.OpenRequest


@dataclass(frozen=True, slots=True)
class SendHeartbeat:
    """Add the latest metrics and the launches that are known, and send it on the stream, now: the lease counts from
    this moment."""

    stream: int
    heartbeat: session_pb2.Heartbeat


@dataclass(frozen=True, slots=True)
class GatherReports:
    """Answer with ReportsReady: every launch report without a receipt and, when `everything`, every replica report."""

    everything: bool


@dataclass(frozen=True, slots=True)
class Apply:
    """Put an assignment in force; answer with AssignmentApplied."""

    assignment: session_pb2.Assignment
    cluster_id: str


@dataclass(frozen=True, slots=True)
class Launch:
    """Run a committed launch."""

    order: session_pb2.LaunchOrder


@dataclass(frozen=True, slots=True)
class StopLaunch:
    """End a launch, or see to it that it never starts, and report what became of it."""

    stop: session_pb2.LaunchStop


@dataclass(frozen=True, slots=True)
class EndRuns:
    """The worker acts under no lease any more: end every run, without a result; start nothing that was ordered."""

    reason: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """A launch report need not be sent again."""

    receipt: session_pb2.LaunchReportReceipt


@dataclass(frozen=True, slots=True)
class End:
    """The session is over for good: end the process with this exit status and say why."""

    exit_status: int
    reason: str


Action = (
    FindMasters
    | Dial
    | HangUp
    | Send
    | SendHeartbeat
    | GatherReports
    | Apply
    | Launch
    | StopLaunch
    | EndRuns
    | Receipt
    | End
)


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now, and when to call `on_advance` at the latest (None: only after another event)."""

    actions: tuple[Action, ...] = ()
    next_wake: Monotonic | None = None
