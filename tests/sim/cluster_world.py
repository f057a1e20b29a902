"""Masters, workers, their shards and clients in one thread, where one seed decides everything: the combined simulation.

Real: the consensus with its journal and PySyncObj, the state machine, all controllers of the leader, the session hub,
the workers' session machines and memories of assignments, the replica machines, the routing of requests. Played: clocks
that drift, disks that lose what was not synced, networks, event loops (cluster_leader.py, cluster_worker.py), clients
(cluster_clients.py), faults and an operator (cluster_faults.py).

The world is the masters' world of raft_world.py; the workers see it as `WorkerSide`, a replica_world.World on the same
time. What must hold at every step is raft_checks.py's and cluster_checks.py's; at the end, after everything was
healed, the cluster is whole within RESTORED_S_MAX, replicas and masters are equal, and every history is linearizable.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from coordinator.api.v1 import command_pb2
from coordinator.config import ClusterConfig, MoveSettings, PlacementSettings, RaftSettings, SessionSettings
from coordinator.control.balance import WAITING_S
from coordinator.control.proposals import REST_S_MAX
from coordinator.machine.state import State
from coordinator.machine.validate import validate, validate_step
from coordinator.model import NodeState, Shard, key_hash
from coordinator.raft import snapshot
from tests.sim import raft_world, replica_world
from tests.sim.cluster_checks import Checks
from tests.sim.cluster_clients import Client, Table
from tests.sim.cluster_faults import TIMES, Faults, Plan
from tests.sim.cluster_master import Master
from tests.sim.cluster_net import ClusterNet
from tests.sim.cluster_worker import Worker
from tests.sim.linearizability import Operation
from tests.sim.raft_world import LIVE_S_MAX, _simulated
from tests.sim.replica_clients import Ledger
from tests.sim.seeds import SeedFailed, replay
from worker_agent.replica_core import Protections
from worker_agent.session_interface import SessionTimes

SESSION = SessionSettings(heartbeat_s=0.25, session_lease_s=2.0, suspect_s=0.8)
MOVES = MoveSettings(copy_deadline_s=4.0, cede_deadline_s=1.5, quarantine_workers=4, quarantine_window_s=5.0)
PLACEMENT = PlacementSettings(tokens_per_weight=32, hold_s=1.0, dwell_s=1.0, merge_after_s=0.5, reshapes_max=2)
FORMED_S_MAX = 15.0
RESTORED_S_MAX = sum(
    (
        LIVE_S_MAX,  # a leader, as the simulation of the masters alone has it
        SessionTimes().pause_s_max + SessionTimes().connect_s + SessionTimes().welcome_s,  # workers find it
        2 * SESSION.suspect_s,  # and until then it may suspect somebody, whose roles go to others
        TIMES.replica_lease_s * TIMES.lease_margin,  # who wait out the leases that they gave
        MOVES.copy_deadline_s + 2 * MOVES.cede_deadline_s,  # a move that cannot end is rolled back in each phase
        REST_S_MAX,  # but its command was refused again and again, and rests
        PLACEMENT.hold_s + PLACEMENT.dwell_s,  # then what lacks a copy is repaired, what was to be moved is moved
        3 * WAITING_S,  # in a few rounds: 48 copies at most, 16 at once
    )
)
"""After the last fault, by the world's clock: the cluster is whole. Clocks differ, which the rounding up covers."""
EQUAL_S_MAX = 4.0
CHUNK_BYTES = 4_000
"""Of a snapshot: the state has some ten thousand bytes."""
TRACE_LINES = 400


class WorkerSide(replica_world.World):
    """The world as workers, their machines and their clients see it. Its time and its story are the whole world's."""

    workers: dict[str, Worker]  # type: ignore[assignment]
    net: ClusterNet

    def __init__(self, cluster: World, plan: Plan, protections: Protections) -> None:
        self.cluster = cluster
        self.seed = cluster.seed
        self.plan = plan.workers
        self.protections = protections
        self.registers = tuple(f"u{number}" for number in range(plan.users))  # type: ignore[assignment]
        self.names = [f"w{number}" for number in range(1, plan.workers.workers + 1)]
        self.net = ClusterNet(self, cluster, random.Random(f"{self.seed} net"))
        self.checks: Checks = Checks(self)
        self.ledger = Ledger()
        self.workers = {name: Worker(self, name, random.Random(f"{self.seed} {name}")) for name in self.names}
        self.restored_s = 0.0

    @property
    def now_s(self) -> float:  # type: ignore[override]
        return self.cluster.now_s

    def note(self, line: str) -> None:
        self.cluster.note(line)

    def at(self, time_s: float, action: Callable[[], object]) -> None:
        self.cluster.at(time_s, action)

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self.cluster.at(self.cluster.now_s + seconds, action)

    def run_until(self, end_s: float, condition: Callable[[], object] | None = None) -> bool:
        return self.cluster.run_until(end_s, condition)


