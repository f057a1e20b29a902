"""What a write to one user's state becomes: judged here, before it is replicated as effects without conditions. Pure.

A primary judges a write against the rows that are applied, and against its **pending** writes: those that it has
submitted and that are not applied yet (the Overlay). The rules:

1. A request id that is known, applied or pending, is the same request again: it gets the first one's answer.
2. A condition is judged on applied rows only. While a pending write touches one of its keys, the judgement waits for
   that write: its version is not known before, and it may still fail.
3. A user's limits are judged on an upper bound first (applied size, plus everything that pending writes put). Only a
   write that may go over waits until nothing of the user is pending, and is then judged on exact figures.

So an accepted write never depends on a pending one: what was judged true stays true until the write takes its place
behind the others in the shard's log, which must happen in the same step of the event loop. And a refusal tells of
applied rows only, so it is a read: whoever hands it out first makes sure that it may read (state_core.py).

A write that shrinks a user passes even above a limit (that was lowered): one must be able to tidy up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from coordinator.api.v1 import replication_pb2, state_pb2
from coordinator.config import StateSettings
from coordinator.model import KEY_BYTES_MAX, check_key
from coordinator.model.errors import CoordinatorError, InvalidRequest, RefusalReason, Refused, VersionConflict
from worker_agent.store_interface import Reader, StateItem

MUTATIONS_MAX = 1_000
WRITE_BYTES_MAX = 8 << 20
"""Keys and values of one write: it travels to the replicas in one message of at most 16 MiB, with others."""
KEYS_READ_MAX = 1_000
SCAN_ITEMS_DEFAULT = 100
SCAN_ITEMS_MAX = 1_000
READ_BYTES_MAX = 8 << 20
"""Values of one answer; a scan ends its page there, a read is refused."""
REQUEST_ID_BYTES_MAX = 128
AT_ONCE = 8
"""So many values are loaded without asking for their sizes first: 8 of 4 MiB are 32 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingWrite:
    """A write that was submitted and is not applied yet. Equal to nothing but itself."""

    user: str
    request_id: str
    keys: frozenset[str]
    keys_put: int
    bytes_put: int
    """Bytes of the keys and values that it puts."""


class Overlay:
    """The pending writes of a worker, by user. An entry goes when its write is applied or has failed."""

    def __init__(self) -> None:
        self._by_user: dict[str, dict[PendingWrite, None]] = {}

    def of(self, user: str) -> Sequence[PendingWrite]:
        """The user's pending writes, in the order of the log."""
        return tuple(self._by_user.get(user, ()))

    def add(self, write: PendingWrite) -> None:
        """It has been submitted."""
        self._by_user.setdefault(write.user, {})[write] = None

    def drop(self, write: PendingWrite) -> None:
        """It is applied, or never will be by this primary."""
        writes = self._by_user.get(write.user, {})
        writes.pop(write, None)
        if not writes:
            self._by_user.pop(write.user, None)


@dataclass(frozen=True, slots=True)
class Accept:
    """Submit this now, and put `write` into the overlay."""

    payload: bytes
    write: PendingWrite


@dataclass(frozen=True, slots=True)
class Repeat:
    """The request was applied before, with this version."""

    version: int


@dataclass(frozen=True, slots=True)
class SameAs:
    """The request is a pending one: what becomes of that one is the answer."""

    write: PendingWrite


