"""Who is in: sessions, leases, suspicion, admission and the end of workers.

Invariants
1. A lease is granted only to the process that the agreed record names, while the record is JOINING, ACTIVE or DRAINING,
   and never once its end has been proposed. `ExpireNode` is proposed no earlier than `session_lease_s * lease_margin`
   after the last grant (the margin covers clocks that run at different rates), except when the worker itself said
   Goodbye. So no worker holds a lease after it is DOWN. (Gray and Cheriton 1989: the holder counts from the sending,
   the grantor from the answer.)
2. A new leader does not know what its predecessor granted. It counts, for every worker, a grant at the moment when it
   began. It suspects a worker that it has not heard at `2 * suspect_s` after it began: `suspect_s` for the worker to
   notice that its stream is gone and to find the new leader, and `suspect_s` as ever.
3. The leader's own stall is not the workers' silence. When this controller is called later than it asked for by more
   than a quarter of `suspect_s`, heartbeats may lie unread; nobody is suspected or expired for another half of it.
4. Discovery admits but never drops: where Consul is configured, a JOINING worker waits until Consul holds it for
   healthy (also while Consul cannot be asked); a worker that is in stays in on its session alone.

Two processes with one id: a restart must work at once, so the newest Hello wins, with one exception. While the older
process is heard and the two name different gRPC addresses, both are alive and one is misconfigured: the newcomer is
refused, and may try again. A restart on a new port is not refused, because the stream of the old process ends with it.
(A half-open stream, after a power cut, delays such a newcomer by `suspect_s`.)

What happens to a session, in order: Hello -> RegisterNode, when the record differs -> Welcome (and, by LeaderControl,
the assignment) -> heartbeats and grants -> ActivateNode. When the record shows that the worker is DOWN, LEFT, removed
or another process, the session ends with a Farewell; after DOWN the worker may say Hello again and registers anew.
"""

from __future__ import annotations

from coordinator.api.v1 import command_pb2, session_pb2
from coordinator.config import SessionSettings
from coordinator.control.assignment import AssignmentIndex
from coordinator.control.contacts import ADMITTED, REGISTERED, Contact, NodeLive, describe_silence, farewell
from coordinator.control.interface import (
    Action,
    Applied,
    CloseSession,
    DiscoveryReported,
    Event,
    FiguresReported,
    GoodbyeReceived,
    HeartbeatReceived,
    LaunchReported,
    ProposalEnded,
    ReplicasReported,
    SendToNode,
    SessionClosed,
    SessionOpened,
    Step,
    Tokens,
)
from coordinator.control.proposals import Outcome, Proposals
from coordinator.control.reports import LossWishes
from coordinator.control.timers import Timers, earliest
from coordinator.machine.state import NodeChanged, State
from coordinator.model import Monotonic, Node, NodeState, WallMs

Wanted = tuple[command_pb2.Command | None, Monotonic | None]
"""The command that a worker's situation asks for now, and when to look again."""


