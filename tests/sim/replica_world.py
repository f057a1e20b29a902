"""One to three shards on three to five workers in one thread, where one seed decides everything.

Real: the replica machines. Played: stores in memory that lose what was not durable (replica_store.py), hosts with
clocks of their own (replica_worker.py), streams (replica_net.py), the masters' decisions (replica_master.py), clients
(replica_clients.py), faults (replica_faults.py). What must hold is checked here, at every step and at the end: at most
one worker may answer for a shard, applied prefixes agree, nothing acknowledged is lost, histories are linearizable,
replicas are equal and whole again within RESTORED_S_MAX after the last fault.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.linearizability import Operation, find_violation
from tests.sim.replica_clients import Client, Ledger
from tests.sim.replica_faults import Faults, Plan
from tests.sim.replica_master import Config, Master, Move
from tests.sim.replica_net import Net
from tests.sim.replica_store import request_of
from tests.sim.replica_worker import Hosted, Worker
from tests.sim.seeds import SeedFailed, replay
from worker_agent.replica_core import Protections
from worker_agent.shard_interface import ReportReplica
from worker_agent.store_interface import LogRecord

if TYPE_CHECKING:
    from coordinator.model import Monotonic

FORMED_S_MAX = 5.0
RESTORED_S_MAX = 20.0
"""After the last fault: every shard serves with its count of replicas, nothing moves."""
EQUAL_S_MAX = 3.0
TRACE_LINES = 250


class Violation(AssertionError):
    """Something that must hold does not."""


class Checks:
    """What must hold at every step."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.committed: dict[tuple[int, int], LogRecord] = {}
        self.counts: Counter[str] = Counter()
        self._acknowledged: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        """By shard, when something was acknowledged, and the highest sequence until then."""

    def stepped(self, hosted: Hosted) -> None:
        """A machine has moved."""
        hosted.machine.validate()
        now = hosted.worker.clock()
        self._check_age(hosted, hosted.machine.age_s(now))
        if not hosted.machine.may_read(now):
            return
        for worker in self._world.workers.values():
            other = worker.hosted.get(hosted.shard_id)
            if other is None or other is hosted or not worker.is_up or worker.is_paused:
                continue
            clock: Monotonic = worker.clock()
            if other.machine.may_read(clock):
                raise Violation(
                    f"{hosted.worker.name} and {worker.name} may both answer for shard {hosted.shard_id} "
                    f"(epochs {hosted.machine.epoch} and {other.machine.epoch})"
                )

    def _check_age(self, hosted: Hosted, age_s: float) -> None:
        """What it says of its age: it has applied everything that was acknowledged before."""
        acknowledged = self._acknowledged[hosted.shard_id]
        # As old as its clock says, or older where that goes slowly.
        until_s = self._world.now_s - age_s / (1.0 - self._world.plan.drift)
        place = bisect_right(acknowledged, (until_s, 0))
        applied = hosted.store.position().applied
        if place and applied < acknowledged[place - 1][1]:
            raise Violation(
                f"{hosted.worker.name} says that shard {hosted.shard_id} is {age_s:.3f} s old there and has applied "
                f"{applied}, but {acknowledged[place - 1]} was acknowledged"
            )

    def applied(self, worker: Worker, shard_id: int, record: LogRecord) -> None:
        """A store applies a record."""
        known = self.committed.setdefault((shard_id, record.sequence), record)
        if known != record:
            raise Violation(f"{worker.name} applies {record} of shard {shard_id}, where another one applied {known}")

    def acknowledged(self, shard_id: int, sequence: int, request_id: str) -> None:
        """A host tells a client that its write is done."""
        record = self.committed.get((shard_id, sequence))
        if record is None or request_of(record) != request_id:
            raise Violation(f"{request_id} is acknowledged at {sequence} of shard {shard_id}, where there is {record}")
        acknowledged = self._acknowledged[shard_id]
        latest = acknowledged[-1][1] if acknowledged else 0
        acknowledged.append((self._world.now_s, max(latest, sequence)))

    def reported(self, hosted: Hosted, report: ReportReplica) -> None:
        """A machine tells the leader something."""
        if report.lagging:
            self.counts["lagging"] += 1

    def ceded(self, shard: Config, move: Move) -> None:
        """The master takes it that a primary has ceded."""
        self.counts[f"ceded {move.kind}"] += 1
        if move.kind == "seal":
            whole = [name for name in shard.in_sync if (shard.shard_id, name) not in self._world.master.damaged]
            stores = {name: self._world.workers[name].stores.get(shard.shard_id) for name in whole}
            lasts = {name: store.position().last if store is not None else -1 for name, store in stores.items()}
            if len(set(lasts.values())) != 1:
                raise Violation(f"shard {shard.shard_id} is sealed, and its logs end at {lasts}")


