"""What all shards of a worker share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.api.v1 import replication_pb2, session_pb2
from coordinator.model import Clock, Monotonic
from worker_agent.copy_rate import CopyRate
from worker_agent.shard_interface import ReplicaTimes
from worker_agent.state_interface import Place
from worker_agent.store import StoreSettings

if TYPE_CHECKING:
    from worker_agent.shard import Shard


@dataclass(slots=True)
class ShardContext:
    """What all shards of a worker share."""

    node_id: str
    pool: ThreadPoolExecutor
    clock: Clock
    store_settings: StoreSettings
    times: ReplicaTimes
    has_session_lease: Callable[[Monotonic], bool]
    report: Callable[[session_pb2.ReplicaReport], None]
    send: Callable[[str, replication_pb2.ShardMessage, bool], None]
    connected_peers: Callable[[], Sequence[str]]
    place: Callable[[str], Place]
    on_changed: Callable[[], None]
    changed: Callable[[], Awaitable[None]]
    on_serving: Callable[[Shard, bool], None]
    """A shard begins to be served here, or stops; told at once, in this order."""
    copy_rate: CopyRate = field(default_factory=CopyRate)
