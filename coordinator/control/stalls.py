"""Workers that took nothing of a copy lately: soft state of one leader, shared by its controllers.

A worker whose disk hangs still sends its heartbeats, and the ring would choose it for the next copy too. So for
`AVOID_S` after a copy to it was given up it gets none: who else can take it does, and otherwise the shard waits. Then
it may show what it is worth. A new process of the worker begins with a clean slate, and so does a new leader.
"""

from __future__ import annotations

from coordinator.model import Monotonic

AVOID_S = 60.0


class Stalls:
    """The book of one leader."""

    def __init__(self) -> None:
        self._until: dict[str, Monotonic] = {}

    def note(self, now: Monotonic, node_id: str) -> None:
        """A copy to the worker was given up."""
        self._until[node_id] = Monotonic(now + AVOID_S)

    def forget(self, node_id: str) -> None:
        """It is another process now, or gone."""
        self._until.pop(node_id, None)

    def avoided(self, now: Monotonic) -> frozenset[str]:
        """Workers that get no copy now."""
        self._until = {node_id: until for node_id, until in self._until.items() if now < until}
        return frozenset(self._until)

    def next_end(self) -> Monotonic | None:
        """When the first of them may get one again."""
        return min(self._until.values(), default=None)
