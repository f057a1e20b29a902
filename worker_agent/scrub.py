"""The scrub: looks for damage on disk where nobody reads, all shards of the worker once in a round.

Rows and records are checked whenever they are read, so damage is never served. But what nobody reads may rot on every
copy in turn; so each worker reads all of its own, a stretch of some thousand rows at a time (store_scan.py), and lets
the same time pass between any two stretches, so that a round takes `[state] scrub_s`. What becomes of damage is said in
store_care.py.

A restart begins a new round; a shard that came during a round is in the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from coordinator.model import Clock
from worker_agent.store_care import ScrubTally
from worker_agent.store_scan import SCRUB_ROWS

EMPTY_WAIT_S_MAX = 5.0
"""How long a worker without shards waits before it looks again."""

_log = logging.getLogger(__name__)


class Scrubbed(Protocol):
    """What the scrub needs of a shard."""

    async def rows(self) -> int:
        """About how many rows and records there are to check; 0 while there is no store."""
        ...

    async def scrub(self, cursor: bytes) -> bytes:
        """Checks the stretch behind the cursor; where the next one begins, empty at the end and when it is lost."""
        ...


class Scrub:
    """Checks all shards, round after round."""

    def __init__(
        self, shards: Callable[[], Sequence[Scrubbed]], round_s: float, tally: ScrubTally, clock: Clock
    ) -> None:
        """`round_s` above 0."""
        self._shards = shards
        self._round_s = round_s
        self._tally = tally
        self._clock = clock

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            counted = [(shard, await shard.rows()) for shard in self._shards()]
            held = [(shard, rows) for shard, rows in counted if rows]
            if not held:
                await asyncio.sleep(min(self._round_s, EMPTY_WAIT_S_MAX))
                continue
            pause_s = self._round_s / sum(stretches(rows) for _, rows in held)
            for shard, rows in held:
                await self._check(shard, rows, pause_s)
            self._tally.rounds += 1
            self._tally.round_ended_at = self._clock.monotonic()
            _log.debug("checked what %d shards have on disk", len(held))

    async def _check(self, shard: Scrubbed, rows: int, pause_s: float) -> None:
        """One shard, in the time that is meant for it: one that grew is done faster, one that shrank waits."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + stretches(rows) * pause_s
        cursor = b""
        while True:
            await asyncio.sleep(min(pause_s, max(0.0, end_s - loop.time())))
            cursor = await shard.scrub(cursor)
            if not cursor:
                break
        await asyncio.sleep(max(0.0, end_s - loop.time()))


def stretches(rows: int) -> int:
    """About how many steps the check of so many rows and records takes: users, requests and log end one each."""
    return 3 + rows // SCRUB_ROWS
