"""What one leader has heard of its workers: soft state that a new leader builds anew."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.control.interface import SessionOpened
from coordinator.machine.codec import node_from_proto
from coordinator.model import Monotonic, Node, NodeState

ADMITTED = (NodeState.ACTIVE, NodeState.DRAINING)
REGISTERED = (NodeState.JOINING, NodeState.ACTIVE, NodeState.DRAINING)


@dataclass(frozen=True, slots=True)
class NodeLive:
    """What the leader sees of a worker now, for people and for the API."""

    connected: bool
    """True while its session is open and welcomed."""
    heartbeat_age_s: float | None
    """Seconds since its last heartbeat; None when there was none under this leader."""
    metrics: session_pb2.NodeMetrics
    applied_generation: int
    incarnation: str


@dataclass(slots=True)
class Contact:
    """One worker as this leader hears it. Invariant: `welcomed` only while `session` is open."""

    opened: SessionOpened
    """The Hello of the latest session."""
    heard_at: Monotonic
    """When anything came from it last."""
    granted_at: Monotonic | None = None
    """When this leader last answered a heartbeat of the node, whichever its process was."""
    session: int | None = None
    """Number of the open session; None when it is closed."""
    welcomed: bool = False
    is_registering: bool = False
    """A registration of this session is on its way."""
    registered: bool = False
    """A registration of this session was applied; what differs then is the machine's decision."""
    heartbeat_at: Monotonic | None = None
    """When the last heartbeat of this session came."""
    metrics: session_pb2.NodeMetrics = field(default_factory=session_pb2.NodeMetrics)
    applied_generation: int = 0
    goodbye: str | None = None
    """Why it stops, once it has said so."""
    is_expiring: bool = False
    """Its end is proposed: no lease may be granted any more."""

    @property
    def incarnation(self) -> str:
        """The process that said Hello last."""
        return self.opened.hello.node.incarnation

    @property
    def node(self) -> types_pb2.Node:
        """What it says of itself."""
        return self.opened.hello.node

    def is_record_of(self, record: Node | None) -> bool:
        """True when the agreed record speaks of the process that said Hello last."""
        return record is not None and record.incarnation == self.incarnation

    def must_register(self, record: Node | None) -> bool:
        """True when the agreed record is missing, of another process, ended, or says other things than the Hello."""
        if record is None or record.incarnation != self.incarnation or record.state not in REGISTERED:
            return True
        said = node_from_proto(self.node)
        if self.registered:
            return False
        return (record.grpc_address, record.http_address, record.zone, record.version, record.labels) != (
            said.grpc_address,
            said.http_address,
            said.zone,
            said.version,
            said.labels,
        ) or record.configured_weight != said.weight


def farewell(contact: Contact, record: Node | None) -> tuple[str, bool]:
    """Why a welcomed session must end, empty when it goes on; and whether the worker shall stay away."""
    if record is None:
        return "the worker was removed from the cluster", True
    if record.incarnation != contact.incarnation:
        return "another process registered with this worker's id", False
    if record.state is NodeState.LEFT:
        return "the worker has left the cluster", True
    if record.state is NodeState.DOWN:
        if contact.goodbye is not None:
            return f"stopped: {contact.goodbye}", False
        return "the session lease ended; say Hello again", False
    return "", False


def describe_silence(now: Monotonic, began: Monotonic, record: Node, contact: Contact | None) -> str:
    """How long a worker has not been heard, for people."""
    if contact is None or not contact.is_record_of(record):
        return f"not heard since a leader began {now - began:.1f} s ago"
    stream = "its stream is open" if contact.session is not None else "its stream is closed"
    return f"not heard for {now - contact.heard_at:.1f} s, {stream}"
