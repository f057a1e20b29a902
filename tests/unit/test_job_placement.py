"""Owners and backups of cron jobs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from coordinator.config import PlacementSettings
from coordinator.model import CronJob, CronJobSpec, NodeState
from coordinator.placement import Planner
from tests.placement_cluster import NOW_MS, cluster, named, with_job_decisions, with_jobs, with_node, worker

PLANNER = Planner(PlacementSettings())


def test_jobs_are_spread_with_backups_elsewhere() -> None:
    """Fifteen jobs over three workers are five each, with two other workers as backups."""
    state = with_job_decisions(with_jobs(cluster(named(3)), *(f"loop_{n:02}" for n in range(1, 16))), PLANNER)
    assert Counter(job.owner for job in state.jobs.values()) == {"w1": 5, "w2": 5, "w3": 5}
    assert all({job.owner, *job.backups} == {"w1", "w2", "w3"} for job in state.jobs.values())


def test_backups_prefer_other_zones() -> None:
    """With a backup fewer than there are workers in the owner's zone, backups are in other zones."""
    workers = [worker("w1", "a"), worker("w2", "a"), worker("w3", "b"), worker("w4", "c")]
    state = with_job_decisions(with_jobs(cluster(workers), *(f"job_{n}" for n in range(12))), PLANNER)
    zone = {node.id: node.zone for node in workers}
    for job in state.jobs.values():
        assert len({zone[job.owner], *(zone[name] for name in job.backups)}) == 3


def test_the_first_good_backup_takes_over() -> None:
    """A suspect owner loses the job to its first backup that may receive; jobs of others stay."""
    spec = CronJobSpec("job", "* * * * *")
    state = with_jobs(cluster(named(4)), CronJob(spec, owner="w1", backups=("w2", "w3")))
    state = with_node(state, replace(state.nodes["w1"], suspect_since_ms=NOW_MS))
    ((_, owner, backups),) = PLANNER.assign_jobs(state)
    assert owner == "w2"
    assert backups[0] == "w3"
    state = with_node(state, replace(state.nodes["w2"], state=NodeState.DOWN))
    assert PLANNER.assign_jobs(state)[0][1] == "w3"


def test_a_suspect_backup_changes_nothing() -> None:
    """Only a backup that is down, draining or gone is replaced."""
    spec = CronJobSpec("job", "* * * * *")
    state = with_jobs(cluster(named(4)), CronJob(spec, owner="w1", backups=("w2", "w3")))
    suspect = with_node(state, replace(state.nodes["w2"], suspect_since_ms=NOW_MS))
    assert PLANNER.assign_jobs(suspect) == []
    down = with_node(state, replace(state.nodes["w2"], state=NodeState.DOWN))
    assert PLANNER.assign_jobs(down) == [("job", "w1", ("w3", "w4"))]


def test_jobs_stay_while_nobody_can_take_them() -> None:
    """With no worker that may receive, owners stay, so that one that returns goes on."""
    spec = CronJobSpec("job", "* * * * *")
    state = with_jobs(cluster(named(1)), CronJob(spec, owner="w1"))
    assert PLANNER.assign_jobs(with_node(state, replace(state.nodes["w1"], suspect_since_ms=NOW_MS))) == []


def test_a_newcomer_takes_only_what_is_above_the_bound() -> None:
    """Fifteen jobs on three workers, a fourth comes: each gives one, nothing else changes owner."""
    jobs = with_jobs(cluster(named(3)), *(f"loop_{n:02}" for n in range(1, 16)))
    before = with_job_decisions(jobs, PLANNER)
    after = with_job_decisions(with_node(before, worker("w4")), PLANNER)
    moved = [job_id for job_id in before.jobs if before.jobs[job_id].owner != after.jobs[job_id].owner]
    assert Counter(after.jobs[job_id].owner for job_id in moved) == {"w4": 3}
