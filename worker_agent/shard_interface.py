"""What the parts of one hosted shard say to each other: replica machine, store, host, and the services above them.

    service (state_service.py)  -- resolve (user_state.py) -->  host (shards.py)  -- events -->  replica (replica.py)
                                                                 host  <-- actions --  replica
    host  -- one thread at a time per shard -->  store (store.py)          host  <-- links (replication.py) -->  peers

The replica decides and does nothing; the host performs its actions in order and feeds back what came of them. A store
is used by one thread at a time, its `Reader` on the event loop beside it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from coordinator.api.v1 import replication_pb2
from coordinator.model import NEVER_MS, Monotonic, WallMs
from coordinator.model.errors import CoordinatorError
from worker_agent.store_interface import CopyChunk, Digest, LogRecord, StorePosition

# What a store keeps and answers, for those who know it from here.
from worker_agent.store_interface import Reader as Reader
from worker_agent.store_interface import StateItem as StateItem
from worker_agent.store_interface import Store as Store
from worker_agent.store_interface import StoreFigures as StoreFigures
from worker_agent.store_interface import StoreFull as StoreFull
from worker_agent.store_interface import UserSize as UserSize

# What a shard is


class ReplicaRole(enum.Enum):
    """A worker's role in one shard; the value is the number in session.proto."""

    PRIMARY = 1
    IN_SYNC = 2
    JOINING = 3


@dataclass(frozen=True, slots=True)
class ShardView:
    """One shard as the assignment in force has it, for the worker that holds it."""

    shard_id: int
    lo: int
    hi: int
    """First key hash after the range, at most 2^64."""
    epoch: int
    role: ReplicaRole
    primary: str
    in_sync: tuple[str, ...]
    """All of them, this worker among them where it is one; sorted."""
    joining: tuple[str, ...]
    is_formed: bool = True
    """False until all first replicas have said that they made their stores: nothing is served before. From then on a
    store that is not there is a loss, never a beginning."""
    cede_to: str = ""
    """For a primary: the worker that it shall cede to."""
    is_sealed: bool = False
    """For a primary: it shall stop, and have every replica apply everything, before it is cut or joined."""
    parents: tuple[int, ...] = ()
    """Shards that this one was cut or joined from; their stores are what it is made of where it has none yet."""
    move_id: int = 0


# The replica machine


@dataclass(frozen=True, slots=True)
class Assigned:
    """This is the shard now, on disk as such. The first one also says where its store stands; a first one that does not
    says that there is no store, or none that can be trusted."""

    view: ShardView
    position: StorePosition | None = None


@dataclass(frozen=True, slots=True)
class Foresee:
    """An assignment with this epoch has come, and is not in force yet: the epoch may go to the disk meanwhile."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Primary: replicate this. Ends in Settle with the same token."""

    token: int
    payload: bytes
    time_ms: WallMs = NEVER_MS
    """Wall clock of the worker now; what the record says of its time."""


@dataclass(frozen=True, slots=True)
class Barrier:
    """Primary: make sure that what is applied now is what a read may show. Ends in Settle with the same token."""

    token: int


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A stream to a worker is open; nothing that was on its way over an older one will come.

    A machine that is made while a stream is open hears of it after its first Assigned.
    """

    node_id: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The stream to a worker ended."""

    node_id: str


@dataclass(frozen=True, slots=True)
class PeerSaid:
    """A message about this shard came in; `is_answer` when down a stream that this worker opened as a primary."""

    node_id: str
    message: replication_pb2.ShardMessage
    is_answer: bool


@dataclass(frozen=True, slots=True)
class StoreDone:
    """A store operation of an action ended well; operations but ReadChunk end in the order of their actions."""

    operation: StoreOperation
    position: StorePosition
    digest: Digest | None = None
    records: tuple[LogRecord, ...] = ()
    chunk: CopyChunk | None = None


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """A store operation failed; all others that have not ended were not begun, and are dropped. But a ReadChunk that
    fails leaves all others as they are.

    `position` is None when the store cannot say it any more: then nothing in it is trusted.
    """

    operation: StoreOperation
    error: Exception
    position: StorePosition | None


