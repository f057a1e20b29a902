"""Whole lives of a cluster under virtual time: the real controllers and the real machine, faults drawn from a seed.

Replay one seed: `pytest "tests/sim/test_control_sim.py::test_faults_end_in_a_whole_cluster[17]"`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.api.v1 import command_pb2
from coordinator.config import ClusterConfig, CronSettings, MoveSettings, PlacementSettings, SessionSettings
from coordinator.model import CronJobSpec, LaunchState, NodeState
from tests.sim.control_world import Faults, World

CONFIG = ClusterConfig(
    name="sim",
    session=SessionSettings(heartbeat_s=0.5, session_lease_s=4.0, suspect_s=1.5),
    placement=PlacementSettings(shards=24, replicas=2, tokens_per_weight=32, hold_s=3.0, dwell_s=1.0),
    moves=MoveSettings(copy_deadline_s=10.0, cede_deadline_s=2.0),
    cron=CronSettings(
        jobs=(
            CronJobSpec(id="every_second", schedule="* * * * * *", command=("true",)),
            CronJobSpec(id="every_minute", schedule="* * * * *", command=("true",)),
        )
    ),
)


def start_cluster(seed: int, workers: int = 3, faults: Faults | None = None, replicas: int = 2) -> World:
    """A world whose first leader leads and whose workers hold every shard."""
    config = replace(CONFIG, placement=replace(CONFIG.placement, replicas=replicas))
    world = World(seed, config, faults or Faults())
    world.lead()
    for number in range(1, workers + 1):
        world.add_worker(f"w{number}", zone=f"z{number % 3}").start()
    world.run_until(world.is_settled, 30, "the first workers hold every shard")
    return world


@pytest.mark.parametrize("seed", range(5))
def test_workers_that_start_together_share_from_the_start(seed: int) -> None:
    """Three workers get their first replicas in one decision, without a move, and every job an owner with backups."""
    world = start_cluster(seed)
    assert not world.state.ended_moves
    primaries = [shard.primary for shard in world.state.shards.values()]
    assert {primaries.count(name) for name in world.workers} == {8}
    assert all(len(job.backups) == 2 for job in world.state.jobs.values())
    world.run_until(world.is_known, 5, "every worker holds what it shall hold")


@pytest.mark.parametrize("seed", range(10))
def test_a_drain_never_takes_a_shard_below_two_copies(seed: int) -> None:
    """A worker joins and one drains and leaves; every shard has two good copies after every entry of the log."""
    world = start_cluster(seed)
    world.copies_min = 2
    world.add_worker("w4").start()
    world.run_until(lambda: "w4" in world.state.nodes, 5, "w4 registers")
    world.run(0.5)
    world.command(drain_node=command_pb2.DrainNode(node_id="w1"))
    world.run_until(world.is_settled, 60, "w1 is empty")
    world.workers["w1"].stop()
    world.run_until(lambda: world.state.nodes["w1"].state is NodeState.LEFT, 5, "w1 has left")
    world.run_until(world.is_known, 5, "every worker holds what it shall hold")
    assert world.workers["w1"].has_left


@pytest.mark.parametrize("seed", range(5))
def test_a_stop_hands_over_at_once(seed: int) -> None:
    """A Goodbye without a drain gives the worker's roles away within tenths of a second."""
    world = start_cluster(seed)
    world.workers["w2"].stop()
    world.run(0.3)
    assert world.state.nodes["w2"].state is NodeState.DOWN
    assert all(shard.primary != "w2" for shard in world.state.shards.values())


@pytest.mark.parametrize("seed", range(5))
def test_a_crashed_worker_loses_its_primaries_and_gets_its_place_back(seed: int) -> None:
    """After kill -9 the roles go within suspect_s and a little; a restart within hold_s finds its place again.

    With three copies, that is: a shard that is down to its last copy is repaired at once.
    """
    world = start_cluster(seed, workers=5, replicas=3)
    held = {shard.id for shard in world.state.shards.values() if "w3" in shard.in_sync}
    world.workers["w3"].crash()
    world.run(CONFIG.session.suspect_s + 0.2)
    assert not world.state.moves
    assert all("w3" not in shard.in_sync for shard in world.state.shards.values())
    world.workers["w3"].start()
    world.run_until(world.is_settled, 30, "w3 is back")
    assert {shard.id for shard in world.state.shards.values() if "w3" in shard.in_sync} == held


