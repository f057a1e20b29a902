"""What the state client takes and gives: frozen values, made from and to the messages of state.proto. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.api.v1 import cluster_pb2, state_pb2
from coordinator.client.errors import error_of_detail
from coordinator.model.errors import CoordinatorError, IndefiniteError, InvalidRequest

# What is asked for


@dataclass(frozen=True, slots=True)
class Put:
    """Store a value."""

    key: str
    value: bytes
    expected_version: int | None = None
    """Only if the key has this version, 0: only if it does not exist. None: in any case."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a key; one that is not there is no error."""

    key: str
    expected_version: int | None = None
    """As for Put."""


Mutation = Put | Delete


@dataclass(frozen=True, slots=True)
class Write:
    """Changes of one user, all or none."""

    user: str
    mutations: Sequence[Mutation]
    request_id: str = ""
    """Makes a retry of yours apply once; one is made when it is left out."""


@dataclass(frozen=True, slots=True)
class Read:
    """Some keys of one user, as of one moment."""

    user: str
    keys: Sequence[str]
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """A page of one user's keys."""

    user: str
    from_key: str = ""
    prefix: str = ""
    limit: int = 0
    """Items at most; 0 means 100, 1,000 at most. A page with values of more than 8 MiB ends earlier."""
    stale: bool = False


# What comes back


@dataclass(frozen=True, slots=True)
class Entry:
    """One key."""

    key: str
    value: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Written:
    """A write is committed."""

    version: int
    """Of everything that it wrote."""
    is_repeated: bool
    """True when the request had been applied before."""


@dataclass(frozen=True, slots=True)
class Entries:
    """The keys that exist, in the order in which they were asked for."""

    entries: tuple[Entry, ...]
    age_s: float
    """Of a stale read: how long ago the replica last knew itself to have all that was committed; else 0."""


@dataclass(frozen=True, slots=True)
class Page:
    """Keys in order."""

    entries: tuple[Entry, ...]
    next_key: str
    """`from_key` of the next page; empty when this is the last one."""
    age_s: float
    """As for Entries."""


@dataclass(frozen=True, slots=True)
class UserDescription:
    """How much a user keeps, and may keep."""

    keys: int
    bytes: int
    keys_max: int
    bytes_max: int
    shard_id: int
    key_hash: int


Request = Write | Read | Scan
Result = Written | Entries | Page
Message = state_pb2.WriteRequest | state_pb2.ReadRequest | state_pb2.ScanRequest | state_pb2.DescribeUserRequest


def write_message(write: Write, request_id: str) -> state_pb2.WriteRequest:
    """The message of a write."""
    return state_pb2.WriteRequest(
        user=write.user, mutations=[_mutation(one) for one in write.mutations], request_id=request_id
    )


def _mutation(mutation: Mutation) -> state_pb2.Mutation:
    match mutation:
        case Put(key, value, expected):
            return state_pb2.Mutation(key=key, put=value, expected_version=expected)
        case Delete(key, expected):
            return state_pb2.Mutation(key=key, delete=True, expected_version=expected)


def operation_of(request: Request, request_id: str) -> state_pb2.Operation:
    """The message of one operation among many. Raises InvalidRequest for what is none."""
    match request:
        case Write():
            return state_pb2.Operation(write=write_message(request, request_id))
        case Read():
            message = state_pb2.ReadRequest(user=request.user, keys=request.keys, stale=request.stale)
            return state_pb2.Operation(read=message)
        case Scan():
            return state_pb2.Operation(scan=scan_message(request))
        case _:
            raise InvalidRequest(f"{request!r} is no operation; use Write, Read or Scan")


def scan_message(scan: Scan) -> state_pb2.ScanRequest:
    """The message of a scan."""
    return state_pb2.ScanRequest(
        user=scan.user, from_key=scan.from_key, prefix=scan.prefix, limit=scan.limit, stale=scan.stale
    )


def written_of(response: state_pb2.WriteResponse) -> Written:
    """The value of an answer."""
    return Written(response.version, response.is_repeated)


def entries_of(response: state_pb2.ReadResponse) -> Entries:
    """The value of an answer."""
    return Entries(tuple(map(_entry, response.items)), response.age_s)


def page_of(response: state_pb2.ScanResponse) -> Page:
    """The value of an answer."""
    return Page(tuple(map(_entry, response.items)), response.next_key, response.age_s)


def _entry(item: state_pb2.Item) -> Entry:
    return Entry(item.key, item.value, item.version)


def description_of(response: state_pb2.DescribeUserResponse) -> UserDescription:
    """The value of an answer."""
    return UserDescription(
        response.keys,
        response.bytes,
        response.keys_max,
        response.bytes_max,
        response.shard_id,
        response.key_hash,
    )


def result_of(outcome: state_pb2.OperationOutcome) -> Result | CoordinatorError:
    """What became of one operation among many."""
    match outcome.WhichOneof("outcome"):
        case "write":
            return written_of(outcome.write)
        case "read":
            return entries_of(outcome.read)
        case "scan":
            return page_of(outcome.scan)
        case "error":
            return error_of_detail(cluster_pb2.ErrorDetail.FromString(outcome.error))
        case _:
            return IndefiniteError("the worker's answer has an outcome that this client does not know")
