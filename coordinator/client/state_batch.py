"""Many operations on users' state at once: split by worker, asked side by side, each with an outcome of its own.

What fails and may be retried goes into the next round with whatever else is left, sent to where it belongs by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coordinator.api.v1 import state_pb2
from coordinator.client.shard_map import ShardTable, Target
from coordinator.client.state_calls import Clockwork, StateCalls, Tries
from coordinator.client.state_types import Message, Result, result_of
from coordinator.model.errors import CoordinatorError, IndefiniteError, NotPrimary

CHUNK_OPERATIONS = 500
CHUNK_BYTES = 4 << 20
"""One call to a worker has at most so much: a message has at most 16 MiB, and several calls go side by side."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One operation that has not ended."""

    index: int
    operation: state_pb2.Operation
    message: Message
    """The operation's own."""
    tries: Tries


@dataclass(frozen=True, slots=True)
class _Aimed:
    """One operation in one round."""

    part: _Part
    target: Target
    address: str


class Batch:
    """One call of `AsyncStateClient.execute`."""

    def __init__(self, calls: StateCalls, operations: Sequence[state_pb2.Operation], clock: Clockwork) -> None:
        self._calls = calls
        self._clock = clock
        self._results: list[Result | CoordinatorError | None] = [None] * len(operations)
        self._left: list[_Part] = []
        for index, operation in enumerate(operations):
            message = getattr(operation, operation.WhichOneof("operation") or "write")
            self._left.append(_Part(index, operation, message, Tries(message)))

    async def run(self, table: ShardTable) -> list[Result | CoordinatorError]:
        """The outcomes, in the order of the operations."""
        while True:
            chunks = list(_chunks(self._aim(table)))
            await asyncio.gather(*(self._ask(chunk) for chunk in chunks))
            self._left = [part for part in self._left if self._results[part.index] is None]
            if not self._left:
                return [result for result in self._results if result is not None]
            is_pointed = all(part.tries.hint for part in self._left)
            if not await self._calls.wait(self._clock, at_once=is_pointed):
                for part in self._left:
                    self._results[part.index] = part.tries.final()
                return [result for result in self._results if result is not None]
            if not is_pointed:
                table = await self._calls.newer(self._clock, table)

    def _aim(self, table: ShardTable) -> list[_Aimed]:
        """Where each operation goes in this round; what can go nowhere fails."""
        aimed = []
        for part in self._left:
            try:
                target = table.locate(part.message.user)
                if not (address := part.tries.hint or target.primary_address):
                    raise NotPrimary(f"shard {target.shard_id} has no primary at the moment", shard_id=target.shard_id)
            except CoordinatorError as error:
                self._failed(part, error, "")
            else:
                aimed.append(_Aimed(part, target, address))
        return aimed

    async def _ask(self, chunk: list[_Aimed]) -> None:
        """One call to one worker."""
        address = chunk[0].address
        request = state_pb2.ExecuteRequest(operations=[one.part.operation for one in chunk])
        try:
            link = await self._calls.links.connect(address, self._clock.left_s())
            call = link.state.Execute(request, timeout=self._clock.attempt_s())
            aims = [(one.part.message.user, one.target) for one in chunk]
            response: state_pb2.ExecuteResponse = await self._calls.watched(call, link, aims)
            if len(response.outcomes) != len(chunk):
                raise IndefiniteError(f"{address} answered {len(response.outcomes)} of {len(chunk)} operations")
        except CoordinatorError as error:
            for one in chunk:
                self._failed(one.part, error, address)
            return
        for one, outcome in zip(chunk, response.outcomes, strict=True):
            result = result_of(outcome)
            if isinstance(result, CoordinatorError):
                self._failed(one.part, result, address)
            else:
                self._results[one.part.index] = result

    def _failed(self, part: _Part, error: CoordinatorError, address: str) -> None:
        if not part.tries.failed(error, address):
            self._results[part.index] = part.tries.final()


def _chunks(aimed: list[_Aimed]) -> Iterator[list[_Aimed]]:
    """The operations by address, in calls of bearable size."""
    by_address: dict[str, list[_Aimed]] = {}
    for one in aimed:
        by_address.setdefault(one.address, []).append(one)
    for group in by_address.values():
        chunk: list[_Aimed] = []
        size = 0
        for one in group:
            added = one.part.operation.ByteSize()
            if chunk and (len(chunk) == CHUNK_OPERATIONS or size + added > CHUNK_BYTES):
                yield chunk
                chunk, size = [], 0
            chunk.append(one)
            size += added
        yield chunk