@pytest.mark.parametrize("seed", range(10))
def test_a_new_leader_resumes_every_move(seed: int) -> None:
    """Leaders change in the middle of a drain; the moves go on from the state alone and no worker is suspected."""
    world = start_cluster(seed, workers=4)
    world.copies_min = 2
    for worker in world.workers.values():
        worker.copies_s = 1.0
    world.command(drain_node=command_pb2.DrainNode(node_id="w1"))
    for _ in range(4):
        world.run(world.rng.uniform(0.05, 0.5))
        world.depose()
        world.run(world.rng.uniform(0.2, 1.0))
        world.lead()
    world.run_until(world.is_settled, 60, "the drain ends")
    assert not any(entry.HasField("suspect_node") for entry in world.entries)
    world.run_until(world.is_known, 5, "every worker holds what it shall hold")


FAULTS = (
    *("crash", "start", "pause", "resume", "break", "leader", "drain", "undrain", "stop", "slow"),
    *("lost", "lags", "split", "merge"),
)


def harm_a_shard(world: World, fault: str) -> None:
    """A copy is lost, a replica lags, or somebody has a shard cut or joined."""
    shards = sorted(world.state.shards.values(), key=lambda shard: shard.lo)
    position = world.rng.randrange(len(shards) - 1)
    shard, upper = shards[position : position + 2]
    name = world.rng.choice(shard.in_sync)
    primary = world.workers[shard.primary]
    if fault == "lost" and shard.id in world.workers[name].held:
        world.workers[name].fail(shard.id)
    elif fault == "lags" and shard.id in primary.held and name != shard.primary:
        primary.fail(shard.id, lagging=name)
    elif fault == "split" and len(shards) < 40:
        world.command(split_shard=command_pb2.SplitShard(shard_id=shard.id))
    elif fault == "merge":
        world.command(merge_shards=command_pb2.MergeShards(lower_shard_id=shard.id, upper_shard_id=upper.id))


@pytest.mark.parametrize("seed", range(40))
def test_faults_end_in_a_whole_cluster(seed: int) -> None:
    """Crashes, pauses, broken streams, drains, lost answers, lost copies, cuts, joins and new leaders, at random; then
    quiet makes it whole."""
    world = start_cluster(seed, workers=4, faults=Faults(proposal_lost=0.05, proposal_unknown=0.05))
    rng = world.rng
    for _ in range(30):
        worker = world.workers[f"w{rng.randint(1, 4)}"]
        fault = rng.choice(FAULTS)
        if fault in ("lost", "lags", "split", "merge"):
            harm_a_shard(world, fault)
        elif fault == "crash" and worker.is_running:
            worker.crash()
        elif fault == "start" and not worker.is_running:
            worker.start()
        elif fault == "pause" and worker.is_running:
            worker.pause()
        elif fault == "resume" and worker.is_silent:
            worker.resume()
        elif fault == "break":
            world.break_session(worker.session)
        elif fault == "leader":
            world.depose()
            world.after(rng.uniform(0.2, 1.5), world.lead)
        elif fault == "drain" and worker.id in world.state.nodes:
            world.command(drain_node=command_pb2.DrainNode(node_id=worker.id))
        elif fault == "undrain" and worker.id in world.state.nodes:
            world.command(undrain_node=command_pb2.UndrainNode(node_id=worker.id))
        elif fault == "stop" and worker.is_welcome and not worker.is_silent:
            worker.stop()
        elif fault == "slow":
            worker.copies_s, worker.cedes = rng.choice((0.1, 2.0, 30.0)), rng.random() < 0.7
        world.run(rng.uniform(0.0, 4.0))
    calm(world)
    world.run(10)
    release(world)
    world.run_until(world.is_settled, 120, "the cluster is whole after the faults")
    world.run_until(world.is_known, 5, "every worker holds what it shall hold")
    check_cron(world)


def calm(world: World) -> None:
    """Ends every fault."""
    world.faults = Faults()
    world.run(2)
    if world.control is None:
        world.lead()
    for worker in world.workers.values():
        worker.copies_s, worker.cedes, worker.failing = 0.2, True, {}
        if worker.is_silent and worker.is_running:
            worker.resume()
        if not worker.is_running:
            worker.start()
        if worker.id in world.state.nodes:
            world.command(undrain_node=command_pb2.UndrainNode(node_id=worker.id))


def release(world: World) -> None:
    """Ends every quarantine, as an operator would who has seen that the workers are well."""
    for shard in sorted(world.state.shards.values(), key=lambda shard: shard.id):
        if shard.quarantine:
            world.command(release_shard=command_pb2.ReleaseShard(shard_id=shard.id))


def check_cron(world: World) -> None:
    """No attempt of a launch ran twice in one process, and the latest ones ended well."""
    world.run(20)
    times = world.state.launch_times.get("every_second", ())
    assert len(times) > 5
    for time_ms in times[-8:-3]:
        assert world.state.launches["every_second", time_ms].state is LaunchState.SUCCEEDED, f"seed {world.seed}"
    for worker in world.workers.values():
        assert len(set(worker.launched)) == len(worker.launched)
