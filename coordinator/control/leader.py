"""All controllers of one leader as one machine.

Order rules
- A session speaks to the other controllers only once it is welcomed, so nothing is sent to a worker before its Welcome;
  and only while it is the worker's current one, so a session that was replaced cannot speak for the new process.
- Within a step, what membership wants comes first, assignments come before launch orders and stops.
- A worker is sent its assignment after the Welcome and whenever it has become another one. Changes that come close
  together are sent as one: the first at once, the next after a pause that grows with what the worker holds, since an
  assignment is always whole.

Heartbeats are by far the most frequent events; only membership is shown them, and the cron controller those of current
sessions, for the launches that they name.
"""

from __future__ import annotations

import random

from coordinator.api.v1 import session_pb2
from coordinator.config import ClusterConfig
from coordinator.control.assignment import AssignmentIndex, build_assignment
from coordinator.control.balance import BalanceControl
from coordinator.control.contacts import NodeLive
from coordinator.control.cron import CronControl
from coordinator.control.figures import CopyProgress, DamagedCopy, Figures
from coordinator.control.founding import Founding
from coordinator.control.interface import (
    Action,
    Applied,
    Controller,
    Event,
    FiguresReported,
    GoodbyeReceived,
    HeartbeatReceived,
    LaunchReported,
    ReplicasReported,
    SendAssignment,
    SendLaunch,
    SessionClosed,
    SessionOpened,
    Step,
    StopLaunch,
    Tokens,
)
from coordinator.control.membership import Membership
from coordinator.control.moves import MoveControl
from coordinator.control.relief import ReliefControl
from coordinator.control.replicas import LostCopy, ReplicaControl
from coordinator.control.reports import LossWishes, Reports
from coordinator.control.reshape import ReshapeControl
from coordinator.control.stalls import Stalls
from coordinator.control.timers import earliest
from coordinator.machine.state import State
from coordinator.model import Monotonic, Move, Shard, WallMs
from coordinator.placement.plan import Plan

BYTES_PER_HEIR = 256
"""A wish for a new primary takes at most 75 bytes; so all of them together take a third of the largest command."""
PAUSE_S_MIN = 0.005
PAUSE_S_PER_SHARD = 0.000_05
"""An assignment costs some ten microseconds per shard to build and to send; so a fifth of the leader's time at most."""


