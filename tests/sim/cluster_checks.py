"""What must hold among the workers of a simulated cluster at every step, and of their users' histories at the end.

What replica_world.py checks per shard is checked here per range: of all shards that overlap, a shard that was cut and
what it was cut into among them, at most one replica may answer. What workers make of the same parents is equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.sim import replica_world
from tests.sim.linearizability import find_violation
from tests.sim.replica_store import request_of
from tests.sim.replica_world import Violation

if TYPE_CHECKING:
    from tests.sim.cluster_world import WorkerSide
    from tests.sim.replica_store import ModelBacked, SimStore
    from tests.sim.replica_worker import Hosted


class Checks(replica_world.Checks):
    """See above."""

    _world: WorkerSide

    def __init__(self, world: WorkerSide) -> None:
        super().__init__(world)
        self._ranges: dict[int, tuple[int, int]] = {}
        self._overlapping: dict[int, tuple[int, ...]] = {}
        """Shards that ever were whose range has a key in common with that of this one, itself among them."""
        self._made: dict[int, tuple[object, ...]] = {}

    def stepped(self, hosted: Hosted) -> None:
        hosted.machine.validate()
        worker = hosted.worker
        if not hosted.machine.may_read(worker.clock()):
            return
        overlapping = self._overlapping.get(hosted.shard_id) or self._learn(hosted)
        for other_worker in self._world.workers.values():
            if not other_worker.is_up or other_worker.is_paused:
                continue
            for shard_id in overlapping:
                other = other_worker.hosted.get(shard_id)
                if other is None or other is hosted or (other_worker is worker and shard_id == hosted.shard_id):
                    continue
                if other.machine.may_read(other_worker.clock()):
                    raise Violation(
                        f"{worker.name} may answer for shard {hosted.shard_id} at epoch {hosted.machine.epoch}, and "
                        f"{other_worker.name} for shard {shard_id} at epoch {other.machine.epoch}"
                    )

    def _learn(self, hosted: Hosted) -> tuple[int, ...]:
        view = hosted.view
        self._ranges[view.shard_id] = (view.lo, view.hi)
        for shard_id, (lo, hi) in self._ranges.items():
            self._overlapping[shard_id] = tuple(
                other for other, (other_lo, other_hi) in self._ranges.items() if lo < other_hi and other_lo < hi
            )
        return self._overlapping[view.shard_id]

    def made(self, name: str, shard_id: int, store: SimStore | ModelBacked) -> None:
        """A worker has made a shard's store of its parents'."""
        place = store.position()
        made = (place.last, place.last_epoch, place.applied, store.digest())
        known = self._made.setdefault(shard_id, made)
        self.counts["made of parents"] += 1
        if known != made:
            raise Violation(f"{name} makes {made} of the parents of shard {shard_id}, another one made {known}")

    def finish(self, store_of: Callable[[str], Any]) -> None:
        """Nothing that was acknowledged is lost, nothing was done twice, nothing that was denied."""
        ledger = self._world.ledger
        applied = Counter(map(request_of, self.committed.values()))
        for request_id, count in applied.items():
            if count > 1:
                raise Violation(f"{request_id} was applied {count} times")
            if request_id in ledger.denied | ledger.refused:
                raise Violation(f"{request_id} was applied, though its client heard that it never would be")
        for request_id, sequence in ledger.acknowledged.items():
            key = ledger.writes[request_id].key
            if store_of(key).request(key, request_id) != sequence:
                raise Violation(f"{request_id}, acknowledged at {sequence}, is not there")

    def check_histories(self) -> None:
        """Every user's history is linearizable."""
        violation = find_violation(self._world.ledger.history())
        if violation is not None:
            lines = "\n".join(f"    {operation}" for operation in violation)
            raise Violation(f"the history of {violation[0].key} is not linearizable:\n{lines}")