class World(raft_world.World):
    """Everything."""

    master_type = Master
    masters: dict[str, Master]  # type: ignore[assignment]

    def __init__(self, seed: int, plan: Plan, protections: Protections) -> None:
        super().__init__(seed, plan.masters, raft_world.Mutation())
        self.cluster_plan = plan
        self.settings = RaftSettings(snapshot_entries=self.rng.choice((60, 150, 20_000)))
        self.segment_bytes_max = self.rng.choice((4_000, 60_000))
        self.trace = type(self.trace)(maxlen=TRACE_LINES)
        self.counts: Counter[str] = Counter()
        placement = replace(
            PLACEMENT,
            shards=plan.shards,
            replicas=plan.workers.replicas,
            users_max=plan.users_max,
            merge_below_users=plan.merge_below_users,
        )
        self.config = ClusterConfig(
            name="sim", raft=self.settings, session=SESSION, placement=placement, moves=MOVES
        )
        self.workers = WorkerSide(self, plan, protections)
        self.net = self.workers.net
        self.acknowledged: dict[str, int] = {}
        """Commands of the operator that he heard to be applied, and at which index."""
        self.restored_s = 0.0
        self._table: Table | None = None
        self._validated = State()

    # What others ask

    def is_there(self, name: str) -> bool | None:
        """Whether a process takes what comes; None when nobody even says no."""
        if name in self.masters:
            master = self.masters[name]
            return True if master.consensus is not None else False if master.is_powered else None
        worker = self.workers.workers[name]
        return True if worker.is_up else False if worker.is_powered else None

    def lead_of(self, master: object) -> Any:
        """What of a master leads."""
        return cast("Master", master).leader

    def agent_of(self, worker: object) -> Worker:
        """A worker, as what it is here."""
        return cast("Worker", worker)

    def newest_state(self) -> State:
        """The state of the master that has applied most."""
        states = [master.consensus.state for master in self.masters.values() if master.consensus is not None]
        return max(states, key=lambda state: state.index, default=State())

    def any_shard(self, rng: random.Random, state: State) -> Shard | None:
        """Some shard that has replicas; one in which somebody writes more often than another."""
        shard = Table(state).locate(key_hash(rng.choice(self.workers.registers))) if rng.random() < 0.6 else None
        if shard is not None and shard.in_sync:
            return shard
        shards = [shard for _, shard in sorted(state.shards.items()) if shard.in_sync]
        return rng.choice(shards) if shards else None

    def table_of(self, state: State) -> Table:
        """The map of a state; one for all clients."""
        if self._table is None or self._table.index != state.index:
            self._table = Table(state)
        return self._table

    def machine_moved(self, state: State) -> None:
        """A master has applied an entry; the first one to do so shows whether that is sound."""
        before = self._validated
        if state.index > before.index:
            validate(state)
            if state.index == before.index + 1:
                validate_step(before, state)
            self._validated = state

    # One life

    def play(self) -> None:
        """Sets up, plays, heals, checks."""
        clients = self._set_up()
        faults = Faults(self, self.seed)
        faults.play()
        self.note("everything is healed")
        faults.heal()
        healed_s = self.now_s
        through_s = max(master.time_s() for master in self.masters.values())
        barrier = command_pb2.Command(request_id="live", cause="live", barrier=command_pb2.Barrier())
        self.commit(barrier, LIVE_S_MAX)
        self._settle_on(faults, self.now_s + RESTORED_S_MAX)
        if not self._wait(through_s - self.now_s + RESTORED_S_MAX, self._is_whole):
            raise replica_world.Violation(f"the cluster is not whole within {RESTORED_S_MAX:g} s: {self._show()}")
        self.restored_s = self.now_s - healed_s
        self.note(f"whole {self.restored_s:.2f} s after the last fault")
        self._end(clients)

    def _set_up(self) -> list[Client]:
        """Starts everybody; the clients of a cluster that is whole."""
        for master in self.masters.values():
            master.start()
        for worker in self.workers.workers.values():
            worker.start()
        if not self._wait(FORMED_S_MAX, self._is_whole):
            raise replica_world.Violation(f"the cluster is not there within {FORMED_S_MAX:g} s: {self._show()}")
        return [
            Client(self.workers, f"c{number}", random.Random(f"{self.seed} c{number}"))
            for number in range(1, self.cluster_plan.workers.clients + 1)
        ]

    def _end(self, clients: list[Client]) -> None:
        """Has the clients stop, and holds what is left to everything that must hold."""
        self.run_until(self.now_s + 0.2)
        for client in clients:
            client.is_stopped = True
        if not self._wait(EQUAL_S_MAX + 1.0, self._are_equal):
            raise replica_world.Violation(f"the cluster is not equal within {EQUAL_S_MAX:g} s: {self._show()}")
        self._finish()

    def _settle_on(self, faults: Faults, end_s: float) -> None:
        """The operator takes his wishes back, and ends what quarantine there is or comes of faults not yet noticed."""
        if self.now_s < end_s:
            faults.changes.settle(self.newest_state())
            self.after(0.5, lambda: self._settle_on(faults, end_s))

    def _wait(self, seconds: float, condition: Callable[[], bool]) -> bool:
        """Lets time pass until the condition holds; it is looked at every now and then, as it is dear."""
        end_s = self.now_s + seconds
        while not condition():
            if self.now_s >= end_s:
                return False
            self.run_until(min(end_s, self.now_s + 0.05))
        return True

    def _is_whole(self) -> bool:
        """Every worker is in, nothing moves, every shard has its replicas and a primary that answers."""
        leader = cast("Master | None", self.leader())
        if leader is None or leader.leader.control is None:
            return False
        state = leader.consensus_now.state
        names = self.workers.names
        nodes = [state.nodes.get(name) for name in names]
        if not all(node is not None and node.state is NodeState.ACTIVE and not node.is_suspect for node in nodes):
            return False
        if not state.shards or state.moves:
            return False
        return all(self._is_shard_whole(shard) for shard in state.shards.values())

    def is_settled(self, shard: Shard) -> bool:
        """Every replica of a shard is where the masters think, with a store."""
        if not self._is_primary_whole(shard):
            return False
        hosted = [self.workers.workers[name].hosted.get(shard.id) for name in shard.in_sync]
        return all(
            each is not None and each.machine.epoch == shard.epoch and not each.machine.problem for each in hosted
        )

    def _is_shard_whole(self, shard: Shard) -> bool:
        return len(shard.in_sync) == self.cluster_plan.workers.replicas and self._is_primary_whole(shard)

    def _is_primary_whole(self, shard: Shard) -> bool:
        if not shard.is_formed or shard.parents or shard.joining or shard.quarantine:
            return False
        worker = self.workers.workers[shard.primary]
        hosted = worker.hosted.get(shard.id)
        return hosted is not None and hosted.machine.may_read(worker.clock())

    def _are_equal(self) -> bool:
        if not self._is_whole() or not self._all_equal():
            return False
        for shard in self.newest_state().shards.values():
            stores = [self.workers.workers[name].stores[shard.id] for name in shard.in_sync]
            places = {(store.position().last, store.position().applied, store.digest()) for store in stores}
            if len(places) != 1:
                return False
            last, applied, _ = places.pop()
            if last != applied:
                return False
        return True

    def _show(self) -> str:
        leader = self.leader()
        state = self.newest_state()
        lines = [f"{self._show_masters()}; {leader.id if leader is not None else 'nobody'} leads"]
        lines += [f"    {node}" for _, node in sorted(state.nodes.items())]
        lines += [f"    {move}" for _, move in sorted(state.moves.items())]
        for shard in sorted(state.shards.values(), key=lambda shard: shard.lo):
            if not state.moves and self._is_shard_whole(shard):
                continue
            lines.append(f"    {shard}")
            for name in shard.replicas:
                slot = self.workers.workers[name].slots.get(shard.id)
                machine = slot.hosted.machine if slot is not None and slot.hosted is not None else None
                said = f"{machine.state} epoch {machine.epoch} {machine.problem}" if machine is not None else "nothing"
                lines.append(f"        {name} {said} {slot.last_report if slot is not None else ''}".rstrip())
        return "\n".join(lines)

    def _finish(self) -> None:
        self.checks.finish(self.acknowledged, set(), [], 0.0)
        state, side = self.newest_state(), self.workers
        table = Table(state)

        def store_of(register: str) -> Any:
            shard = table.locate(key_hash(register))
            assert shard is not None
            return side.workers[shard.primary].stores[shard.id]

        side.checks.finish(store_of)
        for register in side.registers:
            value = store_of(register).get(register)
            side.ledger.reads.append(Operation(register, False, value, self.now_s, self.now_s, "end"))
        side.checks.check_histories()


def run_seed(seed: int, plan: Plan | None = None, protections: Protections | None = None) -> World:
    """Plays one seed. Raises SeedFailed with its story and with the command that plays it again."""
    world: World | None = None
    plan = plan or Plan.of_seed(seed)
    store = cast("Any", snapshot)
    try:
        world = World(seed, plan, protections or Protections())
        with _simulated(world):
            store.CHUNK_BYTES = CHUNK_BYTES
            world.play()
    except Exception as error:
        story: Iterable[str] = world.trace if world is not None else ()
        raise SeedFailed(
            f"seed {seed} at {world.now_s if world else 0:.4f} s: {type(error).__name__}: {error}\n"
            + "\n".join(story)
            + f"\n{plan}\n"
            + replay(seed, "tests/sim/test_cluster_seeds.py")
        ) from error
    return world
