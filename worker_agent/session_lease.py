"""The worker's session lease: until when it holds, and the one moment at which it has ended. Reads no clock."""

from __future__ import annotations

from coordinator.model import Monotonic

NO_LEASE = Monotonic(float("-inf"))


class SessionLease:
    """Holds until a moment that only later grants move. Invariant: what is held ends exactly once."""

    def __init__(self) -> None:
        self.until = NO_LEASE
        """When it ends, or has ended; minus infinity when there was none, or it was given back."""
        self._is_held = False

    def holds(self, now: Monotonic) -> bool:
        """True while the worker may act under it."""
        return now < self.until

    def renew(self, now: Monotonic, sent_at: Monotonic, lease_s: float) -> None:
        """A grant came for what was sent then; one that came too late gives nothing."""
        self.until = max(self.until, Monotonic(sent_at + lease_s))
        self._is_held = self._is_held or self.holds(now)

    def give_back(self) -> bool:
        """Ends it at once; True when it had not ended."""
        was_held, self._is_held = self._is_held, False
        self.until = NO_LEASE
        return was_held

    def has_just_ended(self, now: Monotonic) -> bool:
        """True the first time that it is asked after the end."""
        if not self._is_held or self.holds(now):
            return False
        self._is_held = False
        return True

    def first(self, deadline: Monotonic | None) -> Monotonic | None:
        """Its end, if it is held and that comes first; else the deadline."""
        if not self._is_held or deadline is None:
            return deadline
        return min(self.until, deadline)
