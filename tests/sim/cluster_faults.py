"""What goes wrong in a simulated cluster, and what is changed in it by plan; each seed has a selection of its own.

Faults of masters are raft_faults.py's, most of those of workers replica_faults.py's; what is between workers and
masters is here. None goes beyond what the design survives: a disk of a master may be lost, one at a time, and all
others keep what was synced; clocks differ by less than the lease margin. Planned changes are an operator's commands:
they go through the log, and are refused as they may be.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.codec import settings_to_proto
from coordinator.machine.state import State
from coordinator.model import MoveKind, Shard
from coordinator.model.errors import CoordinatorError, Damaged
from tests.sim import raft_faults, replica_faults
from tests.sim.replica_faults import DURATIONS_S, _between
from worker_agent.shard_interface import ReplicaTimes, SeeEpoch, StoreFailed

if TYPE_CHECKING:
    from tests.sim.cluster_worker import Worker
    from tests.sim.cluster_world import WorkerSide, World

MASTER_KINDS = raft_faults.KINDS
WORKER_KINDS = (
    "kill",
    "power",
    "power_many",
    "pause",
    "long_pause",
    "hole",
    "isolate",
    "break",
    "slow_net",
    "slow_disk",
    "full_disk",
    "no_master",
    "deaf",
    "no_leader",
    "alone",
    "break_sessions",
)
DAMAGE = "damage"
"""A replica's store is gone. To lose another copy of the shard before the masters know of the first is more than is
promised: then the last copy in sync is the damaged one, and waits for an operator. So in a seed with this nothing else
goes wrong, and nothing is done that takes good copies away (seeds 80 and 123 restarted or removed the other one)."""
TAKES_COPIES = ("restart", "replicas")
CHANGES = (
    *("move", "transfer", "split", "merge", "drain", "undrain", "weight", "abort", "replicas", "restart", "hand_over"),
)
TIMES = ReplicaTimes(replica_lease_s=1.0, heartbeat_s=0.3, lagging_s=0.8, cede_wait_s=0.3)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run goes."""

    masters: raft_faults.Plan = raft_faults.Plan(clients=0)  # noqa: RUF009 - frozen
    workers: replica_faults.Plan = replica_faults.Plan(workers=5, times=TIMES)  # noqa: RUF009 - frozen
    shards: int = 16
    users: int = 24
    seconds: float = 6.0
    fault_every_s: float = 0.3
    master_kinds: tuple[str, ...] = MASTER_KINDS
    worker_kinds: tuple[str, ...] = WORKER_KINDS
    master_share: float = 0.3
    """Of all faults so many are of masters."""
    change_every_s: float = 0.3
    changes: tuple[str, ...] = CHANGES
    forget_s: float = 3.0
    users_max: int = 1_200
    """A shard with more is cut without being asked; with few it happens here."""
    merge_below_users: int = 0
    """Two neighbours with fewer are joined without being asked."""

    @staticmethod
    def of_seed(seed: int) -> Plan:
        """The plan of a seed."""
        rng = random.Random(f"{seed} plan")
        seconds = rng.uniform(4.0, 8.0)
        # A fifth between the slowest and the fastest: what the leases are made for.
        drift = 0.09 if rng.random() < 0.25 else 0.03
        has_damage, is_reshaped_unasked = rng.random() < 0.05, rng.random() < 0.15
        return Plan(
            masters=raft_faults.Plan(masters=3, clients=0, seconds=seconds, drift=drift),
            workers=replica_faults.Plan(
                workers=5,
                shards=16,
                replicas=3 if rng.random() < 0.25 else 2,
                clients=rng.randint(4, 8),
                seconds=seconds,
                drift=drift,
                think_s=rng.choice((0.005, 0.02, 0.06)),
                log_kept=rng.choice((3, 20, 1_000)),
                has_model_stores=rng.random() < 0.15,
                times=TIMES,
            ),
            users=rng.choice((4, 12, 36)),
            seconds=seconds,
            fault_every_s=rng.choice((0.15, 0.3, 0.6, 1.2)),
            master_kinds=_some(rng, MASTER_KINDS, 0.25),
            worker_kinds=(DAMAGE,) if has_damage else _some(rng, WORKER_KINDS, 0.3),
            master_share=0.0 if has_damage else rng.choice((0.15, 0.3, 0.5)),
            change_every_s=rng.choice((0.1, 0.25, 0.5)),
            changes=_changes(rng, has_damage=has_damage),
            forget_s=rng.choice((0.3, 3.0, 30.0)),
            users_max=2 if is_reshaped_unasked else 1_200,
            merge_below_users=2 if is_reshaped_unasked else 0,
        )


