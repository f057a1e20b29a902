"""Backup of a live cluster, restore into a new one that nobody of the old one gets into; transfer of leadership."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import types_pb2
from coordinator.cli import main as cli_main
from coordinator.cli.backup import read_backup
from coordinator.client import ClusterClient
from coordinator.config import ClusterConfig
from coordinator.machine.backup import INDEX_LEAP, Backup
from coordinator.model.errors import InvalidRequest
from coordinator.raft.identity import Identity
from tools.lib.local_cluster import LocalCluster, wait_until


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Three masters that have elected a leader; one worker that is not started."""

    def change(config: ClusterConfig) -> ClusterConfig:
        return replace(config, placement=replace(config.placement, replicas=1))

    with LocalCluster(tmp_path / "cluster", masters=3, workers=1, change=change) as running:
        running.start(running.master_ids)
        running.wait_leader()
        yield running


def shards_of(client: ClusterClient) -> list[tuple[int, int, str, list[str]]]:
    """What the masters say of every shard but its epoch."""
    return [(shard.lo, shard.hi, shard.primary, list(shard.in_sync)) for shard in client.list_shards().shards]


class Splitter(threading.Thread):
    """Splits one shard after the other until it is told to stop; `acknowledged` counts."""

    def __init__(self, client: ClusterClient) -> None:
        super().__init__(name="splitter")
        self._client = client
        self._stop_asked = threading.Event()
        self.acknowledged = 0
        self.some_done = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.is_set():
            self._client.split_shard(self.acknowledged + 1)
            self.acknowledged += 1
            if self.acknowledged >= 5:
                self.some_done.set()

    def finish(self) -> None:
        """Returns once the last split is acknowledged."""
        self._stop_asked.set()
        self.join()


def check_goes_on_from(backup: Backup, client: ClusterClient, new_id: str) -> None:
    """The restored cluster has everything that the backup has, and indexes beyond."""
    status = client.get_status()
    assert status.cluster_id == new_id
    assert status.index >= backup.header.index + INDEX_LEAP
    assert [(shard[0], shard[1] or 1 << 64) for shard in shards_of(client)] == sorted(
        (shard.lo, shard.hi) for shard in backup.state.shards.values()
    )
    assert {view.node.id for view in client.list_nodes().nodes} == {"w1"}
    assert len(client.list_jobs().jobs) == len(backup.state.jobs)
    story = [record.message for _, record in sorted(backup.state.events.items())]
    assert [event.message for event in client.stream_events(from_sequence=1)][: len(story)] == story


def check_old_master_is_refused(cluster: LocalCluster, old: Path, old_id: str) -> None:
    """With the old m3 in the place of the new one it is named in the log, and the two others go on."""
    new = cluster.directory / "new-m3"
    cluster.kill("m3")
    shutil.move(cluster.directory / "data" / "m3", new)
    shutil.copytree(old, cluster.directory / "data" / "m3")
    cluster.start(["m3"])
    refusals = [cluster.process(master_id).log for master_id in cluster.master_ids]
    wait_until(
        lambda: any(f"its disk belongs to cluster id {old_id}" in log.read_text() for log in refusals[:2]),
        20.0,
        "the old master is named in the log of the one that it dials",
    )
    client = cluster.client(["m1", "m2"])
    figures = wait_until(
        lambda: next((one for one in client.list_masters().masters if one.id == "m3" and one.problem), None),
        20.0,
        "the list of masters says what is wrong with m3",
    )
    assert list(figures.connected_peers) == []
    assert client.change_settings(cron_paused=True).settings.cron_paused
    cluster.kill("m3")
    shutil.rmtree(cluster.directory / "data" / "m3")
    shutil.move(new, cluster.directory / "data" / "m3")
    cluster.start(["m3"])


