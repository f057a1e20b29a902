"""Connections between masters in virtual time: how soon they are there again after what interrupts them."""

from __future__ import annotations

from tests.sim.raft_directed import run, running
from tests.sim.raft_world import World

STOOD_STILL_S = 60.0
AGAIN_S_MAX = 0.5
"""Two pauses between attempts, and a packet or two that are late."""


def connected(world: World, id: str) -> set[str]:
    """The masters that this one is connected with."""
    node = world.masters[id].node
    assert node is not None
    return set(node.status().connected_peers)


def test_a_master_that_stood_still_is_connected_at_once_when_it_goes_on() -> None:
    """Its machine took the others' attempts while it said nothing; that is no refusal, after which they would wait."""
    with running(3) as world:
        world.masters["m1"].pause()
        world.run_until(world.now_s + STOOD_STILL_S)
        assert connected(world, "m2") == {"m3"}
        world.masters["m1"].resume()
        went_on_s = world.now_s
        run(world, lambda: connected(world, "m1") == {"m2", "m3"}, "it is connected")
        assert world.now_s - went_on_s < AGAIN_S_MAX
        waits = [line for line in world.trace if "no hello within" in line]
        assert len(waits) == 2, "each of the others says so once"
