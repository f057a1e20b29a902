"""Is a history of reads and writes of one register linearizable?

The search of Wing and Gong (1993) with Lowe's cache of visited configurations (2017), on registers: a history of
several keys is linearizable when each key's is (Herlihy and Wing 1990, locality), so keys are checked one by one.

An operation that never answered may take effect at any time after its call, or never: its `returned` is infinite, and a
history may end without it. A read that never answered says nothing and is left out.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass


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
    ordered = sorted(operations, key=lambda operation: operation.called)
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
        for number in _candidates(ordered, done):
            operation = ordered[number]
            if operation.is_write:
                if operation.expected is Any.VALUE or operation.expected == value:
                    stack.append((done | 1 << number, operation.value))
            elif operation.value == value:
                stack.append((done | 1 << number, value))
    return False


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
