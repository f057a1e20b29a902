"""The state client for programs without an event loop: the methods of AsyncStateClient, each waiting for its answer.

    with StateClient(["127.0.0.1:7101"], credentials=who) as state:
        state.put("ann", "name", b"Ann")
        entry = state.get("ann", "name")
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from types import TracebackType

from coordinator.client.loop_thread import LoopThread
from coordinator.client.state import TIMEOUT_S, AsyncStateClient
from coordinator.client.state_types import (
    Entries,
    Entry,
    Mutation,
    Page,
    Request,
    Result,
    Scan,
    UserDescription,
    Written,
)
from coordinator.model.errors import CoordinatorError
from coordinator.security.credentials import Credentials


class StateClient:
    """A client of the users' state of one cluster; a context manager. Any thread may call, also several at once."""

    def __init__(
        self, addresses: Sequence[str], *, timeout_s: float = TIMEOUT_S, credentials: Credentials | None = None
    ) -> None:
        """`addresses` are host:port of the masters; `timeout_s` bounds each call that says nothing else.

        Without credentials it speaks plain text, which only a cluster with `mode = "plaintext"` takes.
        """
        self._client = AsyncStateClient(addresses, timeout_s=timeout_s, credentials=credentials)
        self._calls = LoopThread("state-client", self._client.close)

    def close(self) -> None:
        """Ends all connections and the thread; harmless when there are none."""
        self._calls.close()

    def __enter__(self) -> StateClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def get(self, user: str, key: str, *, stale: bool = False, timeout_s: float | None = None) -> Entry | None:
        """One key of a user; None when it does not exist.

        >>> state.put("ann", "name", b"Ann").version
        1
        >>> state.get("ann", "name")
        Entry(key='name', value=b'Ann', version=1)
        """
        return self._calls.run(self._client.get(user, key, stale=stale, timeout_s=timeout_s))

    def get_many(
        self, user: str, keys: Iterable[str], *, stale: bool = False, timeout_s: float | None = None
    ) -> dict[str, Entry]:
        """Some keys of a user, as of one moment; those that do not exist are left out."""
        return self._calls.run(self._client.get_many(user, keys, stale=stale, timeout_s=timeout_s))

    def read(
        self, user: str, keys: Sequence[str], *, stale: bool = False, timeout_s: float | None = None
    ) -> Entries:
        """Some keys of a user, 1,000 at most, as of one moment; `stale` lets any replica answer, with the age."""
        return self._calls.run(self._client.read(user, keys, stale=stale, timeout_s=timeout_s))

    def scan(
        self,
        user: str,
        *,
        prefix: str = "",
        from_key: str = "",
        page_size: int = 0,
        stale: bool = False,
        timeout_s: float | None = None,
    ) -> Generator[Entry, None, None]:
        """The user's keys in the order of their bytes, fetched page by page; `timeout_s` is for each page.

        >>> [entry.key for entry in state.scan("ann", prefix="na")]
        ['name']
        """
        entries = self._client.scan(
            user, prefix=prefix, from_key=from_key, page_size=page_size, stale=stale, timeout_s=timeout_s
        )
        return self._calls.iterate(entries)

    def scan_page(self, scan: Scan, *, timeout_s: float | None = None) -> Page:
        """One page of a user's keys, and where the next one begins."""
        return self._calls.run(self._client.scan_page(scan, timeout_s=timeout_s))

    def describe_user(self, user: str, *, timeout_s: float | None = None) -> UserDescription:
        """How much a user keeps and may keep, and in which shard."""
        return self._calls.run(self._client.describe_user(user, timeout_s=timeout_s))

    def put(
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

        >>> state.put("ann", "name", b"Anna", expected_version=1)
        Written(version=2, is_repeated=False)
        """
        return self._calls.run(
            self._client.put(
                user, key, value, expected_version=expected_version, request_id=request_id, timeout_s=timeout_s
            )
        )

    def delete(
        self,
        user: str,
        key: str,
        *,
        expected_version: int | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Written:
        """Removes a key; one that does not exist is no error, unless `expected_version` says that it does."""
        return self._calls.run(
            self._client.delete(
                user, key, expected_version=expected_version, request_id=request_id, timeout_s=timeout_s
            )
        )

    def write(
        self, user: str, mutations: Sequence[Mutation], *, request_id: str = "", timeout_s: float | None = None
    ) -> Written:
        """Changes several keys of one user, all or none; they all get the same version.

        >>> state.write("ann", [Put("city", b"Bern"), Delete("name")]).version
        3
        """
        return self._calls.run(self._client.write(user, mutations, request_id=request_id, timeout_s=timeout_s))

    def execute(
        self, operations: Iterable[Request], *, timeout_s: float | None = None
    ) -> list[Result | CoordinatorError]:
        """Independent operations of any users, sent to their workers side by side; no order among them.

        Each has an outcome of its own: its result, or the error that it would have raised alone.

        >>> [found] = state.execute([Read("ann", ["city", "name"])])
        >>> [entry.key for entry in found.entries]
        ['city']
        """
        return self._calls.run(self._client.execute(operations, timeout_s=timeout_s))
