"""gRPC failures become the exceptions of coordinator/model/errors.py again.

A master that fails a call says why in an ErrorDetail (trailing metadata `coordinator-error-bin`). Without one, the
failure comes from the connection or from grpc itself; then the status alone decides, and what may have been applied is
never called definite.
"""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError

from coordinator.api.v1 import cluster_pb2
from coordinator.model import errors
from coordinator.model.errors import CoordinatorError, NotLeader, NotPrimary, Refused, VersionConflict

ERROR_METADATA = "coordinator-error-bin"

_BY_NAME: dict[str, type[CoordinatorError]] = {
    kind.__name__: kind
    for kind in (
        errors.InvalidRequest,
        errors.Unauthenticated,
        errors.Forbidden,
        errors.NoLeader,
        errors.TooFewReplicas,
        errors.Expired,
        errors.Overloaded,
        errors.Unreachable,
        errors.OutcomeUnknown,
        errors.TimedOut,
        errors.Damaged,
        errors.DefiniteError,
        errors.IndefiniteError,
    )
}
# A worker whose disk is full is as good as one whose queue is: later, or elsewhere, there is room.
_BY_NAME["StoreFull"] = errors.Overloaded
_NEVER_CONNECTED = "failed to connect to all addresses"
"""What gRPC says when there was no connection to send the call on, so that nothing was sent."""
_TOO_LARGE = "larger than max"
"""What gRPC says, in either direction, of a message above the channel's limit."""
_REASON_BY_STATUS = {status: reason for reason, status in Refused.STATUS_BY_REASON.items()}


def error_of(failure: grpc.aio.AioRpcError, address: str) -> CoordinatorError:
    """The exception behind a failed call to `address`."""
    detail = detail_of(failure)
    status = failure.code()
    if detail is None:
        return _error_of_status(status, failure.details() or "", address)
    return error_of_detail(detail, status.name)


def error_of_detail(detail: cluster_pb2.ErrorDetail, status: str = "") -> CoordinatorError:
    """The exception that a detail tells of; `status` is the name of the gRPC status, else the detail's own."""
    status = status or detail.status
    if detail.code == "NotLeader":
        return NotLeader(detail.message, detail.leader_id, detail.leader_address)
    if detail.code == "NotPrimary":
        return NotPrimary(detail.message, detail.primary_id, detail.primary_address, detail.shard_id)
    if detail.code == "VersionConflict":
        return VersionConflict(detail.message, detail.key, detail.found_version)
    if detail.code == "Refused" and status in _REASON_BY_STATUS:
        return Refused(_REASON_BY_STATUS[status], detail.message)
    if detail.code == "ConfigError":
        return errors.ConfigError(detail.message.splitlines())
    kind = _BY_NAME.get(detail.code)
    if kind is None:  # A master of a newer version; what it says of the outcome still counts.
        kind = errors.DefiniteError if detail.definite else CoordinatorError
    return kind(detail.message)


def detail_of(failure: grpc.aio.AioRpcError) -> cluster_pb2.ErrorDetail | None:
    """What the master said of the failure; None when it said nothing that can be read."""
    for name, value in failure.trailing_metadata() or ():
        if name == ERROR_METADATA and isinstance(value, bytes):
            try:
                return cluster_pb2.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None


def _error_of_status(status: grpc.StatusCode, details: str, address: str) -> CoordinatorError:
    said = f" ({details})" if details else ""
    match status:
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.TimedOut(f"{address} did not answer within the deadline")
        case grpc.StatusCode.UNIMPLEMENTED:
            return errors.InvalidRequest(f"{address} does not know this call{said}; is it a master of this version?")
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.OUT_OF_RANGE:
            return errors.InvalidRequest(f"{address} refused the request{said}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if _TOO_LARGE in details:
            # To ask again would give the same. Answers to changes are small, so it was a question, or the request.
            return errors.InvalidRequest(f"{address}: a message is too large{said}; ask or send less at once")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.Overloaded(f"{address} has no room for the request{said}")
        case grpc.StatusCode.UNAVAILABLE if _NEVER_CONNECTED in details:
            return errors.Unreachable(f"{address} accepts no connection")
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return errors.OutcomeUnknown(f"the connection to {address} ended before the answer{said}")
        case _:
            return errors.IndefiniteError(f"{address} failed with {status.name}{said}")
