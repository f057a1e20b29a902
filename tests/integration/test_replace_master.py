"""A master with an empty disk among real ones: silent until it is replaced, a full master afterwards; five as three."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import cluster_pb2
from coordinator.cli import main as cli_main
from coordinator.client import STALE
from coordinator.config_file import render
from coordinator.model.errors import NoLeader, Refused, TimedOut
from tools.lib.local_cluster import LocalCluster, wait_until
from tools.lib.ports import free_ports


@contextmanager
def running(directory: Path, masters: int = 3) -> Iterator[LocalCluster]:
    """Masters that have elected a leader."""
    with LocalCluster(directory, masters=masters, workers=0) as cluster:
        cluster.start()
        cluster.wait_leader()
        yield cluster


def lose_disk(cluster: LocalCluster, master_id: str) -> Path:
    """Kills a master and takes its data directory away; where that is kept."""
    cluster.kill(master_id)
    kept = cluster.directory / f"kept-{master_id}"
    shutil.move(cluster.directory / "data" / master_id, kept)
    return kept


def master(cluster: LocalCluster, master_id: str) -> cluster_pb2.Master:
    """What the list of masters says of one."""
    return next(one for one in cluster.client().list_masters().masters if one.id == master_id)


def follower_of(cluster: LocalCluster) -> str:
    """A master that does not lead."""
    leader = cluster.wait_leader()
    return next(master_id for master_id in cluster.master_ids if master_id != leader)


def test_a_lost_disk_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A master without its disk is a learner that makes no majority; replaced, it does; its old disk is refused."""
    with running(tmp_path) as cluster:
        config = str(cluster.config_path)
        client = cluster.client()
        client.change_settings(replicas=3)
        lost = follower_of(cluster)
        assert cli_main.run(["--config", config, "masters", "replace", lost]) == 1
        assert "votes, there is nothing to replace" in " ".join(capsys.readouterr().err.split())
        kept = lose_disk(cluster, lost)
        assert cli_main.run(["--config", config, "--timeout", "3", "masters", "replace", lost]) == 1
        assert "is not connected to the leader" in " ".join(capsys.readouterr().err.split())
        cluster.start([lost])
        wait_until(lambda: master(cluster, lost).role == "learner", 20.0, "it is a learner")

        leader = cluster.wait_leader()
        other = next(one for one in cluster.master_ids if one not in (leader, lost))
        cluster.kill(other)
        with pytest.raises((NoLeader, TimedOut)):
            cluster.client([leader], timeout_s=4.0).change_settings(replicas=2, request_id="no majority")
        cluster.start([other])
        cluster.wait_leader()

        assert cli_main.run(["--config", config, "masters", "replace", lost]) == 0
        assert f"{lost} votes with its new disk" in capsys.readouterr().out
        assert cli_main.run(["--config", config, "masters", "replace", lost]) == 0
        assert master(cluster, lost).role in ("follower", "leader")
        cluster.kill(other)
        cluster.wait_leader()
        assert cluster.client().change_settings(replicas=1).settings.replicas == 1
        cluster.start([other])
        wait_until(lambda: not any(one.problem for one in client.list_masters().masters), 20.0, "all answer")

        cluster.kill(lost)
        shutil.rmtree(cluster.directory / "data" / lost)
        shutil.move(kept, cluster.directory / "data" / lost)
        cluster.start([lost])
        logs = [cluster.process(one).log for one in cluster.master_ids if one != lost]
        wait_until(
            lambda: any("was replaced by" in log.read_text() for log in logs)
            or cluster.process(lost).exit_status == 1,
            20.0,
            "the replaced disk is refused",
        )
        assert cluster.client().get_status().settings.replicas == 1


def test_a_master_moves_to_another_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --with the others find it at its new port, also two that start alone, and a wrong address is taken back."""
    with running(tmp_path) as cluster:
        lost = follower_of(cluster)
        lose_disk(cluster, lost)
        moved = f"127.0.0.1:{free_ports(1)[0]}"
        masters = tuple(
            replace(one, peer_address=moved) if one.id == lost else one for one in cluster.config.masters
        )
        elsewhere = tmp_path / "elsewhere.toml"
        elsewhere.write_text(render(replace(cluster.config, masters=masters)))
        cluster.process(lost).config = elsewhere
        cluster.start([lost])
        arguments = ["--config", str(cluster.config_path), "masters", "replace", lost]
        assert cli_main.run([*arguments, "--with", "nowhere"]) == 1
        assert "is not host:port" in " ".join(capsys.readouterr().err.split())
        # A process has to start within that time, on a machine that may be busy.
        status = cli_main.run(["--timeout", "60", *arguments, "--with", moved])
        assert status == 0, capsys.readouterr().err
        cluster.stop()
        others = [one for one in cluster.master_ids if one != lost]
        # Of two masters the one with the higher id dials; the third, whom all find, stays away until there is a leader.
        cluster.start([lost, max(others)])
        cluster.wait_leader()
        cluster.start([min(others)])
        wait_until(lambda: set(master(cluster, lost).connected_peers) == set(others), 20.0, "all are connected")


def test_a_majority_of_lost_disks_elects_nobody(tmp_path: Path) -> None:
    """Two of three masters come back empty: they stay learners, and what the third one has is not overruled."""
    with running(tmp_path) as cluster:
        cluster.client().change_settings(replicas=3)
        stays = cluster.wait_leader()
        lost = [one for one in cluster.master_ids if one != stays]
        for one in lost:
            lose_disk(cluster, one)
        cluster.start(lost)
        roles = {"learner"}
        wait_until(
            lambda: {one.role for one in cluster.client().list_masters().masters if one.id in lost} == roles,
            20.0,
            "both are learners",
        )
        with pytest.raises((NoLeader, TimedOut)):
            cluster.client(timeout_s=3.0).change_settings(replicas=1, request_id="no majority")
        assert cluster.client([stays]).get_status(consistency=STALE).settings.replicas == 3
        with pytest.raises((NoLeader, TimedOut, Refused)):
            cluster.client(timeout_s=3.0).replace_master(lost[0])


def test_five_masters_work_as_three_do(tmp_path: Path) -> None:
    """Two of five are killed and the rest goes on; one of them comes back empty and is replaced; a third one may go."""
    with running(tmp_path, masters=5) as cluster:
        cluster.client().change_settings(replicas=3)
        leader = cluster.wait_leader()
        first, second, third, _ = (one for one in cluster.master_ids if one != leader)
        lose_disk(cluster, first)
        cluster.kill(leader)
        cluster.wait_leader(other_than=leader)
        assert cluster.client().change_settings(cron_paused=True).settings.replicas == 3
        cluster.start([first])
        wait_until(lambda: cluster.client().replace_master(first).disk_id, 20.0, "it is replaced")
        cluster.kill(second)
        cluster.wait_leader()
        assert cluster.client().transfer_leadership(third).leader_id == third
        assert cluster.client().change_settings(cron_paused=False).settings.replicas == 3
        cluster.start([leader, second])
        wait_until(
            lambda: not any(one.problem for one in cluster.client().list_masters().masters), 20.0, "all five answer"
        )
