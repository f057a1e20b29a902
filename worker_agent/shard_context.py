"""What all shards of a worker share: where their words go, and how fast they may send copies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.api.v1 import replication_pb2, session_pb2
from coordinator.config import ClusterConfig
from coordinator.model import Clock, Monotonic
from worker_agent.shard_interface import ReplicaTimes
from worker_agent.state_interface import Place
from worker_agent.store import StoreSettings
from worker_agent.store_care import ScrubTally

if TYPE_CHECKING:
    from worker_agent.shard import Shard


HEARTBEATS_PER_LEASE = 4
"""A primary asks for its leases so often that three requests in a row may be late."""


def replica_times(config: ClusterConfig) -> ReplicaTimes:
    """The times of the protocol, as the configuration wants them."""
    return ReplicaTimes(
        replica_lease_s=config.state.replica_lease_s,
        lease_margin=config.session.lease_margin,
        heartbeat_s=config.state.replica_lease_s / HEARTBEATS_PER_LEASE,
        lagging_s=config.state.lagging_s,
        opening_s=config.state.opening_s,
        stall_s=config.moves.copy_stall_s,
    )


class CopyRate:
    """A token bucket for what this worker sends of copies; one second's worth may go at once.

    What is to be sent books a place in line, and asks again at least every LOOK_S: so a rate that is changed counts for
    what waits already. Invariant: passed <= booked + one second's worth.
    """

    LOOK_S = 0.5

    def __init__(self) -> None:
        self._bytes_per_s = 0
        self._booked = 0
        self._passed = 0.0
        """Bytes that might have left until `_at`."""
        self._at = 0.0

    def set(self, now_s: float, bytes_per_s: int) -> None:
        """From now on; 0 for no limit."""
        self._advance(now_s)
        self._bytes_per_s = bytes_per_s

    def _advance(self, now_s: float) -> None:
        passed = self._passed + self._bytes_per_s * max(0.0, now_s - self._at)
        self._passed = min(passed, self._booked + self._bytes_per_s) if self._bytes_per_s else self._booked
        self._at = now_s

    def book(self, now_s: float, size: int) -> int:
        """The place in line of `size` bytes, for `delay_s`."""
        self._advance(now_s)
        self._booked += size
        return self._booked

    def delay_s(self, now_s: float, place: int) -> float:
        """How long to wait before asking again; 0 when what has this place may leave now."""
        if not self._bytes_per_s:
            return 0.0
        self._advance(now_s)
        return min(max(0.0, place - self._passed) / self._bytes_per_s, self.LOOK_S)


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
    scrub_tally: ScrubTally = field(default_factory=ScrubTally)
