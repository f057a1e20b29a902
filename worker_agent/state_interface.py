"""What the state service asks of the host of the shards (shards.py), and what it is told.

    service (state_service.py) --> core (state_core.py) --> ShardHost, HostedShard (shards.py implements them)

Everything here belongs to the event loop's thread. What a shard says of itself holds until the next `await`: the core
looks again behind each one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from coordinator.model.errors import Damaged
from worker_agent.store_interface import Reader


@dataclass(frozen=True, slots=True)
class Place:
    """Who answers for a shard, as far as this worker knows."""

    node_id: str = ""
    """Empty when it does not know."""
    address: str = ""
    """host:port of its gRPC server; empty when it does not know."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """This worker holds no replica of the shard that was looked for."""

    shard_id: int = 0
    """0 when it never held it."""
    epoch: int = 0
    """Highest epoch of the shard that it has seen."""
    primary: Place = Place()
    """The last that it knew: whom it ceded to, or who was primary when it gave the shard up."""


class HostedShard(Protocol):
    """One shard that this worker holds, in any role. Once it is given up, cut or joined it neither serves nor is
    primary, for ever."""

    @property
    def shard_id(self) -> int: ...

    @property
    def epoch(self) -> int:
        """Of the assignment in force."""
        ...

    @property
    def primary_epoch(self) -> int:
        """Epoch of which `primary` is spoken: that in force; once this worker has ceded, the one that comes next."""
        ...

    @property
    def primary(self) -> Place:
        """By the assignment in force; once this worker has ceded, whom it ceded to."""
        ...

    @property
    def is_primary(self) -> bool:
        """This worker is that primary. It need not serve: while it takes over, cedes or is sealed it does not."""
        ...

    @property
    def is_serving(self) -> bool:
        """It takes writes and answers reads now; only ever while `is_primary`."""
        ...

    @property
    def in_sync_count(self) -> int:
        """In-sync replicas by the assignment in force, this one among them."""
        ...

    @property
    def reader(self) -> Reader | None:
        """None while there is no store to read. While `is_serving` there is one, and it shows all that was settled."""
        ...

    def may_read(self) -> bool:
        """It serves, and holds every lease that an answer needs, by the clock now."""
        ...

    def barrier(self) -> Awaitable[None]:
        """Ends once what is applied now is what a read may show. Raises a CoordinatorError when that cannot be."""
        ...

    def submit(self, payload: bytes) -> asyncio.Future[int]:
        """Replicates a serialized Effects; the future has the sequence once it is applied and `reader` shows it.

        The write takes its place in the shard's order in this very call, so there must be no `await` between judging a
        write and submitting it. The future ends in any case: with an error of model/errors.py when the shard stops
        serving or the write fails, a definite one only when the record will never be applied. Cancelling the future
        changes nothing. A shard that does not serve answers with a future that holds NotPrimary.
        """
        ...

    def note_damage(self, error: Damaged) -> bool:
        """A read has found what is on disk damaged. True when this replica is given up for it: another one answers
        soon. False for the last copy, which goes on with what is sound."""
        ...

    def stale_age_s(self) -> float | None:
        """How long ago, in seconds, this replica last knew itself to have all that was committed; 0 for a primary that
        may read; None when it cannot answer at all: never, or its copy is not complete."""
        ...


class ShardHost(Protocol):
    """The shards of this worker."""

    def locate(self, key_hash: int) -> HostedShard | Elsewhere:
        """The shard whose range has the hash, as the assignment in force has it."""
        ...

    def changed(self) -> Awaitable[None]:
        """Ends at the next change, counted from this call, of any shard's role, epoch, serving or primary, and when a
        shard comes or goes. A spurious end does no harm."""
        ...
