"""Clients of the simulated shards: registers that they write, read and compare-and-set through any worker.

Every write has a value of its own and keeps its request id through all attempts. It is acknowledged, or unknown for
ever, or denied: every attempt ended definitely. A compare-and-set that found another value counts as a read of that.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.sim.linearizability import Operation
from tests.sim.replica_worker import Reply, Request, Worker

if TYPE_CHECKING:
    from tests.sim.replica_world import World

ATTEMPTS_MAX = 12
ATTEMPT_S_MAX = 1.0


class Ledger:
    """What all clients know together."""

    def __init__(self) -> None:
        self.reads: list[Operation] = []
        self.writes: dict[str, Operation] = {}
        self.acknowledged: dict[str, int] = {}
        self.denied: set[str] = set()
        self.refused: set[str] = set()
        """Compare-and-sets that found another value: they never happened."""
        self.longest_s = 0.0

    def history(self) -> list[Operation]:
        """Everything that may have happened."""
        read = {(operation.key, operation.value) for operation in self.reads}
        expected = {(write.key, write.expected) for write in self.writes.values()}
        writes = [
            write
            for request_id, write in self.writes.items()
            if request_id not in self.denied
            and request_id not in self.refused
            # One that never answered and that nobody saw is explained by "never happened".
            and (write.returned != float("inf") or {(write.key, write.value)} & (read | expected))
        ]
        return [*self.reads, *writes]


class Client:
    """One client, one operation at a time."""

    def __init__(self, world: World, name: str, rng: random.Random) -> None:
        self._world = world
        self._name = name
        self._rng = rng
        self._numbers = 0
        self._attempt = 0
        self._attempts_left = 0
        self._may_be_applied = False
        self._hints: dict[int, str] = {}
        self._seen: dict[str, str | None] = {}
        self.is_stopped = False
        self._think()

    def _think(self) -> None:
        self._attempt += 1
        if not self.is_stopped:
            self._world.after(self._rng.expovariate(1 / self._world.plan.think_s), self._begin)

    def _begin(self) -> None:
        if self.is_stopped:
            return
        world, rng = self._world, self._rng
        shard_id = rng.randint(1, world.plan.shards)
        register = f"s{shard_id}-{rng.choice(world.registers)}"
        self._numbers += 1
        self._attempts_left, self._may_be_applied = ATTEMPTS_MAX, False
        if rng.random() < 0.45:
            self._attempts_left = 4
            self._ask(Request(shard_id, register))
            return
        request_id = f"{self._name}-{self._numbers}"
        value = f"v-{request_id}" if rng.random() < 0.85 else None
        request = Request(shard_id, register, True, value, request_id)
        operation = Operation(register, True, request.value, world.now_s, client=self._name)
        if rng.random() < 0.3 and register in self._seen:
            request = replace(request, is_conditional=True, expected=self._seen[register])
            operation = replace(operation, expected=request.expected)
        world.ledger.writes[request_id] = operation
        self._ask(request)

    def _target(self, shard_id: int) -> Worker:
        hint = self._hints.get(shard_id)
        if hint is None or self._rng.random() < 0.1:
            hint = self._rng.choice(self._world.names)
        return self._world.workers[hint]

    def _ask(self, request: Request) -> None:
        world, target = self._world, self._target(request.shard_id)
        self._attempt += 1
        self._attempts_left -= 1
        attempt, called_s = self._attempt, world.now_s

        def arrive(worker: Worker) -> None:
            hosted = worker.hosted.get(request.shard_id)
            if hosted is None:
                back(Reply(error=None, sequence=-1))
            else:
                hosted.handle(request, back)

        def back(reply: Reply) -> None:
            world.after(world.net.delay_s(), lambda: self._answered(request, reply, attempt, called_s, target.name))

        if target.is_up:
            world.after(world.net.delay_s(), lambda: target.enqueue(arrive))
        else:
            back(Reply(sequence=-1))
        world.after(ATTEMPT_S_MAX, lambda: self._expire(request, attempt))

    def _expire(self, request: Request, attempt: int) -> None:
        if attempt == self._attempt:
            self._may_be_applied = True
            self._hints.pop(request.shard_id, None)
            self._again(request)

    def _answered(self, request: Request, reply: Reply, attempt: int, called_s: float, target: str) -> None:
        ledger, now_s = self._world.ledger, self._world.now_s
        if reply.error is None and reply.sequence >= 0:
            self._note(request, reply, called_s)
        if attempt != self._attempt:
            return
        if reply.error is None and reply.sequence >= 0:
            self._hints[request.shard_id] = target
            if request.is_write:
                ledger.longest_s = max(ledger.longest_s, now_s - ledger.writes[request.request_id].called)
            self._think()
            return
        self._hints.pop(request.shard_id, None)
        if reply.error is not None:
            self._may_be_applied |= not reply.error.DEFINITE
            hint = getattr(reply.error, "primary_id", "")
            if hint:
                self._hints[request.shard_id] = hint
        self._again(request)

    def _note(self, request: Request, reply: Reply, called_s: float) -> None:
        """A success goes down in the history, however late."""
        ledger, now_s = self._world.ledger, self._world.now_s
        if not request.is_write:
            self._seen[request.register] = reply.value
            ledger.reads.append(Operation(request.register, False, reply.value, called_s, now_s, self._name))
            return
        if reply.is_conflict:
            self._seen[request.register] = reply.value
            ledger.reads.append(Operation(request.register, False, reply.value, called_s, now_s, self._name))
            if not self._may_be_applied:
                ledger.refused.add(request.request_id)
            return
        self._seen[request.register] = request.value
        before = ledger.writes[request.request_id]
        known = ledger.acknowledged.setdefault(request.request_id, reply.sequence)
        assert known == reply.sequence, f"{request.request_id} was acknowledged at {known} and at {reply.sequence}"
        if before.returned == float("inf"):
            ledger.writes[request.request_id] = replace(before, returned=now_s)

    def _again(self, request: Request) -> None:
        self._attempt += 1
        if self._attempts_left > 0 and not self.is_stopped:
            self._world.after(self._rng.uniform(0.01, 0.3), lambda: self._ask(request))
            return
        if request.is_write and not self._may_be_applied and request.request_id not in self._world.ledger.acknowledged:
            self._world.ledger.denied.add(request.request_id)
        self._think()