def _some(rng: random.Random, kinds: tuple[str, ...], share: float) -> tuple[str, ...]:
    return tuple(kind for kind in kinds if rng.random() < share) or kinds


def _changes(rng: random.Random, *, has_damage: bool) -> tuple[str, ...]:
    kinds = _some(rng, CHANGES, 0.7)
    return tuple(kind for kind in kinds if not has_damage or kind not in TAKES_COPIES) or ("move",)


class WorkerFaults(replica_faults.Faults):
    """Faults of workers and of what is between them and the masters."""

    _world: WorkerSide

    def _any(self) -> str:
        rng, state = self._rng, self._world.cluster.newest_state()
        shard = self._world.cluster.any_shard(rng, state) if rng.random() < 0.5 else None
        return shard.primary if shard is not None else rng.choice(self._world.names)

    def strike(self, kind: str) -> None:
        """One fault; it ends by itself."""
        world, rng, name = self._world, self._rng, self._any()
        worker, duration_s = world.workers[name], rng.choice(DURATIONS_S)
        masters = list(world.cluster.ids)
        match kind:
            case "power_many":
                for each in rng.sample(world.names, rng.randint(2, len(world.names))):
                    world.workers[each].crash(is_silent=True)
                    self._later(each, duration_s)
            case "power":
                world.note(f"-- {kind} {name} {duration_s}")
                worker.crash(is_silent=True)
                self._later(name, duration_s)
            case "full_disk":
                world.note(f"-- {kind} {name} {duration_s}")
                worker.set_full(True)
                self._later(name, duration_s)
            case "no_master":
                self._open(_between(name, masters), 2 * duration_s, f"{kind} {name}")
            case "deaf":
                directions = {(name, id) for id in masters}
                if rng.random() < 0.5:
                    directions = {(id, name) for id in masters}
                self._open(directions, 2 * duration_s, f"{kind} {name}")
            case "no_leader":
                leader = world.cluster.leader()
                cut = rng.sample(world.names, rng.randint(1, len(world.names)))
                if leader is not None:
                    self._open(_between(leader.id, cut), 2 * duration_s, f"{kind} {leader.id} {cut}")
            case "alone":
                others = [other for other in world.names if other != name]
                self._open(_between(name, others + masters), 2 * duration_s, f"{kind} {name}")
            case "damage":
                self._damage()
            case "break_sessions":
                world.note(f"-- {kind}")
                for stream in world.net.sessions:
                    if rng.random() < 0.5:
                        stream.break_off()
            case _:
                self._strike(kind)

    def _damage(self) -> None:
        """One store of a shard is gone after a restart, or found to be damaged, while every other one is sound."""
        world, rng = self._world, self._rng
        state = world.cluster.newest_state()
        shard = world.cluster.any_shard(rng, state)
        if shard is None or len(shard.in_sync) < 2 or shard.id in state.move_of_shard:
            return
        if not world.cluster.is_settled(shard):
            return
        name = rng.choice(shard.in_sync)
        world.note(f"-- damage of shard {shard.id} on {name}")
        if rng.random() < 0.5:
            # As Shard tells its replica of what a scrub has found.
            found = StoreFailed(SeeEpoch(0), Damaged("a row has another checksum"), None)
            world.workers[name].hosted[shard.id].feed(found)
            return
        world.workers[name].crash(is_silent=False)
        world.workers[name].stores.pop(shard.id)
        self._later(name, 0.2)

    def _open(self, directions: set[tuple[str, str]], seconds: float, what: str) -> None:
        self._world.note(f"-- {what} {seconds}")
        self._world.net.open_holes(directions, seconds)

    def _mend(self, name: str) -> None:
        worker = self._world.workers[name]
        worker.sync_s_max = 0.001
        worker.set_full(False)
        worker.resume()
        if not worker.is_up:
            worker.start()

    def heal(self) -> None:
        world = self._world
        world.net.close_holes(set(world.net.holes))
        world.net.delay_s_max = 0.004
        for name in world.names:
            self._mend(name)


