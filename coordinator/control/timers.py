"""When a controller must look at each of its subjects again.

A timer that is set too early only costs a look; one that is set too late costs a deadline. So whoever sets one gives
the earliest time at which something could be due, and renews it when it rings: a heartbeat never has to touch a timer.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Any, Generic, NamedTuple, TypeVar

from coordinator.model import Monotonic, WallMs

Subject = TypeVar("Subject", bound=Hashable)


class Moment(NamedTuple):
    """One reading of both clocks: `now` for what lasts, `wall` for schedules and for people."""

    now: Monotonic
    wall: WallMs


def earliest(*times: Monotonic | None) -> Monotonic | None:
    """The first of the times that are given; None when none is."""
    given = [time for time in times if time is not None]
    return min(given) if given else None


class Timers(Generic[Subject]):
    """One time for each subject; subjects can be sorted.

    Invariant: the first entry of the heap that is still meant is the earliest due.
    """

    def __init__(self) -> None:
        self._due: dict[Subject, Monotonic] = {}
        self._heap: list[tuple[Monotonic, Any]] = []

    def set(self, subject: Subject, due: Monotonic | None) -> None:
        """Replaces the subject's time; None clears it."""
        if due is None:
            self._due.pop(subject, None)
        elif self._due.get(subject) != due:
            self._due[subject] = due
            heapq.heappush(self._heap, (due, subject))

    def take_due(self, now: Monotonic) -> list[Subject]:
        """Subjects whose time has come, in its order; their timers are cleared."""
        due: list[Subject] = []
        while self._heap and self._heap[0][0] <= now:
            time, subject = heapq.heappop(self._heap)
            if self._due.get(subject) == time:
                del self._due[subject]
                due.append(subject)
        return due

    def next_wake(self) -> Monotonic | None:
        """The earliest time; None when no timer is set."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None


class Gathered(Generic[Subject]):
    """Subjects that are looked at together, `wait_s` after the first of them came at the latest."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._subjects: dict[Subject, None] = {}
        self.due_at: Monotonic | None = None
        """When they are to be taken; None while there are none."""

    def add(self, now: Monotonic, subject: Subject) -> None:
        """Puts one to the others."""
        self._subjects[subject] = None
        if self.due_at is None:
            self.due_at = Monotonic(now + self._wait_s)

    def take_due(self, now: Monotonic) -> list[Subject]:
        """All of them, in the order in which they came, once it is time; else none."""
        return self.take() if self.due_at is not None and self.due_at <= now else []

    def take(self) -> list[Subject]:
        """All of them now."""
        subjects = list(self._subjects)
        self._subjects.clear()
        self.due_at = None
        return subjects
