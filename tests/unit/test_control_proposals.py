"""The book of proposals and the timers of the controllers."""

from __future__ import annotations

from coordinator.api.v1 import command_pb2
from coordinator.control.interface import ProposalEnded, Propose, Tokens
from coordinator.control.proposals import REST_S, REST_S_MAX, Ended, Outcome, Proposals
from coordinator.control.timers import Timers, earliest
from coordinator.model import Monotonic
from coordinator.model.errors import NoLeader, TimedOut

NOW = Monotonic(10.0)


def barrier() -> command_pb2.Command:
    """Some command."""
    return command_pb2.Command(barrier=command_pb2.Barrier())


def applied(index: int) -> command_pb2.CommandResult:
    """The result of a command that was applied."""
    return command_pb2.CommandResult(applied=command_pb2.Applied(index=index))


def refused(code: command_pb2.RefusalCode.ValueType) -> command_pb2.CommandResult:
    """The result of a command that was refused."""
    return command_pb2.CommandResult(refusal=command_pb2.Refusal(code=code, message="no"))


def propose(book: Proposals, now: float = NOW, index: int = 5) -> Propose | None:
    """A proposal for the subject "s", if the book allows one."""
    actions = book.propose(Monotonic(now), index, "s", barrier())
    return actions[0] if actions else None


def test_one_proposal_for_each_subject_with_a_cause() -> None:
    """A second one waits for the end of the first; another subject does not wait."""
    book = Proposals("moves", Tokens())
    first = propose(book)
    assert first is not None
    assert first.command.cause == "moves/s/5"
    assert propose(book) is None
    assert book.propose(NOW, 5, "t", barrier()) != ()
    assert len(book) == 2


def test_after_success_the_subject_rests_until_the_state_shows_it() -> None:
    """The result may come before the state; nothing is decided in between."""
    book = Proposals("moves", Tokens())
    first = propose(book)
    assert first is not None
    assert book.end(NOW, ProposalEnded(first.token, applied(6), None)) == Ended("s", Outcome.APPLIED)
    assert not book.is_free(NOW, 5, "s")
    assert book.free_at(NOW, 5, "s") == NOW + REST_S
    assert book.is_free(NOW, 6, "s")


def test_failures_in_a_row_rest_longer_and_longer() -> None:
    """A command that can never succeed is proposed a few times a minute, not a thousand times a second."""
    book = Proposals("moves", Tokens())
    now: float = NOW
    rests = []
    for _ in range(8):
        action = propose(book, now)
        assert action is not None
        book.end(Monotonic(now), ProposalEnded(action.token, None, NoLeader("nobody leads")))
        free_at = book.next_free(Monotonic(now))
        assert free_at is not None
        rests.append(round(free_at - now, 6))
        now = free_at
    assert rests == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, REST_S_MAX, REST_S_MAX]
    assert book.next_free(Monotonic(now + 60)) is None


def test_outcomes_are_told_apart() -> None:
    """Stale, refused, surely not applied, and unknown are different things."""
    book = Proposals("moves", Tokens())
    ends = [
        (refused(command_pb2.REFUSAL_CODE_STALE), None, Outcome.STALE),
        (refused(command_pb2.REFUSAL_CODE_PRECONDITION), None, Outcome.REFUSED),
        (None, NoLeader("x"), Outcome.NOT_APPLIED),
        (None, TimedOut("x"), Outcome.UNKNOWN),
        (None, None, Outcome.UNKNOWN),
    ]
    now: float = NOW
    for result, error, outcome in ends:
        now += 100
        action = propose(book, now)
        assert action is not None
        ended = book.end(Monotonic(now), ProposalEnded(action.token, result, error))
        assert ended is not None
        assert ended.outcome is outcome


def test_the_ends_of_others_are_not_taken() -> None:
    """Each controller knows its own proposals."""
    book = Proposals("moves", Tokens())
    assert book.end(NOW, ProposalEnded(77, applied(6), None)) is None


def test_timers_ring_once_at_their_last_time() -> None:
    """A timer that was replaced or cleared does not ring for its old time."""
    timers = Timers[str]()
    timers.set("a", Monotonic(5.0))
    timers.set("b", Monotonic(3.0))
    timers.set("a", Monotonic(4.0))
    timers.set("c", Monotonic(1.0))
    timers.set("c", None)
    assert timers.next_wake() == 3.0
    assert timers.take_due(Monotonic(4.5)) == ["b", "a"]
    assert timers.next_wake() is None
    assert timers.take_due(Monotonic(9.0)) == []


def test_earliest_of_some_times() -> None:
    """None stands for never."""
    assert earliest(None, Monotonic(2.0), Monotonic(1.0)) == 1.0
    assert earliest(None) is None