class LeaderControl:
    """Every decision of one leader; made when it begins, from a state that shows all that was ever acknowledged."""

    def __init__(
        self,
        state: State,
        config: ClusterConfig,
        tokens: Tokens,
        now: Monotonic,
        wall: WallMs,
        rng: random.Random,
        *,
        leader_id: str = "",
        term: int = 0,
    ) -> None:
        self._state = state
        self._now = now
        self._index = AssignmentIndex(state)
        self._reports = Reports()
        self._figures = Figures()
        self._membership = Membership(
            state,
            config.session,
            tokens,
            now,
            index=self._index,
            losses=LossWishes(self._reports, config.moves, config.raft.command_bytes_max // BYTES_PER_HEIR),
            needs_discovery=config.discovery.backend == "consul",
            leader_id=leader_id,
            term=term,
        )
        self._founding = Founding(state, config, tokens, rng)
        relief = ReliefControl(state, config.placement, self._figures, self._membership.metrics, tokens, now)
        stalls = Stalls()
        self._balance = BalanceControl(state, config.placement, tokens, now, crowded=relief.crowded, stalls=stalls)
        self._replicas = ReplicaControl(state, self._reports, tokens, now, config.raft.command_bytes_max)
        self._cron = CronControl(state, config.cron, tokens, now, wall)
        self._others: tuple[Controller, ...] = (
            self._founding,
            self._replicas,
            MoveControl(state, config.moves, self._reports, tokens, now, stalls),
            self._balance,
            ReshapeControl(state, config.placement, self._figures, tokens),
            relief,
            self._cron,
        )
        self._wakes: list[Monotonic | None] = [now] * (1 + len(self._others))
        """When membership and each of the others wants to be called."""
        self._unsent: set[str] = set()
        """Workers whose assignment changed since it was sent."""
        self._sent_at: dict[str, Monotonic] = {}

    # What the API and the driver ask

    def live(self, node_id: str, now: Monotonic | None = None) -> NodeLive | None:
        """What is seen of the worker; None when it never said Hello under this leader."""
        return self._membership.live(node_id, self._now if now is None else now)

    def sessions(self, now: Monotonic | None = None) -> dict[str, NodeLive]:
        """What is seen of every worker that said Hello under this leader, by id."""
        return self._membership.sessions(self._now if now is None else now)

    def metrics(self, node_id: str) -> session_pb2.NodeMetrics | None:
        """The worker's latest figures; None before its first heartbeat under this leader."""
        return self._membership.metrics(node_id)

    def plan(self) -> Plan | None:
        """The latest plan with its refusals; None before the first one."""
        return self._balance.plan()

    def problems(self) -> tuple[str, ...]:
        """What of the configuration could not be applied, one sentence each."""
        return self._founding.problems

    def figure(self, shard: Shard) -> session_pb2.ShardFigure | None:
        """How much is in a shard; None while its primary has not said so."""
        return self._figures.of(shard)

    def progress(self, move: Move) -> CopyProgress | None:
        """How far the copy of a move is; None where nothing is copied, or nothing is known."""
        return self._figures.progress(self._state, move)

    def lost_copies(self) -> tuple[LostCopy, ...]:
        """Shards whose last replica says that its data is lost."""
        return self._replicas.lost_copies()

    def damaged_copies(self) -> tuple[DamagedCopy, ...]:
        """Shards whose last replica serves what is sound of its data."""
        return self._figures.damaged(self._state)

    def assignment(self, node_id: str) -> session_pb2.Assignment:
        """The worker's assignment as of the last entry taken in; without a scan of all shards."""
        return build_assignment(self._state, node_id, self._index)

    # Controller

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        self._now = now
        actions: list[Action] = []
        is_for_others = self._concerns_others(event)
        if is_for_others:
            self._reports.take(event)
            self._figures.take(now, event)
        if isinstance(event, Applied):
            self._state = event.state
            self._unsent |= self._index.take(event.state, event.changes)
        self._keep(actions, 0, self._membership.on_event(now, wall, event))
        if is_for_others:
            self._tell_others(now, wall, event, actions)
        elif isinstance(event, HeartbeatReceived) and self._membership.is_current(event.node_id, event.session):
            self._keep(actions, len(self._others), self._cron.on_event(now, wall, event))
        return self._finish(now, wall, actions)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        self._now = now
        actions: list[Action] = []
        for position, controller in enumerate((self._membership, *self._others)):
            wake = self._wakes[position]
            if wake is not None and wake <= now:
                self._keep(actions, position, controller.on_advance(now, wall))
        return self._finish(now, wall, actions)

    def _concerns_others(self, event: Event) -> bool:
        """False for what membership alone is to see, and for sessions that do not speak for their worker."""
        match event:
            case HeartbeatReceived() | SessionOpened():
                return False
            case SessionClosed() | GoodbyeReceived() | ReplicasReported() | FiguresReported() | LaunchReported():
                return self._membership.is_current(event.node_id, event.session)
            case _:
                return True

    def _tell_others(self, now: Monotonic, wall: WallMs, event: Event, actions: list[Action]) -> None:
        for position, controller in enumerate(self._others, start=1):
            self._keep(actions, position, controller.on_event(now, wall, event))

    def _keep(self, actions: list[Action], position: int, step: Step) -> None:
        actions += step.actions
        self._wakes[position] = step.next_wake

    def _finish(self, now: Monotonic, wall: WallMs, actions: list[Action]) -> Step:
        for opened in self._membership.take_welcomed():
            self._unsent.add(opened.hello.node.id)
            self._sent_at.pop(opened.hello.node.id, None)
            self._reports.take(opened)
            self._tell_others(now, wall, opened, actions)
        assignments, send_at = self._send_assignments(now)
        orders = [action for action in actions if isinstance(action, SendLaunch | StopLaunch)]
        first = [action for action in actions if not isinstance(action, SendLaunch | StopLaunch)]
        heard = [order for order in orders if self._membership.session_of(order.node_id) is not None]
        return Step((*first, *assignments, *heard), earliest(*self._wakes, send_at))

    def _send_assignments(self, now: Monotonic) -> tuple[list[Action], Monotonic | None]:
        """Sends what may be sent now; the time at which the next may be."""
        actions: list[Action] = []
        next_at: Monotonic | None = None
        for node_id in sorted(self._unsent):
            session = self._membership.session_of(node_id)
            if session is None:
                self._unsent.discard(node_id)
                continue
            sent_at = self._sent_at.get(node_id)
            pause_s = max(PAUSE_S_MIN, PAUSE_S_PER_SHARD * len(self._index.shards_of(node_id)))
            if sent_at is not None and now < sent_at + pause_s:
                next_at = earliest(next_at, Monotonic(sent_at + pause_s))
                continue
            self._unsent.discard(node_id)
            self._sent_at[node_id] = now
            actions.append(SendAssignment(session, node_id))
        return actions, next_at
