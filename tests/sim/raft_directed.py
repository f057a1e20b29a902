"""A simulated cluster of masters for tests that say themselves what happens, in place of random faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.sim.raft_clients import set_up_commands
from tests.sim.raft_faults import Plan
from tests.sim.raft_world import LIVE_S_MAX, Mutation, World, _simulated


@contextmanager
def running(masters: int) -> Iterator[World]:
    """A simulated cluster that has a leader and a few entries."""
    world = World(1, Plan(masters=masters, drift=0.0), Mutation())
    with _simulated(world):
        for master in world.masters.values():
            master.start()
        for command in set_up_commands():
            world.commit(command, LIVE_S_MAX)
        yield world


def run(world: World, condition: object, what: str) -> None:
    """Lets time pass until the condition holds."""
    assert callable(condition)
    assert world.run_until(world.now_s + LIVE_S_MAX, condition), what