class World:
    """Workers, master, clients, and their time."""

    def __init__(self, seed: int, plan: Plan, protections: Protections) -> None:
        self.seed = seed
        self.plan = plan
        self.protections = protections
        self.now_s = 0.0
        self.trace: deque[str] = deque(maxlen=TRACE_LINES)
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._sequence = 0
        self.registers = ("a", "b")
        self.names = [f"w{number}" for number in range(1, plan.workers + 1)]
        self.net = Net(self, random.Random(f"{seed} net"))
        self.checks = Checks(self)
        self.ledger = Ledger()
        self.workers = {name: Worker(self, name, random.Random(f"{seed} {name}")) for name in self.names}
        self.master = Master(self, random.Random(f"{seed} master"))
        self.restored_s = 0.0

    def note(self, line: str) -> None:
        """Remembers a line for whoever replays this seed."""
        self.trace.append(f"{self.now_s:9.4f}  {line}")

    def at(self, time_s: float, action: Callable[[], object]) -> None:
        """Has something done at a time."""
        self._sequence += 1
        heapq.heappush(self._queue, (max(time_s, self.now_s), self._sequence, action))

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Has something done after a while."""
        self.at(self.now_s + seconds, action)

    def run_until(self, end_s: float, condition: Callable[[], object] | None = None) -> bool:
        """Lets time pass until then, or until the condition holds (looked at a hundred times a second)."""
        look_s = self.now_s
        while self._queue and self._queue[0][0] <= end_s:
            if condition is not None and self._queue[0][0] >= look_s:
                look_s = self._queue[0][0] + 0.01
                if condition():
                    return True
            self.now_s, _, action = heapq.heappop(self._queue)
            self.events += 1
            action()
        self.now_s = end_s
        return condition is not None and bool(condition())

    # One life

    def play(self) -> None:
        """Sets up, plays, heals, checks."""
        for worker in self.workers.values():
            worker.start()
        self.master.start()
        if not self.run_until(FORMED_S_MAX, self._is_whole):
            raise Violation(f"the shards do not serve within {FORMED_S_MAX:g} s: {self._show()}")
        clients = [
            Client(self, f"c{number}", random.Random(f"{self.seed} c{number}"))
            for number in range(1, self.plan.clients + 1)
        ]
        faults = Faults(self, random.Random(f"{self.seed} faults"))
        faults.play()
        self.note("everything is healed")
        faults.heal()
        # Faults that were to end by themselves end now and then still; they find nothing to do.
        healed_s = self.now_s
        if not self.run_until(healed_s + RESTORED_S_MAX, self._is_whole):
            raise Violation(f"the shards are not whole within {RESTORED_S_MAX:g} s: {self._show()}")
        self.restored_s = self.now_s - healed_s
        self.run_until(self.now_s + 0.2)
        for client in clients:
            client.is_stopped = True
        if not self.run_until(self.now_s + EQUAL_S_MAX + 1.0, self._are_equal):
            raise Violation(f"the replicas are not equal within {EQUAL_S_MAX:g} s: {self._show()}")
        self._finish()

    def _is_whole(self) -> bool:
        for shard in self.master.shards.values():
            if shard.move is not None or shard.joining or len(shard.in_sync) != self.plan.replicas:
                return False
            worker = self.workers[shard.primary]
            hosted = worker.hosted.get(shard.shard_id)
            if hosted is None or not hosted.machine.may_read(worker.clock()):
                return False
        return True

    def _are_equal(self) -> bool:
        if not self._is_whole():
            return False
        for shard in self.master.shards.values():
            stores = [self.workers[name].stores[shard.shard_id] for name in shard.in_sync]
            places = {(store.position().last, store.position().applied, store.digest()) for store in stores}
            if len(places) != 1 or len({place[:2] for place in places}) != 1:
                return False
            last, applied, _ = places.pop()
            if last != applied:
                return False
        return True

    def _show(self) -> str:
        lines = []
        for shard in self.master.shards.values():
            lines.append(f"{shard}")
            for name, worker in self.workers.items():
                hosted = worker.hosted.get(shard.shard_id)
                store = worker.stores.get(shard.shard_id)
                machine = hosted.machine if hosted is not None else None
                state = f"{machine.state} epoch {machine.epoch} {machine.problem}" if machine is not None else "nothing"
                lines.append(f"    {name} {state} {store.position() if store else ''}")
        return "\n".join(lines)

    def _finish(self) -> None:
        applied = Counter(map(request_of, self.checks.committed.values()))
        for request_id, count in applied.items():
            if count > 1:
                raise Violation(f"{request_id} was applied {count} times")
            if request_id in self.ledger.denied | self.ledger.refused:
                raise Violation(f"{request_id} was applied, though its client heard that it never would be")
        for shard in self.master.shards.values():
            store = self.workers[shard.primary].stores[shard.shard_id]
            for request_id, sequence in self.ledger.acknowledged.items():
                key = self.ledger.writes[request_id].key
                if key.startswith(f"s{shard.shard_id}-") and store.request(key, request_id) != sequence:
                    raise Violation(f"{request_id}, acknowledged at {sequence}, is not there")
            for register in self.registers:
                key = f"s{shard.shard_id}-{register}"
                self.ledger.reads.append(Operation(key, False, store.get(key), self.now_s, self.now_s, "end"))
        violation = find_violation(self.ledger.history())
        if violation is not None:
            lines = "\n".join(f"    {operation}" for operation in violation)
            raise Violation(f"the history of {violation[0].key} is not linearizable:\n{lines}")


def run_seed(seed: int, plan: Plan | None = None, protections: Protections | None = None) -> World:
    """Plays one seed. Raises SeedFailed with its story and with the command that plays it again."""
    plan = plan or Plan.of_seed(seed)
    world = World(seed, plan, protections or Protections())
    try:
        world.play()
    except Exception as error:
        story = "\n".join(world.trace)
        raise SeedFailed(
            f"seed {seed} at {world.now_s:.4f} s: {type(error).__name__}: {error}\n{story}\n{plan}\n"
            + replay(seed, "tests/sim/test_replica_seeds.py")
        ) from error
    return world
