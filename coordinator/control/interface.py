"""What goes into the leader's controllers and what comes out.

A controller is made when this master becomes leader and dropped when it stops being that; it keeps soft state only.
`on_event` and `on_advance` return actions and the time at which the controller wants to be called again; calls that
come early, late or twice are harmless. `now` is monotonic; `wall` is wall time, for schedules and for people only.

    driver (server/leader.py)  -- events -->  LeaderControl  -- actions -->  driver
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from coordinator.api.v1 import command_pb2, session_pb2
from coordinator.machine.state import Change, State
from coordinator.model import CronJobSpec, Launch, Monotonic, WallMs
from coordinator.model.errors import CoordinatorError

# Events


@dataclass(frozen=True, slots=True)
class Applied:
    """A log entry was applied. `state` is the new state; `changes` is what it did."""

    state: State
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A worker's stream is open and its Hello was well formed."""

    session: int
    """Number of the stream, unique under this leader."""
    hello: session_pb2.Hello


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """A worker's stream ended, for whatever reason."""

    session: int
    node_id: str


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    """A heartbeat came in on a session."""

    session: int
    node_id: str
    heartbeat: session_pb2.Heartbeat


@dataclass(frozen=True, slots=True)
class GoodbyeReceived:
    """The worker stops."""

    session: int
    node_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicasReported:
    """A worker says how far it is with shards."""

    session: int
    node_id: str
    reports: tuple[session_pb2.ReplicaReport, ...]


@dataclass(frozen=True, slots=True)
class FiguresReported:
    """A worker says how much is in the shards that it is primary of."""

    session: int
    node_id: str
    figures: tuple[session_pb2.ShardFigure, ...]


@dataclass(frozen=True, slots=True)
class LaunchReported:
    """A worker says what became of a launch."""

    session: int
    node_id: str
    report: session_pb2.LaunchReport


@dataclass(frozen=True, slots=True)
class DiscoveryReported:
    """Workers that the discovery backend holds for healthy; None when the backend has no opinion or cannot be asked."""

    healthy: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class ProposalEnded:
    """A proposed command was applied (with its result), or failed."""

    token: int
    result: command_pb2.CommandResult | None
    error: CoordinatorError | None


Event = (
    Applied
    | SessionOpened
    | SessionClosed
    | HeartbeatReceived
    | GoodbyeReceived
    | ReplicasReported
    | FiguresReported
    | LaunchReported
    | DiscoveryReported
    | ProposalEnded
)

# Actions


@dataclass(frozen=True, slots=True)
class Propose:
    """Propose a command; its end comes back as ProposalEnded with the same token."""

    token: int
    """Made by `Tokens.next()`: unique under this leader, so each controller knows its own."""
    command: command_pb2.Command


@dataclass(frozen=True, slots=True)
class SendToNode:
    """Send a message on a worker's session; dropped silently when that session has ended."""

    session: int
    message: session_pb2.OpenResponse


@dataclass(frozen=True, slots=True)
class SendAssignment:
    """Send the worker its assignment as of the current state; the driver builds it (control/assignment.py)."""

    session: int
    node_id: str


@dataclass(frozen=True, slots=True)
class SendLaunch:
    """Order a worker to run a committed launch; dropped when it has no session, the launch stays committed."""

    node_id: str
    launch: Launch
    spec: CronJobSpec


@dataclass(frozen=True, slots=True)
class StopLaunch:
    """Tell a worker to stop an attempt, or never to start it; dropped when it has no session."""

    node_id: str
    job_id: str
    scheduled_at_ms: WallMs
    attempt: int
    reason: str
    """For people."""


@dataclass(frozen=True, slots=True)
class CloseSession:
    """Send a Farewell and end the stream."""

    session: int
    reason: str
    final: bool = False


Action = Propose | SendToNode | SendAssignment | SendLaunch | StopLaunch | CloseSession


@dataclass(frozen=True, slots=True)
class Step:
    """What a controller wants: actions now, and to be called again at `next_wake` at the latest."""

    actions: tuple[Action, ...] = ()
    next_wake: Monotonic | None = None


class Controller(Protocol):
    """One decision-maker of the leader."""

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        ...

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        ...


class Tokens:
    """Numbers for proposals, shared by the controllers of one leader."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        """A number that was not given before."""
        self._last += 1
        return self._last
