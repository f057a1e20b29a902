"""Looks after what one shard has on disk: asks its store, checks it for the scrub, and knows what was found damaged.

What becomes of damage depends on whether there is another copy. Where there is, this one is given up: it reports itself
LOST, its files are used no more, and a copy from another worker takes its place. The last copy stays in service without
the rows that are damaged, for there is nothing better; the leader is told, so that people are. It is given up as soon
as another worker has a copy, and forgiven when a whole round of the scrub finds nothing any more.

Damage comes to light where rows are read: by the scrub, by a request, by a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from coordinator.model import Monotonic
from coordinator.model.errors import Damaged
from worker_agent.store import ShardStore
from worker_agent.store_queue import StoreQueue

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class ScrubTally:
    """What the scrub of a worker has done since its start, over all shards."""

    rounds: int = 0
    round_ended_at: Monotonic | None = None
    """When the latest round ended."""
    bytes: int = 0
    """Of the rows and records that were checked."""
    found: int = 0
    """Copies in which damage was found, by whatever read them."""
    mended: int = 0
    """Of those, the ones that are whole again."""
    broken: set[int] = field(default_factory=set)
    """Shards whose copies here are damaged and not whole again yet."""

    def note_broken(self, shard_id: int) -> None:
        """Damage was found in the shard's copy."""
        if shard_id not in self.broken:
            self.found += 1
            self.broken.add(shard_id)

    def note_whole(self, shard_id: int) -> None:
        """The shard's copy has all rows, and none is known to be damaged."""
        if shard_id in self.broken:
            self.mended += 1
            self.broken.remove(shard_id)


class StoreCare:
    """See above; of one shard. Belongs to the event loop's thread."""

    def __init__(
        self,
        shard_id: int,
        tally: ScrubTally,
        queue: Callable[[], StoreQueue | None],
        is_last_copy: Callable[[], bool],
        give_up: Callable[[Damaged], None],
    ) -> None:
        """`queue` is that of the store while one is used; `give_up` ends the replica."""
        self._shard_id = shard_id
        self._tally = tally
        self._queue = queue
        self._is_last_copy = is_last_copy
        self._give_up = give_up
        self.damage = ""
        """What is damaged in a last copy; empty while nothing is known to be."""
        self.is_given_up = False
        """Its files are not to be used again."""

    def note(self, error: Damaged) -> bool:
        """Damage was found. True when the replica is given up for it, False for a last copy, which stays."""
        self._tally.note_broken(self._shard_id)
        if self._is_last_copy():
            if not self.damage:
                _log.error("shard %d: its last copy is damaged, and stays in service: %s", self._shard_id, error)
            self.damage = str(error)
            return False
        if not self.is_given_up:
            _log.error("shard %d is damaged: %s", self._shard_id, error)
            self.is_given_up = True
            self._give_up(error)
        return True

    def look_again(self) -> None:
        """The replicas of the shard are others now: a copy that only stayed because it was the last one may go."""
        if self.damage and not self._is_last_copy():
            self.note(Damaged(self.damage))

    def begin_anew(self) -> None:
        """The files are gone; a copy will be made."""
        self.damage, self.is_given_up = "", False

    async def ask(self, function: Callable[[ShardStore], Result]) -> Result | None:
        """What `function` makes of the store, in its turn; None when it cannot be asked, or found damage."""
        queue = self._queue()
        if queue is None:
            return None
        try:
            return await queue.ask(function)
        except OSError as error:
            _log.warning("shard %d cannot be read now: %s", self._shard_id, error)
        except Damaged as error:
            if queue is self._queue():
                self.note(error)
        return None

    async def rows(self) -> int:
        """About how many rows and records there are; 0 while there is no store."""
        found = await self.ask(lambda store: store.figures())
        return max(1, found.rows + found.requests + found.log_records) if found is not None else 0

    async def scrub(self, cursor: bytes) -> bytes:
        """Checks the stretch behind the cursor; where to go on, empty at the end."""
        checked = await self.ask(lambda store: store.scrub_stretch(cursor))
        if checked is None:
            return b""
        next_cursor, size = checked
        self._tally.bytes += size
        if not next_cursor and self.damage:
            _log.info("shard %d: no damage is left", self._shard_id)
            self.damage = ""
            self._tally.note_whole(self._shard_id)
        return next_cursor
