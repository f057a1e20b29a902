"""Where a simulated worker answers a request: plays the Router of state_route.py around its real `direct`.

A request that the worker cannot answer now waits for a change, or is passed on once, or is sent back to its client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from coordinator.model import key_hash
from coordinator.model.errors import NotPrimary
from tests.sim.replica_worker import Reply, Request
from worker_agent.state_interface import Elsewhere, HostedShard
from worker_agent.state_route import NEWS_WAIT_S, Hold, Known, PassOn, Scope, Wait, direct

if TYPE_CHECKING:
    from tests.sim.cluster_worker import Slot, Worker


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request at a worker."""

    request: Request
    answer: Callable[[Reply], None]
    give_up_s: float
    """By the world's clock: its client waits no longer."""
    known: Known = Known()  # noqa: RUF009 - frozen
    is_forwarded: bool = False


class Routes:
    """The requests of one life of a worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._held: dict[int, tuple[Arrival, float]] = {}
        """What waits for a change, and until when."""
        self._last = 0
        self._is_look_due = False

    def take(self, arrival: Arrival) -> None:
        """Answers a request, passes it on, holds it, or sends it back."""
        worker = self._worker
        found = worker.locate(key_hash(arrival.request.register))
        scope = Scope(arrival.give_up_s, arrival.is_forwarded, arrival.known)
        direction = direct(cast("HostedShard | Elsewhere", found), scope, worker.name)
        match direction:
            case PassOn():
                self._pass_on(arrival, direction)
            case Hold():
                self._hold(arrival, direction)
            case NotPrimary():
                arrival.answer(Reply(error=direction))
            case _:
                hosted = cast("Slot", direction).hosted
                assert hosted is not None
                hosted.handle(arrival.request, arrival.answer)

    def _pass_on(self, arrival: Arrival, direction: PassOn) -> None:
        worker = self._worker
        net, workers = worker.world.net, worker.cluster.workers.workers
        target = workers[direction.primary.node_id]
        there, back = (worker.name, target.name), (target.name, worker.name)
        if not target.is_up or {there, back} & net.holes:
            error = NotPrimary(f"{target.name} accepts no connection", shard_id=direction.known.shard_id)
            self._hold(arrival, Hold(Wait.FOR_NEWS, error))
            return

        def answer(reply: Reply) -> None:
            if back not in net.holes:
                worker.world.after(net.delay_s(), lambda: worker.enqueue(lambda _: arrival.answer(reply)))

        forwarded = replace(arrival, answer=answer, known=direction.known, is_forwarded=True)
        worker.cluster.counts["passed on"] += 1
        worker.world.after(net.delay_s(), lambda: target.enqueue(lambda _: target.ask(forwarded)))

    def _hold(self, arrival: Arrival, hold: Hold) -> None:
        worker, now_s = self._worker, self._worker.world.now_s
        until_s = min(arrival.give_up_s, now_s + (NEWS_WAIT_S if hold.wait is Wait.FOR_NEWS else float("inf")))
        if until_s <= now_s:
            arrival.answer(Reply(error=hold.error))
            return
        self._last += 1
        number = self._last
        self._held[number] = (arrival, until_s)
        worker.cluster.counts["held"] += 1

        def expire() -> None:
            if self._held.pop(number, None) is not None:
                arrival.answer(Reply(error=hold.error))

        worker.later(until_s - now_s, expire)

    def changed(self) -> None:
        """Something is another one: whatever waits looks again in the next turn."""
        if self._held and not self._is_look_due:
            self._is_look_due = True
            self._worker.later(0.0, self._look)

    def _look(self) -> None:
        self._is_look_due = False
        held, self._held = self._held, {}
        for arrival, _ in held.values():
            self.take(arrival)
