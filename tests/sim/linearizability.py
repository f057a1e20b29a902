"""Is a history of reads and writes of one register linearizable?

The search of Wing and Gong (1993) with Lowe's cache of visited configurations (2017), on registers: a history of
several keys is linearizable when each key's is (Herlihy and Wing 1990, locality), so keys are checked one by one.

An operation that never answered may take effect at any time after its call, or never: its `returned` is infinite, and a
history may end without it. A read that never answered says nothing and is left out.

Two things keep the search short, and change no answer. A read that fits the present value is taken at once: it changes
nothing, so it stands in nobody's way. And a write that never answered, but whose value was read and that nobody else
wrote, took effect before the first of those reads returned.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace


class Any(enum.Enum):
    """Stands where no value is asked for."""

    VALUE = 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One call on one register. Times are of one clock that all callers share."""

    key: str
    is_write: bool
    value: Hashable
    """What was written, or what was read."""
    called: float
    returned: float = math.inf
    client: str = ""
    expected: Hashable = Any.VALUE
    """Of a compare-and-set that succeeded: the value that it found."""


def find_violation(history: Iterable[Operation], initial: Hashable = None) -> list[Operation] | None:
    """The operations of the first key whose history cannot be explained by any order, or None when all can."""
    by_key: dict[str, list[Operation]] = {}
    for operation in history:
        if operation.is_write or operation.returned < math.inf:
            by_key.setdefault(operation.key, []).append(operation)
    for key in sorted(by_key):
        if not is_linearizable(by_key[key], initial):
            return sorted(by_key[key], key=lambda operation: operation.called)
    return None


def is_linearizable(operations: list[Operation], initial: Hashable = None) -> bool:
    """True when some order of one register's operations explains every read and respects time."""
    ordered = sorted(_bounded(operations, initial), key=lambda operation: operation.called)
    must = sum(1 << number for number, operation in enumerate(ordered) if operation.returned < math.inf)
    seen: set[tuple[int, Hashable]] = set()
    stack: list[tuple[int, Hashable]] = [(0, initial)]
    while stack:
        done, value = stack.pop()
        if done & must == must:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        candidates = _candidates(ordered, done)
        fitting = sum(1 << one for one in candidates if not ordered[one].is_write and ordered[one].value == value)
        if fitting:
            stack.append((done | fitting, value))
            continue
        for one in candidates:
            operation = ordered[one]
            if operation.is_write and (operation.expected is Any.VALUE or operation.expected == value):
                stack.append((done | 1 << one, operation.value))
    return False


def _bounded(operations: list[Operation], initial: Hashable) -> list[Operation]:
    """The operations, with an end for each unanswered write that was read."""
    writes = Counter(operation.value for operation in operations if operation.is_write)
    first_read: dict[Hashable, float] = {}
    for operation in operations:
        if not operation.is_write:
            first_read[operation.value] = min(operation.returned, first_read.get(operation.value, math.inf))
    return [
        replace(operation, returned=first_read[operation.value])
        if operation.is_write
        and operation.returned == math.inf
        and operation.value in first_read
        and writes[operation.value] == 1
        and operation.value != initial
        else operation
        for operation in operations
    ]


def _candidates(ordered: list[Operation], done: int) -> list[int]:
    """Operations that may come next: those called before any open operation has returned."""
    first_return = math.inf
    found = []
    for number, operation in enumerate(ordered):
        if operation.called > first_return:
            break
        if not done >> number & 1:
            found.append(number)
            first_return = min(first_return, operation.returned)
    return [number for number in found if ordered[number].called <= first_return]