ReplicaEvent = Assigned | Foresee | Submit | Barrier | PeerConnected | PeerLost | PeerSaid | StoreDone | StoreFailed


@dataclass(frozen=True, slots=True)
class SeeEpoch:
    """`Store.see_epoch`."""

    epoch: int


@dataclass(frozen=True, slots=True)
class AppendRecords:
    """`Store.append`."""

    records: tuple[LogRecord, ...]


@dataclass(frozen=True, slots=True)
class TruncateLog:
    """`Store.truncate`."""

    last: int


@dataclass(frozen=True, slots=True)
class ApplyLog:
    """`Store.apply`; the end has the digest. `up_to` may be what is applied already: then only the digest is wanted."""

    up_to: int
    keeps_tombstones: bool


@dataclass(frozen=True, slots=True)
class ReadLog:
    """`Store.read_log` for a peer, or for this worker itself to learn its own tail; the end has the records. One whose
    first record is not in the log any more fails with KeyError, and the machine asks again for what was dropped behind
    it."""

    node_id: str
    first: int


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """`Store.read_chunk` for a peer; the end has the chunk. The host may delay it (throttle)."""

    node_id: str
    cursor: bytes


@dataclass(frozen=True, slots=True)
class BeginCopy:
    """`Store.begin_copy`."""

    start: int
    start_epoch: int


@dataclass(frozen=True, slots=True)
class MergeChunk:
    """`Store.merge_chunk`."""

    chunk: CopyChunk


@dataclass(frozen=True, slots=True)
class FinishCopy:
    """`Store.finish_copy`."""


StoreOperation = (
    SeeEpoch | AppendRecords | TruncateLog | ApplyLog | ReadLog | ReadChunk | BeginCopy | MergeChunk | FinishCopy
)


@dataclass(frozen=True, slots=True)
class SendToPeer:
    """Send a message: up the stream that this worker opened, or, for an answer, down the one that the peer opened."""

    node_id: str
    message: replication_pb2.ShardMessage
    is_answer: bool


@dataclass(frozen=True, slots=True)
class Settle:
    """A Submit is applied (`sequence`) or a Barrier passed; or it failed, with an error of model/errors.py."""

    token: int
    sequence: int = 0
    error: CoordinatorError | None = None


class Progress(enum.Enum):
    """How far a worker is with a shard; the value is the number in session.proto."""

    ACCEPTED = 1
    CAUGHT_UP = 2
    CEDED = 3
    LOST = 4


@dataclass(frozen=True, slots=True)
class ReportReplica:
    """Tell the leader. `caught_up` and `lagging` are a primary's words about other replicas."""

    epoch: int
    progress: Progress
    caught_up: tuple[str, ...] = ()
    """Joining replicas that have everything; the primary needs their disks and leases from before it says so."""
    lagging: tuple[str, ...] = ()
    """In-sync replicas that do not follow, to be removed by a command; joining ones that get no further."""
    reason: str = ""


ReplicaAction = StoreOperation | SendToPeer | Settle | ReportReplica


@dataclass(frozen=True, slots=True)
class ReplicaStep:
    """What a replica wants: actions in order, and to be called again at `next_wake` at the latest."""

    actions: tuple[ReplicaAction, ...] = ()
    next_wake: Monotonic | None = None


@dataclass(frozen=True, slots=True)
class ReplicaTimes:
    """Times of the protocol, in seconds."""

    replica_lease_s: float = 1.5
    lease_margin: float = 1.25
    heartbeat_s: float = 0.4
    """How often a primary sends something to each replica."""
    lagging_s: float = 1.0
    """An in-sync replica that has not acknowledged what it was sent for so long is to be removed."""
    opening_s: float = 8.0
    """The same for one that says all the time that it is still opening its store."""
    stall_s: float = 20.0
    """A joining replica that owes an answer, and has got no further for so long, is to be given up."""
    probe_s: float = 0.1
    """How often an unanswered probe is repeated."""
    cede_wait_s: float = 0.5
    """How long a primary waits for the word that its target knows of its ceding."""
