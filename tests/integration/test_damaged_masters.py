"""Real masters with a damaged or a full disk: one clear line, status 1, and the other two go on; nothing is lost."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from coordinator.client import STALE
from coordinator.config import ClusterConfig
from coordinator.raft.files import ADVICE
from tests.chaos import job
from tests.disk_faults import flip, start, wait_end
from tests.small_disk import fill, small_disk
from tools.lib.local_cluster import LocalCluster, wait_until

SNAPSHOT_ENTRIES = 100


def with_snapshots(config: ClusterConfig) -> ClusterConfig:
    """Snapshots come soon."""
    return replace(config, raft=replace(config.raft, snapshot_entries=SNAPSHOT_ENTRIES))


def write(cluster: LocalCluster, count: int = 1) -> list[str]:
    """Jobs that were acknowledged."""
    made = [f"job-{uuid.uuid4().hex}" for _ in range(count)]
    client = cluster.client()
    for job_id in made:
        client.apply_jobs([job(job_id, "x" * 500)])
    return made


def holds(cluster: LocalCluster, master_id: str, wanted: list[str]) -> bool:
    """True when this master alone shows all of these jobs."""
    shown = cluster.client([master_id]).list_jobs(consistency=STALE).jobs
    return set(wanted) <= {view.job.spec.id for view in shown}


def log_of(directory: Path) -> Path:
    """The last segment."""
    return max(directory.glob("journal-*.log"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the vote": (lambda directory: flip(directory / "vote.json", 20), "vote.json, offset 0"),
    "the snapshot": (lambda directory: flip(directory / "snapshot", 200), "snapshot, offset 20"),
    "the log": (lambda directory: flip(log_of(directory), 60), "a checksum does not match"),
    "the log's end is gone": (
        lambda directory: log_of(directory).write_bytes(log_of(directory).read_bytes()[:-1]),
        "it once held entry",
    ),
}


def may_start(cluster: LocalCluster, what: str, made: list[str]) -> bool:
    """True when m3 did without the snapshot: the log, or an older snapshot, may have all that was in it."""
    if what != "the snapshot":
        return False
    process = cluster.process("m3")
    return wait_until(
        lambda: "ended" if process.process_id is None else "whole" if holds(cluster, "m3", made) else "", 20.0, what
    ) == "whole"


def test_a_damaged_master_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    """Each kind of damage after a clean stop is told with file, offset and advice; a torn write is mended."""
    with LocalCluster(tmp_path, masters=3, workers=0, change=with_snapshots) as cluster:
        cluster.start()
        cluster.wait_leader()
        made = write(cluster, SNAPSHOT_ENTRIES + 20)
        directory, sound = tmp_path / "data" / "m3", tmp_path / "sound"
        wait_until(lambda: holds(cluster, "m3", made) and (directory / "snapshot").exists(), 20.0, "a snapshot")
        assert cluster.stop(["m3"]) == []
        shutil.copytree(directory, sound)
        for what, (damage, words) in DAMAGES.items():
            damage(directory)
            start(cluster, "m3")
            if not may_start(cluster, what, made):
                said = wait_end(cluster, "m3")
                assert words in said, what
                assert str(directory) in said, what
                assert "offset " in said, what
                assert ADVICE in said, what
                assert "`clusterctl masters replace`" in said, what
                assert "`clusterctl restore`" in said, what
            made += write(cluster)
            cluster.kill("m3")
            shutil.rmtree(directory)
            shutil.copytree(sound, directory)
        # All that the snapshot includes is still in the log's one segment, so without it nothing is lost.
        (directory / "snapshot").unlink()
        start(cluster, "m3")
        wait_until(lambda: holds(cluster, "m3", made), 20.0, "m3 has caught up")
        cluster.kill("m3")
        # What a power cut leaves of a record that was never acknowledged.
        with log_of(directory).open("ab") as log:
            log.write(b"half a record")
        start(cluster, "m3")
        made += write(cluster)
        wait_until(lambda: holds(cluster, "m3", made), 20.0, "m3 has caught up")
        assert "dropped a torn record" in cluster.process("m3").log.read_text()


def test_a_full_disk_stops_one_master_and_loses_nothing(tmp_path: Path) -> None:
    """The leader's disk, then a follower's: that master ends and says so; with room it is back."""
    with ExitStack() as disks:
        for master_id in ("m1", "m2", "m3"):
            disks.enter_context(small_disk(tmp_path / "data" / master_id))
        cluster = disks.enter_context(LocalCluster(tmp_path, masters=3, workers=0))
        cluster.start()
        leader = cluster.wait_leader()
        made = write(cluster, 20)
        for is_leader in (True, False):
            leader = cluster.wait_leader()
            full = leader if is_leader else next(one for one in cluster.master_ids if one != leader)
            directory = tmp_path / "data" / full
            ballast = fill(directory)
            while cluster.process(full).process_id is not None:
                made += write(cluster, 10)
                assert len(made) < 1_000, f"{full} does not notice that its disk is full"
            said = wait_end(cluster, full)
            assert str(directory) in said
            assert "No space left on device" in said
            assert "make room" in said
            with_one_away = [one for one in cluster.master_ids if one != full]
            made += write(cluster, 5)
            wait_until(lambda: all(holds(cluster, one, made) for one in with_one_away), 20.0, "the others have all")  # noqa: B023
            start(cluster, full)
            wait_until(
                lambda: cluster.process(full).process_id is None or holds(cluster, full, made[:1]),  # noqa: B023
                20.0,
                f"{full} starts or says why not",
            )
            cluster.kill(full)
            ballast.unlink()
            start(cluster, full)
            wait_until(lambda: holds(cluster, full, made), 20.0, f"{full} has caught up")  # noqa: B023