def check_worker_has_to_accept(cluster: LocalCluster, new_id: str) -> None:
    """The worker ends with one line until it is told the new cluster's id, once; then it carries its shards again."""
    cluster.start(["w1"])
    wait_until(lambda: cluster.process("w1").exit_status == 1, 20.0, "the worker refuses the new cluster")
    assert "--accept-cluster" in cluster.process("w1").last_words()
    cluster.restart_with("w1", "--accept-cluster", new_id)
    wait_until(
        lambda: [view.node.state for view in cluster.client().list_nodes().nodes] == [types_pb2.NODE_STATE_ACTIVE],
        30.0,
        "the worker is active in the new cluster",
    )
    cluster.wait_ready()
    assert {shard[2] for shard in shards_of(cluster.client())} == {"w1"}
    cluster.restart_with("w1")
    cluster.wait_ready()


def test_backup_while_writes_run_and_restore_into_a_new_cluster(cluster: LocalCluster, tmp_path: Path) -> None:
    """A backup under load has all that was acknowledged before it; a new cluster of three goes on from exactly there.

    A master of the old cluster that comes back with its disk is refused and named; the worker is refused until it is
    told to accept the new cluster, and then has its shards again.
    """
    config, file = str(cluster.config_path), tmp_path / "state.backup"
    cluster.start(["w1"])
    cluster.wait_ready()
    splitter = Splitter(cluster.client())
    splitter.start()
    assert splitter.some_done.wait(30)
    before = splitter.acknowledged
    assert cli_main.run(["--config", config, "backup", str(file)]) == 0
    after = splitter.acknowledged + 1
    splitter.finish()
    backup = read_backup(file)
    assert before <= len(backup.state.shards) - 256 <= after
    old_id = cluster.client().get_status().cluster_id
    assert backup.header.cluster_id == old_id

    for daemon_id in ("w1", *cluster.master_ids):
        cluster.kill(daemon_id)
    for master_id in cluster.master_ids:
        shutil.move(cluster.directory / "data" / master_id, tmp_path / "old" / master_id)
    assert cli_main.run(["restore", str(file), "--config", config, "--all"]) == 0
    cluster.start(cluster.master_ids)
    cluster.wait_leader()
    new_id = Identity(cluster.directory / "data" / "m1").cluster_id
    assert new_id != old_id
    check_goes_on_from(backup, cluster.client(), new_id)
    check_old_master_is_refused(cluster, tmp_path / "old" / "m3", old_id)
    check_worker_has_to_accept(cluster, new_id)


def test_leadership_is_handed_to_the_master_that_is_named(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """`masters transfer` works through every master, for a named target and without one, and twice is as once."""
    config = str(cluster.config_path)
    leader = cluster.wait_leader()
    target = next(master_id for master_id in cluster.master_ids if master_id != leader)
    assert cli_main.run(["--config", config, "masters", "transfer", target]) == 0
    assert capsys.readouterr().out.startswith(f"{target} leads in term ")
    for master_id in cluster.master_ids:
        # Whoever is asked, and however often: it leads already.
        assert cluster.client([master_id]).transfer_leadership(target).leader_id == target
    third = next(master_id for master_id in cluster.master_ids if master_id not in (leader, target))
    assert cluster.client([third]).transfer_leadership(third).leader_id == third
    assert cluster.client([leader]).transfer_leadership().leader_id != third
    assert cluster.client().transfer_leadership(leader_id=third).leader_id != third
    assert cli_main.run(["--config", config, "masters", "transfer", "m9"]) == 1
    assert "there is no master 'm9'" in capsys.readouterr().err
    with pytest.raises(InvalidRequest, match="use one of m1, m2, m3"):
        cluster.client().transfer_leadership("m9")


def test_leadership_is_handed_on_under_load(cluster: LocalCluster) -> None:
    """While a client writes without a pause, three transfers succeed, and no write fails."""
    splitter = Splitter(cluster.client())
    splitter.start()
    client = cluster.client()
    for _ in range(3):
        leader = client.get_status().leader_id
        assert client.transfer_leadership().leader_id != leader
        wait_until(lambda leader=leader: client.get_status().leader_id != leader, 10.0, "another one leads")  # type: ignore[misc]
    splitter.finish()
    assert len(client.list_shards().shards) == 256 + splitter.acknowledged