class Changes:
    """An operator who never rests."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._count = 0

    def ask(self, kind: str) -> None:
        """One planned change."""
        world, rng, state = self._world, self._rng, self._world.newest_state()
        if kind == "hand_over":
            leader = world.leader()
            if leader is not None:
                world.note(f"++ {leader.id} is asked to hand over")
                leader.enqueue(lambda leader: leader.hand_over(None))
            return
        if kind == "restart":
            worker = world.workers.workers[rng.choice(world.workers.names)]
            worker.stop()
            world.after(rng.uniform(0.3, 2.0), lambda: self._start_again(worker))
            return
        command = self._command(kind, state, rng)
        if command is not None:
            self.propose(command)

    def _start_again(self, worker: Worker) -> None:
        """Starts a worker as soon as it has come to its end."""
        if not worker.is_up:
            worker.start()
        elif worker.is_stopping:
            self._world.after(0.1, lambda: self._start_again(worker))

    def propose(self, command: command_pb2.Command) -> None:
        """Gives the leader a command, once."""
        leader = self._world.leader()
        if leader is None:
            return
        self._count += 1
        request_id = command.request_id = f"operator-{self._count}"
        command.cause = "operator"
        what = command.WhichOneof("operation")
        self._world.note(f"++ {what} {' '.join(str(getattr(command, what or '')).split())}")

        def answered(result: command_pb2.CommandResult | None, error: CoordinatorError | None) -> None:
            if result is not None and result.HasField("applied"):
                self._world.counts[f"asked {what}"] += 1
                self._world.acknowledged[request_id] = result.applied.index

        leader.enqueue(lambda master: master.propose(command, answered))

    def _command(self, kind: str, state: State, rng: random.Random) -> command_pb2.Command | None:
        shard, shards = self._world.any_shard(rng, state), [shard for _, shard in sorted(state.shards.items())]
        names = sorted(state.nodes)
        if shard is None or not names:
            return None
        name = rng.choice(names)
        match kind:
            case "move" | "transfer":
                return self._move(kind, shard, state, rng)
            case "split":
                if len(shards) >= 2 * self._world.cluster_plan.shards:
                    return None
                return command_pb2.Command(split_shard=command_pb2.SplitShard(shard_id=shard.id))
            case "merge":
                return self._merge(shards, rng)
            case "drain":
                if sum(node.drain_requested for node in state.nodes.values()) >= 2:
                    return None
                return command_pb2.Command(drain_node=command_pb2.DrainNode(node_id=name))
            case "undrain":
                drained = [name for name in names if state.nodes[name].drain_requested]
                name = rng.choice(drained or names)
                return command_pb2.Command(undrain_node=command_pb2.UndrainNode(node_id=name))
            case "weight":
                weight = command_pb2.SetNodeWeight(node_id=name, weight=rng.choice((0.5, 1.0, 2.0)))
                return command_pb2.Command(set_node_weight=weight)
            case "replicas":
                return self._set_replicas(state, rng.choice((1, 2, 3)))
            case "abort":
                moves = sorted(state.moves)
                if not moves or rng.random() < 0.5:
                    return None
                return command_pb2.Command(abort_move=command_pb2.AbortMove(move_id=rng.choice(moves)))
            case _:
                raise ValueError(kind)

    def _set_replicas(self, state: State, replicas: int) -> command_pb2.Command:
        settings = settings_to_proto(replace(state.settings, replicas=replicas))
        return command_pb2.Command(change_settings=command_pb2.ChangeSettings(settings=settings))

    def _move(self, kind: str, shard: Shard, state: State, rng: random.Random) -> command_pb2.Command | None:
        is_move = kind == "move"
        targets = [name for name in sorted(state.nodes) if (name not in shard.replicas) == is_move]
        targets = [name for name in targets if state.nodes[name].may_receive and name != shard.primary]
        if not targets:
            return None
        # Most moves are of the primary: they have more to them.
        source = shard.primary if not is_move or rng.random() < 0.7 else rng.choice(shard.in_sync)
        start = command_pb2.StartMove(
            shard_id=shard.id,
            source=source,
            target=rng.choice(targets),
            kind=types_pb2.MoveKind.ValueType((MoveKind.BALANCE if is_move else MoveKind.TRANSFER).value),
            reason="an operator wants it",
            expected_epoch=shard.epoch,
        )
        return command_pb2.Command(start_move=start)

    def _merge(self, shards: list[Shard], rng: random.Random) -> command_pb2.Command | None:
        ordered = sorted(shards, key=lambda shard: shard.lo)
        pairs = [
            (lower, upper)
            for lower, upper in pairwise(ordered)
            if lower.hi == upper.lo and lower.in_sync == upper.in_sync
        ]
        if not pairs or len(shards) <= self._world.cluster_plan.shards // 2:
            return None
        lower, upper = rng.choice(pairs)
        merge = command_pb2.MergeShards(lower_shard_id=lower.id, upper_shard_id=upper.id)
        return command_pb2.Command(merge_shards=merge)

    def settle(self, state: State) -> None:
        """Takes every wish back: nobody is to be drained, nothing rests in quarantine."""
        if state.settings.replicas != self._world.cluster_plan.workers.replicas:
            self.propose(self._set_replicas(state, self._world.cluster_plan.workers.replicas))
        for name, node in sorted(state.nodes.items()):
            if node.drain_requested:
                self.propose(command_pb2.Command(undrain_node=command_pb2.UndrainNode(node_id=name)))
        for shard_id, shard in sorted(state.shards.items()):
            if shard.quarantine:
                self.propose(command_pb2.Command(release_shard=command_pb2.ReleaseShard(shard_id=shard_id)))


class Faults:
    """Plays a plan on a world: faults, and changes beside them."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._rng = random.Random(f"{seed} faults")
        self._masters = raft_faults.Faults(world, random.Random(f"{seed} master faults"))
        self._workers = WorkerFaults(world.workers, random.Random(f"{seed} worker faults"))
        self.changes = Changes(world, random.Random(f"{seed} changes"))

    def play(self) -> None:
        """Lets the plan's time pass."""
        world, rng, plan = self._world, self._rng, self._world.cluster_plan
        end_s = world.now_s + plan.seconds
        self._change_on(end_s)
        while world.now_s < end_s:
            world.run_until(world.now_s + rng.expovariate(1 / plan.fault_every_s))
            if rng.random() < plan.master_share:
                kind = rng.choice(plan.master_kinds)
                world.note(f"-- masters: {kind}")
                self._masters._strike(kind)
            else:
                self._workers.strike(rng.choice(plan.worker_kinds))

    def _change_on(self, end_s: float) -> None:
        world = self._world
        if world.now_s < end_s:
            self.changes.ask(self._rng.choice(world.cluster_plan.changes))
            world.after(self._rng.expovariate(1 / world.cluster_plan.change_every_s), lambda: self._change_on(end_s))

    def heal(self) -> None:
        """Ends every fault."""
        self._masters.heal()
        self._workers.heal()
