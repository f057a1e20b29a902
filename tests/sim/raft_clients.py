"""Clients of the simulated masters: they write and read a few registers, retry, and keep the history.

A register is the weight of a worker; every write has a value of its own. A write keeps its request id through all its
attempts. It is acknowledged, or unknown for ever, or denied: given up after attempts that all ended definitely. Every
attempt to read is an operation of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.state import State
from coordinator.model.errors import CoordinatorError, IndefiniteError, NoLeader
from tests.sim.linearizability import Operation
from tests.sim.raft_master import Master

if TYPE_CHECKING:
    from tests.sim.raft_world import World

REGISTERS = ("r1", "r2", "r3")
INITIAL = 1.0
ATTEMPTS_MAX = 8
ATTEMPT_S_MAX = 0.8
"""How long a client waits for the answer of one attempt."""
GIVE_UP_SHARE = 0.3
"""Of writes that have definitely not been applied, by what this attempt was told."""


def set_up_commands() -> list[command_pb2.Command]:
    """What makes the cluster and its registers."""
    settings = types_pb2.Settings(replicas=1)
    bootstrap = command_pb2.BootstrapCluster(cluster_id="sim", shards=1, settings=settings)
    commands = [command_pb2.Command(request_id="bootstrap", bootstrap_cluster=bootstrap)]
    for name in REGISTERS:
        node = types_pb2.Node(id=name, incarnation="1", weight=INITIAL, grpc_address=f"{name}:1")
        register = command_pb2.RegisterNode(node=node)
        commands.append(command_pb2.Command(request_id=f"make-{name}", register_node=register))
    return commands


class Ledger:
    """What all clients know together."""

    def __init__(self) -> None:
        self.reads: list[Operation] = []
        self.writes: dict[str, Operation] = {}
        self.acknowledged: dict[str, int] = {}
        self.denied: set[str] = set()
        self._values = 0

    def next_value(self) -> float:
        """A value that nobody has written."""
        self._values += 1
        return 1.0 + self._values / 1_000

    @property
    def history(self) -> list[Operation]:
        """Everything that was done and not denied."""
        return [*self.reads, *(write for id, write in self.writes.items() if id not in self.denied)]


class Client:
    """One client, one operation at a time. Its latest attempt is the one whose answer it waits for."""

    def __init__(self, world: World, name: str, rng: random.Random) -> None:
        self._world = world
        self._name = name
        self._rng = rng
        self._favourite = rng.choice(world.ids)
        self._operations = 0
        self._attempt = 0
        self._attempts_left = 0
        self._may_be_applied = False
        self.is_stopped = False
        self._think()

    def _think(self) -> None:
        if not self.is_stopped:
            self._world.after(self._rng.expovariate(1 / self._world.plan.think_s), self._begin)

    def _begin(self) -> None:
        if self.is_stopped:
            return
        self._operations += 1
        key = self._rng.choice(REGISTERS)
        if self._rng.random() < 0.5:
            self.read(key)
        else:
            request_id = f"{self._name}-{self._operations}"
            operation = Operation(key, True, self._world.ledger.next_value(), self._world.now_s, client=self._name)
            self._world.ledger.writes[request_id] = operation
            self._attempts_left, self._may_be_applied = ATTEMPTS_MAX, False
            self._write(request_id)

    def _target(self) -> Master:
        if self._rng.random() < 0.4:
            self._favourite = self._rng.choice(self._world.ids)
        return self._world.masters[self._favourite]

    def _delay_s(self) -> float:
        return 0.000_05 + 0.003 * self._rng.random() ** 2

    # Reading

    def read(self, key: str) -> None:
        """One attempt to read."""
        called_s, target = self._world.now_s, self._target()
        attempt = self._attempt = self._attempt + 1

        def answered(state: State | None, error: CoordinatorError | None) -> None:
            if state is not None and key in state.nodes:
                value = state.nodes[key].weight
                self._world.ledger.reads.append(Operation(key, False, value, called_s, self._world.now_s, self._name))
            if self._attempt == attempt:
                self._end()

        def ask(master: Master) -> None:
            master.read(self._back(answered), ATTEMPT_S_MAX)

        self._world.after(self._delay_s(), lambda: target.enqueue(ask))

        def expire() -> None:
            if self._attempt == attempt:
                self._end()

        self._world.after(ATTEMPT_S_MAX, expire)

    def _end(self) -> None:
        self._attempt += 1
        self._think()

    def _back(self, answered: Callable[[Any, CoordinatorError | None], None]) -> Callable[..., None]:
        """Carries an answer from the master to the client."""

        def answer(value: object, error: CoordinatorError | None) -> None:
            running = self._world.running
            now_s = running.time_s() if running is not None else self._world.now_s
            self._world.at(now_s + self._delay_s(), lambda: answered(value, error))

        return answer

    # Writing

    def _write(self, request_id: str) -> None:
        operation, target = self._world.ledger.writes[request_id], self._target()
        attempt = self._attempt = self._attempt + 1
        self._attempts_left -= 1
        weight = command_pb2.SetNodeWeight(node_id=operation.key, weight=operation.value)  # type: ignore[arg-type]
        command = command_pb2.Command(request_id=request_id, cause=request_id, set_node_weight=weight)

        def answered(result: command_pb2.CommandResult | None, error: CoordinatorError | None) -> None:
            if result is not None:
                self._acknowledge(request_id, result)
            if self._attempt != attempt:
                return
            if result is not None:
                self._end()
                return
            may_be_applied = isinstance(error, IndefiniteError)
            if not may_be_applied and self._rng.random() < GIVE_UP_SHARE:
                self._attempts_left = 0
            self._retry(request_id, may_be_applied)

        def ask(master: Master) -> None:
            master.propose(command, self._back(answered), ATTEMPT_S_MAX)

        if target.consensus is None:
            self._world.after(2 * self._delay_s(), lambda: answered(None, NoLeader("it is not there")))
            return
        self._world.after(self._delay_s(), lambda: target.enqueue(ask))

        def expire() -> None:
            if self._attempt == attempt:
                self._retry(request_id, True)

        self._world.after(ATTEMPT_S_MAX, expire)

    def _acknowledge(self, request_id: str, result: command_pb2.CommandResult) -> None:
        ledger, before = self._world.ledger, self._world.ledger.writes[request_id]
        assert result.WhichOneof("outcome") == "applied", result
        assert ledger.acknowledged.setdefault(request_id, result.applied.index) == result.applied.index, request_id
        if before.returned == math.inf:
            ledger.writes[request_id] = Operation(
                before.key, True, before.value, before.called, self._world.now_s, before.client
            )

    def _retry(self, request_id: str, may_be_applied: bool) -> None:
        self._attempt += 1
        self._may_be_applied |= may_be_applied
        if self._attempts_left > 0 and not self.is_stopped:
            # The request id is the same; so is the answer, should the first attempt have been applied.
            again_s = self._rng.uniform(0.02, 0.2)
            self._world.after(again_s, lambda: self._write(request_id))
            return
        if not self._may_be_applied:
            self._world.ledger.denied.add(request_id)
        self._think()
