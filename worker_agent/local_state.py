"""Users' state for an application on the worker: the methods of AsyncStateClient, answered by the replica beside it.

Reads and writes are those of the gRPC service (state_core.py), with the same linearizability, limits and errors, and
without a hop. They never leave the worker: for a user whose shard is not served here they raise NotPrimary at once, and
for one whose shard stops being served before the answer is certain they raise what is known then: NotPrimary when
nothing was done, OutcomeUnknown when a write may be applied. Ask AsyncStateClient for users of other workers.

What an application remembers of a user is as of the version that it read: another worker may have been primary since,
even though this one is again. So a write that builds on something read names that version (`expected_version`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass

from coordinator.api.v1 import state_pb2
from coordinator.client.state_types import (
    Delete,
    Entries,
    Entry,
    Mutation,
    Page,
    Put,
    Scan,
    UserDescription,
    Write,
    Written,
    description_of,
    entries_of,
    page_of,
    scan_message,
    write_message,
    written_of,
)
from coordinator.model import key_hash
from coordinator.model.errors import InvalidRequest, NotPrimary
from worker_agent.state_core import StateCore
from worker_agent.state_interface import Elsewhere, ShardHost
from worker_agent.state_route import Scope
from worker_agent.user_state import check_user

TIMEOUT_S = 10.0
USERS_PAGE = 500

Message = state_pb2.WriteRequest | state_pb2.ReadRequest | state_pb2.ScanRequest | state_pb2.DescribeUserRequest


@dataclass(frozen=True, slots=True)
class OwnedShard:
    """A shard that this worker serves as primary, from on_acquired to on_released."""

    shard_id: int
    lo: int
    hi: int
    """First key hash after the range, at most 2^64."""
    epoch: int
    """When it began; later ones of the same tenure have the same object."""

    def holds(self, user: str) -> bool:
        """True when the user's state is in this shard."""
        return self.lo <= key_hash(user) < self.hi


class LocalState:
    """State of the users whose shards this worker serves. Belongs to the worker's event loop."""

    def __init__(self, worker_id: str, core: StateCore, host: ShardHost, *, timeout_s: float = TIMEOUT_S) -> None:
        self.worker_id = worker_id
        """Id of this worker."""
        self.timeout_s = timeout_s
        """Bounds each call that says nothing else."""
        self._core = core
        self._host = host

    def serves(self, user: str) -> bool:
        """True while this worker answers for the user; what is asked in the same step of the event loop is begun."""
        check_user(user)
        shard = self._host.locate(key_hash(user))
        return not isinstance(shard, Elsewhere) and shard.is_serving

    # Reading

    async def get(self, user: str, key: str, *, timeout_s: float | None = None) -> Entry | None:
        """One key of a user; None when it does not exist."""
        entries = (await self.read(user, [key], timeout_s=timeout_s)).entries
        return entries[0] if entries else None

    async def get_many(self, user: str, keys: Iterable[str], *, timeout_s: float | None = None) -> dict[str, Entry]:
        """Some keys of a user, as of one moment; those that do not exist are left out."""
        entries = (await self.read(user, list(keys), timeout_s=timeout_s)).entries
        return {entry.key: entry for entry in entries}

    async def read(self, user: str, keys: Sequence[str], *, timeout_s: float | None = None) -> Entries:
        """Some keys of a user, 1,000 at most, as of one moment."""
        request = state_pb2.ReadRequest(user=user, keys=keys)
        return entries_of(await self._core.read(request, self._scope(request, timeout_s)))

    async def scan(
        self, user: str, *, prefix: str = "", from_key: str = "", page_size: int = 0, timeout_s: float | None = None
    ) -> AsyncGenerator[Entry, None]:
        """The user's keys in the order of their bytes; each page is as of one moment, the scan as a whole is not."""
        while True:
            page = await self.scan_page(Scan(user, from_key, prefix, page_size), timeout_s=timeout_s)
            for entry in page.entries:
                yield entry
            from_key = page.next_key
            if not from_key:
                return

    async def scan_page(self, scan: Scan, *, timeout_s: float | None = None) -> Page:
        """One page of a user's keys, and where the next one begins. Never a stale one: the primary is here."""
        request = scan_message(scan)
        request.stale = False
        return page_of(await self._core.scan(request, self._scope(request, timeout_s)))

    async def users(
        self, shard: OwnedShard, *, page_size: int = USERS_PAGE, timeout_s: float | None = None
    ) -> AsyncGenerator[str, None]:
        """All users of a shard that is served here who keep at least one key, in no order that means anything.

        They are read a page at a time, each as of one moment and within `timeout_s`. Users who come meanwhile may be
        left out, those who were there before and still are never. Raises NotPrimary once the shard is not served here.
        """
        if page_size < 1:
            raise InvalidRequest(f"a page has at least one user, not {page_size}")
        after = ""
        while True:
            found = self._host.locate(shard.lo)
            if isinstance(found, Elsewhere) or not found.is_serving or found.shard_id != shard.shard_id:
                raise NotPrimary(f"{self.worker_id} does not serve shard {shard.shard_id}", shard_id=shard.shard_id)
            scope = self._bounds(timeout_s)
            users = await self._core.users(shard.shard_id, shard.lo, after, page_size, scope)
            for user in users:
                yield user
            if len(users) < page_size:
                return
            after = users[-1]

    async def describe_user(self, user: str, *, timeout_s: float | None = None) -> UserDescription:
        """How much a user keeps and may keep, and in which shard."""
        request = state_pb2.DescribeUserRequest(user=user)
        return description_of(await self._core.describe(request, self._scope(request, timeout_s)))

    # Writing

    async def put(
        self,
        user: str,
        key: str,
        value: bytes,
        *,
        expected_version: int | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Written:
        """Stores a value; with `expected_version` only if the key has that version now, 0 for one that is not there."""
        return await self.write(user, [Put(key, value, expected_version)], request_id=request_id, timeout_s=timeout_s)

    async def delete(
        self,
        user: str,
        key: str,
        *,
        expected_version: int | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Written:
        """Removes a key; one that is not there is no error, unless `expected_version` says that it is."""
        return await self.write(user, [Delete(key, expected_version)], request_id=request_id, timeout_s=timeout_s)

    async def write(
        self, user: str, mutations: Sequence[Mutation], *, request_id: str = "", timeout_s: float | None = None
    ) -> Written:
        """Changes several keys of one user, all or none; they all get the same version."""
        request = write_message(Write(user, mutations), request_id or uuid.uuid4().hex)
        return written_of(await self._core.write(request, self._scope(request, timeout_s)))

    def _scope(self, request: Message, timeout_s: float | None) -> Scope:
        """The bounds of a request that never leaves this worker. Raises NotPrimary, and InvalidRequest for no user."""
        if not self.serves(request.user):
            found = self._host.locate(key_hash(request.user))
            which = f"shard {found.shard_id}" if found.shard_id else "the user's shard"
            primary = found.primary if found.primary.node_id != self.worker_id else None
            where = f"; ask {primary.node_id}" if primary is not None and primary.node_id else ""
            raise NotPrimary(
                f"{self.worker_id} does not serve {which}{where}",
                primary_id=primary.node_id if primary is not None else "",
                primary_address=primary.address if primary is not None else "",
                shard_id=found.shard_id,
            )
        return self._bounds(timeout_s, request.ByteSize())

    def _bounds(self, timeout_s: float | None, size: int = 0) -> Scope:
        give_up_at_s = asyncio.get_running_loop().time() + (self.timeout_s if timeout_s is None else timeout_s)
        return Scope(give_up_at_s, is_forwarded=True, size=size)
