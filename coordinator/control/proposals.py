"""The commands of one controller that are on their way: at most one for each subject at a time.

A controller decides from the state, and a command that was proposed but not yet applied is not in the state. Without
this book it would decide the same thing again on every event. Three rules keep it calm:

1. While a command is on its way, nothing more is proposed for its subject.
2. When it was applied at index `i`, the subject rests until the controller has seen the state at `i`.
3. When it was refused or failed, the subject rests; longer each time in a row, so that a command that can never succeed
   does not fill the log.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from coordinator.api.v1 import command_pb2
from coordinator.control.interface import ProposalEnded, Propose, Tokens
from coordinator.control.timers import earliest
from coordinator.model import Monotonic
from coordinator.model.errors import CoordinatorError

REST_S = 0.1
"""After the first refusal or failure; doubles with each one that follows at once."""
REST_S_MAX = 5.0


class Outcome(enum.Enum):
    """How a proposal ended."""

    APPLIED = "applied"
    REFUSED = "refused"
    STALE = "stale"
    """Refused, because the state has gone on since the decision."""
    NOT_APPLIED = "not applied"
    UNKNOWN = "unknown"
    """It may have been applied."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one of the controller's own proposals."""

    subject: str
    outcome: Outcome
    reason: str = ""
    """Why it was not applied, for people."""


@dataclass(slots=True)
class _Rest:
    until: Monotonic
    index: int
    """The state at this index ends the rest; 0 when only time does."""
    failures: int


class Proposals:
    """The book of one controller. Invariant: a subject is in at most one of `_tokens`' values."""

    def __init__(self, controller: str, tokens: Tokens) -> None:
        self._controller = controller
        self._source = tokens
        self._tokens: dict[int, str] = {}
        self._in_flight: set[str] = set()
        self._rests: dict[str, _Rest] = {}

    def __len__(self) -> int:
        return len(self._in_flight)

    def is_free(self, now: Monotonic, index: int, subject: str) -> bool:
        """True when a command may be proposed for the subject by one who knows the state at `index`."""
        if subject in self._in_flight:
            return False
        rest = self._rests.get(subject)
        return rest is None or now >= rest.until or 0 < rest.index <= index

    def propose(
        self, now: Monotonic, index: int, subject: str, command: command_pb2.Command
    ) -> tuple[Propose, ...]:
        """The action that proposes the command, with its cause filled in; none while the subject is not free."""
        if not self.is_free(now, index, subject):
            return ()
        command.cause = f"{self._controller}/{subject}/{index}"
        token = self._source.next()
        self._tokens[token] = subject
        self._in_flight.add(subject)
        return (Propose(token, command),)

    def end(self, now: Monotonic, event: ProposalEnded) -> Ended | None:
        """Takes the end of a proposal in; None when it is another controller's."""
        subject = self._tokens.pop(event.token, None)
        if subject is None:
            return None
        self._in_flight.discard(subject)
        ended = _read(subject, event.result, event.error)
        if ended.outcome is Outcome.APPLIED and event.result is not None:
            self._rests[subject] = _Rest(Monotonic(now + REST_S), event.result.applied.index, 0)
        else:
            before = self._rests.get(subject)
            in_a_row = before is not None and now < before.until + REST_S_MAX
            failures = before.failures + 1 if before is not None and in_a_row else 1
            rest_s = min(REST_S * 2 ** min(failures - 1, 10), REST_S_MAX)
            self._rests[subject] = _Rest(Monotonic(now + rest_s), 0, failures)
        return ended

    def free_at(self, now: Monotonic, index: int, subject: str) -> Monotonic | None:
        """When a resting subject is free again; None when it is free, or when a command of it is on its way."""
        if subject in self._in_flight or self.is_free(now, index, subject):
            return None
        return self._rests[subject].until

    def next_free(self, now: Monotonic) -> Monotonic | None:
        """When the next of all resting subjects is free."""
        for subject in [subject for subject, rest in self._rests.items() if now >= rest.until + REST_S_MAX]:
            del self._rests[subject]
        return earliest(*(rest.until for rest in self._rests.values() if rest.until > now))

    def forget(self, subject: str) -> None:
        """Drops what is remembered of a subject that has ended."""
        self._rests.pop(subject, None)


def _read(
    subject: str, result: command_pb2.CommandResult | None, error: CoordinatorError | None
) -> Ended:
    if error is not None or result is None:
        definite = error is not None and error.DEFINITE
        return Ended(subject, Outcome.NOT_APPLIED if definite else Outcome.UNKNOWN, str(error or "no result"))
    if result.HasField("applied"):
        return Ended(subject, Outcome.APPLIED)
    stale = result.refusal.code == command_pb2.REFUSAL_CODE_STALE
    return Ended(subject, Outcome.STALE if stale else Outcome.REFUSED, result.refusal.message)
