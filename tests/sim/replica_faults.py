"""What goes wrong in a simulated set of workers, and when; each seed has a selection of its own ("swarm testing")."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker_agent.shard_interface import ReplicaTimes

if TYPE_CHECKING:
    from tests.sim.replica_master import Config
    from tests.sim.replica_worker import Hosted
    from tests.sim.replica_world import World

KINDS = (
    "kill",
    "kill_silent",
    "pause",
    "long_pause",
    "hole",
    "isolate",
    "depose",
    "amnesia",
    "cut_off",
    "break",
    "slow_net",
    "slow_disk",
    "full_disk",
    "damage",
    "suspect",
    "move",
    "transfer",
    "seal",
)
DURATIONS_S = (0.05, 0.3, 0.8, 1.2, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run goes."""

    workers: int = 4
    shards: int = 1
    replicas: int = 2
    clients: int = 3
    seconds: float = 5.0
    fault_every_s: float = 0.4
    kinds: tuple[str, ...] = KINDS
    drift: float = 0.05
    """Clock rates differ by at most so much from the world's: lease_margin covers 1.25."""
    think_s: float = 0.06
    log_kept: int = 20
    has_model_stores: bool = False
    """With the model of the real store, instead of one that only counts what the machine may rely on."""
    times: ReplicaTimes = field(default_factory=ReplicaTimes)

    @staticmethod
    def of_seed(seed: int) -> Plan:
        """The plan of a seed."""
        rng = random.Random(f"{seed} plan")
        often = ("move", "transfer", "suspect")
        kinds = tuple(kind for kind in KINDS if rng.random() < (0.7 if kind in often else 0.3))
        workers = rng.randint(3, 5)
        return Plan(
            workers=workers,
            shards=rng.choice((1, 1, 2, 3)),
            replicas=min(rng.choice((2, 2, 3)), workers - 1),
            clients=rng.randint(3, 5),
            seconds=rng.uniform(5.0, 11.0),
            fault_every_s=rng.choice((0.2, 0.5, 1.0, 2.0)),
            kinds=kinds or KINDS,
            drift=0.09 if rng.random() < 0.25 else 0.03,
            think_s=rng.choice((0.01, 0.03, 0.1)),
            log_kept=rng.choice((3, 20, 1_000)),
            has_model_stores=rng.random() < 0.2,
        )


