"""When a call is tried again: how long to wait, and how often at all. Pure: time and randomness are handed in.

Waits grow by doubling and are drawn evenly below their bound ("full jitter", Brooker 2015), so that clients that failed
together do not come back together. A budget bounds the retries of one client: when a cluster is in trouble for long,
retries must not become most of its load.
"""

from __future__ import annotations

import random

from coordinator.model import errors
from coordinator.model.errors import CoordinatorError

WAIT_S_FIRST = 0.05
WAIT_S_MAX = 1.0
BUDGET_TOKENS = 20.0
BUDGET_TOKENS_PER_S = 2.0
"""A retry costs one token: 20 at once, 2 a second for long."""


def may_retry(error: CoordinatorError) -> bool:
    """True when asking again can help and cannot do harm.

    Every request of this client that changes something has a request id, which the machine applies once; so an unknown
    outcome may be asked about again. A refusal stays a refusal.
    """
    return isinstance(
        error,
        errors.NotLeader
        | errors.NoLeader
        | errors.NotPrimary
        | errors.TooFewReplicas
        | errors.Expired
        | errors.Overloaded
        | errors.Unreachable
        | errors.OutcomeUnknown
        | errors.TimedOut,
    )


class Backoff:
    """The waits of one call."""

    def __init__(self, rng: random.Random, wait_s_max: float = WAIT_S_MAX) -> None:
        self._rng = rng
        self._bound_s = WAIT_S_FIRST
        self._wait_s_max = wait_s_max

    def next_s(self) -> float:
        """How long to wait before the next round, in seconds."""
        wait_s = self._rng.uniform(0.0, self._bound_s)
        self._bound_s = min(self._wait_s_max, self._bound_s * 2)
        return wait_s


class RetryBudget:
    """The retries that one client may still make. Invariant: 0 <= tokens <= tokens_max."""

    def __init__(self, tokens_max: float = BUDGET_TOKENS, tokens_per_s: float = BUDGET_TOKENS_PER_S) -> None:
        self._tokens_max = tokens_max
        self._tokens_per_s = tokens_per_s
        self._tokens = tokens_max
        self._counted_at_s: float | None = None

    def take(self, now_s: float) -> bool:
        """True when one more retry may be made; counts it."""
        if self._counted_at_s is not None:
            earned = max(0.0, now_s - self._counted_at_s) * self._tokens_per_s
            self._tokens = min(self._tokens_max, self._tokens + earned)
        self._counted_at_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
