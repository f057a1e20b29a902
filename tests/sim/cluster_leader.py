"""The leader's side of the control plane on a simulated master: plays server/leader.py and server/sessions.py.

Real: LeaderControl with all its controllers, the SessionHub, the batches, the order rules of server/leader.py. Played:
the event loop around them. Controllers exist only between a barrier that succeeded in this term and the end of the
leadership; a proposal that is on its way when that ends is nobody's any more.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, assert_never

from coordinator.api.v1 import command_pb2, session_pb2
from coordinator.control import interface
from coordinator.control.leader import LeaderControl
from coordinator.machine.state import Transition
from coordinator.model import Monotonic
from coordinator.model.errors import CoordinatorError
from coordinator.server.batches import batches, results_of
from coordinator.server.leader import BARRIER_TIMEOUT_S, WAKE_DELAY_S_MIN
from coordinator.server.sessions import Session, SessionHub, _event_of

if TYPE_CHECKING:
    from tests.sim.cluster_master import Master
    from tests.sim.cluster_net import SessionStream

DIALLED = b"dial"
ACCEPTED = b"accepted"


class Leader:
    """One life of a master as far as it may lead. Invariant: `control` is None unless it leads whole."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self.control: LeaderControl | None = None
        self._hub = SessionHub()
        self._term = 0
        self._is_beginning = False
        self._events: deque[interface.Event] = deque()
        self._wanted: list[interface.Propose] = []
        self._is_drain_due = False
        self._is_advance_due = False
        self._wake_at: Monotonic | None = None
        self._undecided: dict[SessionStream, list[Any]] = {}
        """Streams that wait for the controllers to begin, with what came in on them; and those without a Hello."""
        self._sessions: dict[SessionStream, Session] = {}

    # Leadership

    def lead(self, is_leader: bool, term: int) -> None:
        """Leadership begins or ends."""
        self._end("this master no longer leads")
        if is_leader:
            self._term = term
            self._is_beginning = True
            self._begin(term)

    def _begin(self, term: int) -> None:
        master = self._master

        def ended(result: command_pb2.CommandResult | None, error: CoordinatorError | None) -> None:
            if not self._is_beginning or self._term != term:
                return
            if error is None:
                self._attach(term)
            else:
                master.enqueue_later(master.world.settings.append_period_s, lambda _: again())

        def again() -> None:
            if self._is_beginning and self._term == term:
                self._begin(term)

        barrier = command_pb2.Command(cause="barrier", barrier=command_pb2.Barrier())
        master.propose(barrier, ended, BARRIER_TIMEOUT_S)

    def _attach(self, term: int) -> None:
        master = self._master
        self._is_beginning = False
        self.control = LeaderControl(
            master.consensus_now.state,
            master.cluster.config,
            interface.Tokens(),
            master.monotonic(),
            master.wall_ms(),
            random.Random(f"{master.world.seed} {master.id} term {term}"),
            leader_id=master.id,
            term=term,
        )
        master.world.note(f"{master.id} controls in term {term} from {master.consensus_now.state.index}")
        self._hub.attach(self.post, self._build)
        self.post(interface.DiscoveryReported(None))
        self._is_advance_due = True
        for stream in list(self._undecided):
            self._go_on(stream)

    def _end(self, reason: str) -> None:
        self.control = None
        self._is_beginning = False
        self._events.clear()
        self._wanted.clear()
        self._wake_at = None
        self._hub.detach(self._redirect(reason))
        self._pump()
        for stream in list(self._undecided):
            self._turn_away(stream, reason)

    def _redirect(self, reason: str) -> session_pb2.Redirect:
        leader_id = self._master.consensus_now.leader_id or "" if self._master.consensus is not None else ""
        # A master's address is its name here.
        return session_pb2.Redirect(leader_id=leader_id, leader_address=leader_id, reason=reason)

    def _build(self, node_id: str) -> session_pb2.Assignment:
        assert self.control is not None
        return self.control.assignment(node_id)

    # Sessions

    def take(self, stream: SessionStream, item: Any) -> None:
        """A worker dials, says something, or is gone (None)."""
        session = self._sessions.get(stream)
        if item is None:
            stream.vanish(self._master.id)
            self._undecided.pop(stream, None)
            self._finish(stream)
        elif item == DIALLED:
            stream.send(self._master.id, ACCEPTED)
            if self._is_beginning or self._hub.is_attached:
                self._undecided[stream] = []
            else:
                self._turn_away(stream, "this master does not lead")
        elif stream in self._undecided:
            self._undecided[stream].append(item)
            if self._hub.is_attached:
                self._go_on(stream)
        elif session is not None:
            event = _event_of(session, item)
            assert event is not None
            self._hub.report(session, event)

    def _go_on(self, stream: SessionStream) -> None:
        """Begins the session once there is a Hello."""
        items = self._undecided[stream]
        if items:
            del self._undecided[stream]
            hello, *rest = items
            session = self._hub.begin(hello.hello)
            assert session is not None
            self._sessions[stream] = session
            for item in rest:
                self.take(stream, item)

    def _turn_away(self, stream: SessionStream, reason: str) -> None:
        self._undecided.pop(stream, None)
        stream.send(self._master.id, session_pb2.OpenResponse(redirect=self._redirect(reason)))
        stream.close(self._master.id)

    def _finish(self, stream: SessionStream) -> None:
        session = self._sessions.pop(stream, None)
        if session is not None:
            self._hub.finish(session)

    def _pump(self) -> None:
        """Sends what is queued; as Session.pump, with a network that takes everything at once."""
        for stream, session in list(self._sessions.items()):
            while session._outgoing:
                message = session._outgoing.popleft()
                if message is None:
                    message = session_pb2.OpenResponse(assignment=self._hub.assignment(session.node_id))
                stream.send(self._master.id, message)
            if session.has_ended:
                stream.close(self._master.id)
                self._finish(stream)

    # Events in, actions out; as LeaderDriver has it

    def on_transition(self, transition: Transition) -> None:
        """An entry was applied."""
        self.post(interface.Applied(transition.state, transition.changes))

    def post(self, event: interface.Event) -> None:
        """Queues an event; dropped when the controllers do not run."""
        if self.control is not None:
            self._events.append(event)
            self._schedule_drain()

    def _schedule_drain(self) -> None:
        if not self._is_drain_due:
            self._is_drain_due = True
            self._master.enqueue_later(0.0, lambda _: self._drain())

    def _drain(self) -> None:
        self._is_drain_due = False
        master = self._master
        for _ in range(len(self._events)):
            if self.control is None or not self._events:
                return
            event = self._events.popleft()
            self._take_step(self.control.on_event(master.monotonic(), master.wall_ms(), event))
        if self._is_advance_due and self.control is not None:
            self._is_advance_due = False
            self._take_step(self.control.on_advance(master.monotonic(), master.wall_ms()))
        self._propose_wanted()
        self._pump()
        if self._events:
            self._schedule_drain()

    def _take_step(self, step: interface.Step) -> None:
        for action in step.actions:
            self._carry_out(action)
        if step.next_wake == self._wake_at:
            return
        self._wake_at = wake_at = step.next_wake
        if wake_at is not None:
            delay_s = max(WAKE_DELAY_S_MIN, wake_at - self._master.monotonic()) / self._master.rate
            self._master.enqueue_later(delay_s, lambda _: self._wake(wake_at))

    def _wake(self, wake_at: Monotonic) -> None:
        if self._wake_at == wake_at and self.control is not None:
            self._wake_at = None
            self._is_advance_due = True
            self._schedule_drain()

    def _carry_out(self, action: interface.Action) -> None:
        match action:
            case interface.Propose():
                self._wanted.append(action)
            case interface.SendToNode():
                if not action.message.HasField("lease_grant") or self._master.consensus_now.has_lease:
                    self._hub.send(action.session, action.message)
            case interface.SendAssignment():
                self._hub.send_assignment(action.session)
            case interface.SendLaunch() | interface.StopLaunch():
                raise AssertionError("there are no cron jobs here")
            case interface.CloseSession():
                self._hub.close(action.session, action.reason, action.final)
            case _:
                assert_never(action)

    def _propose_wanted(self) -> None:
        wanted, self._wanted = self._wanted, []
        settings = self._master.world.settings
        start = 0
        for entry, count in batches([action.command for action in wanted], settings.command_bytes_max):
            self._propose(entry, wanted[start : start + count])
            start += count

    def _propose(self, entry: command_pb2.Command, actions: Sequence[interface.Propose]) -> None:
        control = self.control

        def ended(result: command_pb2.CommandResult | None, error: CoordinatorError | None) -> None:
            if control is not self.control:
                return
            results: Sequence[command_pb2.CommandResult | None] = [None] * len(actions)
            if result is not None:
                results = results_of(result, len(actions))
            for action, each in zip(actions, results, strict=True):
                self.post(interface.ProposalEnded(action.token, each, error))

        timeout_s = self._master.world.settings.propose_timeout_s
        self._master.propose(entry, ended, timeout_s, is_urgent=True)
