"""The asynchronous client of users' state: finds the worker that has a user, and retries what is safe.

    async with AsyncStateClient(["127.0.0.1:7101"], credentials=who) as state:
        await state.put("ann", "name", b"Ann")
        entry = await state.get("ann", "name")

Every method takes `timeout_s`, which bounds it with all its retries. Writes carry a request id, so that a retry applies
once, also across a failover; give your own to make a retry of *yours* safe, after a crash for example. Methods raise
the exceptions of coordinator/model/errors.py; those whose `DEFINITE` is true changed nothing.

    VersionConflict   a key has another version than expected: `key`, `found_version`
    Refused           the user would keep more than is allowed
    TimedOut, OutcomeUnknown   the write may be applied: ask again with the same request id
"""

from __future__ import annotations

import random
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from types import TracebackType

from coordinator.api.v1 import state_pb2
from coordinator.client.masters import Masters
from coordinator.client.state_batch import Batch
from coordinator.client.state_calls import StateCalls
from coordinator.client.state_types import (
    Delete,
    Entries,
    Entry,
    Mutation,
    Page,
    Put,
    Request,
    Result,
    Scan,
    UserDescription,
    Write,
    Written,
    description_of,
    entries_of,
    operation_of,
    page_of,
    scan_message,
    write_message,
    written_of,
)
from coordinator.model.errors import CoordinatorError
from coordinator.security.credentials import Credentials

TIMEOUT_S = 10.0


class AsyncStateClient:
    """A client of the users' state of one cluster. Belongs to the event loop that it is first used in."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout_s: float = TIMEOUT_S,
        credentials: Credentials | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`addresses` are host:port of the masters; `timeout_s` bounds each call that says nothing else.

        Without credentials it speaks plain text, which only a cluster with `mode = "plaintext"` takes.
        """
        rng = rng or random.Random()
        self.timeout_s = timeout_s
        self._masters = Masters(addresses, timeout_s=timeout_s, credentials=credentials, rng=rng)
        self._calls = StateCalls(self._masters, credentials, rng)

    async def close(self) -> None:
        """Ends all connections."""
        await self._calls.close()
        await self._masters.close()

    async def __aenter__(self) -> AsyncStateClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # Reading

    async def get(
        self, user: str, key: str, *, stale: bool = False, timeout_s: float | None = None
    ) -> Entry | None:
        """One key of a user; None when it does not exist.

        >>> entry = await state.get("ann", "name")
        >>> entry.value, entry.version
        (b'Ann', 1)
        """
        entries = (await self.read(user, [key], stale=stale, timeout_s=timeout_s)).entries
        return entries[0] if entries else None

    async def get_many(
        self, user: str, keys: Iterable[str], *, stale: bool = False, timeout_s: float | None = None
    ) -> dict[str, Entry]:
        """Some keys of a user, as of one moment; those that do not exist are left out.

        >>> found = await state.get_many("ann", ["name", "nickname"])
        >>> sorted(found)
        ['name']
        """
        entries = (await self.read(user, list(keys), stale=stale, timeout_s=timeout_s)).entries
        return {entry.key: entry for entry in entries}

    async def read(
        self, user: str, keys: Sequence[str], *, stale: bool = False, timeout_s: float | None = None
    ) -> Entries:
        """Some keys of a user, 1,000 at most, as of one moment. With `stale` any replica may answer, and says how old.

        >>> (await state.read("ann", ["name"], stale=True)).age_s
        0.0
        """
        request = state_pb2.ReadRequest(user=user, keys=keys, stale=stale)
        response = await self._calls.call(
            lambda link: link.state.Read, request, self._time(timeout_s), any_replica=stale
        )
        return entries_of(response)

    async def scan(
        self,
        user: str,
        *,
        prefix: str = "",
        from_key: str = "",
        page_size: int = 0,
        stale: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Entry, None]:
        """The user's keys in the order of their bytes, fetched page by page; `timeout_s` is for each page.

        Each page is as of one moment, the scan as a whole is not.

        >>> [entry.key async for entry in state.scan("ann", prefix="na")]
        ['name']
        """
        while True:
            request = Scan(user, from_key, prefix, page_size, stale)
            page = await self.scan_page(request, timeout_s=timeout_s)
            for entry in page.entries:
                yield entry
            from_key = page.next_key
            if not from_key:
                return

    async def scan_page(self, scan: Scan, *, timeout_s: float | None = None) -> Page:
        """One page of a user's keys, and where the next one begins."""
        response = await self._calls.call(
            lambda link: link.state.Scan, scan_message(scan), self._time(timeout_s), any_replica=scan.stale
        )
        return page_of(response)

    async def describe_user(self, user: str, *, timeout_s: float | None = None) -> UserDescription:
        """How much a user keeps and may keep, and in which shard.

        >>> about = await state.describe_user("ann")
        >>> about.keys, about.bytes, about.keys_max
        (1, 7, 10000)
        """
        request = state_pb2.DescribeUserRequest(user=user)
        response = await self._calls.call(lambda link: link.state.DescribeUser, request, self._time(timeout_s))
        return description_of(response)

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
        """Stores a value; with `expected_version` only if the key has that version now, 0 for one that does not exist.

        >>> (await state.put("ann", "name", b"Ann")).version
        1
        >>> try:
        ...     await state.put("ann", "name", b"Anna", expected_version=0)
        ... except VersionConflict as conflict:
        ...     print(conflict.key, "has version", conflict.found_version)
        name has version 1
        """
        mutation = Put(key, value, expected_version)
        return await self.write(user, [mutation], request_id=request_id, timeout_s=timeout_s)

    async def delete(
        self,
        user: str,
        key: str,
        *,
        expected_version: int | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Written:
        """Removes a key; one that does not exist is no error, unless `expected_version` says that it does.

        >>> (await state.delete("ann", "nickname")).version
        2
        """
        mutation = Delete(key, expected_version)
        return await self.write(user, [mutation], request_id=request_id, timeout_s=timeout_s)

    async def write(
        self, user: str, mutations: Sequence[Mutation], *, request_id: str = "", timeout_s: float | None = None
    ) -> Written:
        """Changes several keys of one user, all or none; they all get the same version.

        >>> (await state.write("bob", [Put("name", b"Bob"), Put("city", b"Bern"), Delete("draft")])).version
        3
        """
        request = write_message(Write(user, mutations), request_id or uuid.uuid4().hex)
        response = await self._calls.call(lambda link: link.state.Write, request, self._time(timeout_s))
        return written_of(response)

    # Many users

    async def execute(
        self, operations: Iterable[Request], *, timeout_s: float | None = None
    ) -> list[Result | CoordinatorError]:
        """Independent operations of any users, sent to their workers side by side; no order among them.

        Each has an outcome of its own: its result, or the error that it would have raised alone.

        >>> wrote, read = await state.execute([Write("cid", [Put("name", b"Cid")]), Read("bob", ["city"])])
        >>> wrote.version, read.entries[0].value
        (4, b'Bern')
        """
        messages = [
            operation_of(operation, (operation.request_id or uuid.uuid4().hex) if isinstance(operation, Write) else "")
            for operation in operations
        ]
        if not messages:
            return []
        time_s = self._time(timeout_s)
        clock = self._calls.clock(time_s)
        return await Batch(self._calls, messages, clock).run(await self._calls.map.table(time_s))

    def _time(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s
