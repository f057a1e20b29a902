"""The checker of histories, on histories whose answer is known."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tests.sim.linearizability import Operation, find_violation


def write(value: int, called: float, returned: float = math.inf, key: str = "x") -> Operation:
    return Operation(key, True, value, called, returned)


def read(value: int | None, called: float, returned: float, key: str = "x") -> Operation:
    return Operation(key, False, value, called, returned)


GOOD = [
    [],
    [read(None, 0, 1)],
    [write(1, 0, 1), read(1, 2, 3)],
    # Concurrent with the write: either value is right.
    [write(1, 0, 10), read(None, 1, 2), read(1, 3, 4)],
    # Two concurrent writes in the order in which the readers saw them.
    [write(1, 0, 10), write(2, 0, 10), read(2, 1, 2), read(1, 3, 4), read(1, 11, 12)],
    # A write that never answered took effect late.
    [write(1, 0), read(None, 5, 6), read(1, 100, 101)],
    # A write that never answered never took effect.
    [write(1, 0), write(2, 1, 2), read(2, 50, 51)],
    [write(1, 0, 1, "x"), read(None, 2, 3, "y")],
]
BAD = [
    [read(7, 0, 1)],
    [write(1, 0, 1), read(None, 2, 3)],
    # A value seen and then unseen.
    [write(1, 0, 10), read(1, 1, 2), read(None, 3, 4)],
    [write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)],
    # Two readers that see two writes in different orders.
    [write(1, 0, 20), write(2, 0, 20), read(1, 1, 2), read(2, 3, 4), read(1, 5, 6)],
    # A write that took effect before it was called.
    [read(1, 0, 1), write(1, 2, 3)],
    [write(1, 0, 1, "x"), read(1, 2, 3, "x"), read(5, 2, 3, "y")],
]


@pytest.mark.parametrize("history", GOOD)
def test_good_histories_pass(history: list[Operation]) -> None:
    """Shows that the checker accepts histories that some order explains."""
    assert find_violation(history) is None


@pytest.mark.parametrize("history", BAD)
def test_bad_histories_are_caught(history: list[Operation]) -> None:
    """Shows that the checker refuses histories that no order explains."""
    assert find_violation(history)


def test_a_long_history_is_checked_quickly() -> None:
    """Shows that a thousand operations with some overlap are decided without trying every order."""
    history = []
    for number in range(500):
        history.append(write(number, number, number + 2.5))
        history.append(read(number, number + 2.6, number + 2.9))
    assert find_violation(history) is None
    assert find_violation([*history, read(100, 600, 601)]) is not None


def explained_by_brute_force(history: list[Operation]) -> bool:
    """Every order of every choice of unanswered writes, tried."""
    unanswered = [one for one in history if one.returned == math.inf]
    answered = [one for one in history if one.returned < math.inf]
    for count in range(len(unanswered) + 1):
        for taken in itertools.combinations(unanswered, count):
            for order in itertools.permutations([*answered, *taken]):
                if any(late.returned < early.called for early, late in itertools.combinations(order, 2)):
                    continue
                value: object = None
                for one in order:
                    if not one.is_write and one.value != value:
                        break
                    value = one.value if one.is_write else value
                else:
                    return True
    return False


def test_the_short_search_finds_what_a_full_one_finds() -> None:
    """Random small histories, with unanswered writes and values that are written twice: the same answer each time."""
    rng = random.Random(1)
    answers = set()
    for _ in range(600):
        history = []
        for _ in range(rng.randint(1, 5)):
            called = rng.uniform(0, 10)
            if rng.random() < 0.5:
                history.append(write(rng.randint(1, 3), called, rng.choice([math.inf, called + rng.uniform(0, 5)])))
            else:
                history.append(read(rng.choice([None, 1, 2, 3]), called, called + rng.uniform(0, 5)))
        expected = explained_by_brute_force(history)
        assert (find_violation(history) is None) is expected, history
        answers.add(expected)
    assert answers == {True, False}
