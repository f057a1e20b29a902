"""Owners and backups of cron jobs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from coordinator.config import PlacementSettings
from coordinator.model import CronJob, CronJobSpec, Node, NodeState
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


# Labels

NVME = (("disk", "nvme"),)


def labelled(name: str, zone: str = "", **fields: object) -> Node:
    """A worker with a fast disk."""
    return replace(worker(name, zone), labels=(("disk", "nvme"), ("site", "x")), **fields)  # type: ignore[arg-type]


def needs_nvme(name: str, **fields: object) -> CronJob:
    """A job for workers with a fast disk."""
    return CronJob(CronJobSpec(name, "* * * * *", required_labels=NVME), **fields)  # type: ignore[arg-type]


def test_a_job_with_labels_goes_only_where_they_are() -> None:
    """Owner and backups of a job with required labels have them all; fewer such workers are fewer backups."""
    state = with_jobs(cluster([*named(4), labelled("x1"), labelled("x2")]), *(needs_nvme(f"job_{n}") for n in range(9)))
    state = with_job_decisions(state, PLANNER)
    for job in state.jobs.values():
        assert {job.owner, *job.backups} == {"x1", "x2"}
    assert PLANNER.assign_jobs(state) == []


def test_a_job_whose_labels_nobody_has_has_no_owner() -> None:
    """Without a worker that has the labels there is no owner; the first one that has them becomes it."""
    state = with_jobs(cluster(named(3)), needs_nvme("job", owner="w1", backups=("w2", "w3")), "other")
    state = with_job_decisions(state, PLANNER)
    assert (state.jobs["job"].owner, state.jobs["job"].backups) == ("", ())
    assert state.jobs["other"].owner
    assert PLANNER.assign_jobs(state) == []
    state = with_job_decisions(with_node(state, labelled("x1")), PLANNER)
    assert (state.jobs["job"].owner, state.jobs["job"].backups) == ("x1", ())


def test_a_job_stays_with_the_only_worker_that_has_its_labels() -> None:
    """While the only worker with the labels is down it keeps the job; once it has left for good there is no owner."""
    down = labelled("x1", state=NodeState.DOWN)
    state = with_jobs(cluster([*named(3), down]), needs_nvme("job", owner="x1"))
    assert PLANNER.assign_jobs(state) == []
    assert PLANNER.assign_jobs(with_node(state, replace(down, state=NodeState.LEFT))) == [("job", "", ())]


def test_a_label_that_is_taken_away_takes_the_job_along() -> None:
    """A worker that loses the label loses the job to its first backup that still has it."""
    workers = [labelled("x1"), labelled("x2"), labelled("x3")]
    state = with_jobs(cluster(workers), needs_nvme("job", owner="x1", backups=("x3", "x2")))
    assert PLANNER.assign_jobs(with_node(state, worker("x1"))) == [("job", "x3", ("x2",))]


def test_labelled_jobs_do_not_wander_above_the_bound() -> None:
    """Many jobs for two of six workers: they stay where they are, and jobs without labels make room elsewhere."""
    jobs: list[CronJob | str] = [*(needs_nvme(f"job_{n:02}") for n in range(12)), *(f"any_{n:02}" for n in range(12))]
    state = with_job_decisions(with_jobs(cluster([*named(4), labelled("x1"), labelled("x2")]), *jobs), PLANNER)
    for _ in range(3):
        assert PLANNER.assign_jobs(state) == []
        state = with_job_decisions(state, PLANNER)
    owners = Counter(job.owner for job_id, job in state.jobs.items() if job_id.startswith("job"))
    assert set(owners) == {"x1", "x2"}
    assert max(owners.values()) <= 8
