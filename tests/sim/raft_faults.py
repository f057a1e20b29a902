"""What goes wrong in a simulated cluster, and when; each seed has a selection of its own ("swarm testing").

A run with every kind of fault at once rarely comes far; runs with few kinds, often, reach further. `heal` ends all
faults: every master runs, nothing is lost or slow any more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.api.v1 import command_pb2
from coordinator.raft.link import SEND_BYTES_MAX
from coordinator.raft.transport import CONGESTED_BYTES

if TYPE_CHECKING:
    from tests.sim.raft_master import Master
    from tests.sim.raft_world import World

KINDS = (
    "kill",
    "power",
    "power_all",
    "kill_all",
    "kill_in_disk",
    "power_in_disk",
    "kill_in_turn",
    "power_in_turn",
    "stop",
    "pause",
    "cut_off",
    "split",
    "hole",
    "break",
    "slow_net",
    "congest",
    "slow_disk",
    "full_disk",
    "transfer",
    "snapshot",
    "flood",
    "strand",
    "lose_disk",
    "old_disk",
    "failing_disk",
)
STEPS_S = (-100.0, -20.0, -10.0, -0.7, 0.7, 10.0, 20.0, 100.0)
"""Of wall clocks; by "step_wall", which is for plans that name it (test_clock_seeds.py) and is never healed."""
LONG_PAUSE_S = 60.0
DURATIONS_S = (0.05, 0.2, 0.5, 0.8, 1.2, 2.0)
"""Of faults that end by themselves; an election takes 0.3 to 0.6, and silence is noticed after 1.2."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run goes."""

    masters: int = 3
    clients: int = 4
    seconds: float = 5.0
    """How long the faults last."""
    fault_every_s: float = 0.3
    kinds: tuple[str, ...] = KINDS
    drift: float = 0.05
    """Clock rates differ by at most so much from the world's."""
    think_s: float = 0.08
    has_long_pause: bool = False

    @staticmethod
    def of_seed(seed: int) -> Plan:
        """The plan of a seed."""
        rng = random.Random(f"{seed} plan")
        # Changes of leaders that leave something behind are what the log is tried by.
        kinds = tuple(kind for kind in KINDS if rng.random() < (0.8 if kind in ("strand", "transfer") else 0.25))
        return Plan(
            masters=5 if rng.random() < 0.25 else 3,
            clients=rng.randint(3, 5),
            seconds=rng.uniform(4.0, 8.0),
            fault_every_s=rng.choice((0.1, 0.3, 0.5, 1.0)),
            kinds=kinds or KINDS,
            # A fifth between the slowest and the fastest: what the lease is made for.
            drift=0.09 if rng.random() < 0.25 else 0.05,
            think_s=rng.choice((0.02, 0.08, 0.2)),
            has_long_pause=rng.random() < 0.02,
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
        if world.plan.has_long_pause:
            master = self._any()
            master.pause()
            world.run_until(world.now_s + 0.4)
            world.run_until(world.now_s + LONG_PAUSE_S * rng.uniform(0.2, 1.0))
            master.resume()
        while world.now_s < end_s:
            world.run_until(world.now_s + rng.expovariate(1 / world.plan.fault_every_s))
            self._strike(rng.choice(world.plan.kinds))
        world.run_until(world.now_s + rng.uniform(0.0, 0.2))

    def heal(self) -> None:
        """Ends every fault."""
        world = self._world
        world.network.close_holes(world.network.holes)
        world.network.congested.clear()
        world.network.delay_s_max = 0.005
        for master in world.masters.values():
            self._make_sound(master)
            master.resume()
            if master.consensus is None or master.is_stopping:
                master.start()
            is_replaced = master is world.operator.replacing
            assert master.consensus is not None or is_replaced, f"{master.id} does not start"

    def _make_sound(self, master: Master) -> None:
        master.disk.is_full = master.disk.fails_next_sync = False
        master.disk.steps_left = master.calls_left = None
        master.sync_s_max = 0.000_2

    def _any(self) -> Master:
        return self._world.masters[self._rng.choice(self._world.ids)]

    def _leader_or_any(self) -> Master:
        leader = self._world.leader()
        return leader if leader is not None and self._rng.random() < 0.5 else self._any()

    def _strike(self, kind: str) -> None:
        world, rng = self._world, self._rng
        master = self._leader_or_any()
        match kind:
            case "kill_all" | "power_all":
                for each in world.masters.values():
                    self._end(each, is_power_cut=kind == "power_all")
            case "kill" | "power":
                self._end(master, is_power_cut=kind == "power")
            case "kill_in_disk" | "power_in_disk":
                master.fuse_is_power = kind == "power_in_disk"
                master.disk.steps_left = rng.choice((0, 1, 2, rng.randint(0, 40)))
                self._mend_later(master)
            case "kill_in_turn" | "power_in_turn":
                # A coroutine goes on by a call, so this is at any `await`.
                master.fuse_is_power = kind == "power_in_turn"
                master.calls_left = rng.choice((0, 1, 2, rng.randint(0, 60)))
                self._mend_later(master)
            case "stop":
                master.stop()
                self._mend_later(master)
            case "pause":
                self._pause(master)
            case "cut_off" | "split" | "hole":
                self._cut(kind, master)
            case "break":
                for connection in world.network.connections:
                    if rng.random() < 0.5:
                        connection.break_off()
            case "slow_net":
                world.network.delay_s_max = rng.choice((0.005, 0.03, 0.1))
            case "congest":
                for id in world.ids:
                    world.network.congested[master.id, id] = rng.choice((0, 0, CONGESTED_BYTES + 1, SEND_BYTES_MAX + 1))
            case "slow_disk":
                master.sync_s_max = rng.choice((0.01, 0.05, 0.3))
                self._mend_later(master)
            case "full_disk":
                world.note(f"the disk of {master.id} is full")
                master.disk.is_full = True
                self._mend_later(master)
            case "failing_disk":
                master.disk.fails_next_sync = True
                self._mend_later(master)
            case "transfer":
                self._transfer()
            case "snapshot":
                master.enqueue(_write_snapshot)
            case "flood":
                self._flood(master)
            case "step_wall":
                step_s = rng.choice(STEPS_S)
                world.note(f"the wall clock of {master.id} steps by {step_s:g} s")
                master.wall_offset_ms += round(step_s * 1_000)
            case "strand":
                # What a leader appends while nobody hears it will be overwritten.
                master = world.leader() or master
                self._cut("cut_off", master, DURATIONS_S[3:])
                self._flood(master)
            case "lose_disk":
                if world.operator.lose_disk(master):
                    self._mend_later(master)
            case "old_disk":
                if (found := world.operator.bring_back_a_disk()) is not None:
                    self._mend_later(found)
            case _:
                raise ValueError(kind)

    def _end(self, master: Master, *, is_power_cut: bool) -> None:
        if master.consensus is not None:
            master.end(is_power_cut=is_power_cut, why="a fault")
            self._mend_later(master)

    def _mend_later(self, master: Master) -> None:
        """Starts it again after a while, on a disk that is sound."""

        def mend() -> None:
            self._make_sound(master)
            if master.consensus is None or master.is_stopping:
                master.start()

        self._world.after(self._rng.choice(DURATIONS_S), mend)

    def _pause(self, master: Master) -> None:
        if master.consensus is not None and not master.is_paused:
            master.pause()
            life = master.lives
            self._world.after(self._rng.choice(DURATIONS_S), lambda: master.resume() if master.lives == life else None)

    def _cut(self, kind: str, master: Master, durations_s: tuple[float, ...] = DURATIONS_S) -> None:
        world, rng = self._world, self._rng
        others = [id for id in world.ids if id != master.id]
        if kind == "hole":
            pair = [master.id, rng.choice(others)]
            rng.shuffle(pair)
            directions = {(pair[0], pair[1])}
        else:
            side = {master.id} if kind == "cut_off" else {master.id, *rng.sample(others, len(others) // 2)}
            directions = {(a, b) for a in world.ids for b in world.ids if (a in side) != (b in side)}
            if rng.random() < 0.3:
                # One way only: out of the side, or into it.
                is_out = rng.random() < 0.5
                directions = {(a, b) for a, b in directions if (a in side) == is_out}
        world.note("holes " + " ".join(f"{a}>{b}" for a, b in sorted(directions)))
        world.network.open_holes(directions)
        world.after(rng.choice(durations_s), lambda: world.network.close_holes(directions))

    def _transfer(self) -> None:
        leader = self._world.leader()
        if leader is not None:
            target = self._rng.choice([None, *(id for id in self._world.ids if id != leader.id)])
            self._world.note(f"{leader.id} is asked to hand over to {target or 'anybody'}")
            leader.enqueue(lambda leader: leader.hand_over(target))

    def _flood(self, master: Master) -> None:
        barrier = command_pb2.Command(cause="flood", barrier=command_pb2.Barrier())
        for _ in range(self._rng.choice((3, 10, 40))):
            master.enqueue(lambda master: master.propose(barrier, lambda result, error: None))


def _write_snapshot(master: Master) -> None:
    assert master.node is not None
    master.node.write_snapshot()