class Membership:
    """The membership controller of one leader. Each worker is looked at when something of it happens, and in time."""

    def __init__(
        self,
        state: State,
        settings: SessionSettings,
        tokens: Tokens,
        now: Monotonic,
        *,
        index: AssignmentIndex,
        losses: LossWishes,
        needs_discovery: bool,
        leader_id: str = "",
        term: int = 0,
    ) -> None:
        self._state = state
        self._settings = settings
        self._proposals = Proposals("membership", tokens)
        self._index = index
        self._losses = losses
        self._needs_discovery = needs_discovery
        self._leader_id = leader_id
        self._term = term
        self._began = now
        self._healthy: frozenset[str] | None = None
        self._contacts: dict[str, Contact] = {}
        self._welcomed: list[SessionOpened] = []
        self._timers = Timers[str]()
        self._planned_wake: Monotonic | None = None
        self._no_verdict_before = now
        for node_id in state.nodes:
            self._timers.set(node_id, now)

    # What others ask

    def live(self, node_id: str, now: Monotonic) -> NodeLive | None:
        """What is seen of the worker; None when it never said Hello under this leader."""
        contact = self._contacts.get(node_id)
        if contact is None:
            return None
        return NodeLive(
            connected=contact.welcomed,
            heartbeat_age_s=None if contact.heartbeat_at is None else now - contact.heartbeat_at,
            metrics=contact.metrics,
            applied_generation=contact.applied_generation,
            incarnation=contact.incarnation,
        )

    def sessions(self, now: Monotonic) -> dict[str, NodeLive]:
        """What is seen of every worker that said Hello under this leader."""
        views = {node_id: self.live(node_id, now) for node_id in sorted(self._contacts)}
        return {node_id: view for node_id, view in views.items() if view is not None}

    def metrics(self, node_id: str) -> session_pb2.NodeMetrics | None:
        """The worker's latest figures; None before its first heartbeat under this leader."""
        contact = self._contacts.get(node_id)
        return contact.metrics if contact is not None and contact.heartbeat_at is not None else None

    def session_of(self, node_id: str) -> int | None:
        """The worker's session once it is welcomed; None otherwise."""
        contact = self._contacts.get(node_id)
        return contact.session if contact is not None and contact.welcomed else None

    def is_current(self, node_id: str, session: int) -> bool:
        """True for the session that speaks for the worker; what other sessions say is to be ignored."""
        contact = self._contacts.get(node_id)
        return contact is not None and contact.session == session

    def take_welcomed(self) -> list[SessionOpened]:
        """Sessions that were welcomed since the last call."""
        welcomed, self._welcomed = self._welcomed, []
        return welcomed

    # Controller

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        self._notice_stall(now)
        actions: list[Action] = []
        match event:
            case Applied():
                actions += self._on_applied(now, event)
            case SessionOpened():
                actions += self._on_opened(now, event)
            case SessionClosed():
                if self.is_current(event.node_id, event.session):
                    contact = self._contacts[event.node_id]
                    contact.session, contact.welcomed = None, False
                    actions += self._look(now, event.node_id)
            case HeartbeatReceived():
                actions += self._on_heartbeat(now, event)
            case GoodbyeReceived():
                if self.is_current(event.node_id, event.session):
                    contact = self._contacts[event.node_id]
                    contact.heard_at, contact.goodbye = now, event.reason or "it was stopped"
                    actions += self._look(now, event.node_id)
            case ReplicasReported() | FiguresReported() | LaunchReported():
                if self.is_current(event.node_id, event.session):
                    self._contacts[event.node_id].heard_at = now
            case DiscoveryReported():
                if event.healthy != self._healthy:
                    self._healthy = event.healthy
                    actions += self._look_at_all(now)
            case ProposalEnded():
                actions += self._on_ended(now, event)
        return self._step(now, actions)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        self._notice_stall(now)
        return self._step(now, [])

    def _step(self, now: Monotonic, actions: list[Action]) -> Step:
        for node_id in self._timers.take_due(now):
            actions += self._look(now, node_id)
        self._planned_wake = self._timers.next_wake()
        return Step(tuple(actions), self._planned_wake)

    def _notice_stall(self, now: Monotonic) -> None:
        suspect_s = self._settings.suspect_s
        if self._planned_wake is not None and now - self._planned_wake > suspect_s / 4:
            self._no_verdict_before = Monotonic(now + suspect_s / 2)

    # Events

    def _on_applied(self, now: Monotonic, event: Applied) -> list[Action]:
        was_founded = bool(self._state.cluster_id)
        self._state = event.state
        if not was_founded and event.state.cluster_id:
            return self._look_at_all(now)
        actions: list[Action] = []
        for change in event.changes:
            if isinstance(change, NodeChanged):
                node = change.after or change.before
                actions += self._look(now, node.id) if node is not None else []
        return actions

    def _on_opened(self, now: Monotonic, event: SessionOpened) -> list[Action]:
        problem = self._hello_problem(now, event.hello)
        if problem:
            return [CloseSession(event.session, problem)]
        node_id = event.hello.node.id
        older = self._contacts.get(node_id)
        actions: list[Action] = []
        if older is not None and older.session is not None:
            actions.append(CloseSession(older.session, f"worker {node_id} opened a newer session"))
        same_process = older is not None and older.incarnation == event.hello.node.incarnation
        self._contacts[node_id] = Contact(
            opened=event,
            heard_at=now,
            granted_at=older.granted_at if older is not None else None,
            session=event.session,
            metrics=older.metrics if older is not None else session_pb2.NodeMetrics(),
            applied_generation=event.hello.applied_generation,
            # Its end may be in the log already; only the log can say that it is not.
            is_expiring=older is not None and same_process and older.is_expiring,
        )
        return actions + self._look(now, node_id)

    def _hello_problem(self, now: Monotonic, hello: session_pb2.Hello) -> str:
        """Why this Hello cannot be taken now, for people; empty when it can. (The servicer has checked its form.)"""
        node = hello.node
        older = self._contacts.get(node.id)
        if older is None or older.session is None or older.incarnation == node.incarnation:
            return ""
        is_heard = now - older.heard_at < self._settings.suspect_s
        if is_heard and older.goodbye is None and older.node.grpc_address != node.grpc_address:
            return (
                f"worker id {node.id!r} is in use by a live process at {older.node.grpc_address}; give the one at "
                f"{node.grpc_address} an id of its own, or stop the other first"
            )
        return ""

    def _on_heartbeat(self, now: Monotonic, event: HeartbeatReceived) -> list[Action]:
        if not self.is_current(event.node_id, event.session):
            return []
        contact = self._contacts[event.node_id]
        is_first = contact.heartbeat_at is None
        contact.heard_at = contact.heartbeat_at = now
        contact.applied_generation = event.heartbeat.applied_generation
        contact.metrics = event.heartbeat.metrics
        record = self._state.nodes.get(event.node_id)
        actions: list[Action] = []
        if self._may_grant(contact, record):
            contact.granted_at = now
            grant = session_pb2.LeaseGrant(heartbeat_sequence=event.heartbeat.sequence)
            actions.append(SendToNode(event.session, session_pb2.OpenResponse(lease_grant=grant)))
        is_settled = record is not None and record.state in ADMITTED and not record.is_suspect
        if is_first or not is_settled:
            actions += self._look(now, event.node_id)
        return actions

    def _may_grant(self, contact: Contact, record: Node | None) -> bool:
        if not contact.welcomed or contact.is_expiring or contact.goodbye is not None:
            return False
        return contact.is_record_of(record) and record is not None and record.state in REGISTERED

    def _on_ended(self, now: Monotonic, event: ProposalEnded) -> list[Action]:
        ended = self._proposals.end(now, event)
        if ended is None:
            return []
        contact = self._contacts.get(ended.subject)
        if contact is None:
            return self._look(now, ended.subject)
        was_registering, contact.is_registering = contact.is_registering, False
        if ended.outcome in (Outcome.REFUSED, Outcome.STALE, Outcome.NOT_APPLIED):
            contact.is_expiring = False
        if was_registering and ended.outcome is Outcome.APPLIED:
            contact.registered = True
        if was_registering and ended.outcome is Outcome.REFUSED and contact.session is not None:
            session, contact.session = contact.session, None
            return [CloseSession(session, ended.reason), *self._look(now, ended.subject)]
        return self._look(now, ended.subject)

    # Decisions

    def _look_at_all(self, now: Monotonic) -> list[Action]:
        known = sorted({*self._contacts, *self._state.nodes})
        return [action for node_id in known for action in self._look(now, node_id)]

    def _look(self, now: Monotonic, node_id: str) -> list[Action]:
        """Decides what the worker's situation asks for, and when to look again. Harmless at any time."""
        if not self._state.cluster_id:
            return []
        record = self._state.nodes.get(node_id)
        contact = self._contacts.get(node_id)
        if contact is not None and (record is None or record.state not in REGISTERED):
            contact.is_expiring = False
        actions = self._tend_session(contact, record)
        command, due = self._wanted(now, record, contact)
        if command is not None:
            actions += self._propose(now, node_id, contact, command)
            due = earliest(due, self._proposals.free_at(now, self._state.index, node_id))
        self._timers.set(node_id, due)
        if record is None and contact is not None and contact.session is None:
            del self._contacts[node_id]
            self._proposals.forget(node_id)
        return actions

    def _propose(
        self, now: Monotonic, node_id: str, contact: Contact | None, command: command_pb2.Command
    ) -> list[Action]:
        if not self._proposals.is_free(now, self._state.index, node_id):
            return []
        is_fault = contact is None or contact.goodbye is None
        self._losses.fill(command, self._state, self._index.shards_of(node_id), node_id, is_fault=is_fault)
        proposed = self._proposals.propose(now, self._state.index, node_id, command)
        if proposed and contact is not None:
            contact.is_registering = command.HasField("register_node")
            contact.is_expiring |= command.HasField("expire_node") or command.HasField("leave_node")
        return list(proposed)

    def _tend_session(self, contact: Contact | None, record: Node | None) -> list[Action]:
        """Welcomes a session whose worker is registered; ends one whose worker is not any more."""
        if contact is None or contact.session is None:
            return []
        session = contact.session
        if not contact.welcomed:
            if contact.must_register(record) or contact.is_expiring:
                return []
            contact.welcomed = True
            self._welcomed.append(contact.opened)
            welcome = session_pb2.Welcome(
                leader_id=self._leader_id,
                term=self._term,
                heartbeat_s=self._settings.heartbeat_s,
                session_lease_s=self._settings.session_lease_s,
                cluster_id=self._state.cluster_id,
            )
            return [SendToNode(session, session_pb2.OpenResponse(welcome=welcome))]
        reason, final = farewell(contact, record)
        if not reason:
            return []
        contact.session, contact.welcomed = None, False
        return [CloseSession(session, reason, final)]

    def _wanted(self, now: Monotonic, record: Node | None, contact: Contact | None) -> Wanted:
        if contact is not None and contact.session is not None and not contact.welcomed:
            if contact.must_register(record):
                return command_pb2.Command(register_node=command_pb2.RegisterNode(node=contact.node)), None
        if record is None or record.state not in REGISTERED:
            return None, None
        if contact is not None and contact.is_record_of(record):
            if contact.goodbye is not None:
                return self._farewell_command(record, contact.goodbye), None
            if contact.is_expiring:
                return _expire(record, "its session lease ended"), None
            if self._may_activate(now, record, contact):
                activate = command_pb2.ActivateNode(node_id=record.id, incarnation=record.incarnation)
                return command_pb2.Command(activate_node=activate), None
        return self._verdict(now, record, contact)

    def _farewell_command(self, record: Node, reason: str) -> command_pb2.Command:
        """A drained worker that holds nothing leaves for good; any other one is expired at once."""
        if record.state is NodeState.DRAINING and self._index.holds_nothing(record.id):
            leave = command_pb2.LeaveNode(node_id=record.id, incarnation=record.incarnation)
            return command_pb2.Command(leave_node=leave)
        return _expire(record, f"stopped: {reason}")

    def _may_activate(self, now: Monotonic, record: Node, contact: Contact) -> bool:
        if not contact.welcomed or contact.heartbeat_at is None:
            return False
        if now - contact.heartbeat_at >= self._settings.suspect_s:
            return False
        if record.state is NodeState.JOINING:
            return not self._needs_discovery or (self._healthy is not None and record.id in self._healthy)
        return record.is_suspect

    def _verdicts(self, record: Node, contact: Contact | None) -> tuple[Monotonic, Monotonic]:
        """When the worker is to be suspected and when expired, if nothing more is heard of it."""
        settings = self._settings
        suspect_at = self._began + 2 * settings.suspect_s
        leased_at: float = self._began
        if contact is not None:
            if contact.is_record_of(record):
                suspect_at = contact.heard_at + settings.suspect_s
                leased_at = max(leased_at, contact.heard_at)
            leased_at = max(leased_at, contact.granted_at or leased_at)
        expire_at = leased_at + settings.session_lease_s * settings.lease_margin
        suspect_at = max(suspect_at, self._no_verdict_before)
        return Monotonic(suspect_at), Monotonic(max(expire_at, suspect_at))

    def _verdict(self, now: Monotonic, record: Node, contact: Contact | None) -> Wanted:
        """Suspicion or the end of a worker that is not heard."""
        suspect_at, expire_at = self._verdicts(record, contact)
        silence = describe_silence(now, self._began, record, contact)
        if now >= expire_at:
            return _expire(record, f"its session lease ended; {silence}"), None
        if record.state in ADMITTED and not record.is_suspect:
            if now < suspect_at:
                return None, suspect_at
            suspect = command_pb2.SuspectNode(node_id=record.id, incarnation=record.incarnation, reason=silence)
            return command_pb2.Command(suspect_node=suspect), expire_at
        return None, expire_at


def _expire(record: Node, reason: str) -> command_pb2.Command:
    expire = command_pb2.ExpireNode(node_id=record.id, incarnation=record.incarnation, reason=reason)
    return command_pb2.Command(expire_node=expire)