@dataclass(frozen=True, slots=True)
class WaitFor:
    """Judge again once none of these is pending; no other write of the user may overtake this one meanwhile."""

    writes: tuple[PendingWrite, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """It cannot be done, as the applied rows stand."""

    error: CoordinatorError


Verdict = Accept | Repeat | SameAs | WaitFor | Refuse


def judge(request: state_pb2.WriteRequest, reader: Reader, overlay: Overlay, settings: StateSettings) -> Verdict:
    """The verdict on a write that `check_write` has passed."""
    user, pending = request.user, overlay.of(request.user)
    if request.request_id:
        version = reader.request(user, request.request_id)
        if version is not None:
            return Repeat(version)
        for write in pending:
            if write.request_id == request.request_id:
                return SameAs(write)
    conditional = [mutation for mutation in request.mutations if mutation.HasField("expected_version")]
    if conditional:
        touching = tuple(write for write in pending if any(mutation.key in write.keys for mutation in conditional))
        if touching:
            return WaitFor(touching)
        if conflict := _conflict(user, conditional, reader):
            return Refuse(conflict)
    write = _pending_write(request)
    size = reader.size(user)
    keys_bound = size.keys + write.keys_put + sum(other.keys_put for other in pending)
    bytes_bound = size.bytes + write.bytes_put + sum(other.bytes_put for other in pending)
    if keys_bound > settings.user_keys_max or bytes_bound > settings.user_bytes_max:
        if pending:
            return WaitFor(tuple(pending))
        if excess := _excess(request, reader, settings):
            return Refuse(excess)
    return Accept(_effects(request).SerializeToString(), write)


def _conflict(user: str, conditional: Sequence[state_pb2.Mutation], reader: Reader) -> VersionConflict | None:
    found = {item.key: item.version for item in _items(user, [mutation.key for mutation in conditional], reader)}
    for mutation in conditional:
        version, expected = found.get(mutation.key, 0), mutation.expected_version
        if version != expected:
            there = f"has version {version}" if version else "does not exist"
            wanted = f"version {expected}" if expected else "a key that does not exist"
            message = f"key {mutation.key!r} {there}, and the write is for {wanted}; read it again"
            return VersionConflict(message, mutation.key, version)
    return None


def _items(user: str, keys: Sequence[str], reader: Reader) -> Iterator[StateItem]:
    """Items of many keys, a few at a time: their values may be large, and nobody needs them all at once."""
    for start in range(0, len(keys), AT_ONCE):
        yield from reader.get(user, keys[start : start + AT_ONCE])


def _excess(request: state_pb2.WriteRequest, reader: Reader, settings: StateSettings) -> Refused | None:
    """The limit that the write would exceed, by the applied rows alone; None when it may pass."""
    before = reader.size(request.user)
    keys_after, bytes_after = before.keys, before.bytes
    for item in _items(request.user, [mutation.key for mutation in request.mutations], reader):
        keys_after -= 1
        bytes_after -= item_bytes(item.key, item.value)
    for mutation in request.mutations:
        if mutation.HasField("put"):
            keys_after += 1
            bytes_after += item_bytes(mutation.key, mutation.put)
    if keys_after > max(settings.user_keys_max, before.keys):
        return Refused(
            RefusalReason.PRECONDITION,
            f"the user would keep {keys_after} keys, and {settings.user_keys_max} are allowed; delete some first",
        )
    if bytes_after > max(settings.user_bytes_max, before.bytes):
        return Refused(
            RefusalReason.PRECONDITION,
            f"the user would keep {bytes_after} bytes, and {settings.user_bytes_max} are allowed; delete some first",
        )
    return None


def item_bytes(key: str, value: bytes) -> int:
    """What one key counts for in a user's size."""
    return len(key.encode("utf-8")) + len(value)


def _pending_write(request: state_pb2.WriteRequest) -> PendingWrite:
    puts = [mutation for mutation in request.mutations if mutation.HasField("put")]
    return PendingWrite(
        user=request.user,
        request_id=request.request_id,
        keys=frozenset(mutation.key for mutation in request.mutations),
        keys_put=len(puts),
        bytes_put=sum(item_bytes(mutation.key, mutation.put) for mutation in puts),
    )


def _effects(request: state_pb2.WriteRequest) -> replication_pb2.Effects:
    return replication_pb2.Effects(
        user=request.user,
        effects=[
            replication_pb2.Effect(key=mutation.key, value=mutation.put if mutation.HasField("put") else None)
            for mutation in request.mutations
        ],
        request_id=request.request_id,
    )


# What can never be right


def check_user(user: str) -> None:
    """Raises InvalidRequest for a name that no user can have."""
    _check_name("user", user)


def check_write(request: state_pb2.WriteRequest, settings: StateSettings) -> None:
    """Raises InvalidRequest for a write that is wrong whatever the state is."""
    check_user(request.user)
    count = len(request.mutations)
    if not 1 <= count <= MUTATIONS_MAX:
        raise InvalidRequest(f"a write has 1 to {MUTATIONS_MAX} mutations, this one has {count}")
    total = 0
    seen: set[str] = set()
    for mutation in request.mutations:
        _check_name("key", mutation.key)
        if mutation.key in seen:
            raise InvalidRequest(f"key {mutation.key!r} stands twice in one write; write each key once")
        seen.add(mutation.key)
        if mutation.WhichOneof("operation") is None or not (mutation.HasField("put") or mutation.delete):
            raise InvalidRequest(f"the mutation of key {mutation.key!r} says neither put nor delete; say one")
        if len(mutation.put) > settings.value_bytes_max:
            raise InvalidRequest(
                f"the value of key {mutation.key!r} has {len(mutation.put)} bytes, and {settings.value_bytes_max} are "
                "allowed; cut it into several keys"
            )
        total += item_bytes(mutation.key, mutation.put)
    if total > WRITE_BYTES_MAX:
        raise InvalidRequest(f"a write has at most {WRITE_BYTES_MAX} bytes, this one has {total}; make several of it")
    if (size := len(request.request_id.encode("utf-8"))) > REQUEST_ID_BYTES_MAX:
        raise InvalidRequest(f"a request id has at most {REQUEST_ID_BYTES_MAX} bytes, this one has {size}")


def check_read(request: state_pb2.ReadRequest) -> None:
    """Raises InvalidRequest for a read that is wrong whatever the state is."""
    check_user(request.user)
    if not 1 <= len(request.keys) <= KEYS_READ_MAX:
        raise InvalidRequest(f"a read has 1 to {KEYS_READ_MAX} keys, this one has {len(request.keys)}")
    for key in request.keys:
        _check_name("key", key)


def check_scan(request: state_pb2.ScanRequest) -> None:
    """Raises InvalidRequest for a scan that is wrong whatever the state is."""
    check_user(request.user)
    if request.limit > SCAN_ITEMS_MAX:
        raise InvalidRequest(f"a page has at most {SCAN_ITEMS_MAX} items, this scan asks for {request.limit}")
    for what, name in (("from_key", request.from_key), ("prefix", request.prefix)):
        if name:
            _check_name(what, name)


def _check_name(what: str, name: str) -> None:
    if not name or len(name) * 4 > KEY_BYTES_MAX:  # Else its bytes are few enough, whatever they are.
        try:
            check_key(name)
        except InvalidRequest:
            size = len(name.encode("utf-8", "surrogatepass"))
            raise InvalidRequest(
                f"a {what} has 1 to {KEY_BYTES_MAX} bytes of UTF-8, this one has {size}"
            ) from None


# Reading


def read(request: state_pb2.ReadRequest, reader: Reader) -> state_pb2.ReadResponse:
    """The keys that exist, as of one moment. Raises InvalidRequest when they are more than an answer holds."""
    keys = list(request.keys)
    total = 0
    with reader.moment():
        if len(keys) > AT_ONCE and reader.size(request.user).bytes > READ_BYTES_MAX:
            for item in _items(request.user, keys, reader):
                total += len(item.value)
                _check_answer(total)
        items = reader.get(request.user, keys)
    _check_answer(sum(len(item.value) for item in items))
    return state_pb2.ReadResponse(items=map(_item, items))


def _check_answer(total: int) -> None:
    if total > READ_BYTES_MAX:
        raise InvalidRequest(
            f"the values are more than the {READ_BYTES_MAX} bytes of one answer; read fewer keys at once"
        )


def scan(request: state_pb2.ScanRequest, reader: Reader) -> state_pb2.ScanResponse:
    """A page, as of one moment: as many items as asked for, fewer when they are large."""
    with reader.moment():
        return _scan(request, reader)


def _scan(request: state_pb2.ScanRequest, reader: Reader) -> state_pb2.ScanResponse:
    limit = request.limit or SCAN_ITEMS_DEFAULT
    start = max(request.from_key, request.prefix, key=lambda name: name.encode("utf-8"))
    is_small = reader.size(request.user).bytes <= READ_BYTES_MAX
    found: list[StateItem] = []
    total = 0
    while len(found) <= limit:
        wanted = limit + 1 - len(found)
        step = wanted if is_small else min(wanted, AT_ONCE)
        items = reader.scan(request.user, start, request.prefix, step)
        for item in items:
            total += len(item.value)
            if len(found) == limit or (found and total > READ_BYTES_MAX):
                return state_pb2.ScanResponse(items=map(_item, found), next_key=item.key)
            found.append(item)
        if len(items) < step:
            break
        start = _after(items[-1].key)
    return state_pb2.ScanResponse(items=map(_item, found))


def _after(key: str) -> str:
    """The first string that sorts behind `key` by its bytes."""
    return key + "\0"


def describe(request: state_pb2.DescribeUserRequest, reader: Reader) -> state_pb2.DescribeUserResponse:
    """How much the user keeps; the rest of the answer is the service's."""
    size = reader.size(request.user)
    return state_pb2.DescribeUserResponse(keys=size.keys, bytes=size.bytes)


def _item(item: StateItem) -> state_pb2.Item:
    return state_pb2.Item(key=item.key, value=item.value, version=item.version)


