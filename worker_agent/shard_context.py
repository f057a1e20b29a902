"""What all shards of a worker share: where their words go, and how fast they may send copies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.api.v1 import replication_pb2, session_pb2
from coordinator.model import Clock, Monotonic
from worker_agent.shard_interface import ReplicaTimes
from worker_agent.state_interface import Place
from worker_agent.store import StoreSettings

if TYPE_CHECKING:
    from worker_agent.shard import Shard


class CopyRate:
    """A token bucket for what this worker sends of copies; one second's worth may go at once."""

    def __init__(self) -> None:
        self._bytes_per_s = 0
        self._free_at = 0.0

    def set(self, bytes_per_s: int) -> None:
        """0 for no limit."""
        self._bytes_per_s = bytes_per_s

    def delay_s(self, now_s: float, size: int) -> float:
        """Books `size` bytes; how long to wait before they may leave."""
        if not self._bytes_per_s:
            return 0.0
        self._free_at = max(self._free_at, now_s - 1.0) + size / self._bytes_per_s
        return max(0.0, self._free_at - now_s)


@dataclass(slots=True)
class ShardContext:
    """What the host gives to each of its shards."""

    node_id: str
    pool: ThreadPoolExecutor
    copies_pool: ThreadPoolExecutor
    """One thread, for the rows of copies (store_queue.py)."""
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
    """Ends at the next change of any shard."""
    on_serving: Callable[[Shard, bool], None]
    """A shard begins to be served here, or stops; told at once, in this order."""
    copy_rate: CopyRate = field(default_factory=CopyRate)
