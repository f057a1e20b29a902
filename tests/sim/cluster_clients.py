"""Clients of the simulated cluster: they find a user's primary by the shard map, as coordinator/client does.

The map is asked for once, from the leader or else from any master, and again when a worker does not answer or says that
it is not the primary; a hint of where to ask goes before the map. What an operation is, and what becomes of it in the
history, is replica_clients.py's. Each register is the one key of a user of its own.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from coordinator.machine.state import State
from coordinator.model import Shard, key_hash
from tests.sim import replica_clients
from tests.sim.cluster_route import Arrival
from tests.sim.linearizability import Operation
from tests.sim.replica_clients import ATTEMPT_S_MAX, ATTEMPTS_MAX
from tests.sim.replica_worker import Reply, Request
from worker_agent.state_route import Known

if TYPE_CHECKING:
    from tests.sim.cluster_master import Master
    from tests.sim.cluster_world import WorkerSide, World

FETCH_S_MAX = 0.4
STALE_SHARE = 0.2
"""So many maps come from any master: an old one does no harm but to cost a redirection."""


class Table:
    """The shards by range, as of one state."""

    def __init__(self, state: State) -> None:
        self.index = state.index
        self._shards = sorted(state.shards.values(), key=lambda shard: shard.lo)
        self._lows = [shard.lo for shard in self._shards]

    def locate(self, hashed: int) -> Shard | None:
        """The shard of a hash."""
        return self._shards[bisect_right(self._lows, hashed) - 1] if self._shards else None


class Client(replica_clients.Client):
    """One client, one operation at a time. A request's shard_id is the number of its user here."""

    _world: WorkerSide

    def __init__(self, world: WorkerSide, name: str, rng: random.Random) -> None:
        self._table: Table | None = None
        super().__init__(world, name, rng)

    @property
    def _cluster(self) -> World:
        return self._world.cluster

    def _begin(self) -> None:
        if self.is_stopped:
            return
        world, rng = self._world, self._rng
        number = rng.randrange(len(world.registers))
        register = world.registers[number]
        self._numbers += 1
        self._attempts_left, self._may_be_applied = ATTEMPTS_MAX, False
        if rng.random() < 0.45:
            self._attempts_left = 4
            self._ask(Request(number, register))
            return
        request_id = f"{self._name}-{self._numbers}@{register}"
        value = f"v-{self._name}-{self._numbers}" if rng.random() < 0.85 else None
        request = Request(number, register, True, value, request_id)
        operation = Operation(register, True, request.value, world.now_s, client=self._name)
        if rng.random() < 0.3 and register in self._seen:
            request = replace(request, is_conditional=True, expected=self._seen[register])
            operation = replace(operation, expected=request.expected)
        world.ledger.writes[request_id] = operation
        self._ask(request)

    # The map

    def _fetch(self, then: Callable[[], None]) -> None:
        """Asks for the map; goes on with whatever it has when no master answers."""
        cluster, rng = self._cluster, self._rng
        leader = cluster.leader()
        is_stale = leader is None or rng.random() < STALE_SHARE
        target = cluster.masters[rng.choice(cluster.ids)] if leader is None or is_stale else leader
        is_done: list[bool] = []

        def came(state: State | None) -> None:
            if not is_done:
                is_done.append(True)
                if state is not None and state.shards and (self._table is None or state.index >= self._table.index):
                    self._table = cluster.table_of(state)
                then()

        def answered(state: State | None) -> None:
            cluster.at(target.time_s() + self._world.net.delay_s(), lambda: came(state))

        def ask(master: Master) -> None:
            if is_stale:
                answered(master.consensus_now.state)
            else:
                master.read(lambda state, error: answered(state))

        cluster.after(self._world.net.delay_s(), lambda: target.enqueue(ask))
        cluster.after(FETCH_S_MAX, lambda: came(None))

    # Attempts

    def _ask(self, request: Request) -> None:
        if self._table is None:
            self._fetch(lambda: self._send(request))
        else:
            self._send(request)

    def _send(self, request: Request) -> None:
        world, cluster = self._world, self._cluster
        self._attempt += 1
        self._attempts_left -= 1
        attempt, called_s = self._attempt, world.now_s
        shard = self._table.locate(key_hash(request.register)) if self._table is not None else None
        hint = self._hints.get(request.shard_id, "")
        name = hint or (shard.primary if shard is not None else "")
        if not name:
            world.after(0.0, lambda: self._answered(request, Reply(sequence=-1), attempt, called_s, ""))
            return
        target = cluster.workers.workers[name]

        def back(reply: Reply) -> None:
            world.after(world.net.delay_s(), lambda: self._answered(request, reply, attempt, called_s, name))

        known = Known(shard.id, shard.epoch) if shard is not None else Known()
        arrival = Arrival(request, back, called_s + ATTEMPT_S_MAX, known)
        if target.is_up:
            world.after(world.net.delay_s(), lambda: target.enqueue(lambda _: target.ask(arrival)))
        else:
            back(Reply(sequence=-1))
        world.after(ATTEMPT_S_MAX, lambda: self._expire(request, attempt))

    def _again(self, request: Request) -> None:
        if self._attempts_left > 0 and not self.is_stopped and request.shard_id not in self._hints:
            # Nobody said where to ask: the map is old.
            self._attempt += 1
            waiting = self._attempt
            pause_s = self._rng.uniform(0.01, 0.2)
            self._world.after(pause_s, lambda: self._fetch(lambda: self._go_on(request, waiting)))
            return
        super()._again(request)

    def _go_on(self, request: Request, waiting: int) -> None:
        if waiting != self._attempt:
            return
        if self.is_stopped:
            super()._again(request)
        else:
            self._send(request)