class Faults:
    """Plays faults on a world."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng

    def play(self) -> None:
        """Lets the plan's time pass with the plan's faults."""
        world, rng = self._world, self._rng
        end_s = world.now_s + world.plan.seconds
        while world.now_s < end_s:
            world.run_until(world.now_s + rng.expovariate(1 / world.plan.fault_every_s))
            self._strike(rng.choice(world.plan.kinds))

    def heal(self) -> None:
        """Ends every fault."""
        world = self._world
        world.net.close_holes(set(world.net.holes))
        world.net.delay_s_max = 0.004
        world.master.cut_off.clear()
        for name in world.names:
            self._mend(name)

    def _mend(self, name: str) -> None:
        worker = self._world.workers[name]
        worker.sync_s_max = 0.001
        for store in worker.stores.values():
            store.is_full = False
        worker.resume()
        if not worker.is_up:
            worker.start()

    def _later(self, name: str, duration_s: float) -> None:
        self._world.after(duration_s, lambda: self._mend(name))

    def _any(self) -> str:
        """Some worker; a primary more often than another."""
        rng, world = self._rng, self._world
        if rng.random() < 0.5:
            return world.master.shards[rng.choice(sorted(world.master.shards))].primary
        return rng.choice(world.names)

    def _strike(self, kind: str) -> None:
        world, rng, name = self._world, self._rng, self._any()
        worker, duration_s = world.workers[name], rng.choice(DURATIONS_S)
        world.note(f"-- {kind} {name} {duration_s}")
        others = [other for other in world.names if other != name]
        match kind:
            case "kill" | "kill_silent":
                worker.crash(is_silent=kind == "kill_silent")
                self._later(name, duration_s)
            case "pause" | "long_pause":
                worker.pause()
                self._later(name, duration_s + (3.0 if kind == "long_pause" else 0.0))
            case "hole":
                pair = [name, rng.choice(others)]
                rng.shuffle(pair)
                world.net.open_holes({(pair[0], pair[1])}, duration_s)
            case "isolate":
                world.net.open_holes(_between(name, others), duration_s)
            case "depose":
                self._depose(name, duration_s + rng.choice((0.0, 2.0)))
            case "amnesia":
                shard = world.master.shards[rng.choice(sorted(world.master.shards))]
                ghost = shard.primary
                if shard.is_formed and world.workers[ghost].is_up:
                    self._depose(ghost, 6.0)
                    self._hand_on(shard, ghost, world.now_s + 6.0)
            case "cut_off":
                world.master.cut_off.add(name)
                world.after(duration_s, lambda: world.master.cut_off.discard(name))
            case "break":
                for stream in list(world.net.streams.values()):
                    if rng.random() < 0.5:
                        world.net.drop(stream)
            case "slow_net":
                world.net.delay_s_max = rng.choice((0.004, 0.03, 0.15))
            case "slow_disk":
                worker.sync_s_max = rng.choice((0.01, 0.08, 0.5))
                self._later(name, duration_s)
            case "full_disk":
                for store in worker.stores.values():
                    store.is_full = True
                self._later(name, duration_s)
            case "damage":
                self._damage()
            case "suspect":
                world.master.suspect(name)
            case "move" | "transfer" | "seal":
                world.master.move_any(kind)
            case _:
                raise ValueError(kind)

    def _depose(self, name: str, duration_s: float) -> None:
        """It hears of its successor from nobody for a while, and goes on as it was."""
        world = self._world
        world.net.open_holes(_between(name, [other for other in world.names if other != name]), duration_s)
        world.master.cut_off.add(name)
        world.after(2 * duration_s + 2.0, lambda: world.master.cut_off.discard(name))
        world.master.suspect(name)

    def _hand_on(self, shard: Config, ghost: str, end_s: float) -> None:
        """Has the successor of a deposed primary hand the role to somebody whom that does not know; then it forgets."""
        world = self._world
        hosted = world.workers[ghost].hosted.get(shard.shard_id)
        if hosted is None or not hosted.machine.is_serving or world.now_s > end_s:
            return
        others = [name for name in shard.in_sync if name not in hosted.view.in_sync]
        if shard.primary not in hosted.view.in_sync:
            self._forget(hosted, shard)
            return
        if others and shard.move is None and ghost != shard.primary:
            world.master.move(shard, "transfer", shard.primary, others[0])
        world.after(0.05, lambda: self._hand_on(shard, ghost, end_s))

    def _forget(self, ghost: Hosted, shard: Config) -> None:
        """Whom a deposed primary needs restarts, and hears it again before it hears its successor."""
        world, name = self._world, ghost.worker.name
        for other in ghost.view.in_sync:
            if other != name:
                world.workers[other].crash(is_silent=False)
                self._later(other, 0.1)
                world.net.close_holes(_between(name, [other]))
                world.net.open_holes(_between(other, [shard.primary]), 1.0)

    def _damage(self) -> None:
        """A replica's store is gone after a restart, where another one is whole."""
        world, rng = self._world, self._rng
        shard = world.master.shards[rng.choice(sorted(world.master.shards))]
        safe = [name for name in shard.in_sync if world.workers[name].is_up and not world.master.known[name].is_suspect]
        if len(shard.in_sync) < 2 or len(safe) != len(shard.in_sync) or not shard.is_formed:
            return
        name = rng.choice([name for name in shard.in_sync if name != shard.primary])
        worker = world.workers[name]
        if shard.shard_id in worker.stores and not world.master.damaged:
            world.master.damaged.add((shard.shard_id, name))
            worker.crash(is_silent=False)
            worker.stores.pop(shard.shard_id)
            self._later(name, 0.2)


def _between(name: str, others: list[str]) -> set[tuple[str, str]]:
    """Both directions between a worker and others."""
    return {(name, other) for other in others} | {(other, name) for other in others}
