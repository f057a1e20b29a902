"""Hands the cluster's story to those who read it: what the state keeps, then what follows.

A reader holds one number, the next sequence that it wants, and reads from the state; nothing is queued for it. So a
slow reader costs nothing, and one that fell behind what is kept is told so instead of being shown a story with a hole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from coordinator.machine.state import Transition
from coordinator.model import LogRecord
from coordinator.model.errors import Overloaded
from coordinator.raft.node import RaftNode

LATEST_DEFAULT = 100
RECORDS_PER_MESSAGE_MAX = 500


class Story:
    """The story of this master's state, which may lag a little behind the leader's."""

    def __init__(self, raft: RaftNode, stopping: asyncio.Event) -> None:
        self._raft = raft
        self._stopping = stopping
        self._more = asyncio.Event()
        raft.on_transition(self._on_transition)

    def _on_transition(self, transition: Transition) -> None:
        if transition.records:
            self.wake()

    def wake(self) -> None:
        """Lets all readers look again; also called when the daemon begins to stop."""
        self._more.set()
        self._more = asyncio.Event()

    async def read(self, from_sequence: int, latest: int, follow: bool, kind: str) -> AsyncIterator[list[LogRecord]]:
        """Batches of records, in order. Ends at the present, or with `follow` when the daemon stops.

        Raises Overloaded when the reader has fallen behind what is kept.
        """
        next_sequence = from_sequence or self._first_of_latest(latest or LATEST_DEFAULT, kind)
        is_first = True
        while True:
            # Taken before the look, so that what is applied between the look and the wait wakes this reader.
            more = self._more
            state = self._raft.state
            oldest = state.next_event_sequence - len(state.events)
            if next_sequence < oldest:
                if not is_first:
                    raise Overloaded(
                        f"this reader fell behind: it needs event {next_sequence}, the oldest that is kept "
                        f"is {oldest}; read again from there"
                    )
                next_sequence = oldest
            is_first = False
            end = min(state.next_event_sequence, next_sequence + RECORDS_PER_MESSAGE_MAX)
            batch = [state.events[sequence] for sequence in range(next_sequence, end)]
            next_sequence = max(next_sequence, end)
            wanted = [record for record in batch if not kind or record.kind == kind]
            if wanted:
                yield wanted
            if batch:
                continue
            if not follow or self._stopping.is_set():
                return
            await more.wait()

    def _first_of_latest(self, latest: int, kind: str) -> int:
        """Sequence of the first of the `latest` records of a kind."""
        state = self._raft.state
        found = 0
        sequence = state.next_event_sequence
        while sequence - 1 in state.events and found < latest:
            sequence -= 1
            found += not kind or state.events[sequence].kind == kind
        return max(1, sequence)
