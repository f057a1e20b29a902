"""The points of the check that are about cron jobs: owned, on time, and each launch once, also across a new leader.

The job writes one line per run to a file, so that what really ran is compared, not only what the cluster says.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from coordinator.api.v1 import types_pb2
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CatchUpPolicy, CronJobSpec, OverlapPolicy
from tools.lib.quickstart_stage import Stage

JOB = "tick"
SECOND_MS = 1_000
LOOPS = tuple(f"loop_{number:02}" for number in range(1, 16))
WRITE_A_LINE = (
    "import os, sys; line = os.environ['LAUNCH_TOKEN'] + ' ' + os.environ['LAUNCH_WORKER'] + chr(10); "
    "handle = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT); os.write(handle, line.encode())"
)
"""One write of one line with O_APPEND: lines of different processes do not mix."""


def loops_are_owned(stage: Stage) -> str:
    """(d) The fifteen loops of the specification have an owner and two backups each, all different."""
    cluster, client = stage.cluster, stage.cluster.client

    def owned() -> bool:
        views = {view.job.spec.id: view.job for view in client.list_jobs().jobs}
        return all(
            name in views and len({views[name].owner, *views[name].backups} & set(stage.workers)) == 3 for name in LOOPS
        )

    cluster.wait("owners and backups of the fifteen loops", owned)
    owners = Counter(view.job.owner for view in client.list_jobs().jobs if view.job.spec.id in LOOPS)
    return f"15 loops, 2 backups each; owners: {', '.join(f'{name} {owners[name]}' for name in sorted(owners))}"


def job_runs_every_second(stage: Stage) -> str:
    """(e) A job that is due every second is launched once a second, on its owner."""
    client, log = stage.cluster.client, stage.directory / "tick.log"
    spec = CronJobSpec(
        id=JOB,
        schedule="* * * * * *",
        command=(sys.executable, "-S", "-c", WRITE_A_LINE, str(log)),
        overlap=OverlapPolicy.ALLOW,
        catch_up=CatchUpPolicy.ALL,
        catch_up_window_s=60.0,
        catch_up_limit=60,
        description="writes one line; made by tools/quickstart --check",
    )
    client.apply_jobs([job_spec_to_proto(spec)])
    stage.cluster.wait("owner of the job", lambda: bool(client.list_jobs(job_id=JOB).jobs[0].job.owner))
    first_ms = next_second_ms() + SECOND_MS
    last_ms = first_ms + 6 * SECOND_MS
    runs = once_a_second(stage, log, first_ms, last_ms)
    owner = client.list_jobs(job_id=JOB).jobs[0].job.owner
    elsewhere = [run.worker for run in runs if run.worker != owner]
    stage.require(not elsewhere, f"{len(elsewhere)} launches ran on {elsewhere[:1]}, the owner is {owner}")
    late_ms = [run.started_unix_ms - (run.due_unix_ms or run.scheduled_at_unix_ms) for run in runs]
    return (
        f"{len(runs)} seconds, {len(runs)} launches, all on its owner {owner}; started at most {max(late_ms)} ms late"
    )


def leader_is_killed(stage: Stage) -> str:
    """(f) The leader is killed: another leads, the map is the same, every second has one launch."""
    cluster = stage.cluster
    first_ms = next_second_ms()
    map_before = {shard.id: shard for shard in cluster.shards()}
    victim = cluster.leader()
    time.sleep(max(0.0, first_ms / SECOND_MS + 1.5 - time.time()))
    begun_s = time.monotonic()
    cluster.masters[victim].kill()
    cluster.wait("new leader", lambda: cluster.leader() not in ("", victim))
    elected_s = time.monotonic() - begun_s
    map_after = {shard.id: shard for shard in cluster.shards()}
    stage.require(map_before == map_after, f"the map changed: {changed(map_before, map_after)}")
    leader = cluster.leader()
    runs = once_a_second(stage, stage.directory / "tick.log", first_ms, next_second_ms() + 3 * SECOND_MS)
    late_ms = max(run.started_unix_ms - (run.due_unix_ms or run.scheduled_at_unix_ms) for run in runs)
    cluster.masters[victim].start()

    def back() -> bool:
        masters = {master.id: master for master in cluster.client.list_masters().masters}
        return masters[victim].applied_index >= masters[leader].commit_index - 5 and masters[victim].role == "follower"

    back_s = cluster.wait(f"return of {victim}", back)
    return (
        f"{victim} killed, {leader} led after {elected_s:.2f} s with the same map of {len(map_after)} shards\n"
        f"{len(runs)} seconds around it, {len(runs)} launches, none missed or doubled, at most {late_ms} ms late; "
        f"{victim} was back in {back_s:.1f} s"
    )


def once_a_second(stage: Stage, log: Path, first_ms: int, last_ms: int) -> list[types_pb2.Launch]:
    """The launches from `first_ms` to `last_ms`, once there is one success and one line for each second.

    Raises CheckFailed when a second was missed, doubled, or failed.
    """
    client = stage.cluster.client
    wanted = list(range(first_ms, last_ms + 1, SECOND_MS))

    def ended() -> bool:
        if time.time() * SECOND_MS < last_ms:
            return False
        kept = {run.scheduled_at_unix_ms: run for run in client.list_launches(job_id=JOB, latest=200).launches}
        pending = (types_pb2.LAUNCH_STATE_COMMITTED, types_pb2.LAUNCH_STATE_RUNNING)
        return all(at in kept and kept[at].state not in pending for at in wanted)

    stage.cluster.wait(f"launch for each of {len(wanted)} seconds", ended, (last_ms / SECOND_MS - time.time()) + 20)
    launches = [
        run for run in client.list_launches(job_id=JOB, latest=200).launches if run.scheduled_at_unix_ms in wanted
    ]
    per_second = Counter(run.scheduled_at_unix_ms for run in launches)
    for run in launches:
        good = run.state == types_pb2.LAUNCH_STATE_SUCCEEDED
        state = types_pb2.LaunchState.Name(run.state)
        stage.require(good, f"the launch of {run.scheduled_at_unix_ms} is {state}: {run.reason}")
    stage.require(all(per_second[at] == 1 for at in wanted), f"not one launch per second in the history: {per_second}")
    lines = [line.split()[0].split("/") for line in log.read_text().splitlines()]
    really = Counter(int(parts[1]) for parts in lines)
    off = {at: really[at] for at in wanted if really[at] != 1}
    stage.require(not off, f"seconds that did not run exactly once, by what the job itself wrote: {off}")
    return sorted(launches, key=lambda run: run.scheduled_at_unix_ms)


def next_second_ms() -> int:
    """The next whole second of the wall clock."""
    return (time.time_ns() // 1_000_000 // SECOND_MS + 1) * SECOND_MS


def changed(before: dict[int, types_pb2.Shard], after: dict[int, types_pb2.Shard]) -> str:
    """Which shards are not the same, for people."""
    different = [shard_id for shard_id in before.keys() | after.keys() if before.get(shard_id) != after.get(shard_id)]
    return f"{len(different)} shards, first {sorted(different)[:1]}"
