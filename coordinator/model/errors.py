"""Every exception that crosses a module boundary, in one tree.

    CoordinatorError
    ├── DefiniteError             nothing was changed; a retry is safe
    │   ├── Refused               the state machine said no (carries a RefusalReason)
    │   ├── InvalidRequest        a request that can never be right
    │   ├── ConfigError           a configuration that cannot be used
    │   ├── Unauthenticated       a caller that shows no certificate of this cluster
    │   ├── Forbidden             a caller whose role may not make the call
    │   ├── NotLeader             the asked master does not lead; names the leader where known
    │   ├── NoLeader              nobody leads at the moment
    │   ├── Overloaded            a queue is full
    │   └── Unreachable           no connection was made
    ├── IndefiniteError           it may or may not have been applied; retry only with the same request id
    │   ├── OutcomeUnknown        the leader changed while the command was on its way
    │   └── TimedOut              no answer within the deadline
    └── Damaged                   data on disk cannot be trusted; the daemon must not go on

Each class maps to exactly one gRPC status, given by `GRPC_STATUS` and, for `Refused`, by its reason (Maelstrom's
division into definite and indefinite errors). The message is one line for people: what was wrong, the value, what to
do.
"""

from __future__ import annotations

import enum
from typing import ClassVar


class CoordinatorError(Exception):
    """Base of all; `GRPC_STATUS` is the name of a grpc.StatusCode."""

    GRPC_STATUS = "INTERNAL"
    DEFINITE = False


class DefiniteError(CoordinatorError):
    """Nothing was changed."""

    DEFINITE = True


class RefusalReason(enum.Enum):
    """Why the state machine refused; the value is the number of RefusalCode in command.proto."""

    NOT_FOUND = 1
    ALREADY_EXISTS = 2
    INVALID = 3
    STALE = 4
    PRECONDITION = 5


class Refused(DefiniteError):
    """The state machine refused a command, deterministically, on every master alike."""

    STATUS_BY_REASON: ClassVar[dict[RefusalReason, str]] = {
        RefusalReason.NOT_FOUND: "NOT_FOUND",
        RefusalReason.ALREADY_EXISTS: "ALREADY_EXISTS",
        RefusalReason.INVALID: "INVALID_ARGUMENT",
        RefusalReason.STALE: "ABORTED",
        RefusalReason.PRECONDITION: "FAILED_PRECONDITION",
    }

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def grpc_status(self) -> str:
        """Name of the gRPC status for this refusal."""
        return self.STATUS_BY_REASON[self.reason]


class InvalidRequest(DefiniteError):
    """A request has a field that can never be right."""

    GRPC_STATUS = "INVALID_ARGUMENT"


class ConfigError(DefiniteError):
    """A configuration cannot be used; `problems` has one line per fault."""

    GRPC_STATUS = "INVALID_ARGUMENT"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Unauthenticated(DefiniteError):
    """The caller showed no certificate of this cluster."""

    GRPC_STATUS = "UNAUTHENTICATED"


class Forbidden(DefiniteError):
    """The caller's role may not make this call."""

    GRPC_STATUS = "PERMISSION_DENIED"


class NotLeader(DefiniteError):
    """The asked master does not lead."""

    GRPC_STATUS = "UNAVAILABLE"

    def __init__(self, message: str, leader_id: str = "", leader_address: str = "") -> None:
        super().__init__(message)
        self.leader_id = leader_id
        self.leader_address = leader_address


class NoLeader(DefiniteError):
    """Nobody leads at the moment."""

    GRPC_STATUS = "UNAVAILABLE"


class Overloaded(DefiniteError):
    """A queue is full; try again later."""

    GRPC_STATUS = "RESOURCE_EXHAUSTED"


class Unreachable(DefiniteError):
    """No connection could be made to any address that was tried."""

    GRPC_STATUS = "UNAVAILABLE"


class IndefiniteError(CoordinatorError):
    """It may or may not have been applied."""

    GRPC_STATUS = "UNKNOWN"


class OutcomeUnknown(IndefiniteError):
    """The leader changed while the command was on its way."""

    GRPC_STATUS = "UNKNOWN"


class TimedOut(IndefiniteError):
    """No answer came within the deadline."""

    GRPC_STATUS = "DEADLINE_EXCEEDED"


class Damaged(CoordinatorError):
    """Data on disk cannot be trusted: which file, where, and what to do."""

    GRPC_STATUS = "DATA_LOSS"
