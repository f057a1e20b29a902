"""Who may say that a disk was replaced: not who knows of an earlier one only, nor who has it in the log alone."""

from __future__ import annotations

from coordinator.api.v1 import command_pb2
from tests.sim.raft_directed import run, running
from tests.sim.raft_master import Master
from tests.sim.raft_world import World


def replace_disk(world: World, master: Master) -> None:
    """It loses its disk, and votes with an empty one in the end."""
    assert world.operator.lose_disk(master)
    master.start()
    run(world, lambda: world.operator.replacing is None, "it is replaced")


def lead(world: World, id: str) -> None:
    """Has this master lead."""

    def leads() -> bool:
        leader = world.leader()
        if leader is not None and leader.id != id:
            leader.enqueue(lambda leader: leader.hand_over(id))
        return leader is not None and leader.id == id

    run(world, leads, f"{id} leads")


def cut_log(world: World) -> None:
    """Has the leader write a snapshot and drop what it includes."""
    leader = world.leader()
    assert leader is not None
    leader.enqueue(lambda leader: leader.node.write_snapshot())
    run(world, lambda: leader.journal[0][1] > 1, "the log is cut")


def test_it_starts_from_a_snapshot_that_names_the_disk_before() -> None:
    """The third disk took in a snapshot with the second one's admission; its own is in the log behind it."""
    with running(3) as world:
        lead(world, "m1")
        third = world.masters["m3"]
        replace_disk(world, third)
        cut_log(world)
        replace_disk(world, third)
        third.end(is_power_cut=True, why="a test")
        third.start()
        run(world, lambda: third.consensus and third.consensus.has_caught_up, "it is back")
        assert third.identity is not None
        assert (third.identity.disk_id, third.identity.is_voter) == ("m3-3", True)


def test_a_master_that_was_away_follows_it() -> None:
    """One that missed the second replacement takes the new disk's appends, also where nobody else would tell it."""
    with running(5) as world:
        lead(world, "m1")
        away, replaced = world.masters["m2"], world.masters["m3"]
        replace_disk(world, replaced)
        run(world, lambda: len({one.journal[-1][1] for one in world.masters.values()}) == 1, "all have all")
        away.end(is_power_cut=True, why="a test")
        replace_disk(world, replaced)
        lead(world, "m3")
        away.start()
        run(world, lambda: away.consensus and away.consensus.leader_id == "m3", "it follows")
        run(world, lambda: away.consensus and away.consensus.has_caught_up, "it has caught up")


def test_the_disk_before_is_refused_all_the_same() -> None:
    """The second disk comes back after the third was admitted: it is cut off, and ends once it hears why."""
    with running(3) as world:
        lead(world, "m1")
        replaced = world.masters["m3"]
        replace_disk(world, replaced)
        replace_disk(world, replaced)
        assert world.operator.bring_back_a_disk() is replaced
        replaced.start()
        run(world, lambda: world.operator.replacing is None, "the operator puts the new one in again")
        assert replaced.identity is not None
        assert replaced.identity.disk_id == "m3-3"
        assert any("counts nowhere" in line for line in world.trace)


def test_an_admission_that_was_not_committed_keeps_nobody_out() -> None:
    """A leader that was cut off admitted a disk to itself alone; the disk before leads meanwhile, and mends its log."""
    with running(3) as world:
        lead(world, "m3")
        found_again, cut_off = world.masters["m1"], world.masters["m3"]
        world.network.open_holes({("m3", "m1"), ("m3", "m2"), ("m1", "m3"), ("m2", "m3")})
        admit = command_pb2.AdmitMaster(master_id="m1", disk_id="m1-2")
        command = command_pb2.Command(cause="replace", admit_master=admit)
        cut_off.enqueue(lambda leader: leader.propose(command, lambda result, error: None))
        run(world, lambda: cut_off.consensus and cut_off.consensus.voters.disk_for("m1") == "m1-2", "it is in its log")
        run(world, lambda: world.leader() not in (None, cut_off), "another one leads")
        lead(world, found_again.id)
        run(world, lambda: cut_off.node and not cut_off.node.status().connected_peers, "its connections are given up")
        world.network.close_holes(set(world.network.holes))
        run(world, lambda: cut_off.consensus and cut_off.consensus.leader_id == "m1", "it follows")
        run(world, lambda: cut_off.consensus and cut_off.consensus.voters.disk_for("m1") == "", "its log is mended")
