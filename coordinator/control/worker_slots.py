"""How many more launches each worker would start now, and so which worker a launch goes to. Soft state of the leader.

A worker says it in every heartbeat. Until its next one, each launch that the leader gives it takes a slot and each end
that it reports frees one; one that declines has none. It is a hint that spares declines, not a promise: the worker
decides, and its heartbeat puts right whatever the leader did not see. A worker that has not said anything yet, under
this leader or in this session, is taken to have SLOTS_ASSUMED: enough for what is due, too few for a flood of declines.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

SLOTS_ASSUMED = 16
"""Of a worker that has not said how many it has: those of one with the default `launches_max`."""


class WorkerSlots:
    """Free slots by worker, as far as the leader knows."""

    def __init__(self) -> None:
        self._free: dict[str, int] = {}

    def has_free(self, node_id: str) -> bool:
        """True unless the worker would decline."""
        return self._free.get(node_id, SLOTS_ASSUMED) > 0

    def choose(self, workers: Iterable[str], avoid: str = "") -> str:
        """The first that has a free slot, `avoid` only where no other has; empty when none has."""
        free = [worker for worker in workers if self.has_free(worker)]
        return next((worker for worker in free if worker != avoid), avoid if avoid in free else "")

    def put(self, node_id: str, free: int) -> None:
        """What the worker has said."""
        self._free[node_id] = max(0, free)

    def forget(self, node_id: str) -> None:
        """The worker begins a new session."""
        self._free.pop(node_id, None)

    def keep(self, node_ids: Container[str]) -> None:
        """Forgets all other workers."""
        self._free = {node_id: free for node_id, free in self._free.items() if node_id in node_ids}

    def take(self, node_id: str) -> None:
        """The worker is given a launch; empty for nobody."""
        if node_id:
            self._add(node_id, -1)

    def give_back(self, node_id: str) -> None:
        """A launch of the worker has ended."""
        self._add(node_id, 1)

    def _add(self, node_id: str, count: int) -> None:
        self._free[node_id] = max(0, self._free.get(node_id, SLOTS_ASSUMED) + count)
