"""Three real masters: they elect, answer alike, survive kill -9 and restarts, and say clearly why they cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.client import STALE, ClusterClient
from coordinator.config import MasterSettings
from coordinator.model.errors import InvalidRequest, NoLeader, RefusalReason, Refused, TimedOut
from coordinator.security import tls
from coordinator.security.certificates import Role
from tools.lib.local_cluster import LocalCluster, wait_until


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Three masters that have elected a leader."""
    with LocalCluster(tmp_path, masters=3, workers=0) as running:
        running.start()
        running.wait_leader()
        yield running


def run_coordinator(*arguments: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Runs the daemon until it ends by itself."""
    command = [sys.executable, "-m", "coordinator.server.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def get_json(address: str) -> tuple[int, dict[str, Any]]:
    """What /health answers."""
    try:
        with urllib.request.urlopen(f"http://{address}/health", timeout=5) as response:
            return int(response.status), json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_every_master_tells_the_same_status(cluster: LocalCluster) -> None:
    """A follower passes the question on, so the answer has the leader's view whichever master is asked."""
    answers = [cluster.client([master_id]).get_status() for master_id in cluster.master_ids]
    assert len({(answer.cluster_id, answer.leader_id) for answer in answers}) == 1
    assert {answer.shards for answer in answers} == {256}
    for answer in answers:
        assert sorted((master.id, master.role == "leader") for master in answer.masters) == [
            (master_id, master_id == answer.leader_id) for master_id in cluster.master_ids
        ]
        assert any("no worker is admitted" in problem for problem in answer.problems)


def test_a_stale_answer_needs_nobody_else(cluster: LocalCluster) -> None:
    """With two of three masters gone, the last one still tells what it knows, and refuses what needs a majority."""
    for master_id in ("m1", "m2"):
        cluster.kill(master_id)
    client = cluster.client(["m3"], timeout_s=5.0)
    status = client.get_status(consistency=STALE)
    assert status.shards == 256
    assert [master.id for master in status.masters if master.role == "unreachable"] == ["m1", "m2"]
    assert "only 1 of 3 masters answer; nothing can be changed before 2 do" in status.problems
    with pytest.raises((NoLeader, TimedOut)):
        client.change_settings(rebalance_paused=True)


def test_a_killed_leader_is_replaced_and_nothing_is_forgotten(cluster: LocalCluster) -> None:
    """After kill -9 of the leader another master leads with all that was acknowledged; the old one returns."""
    leader = cluster.wait_leader()
    cluster.client().change_settings(rebalance_paused=True, replicas=3)
    cluster_id = cluster.client().get_status().cluster_id
    cluster.kill(leader)
    began_s = time.monotonic()
    successor = cluster.wait_leader(other_than=leader)
    assert time.monotonic() - began_s < 15.0
    status = cluster.client().get_status()
    assert status.leader_id == successor != leader
    assert status.cluster_id == cluster_id
    assert (status.settings.rebalance_paused, status.settings.replicas) == (True, 3)

    cluster.start([leader])
    client = cluster.client([leader])
    own = wait_until(lambda: client.get_status(), 20.0, f"{leader} answers again")
    assert own.cluster_id == cluster_id
    assert wait_until(
        lambda: all(master.role != "unreachable" for master in client.list_masters().masters),
        20.0,
        "all masters answer",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX's")
def test_a_leader_that_hangs_does_not_hold_up_a_follower(cluster: LocalCluster) -> None:
    """Calls that a follower passed on to a leader that was stopped go to the next one; the old one finds its place."""
    leader = cluster.wait_leader()
    followers = [master_id for master_id in cluster.master_ids if master_id != leader]
    client = cluster.client(followers)
    process_id = cluster.process(leader).process_id
    assert process_id is not None
    os.kill(process_id, signal.SIGSTOP)
    assert client.get_status().leader_id in followers
    os.kill(process_id, signal.SIGCONT)
    wait_until(lambda: not any(master.problem for master in client.list_masters().masters), 20.0, "all masters answer")
    assert client.get_status().leader_id in followers


def test_all_masters_restarted_keep_the_state(cluster: LocalCluster) -> None:
    """Three masters that were all killed at once come back with the same cluster, settings and story."""
    client = cluster.client()
    client.change_settings(replicas=3)
    split = client.split_shard(7)
    before = client.get_status()
    story = [event.message for event in client.stream_events()]
    for master_id in cluster.master_ids:
        cluster.kill(master_id)
    cluster.start()
    cluster.wait_leader()
    after = cluster.client().get_status()
    assert (after.cluster_id, after.shards, after.settings) == (before.cluster_id, 257, before.settings)
    assert [event.message for event in cluster.client().stream_events()][: len(story)] == story
    shards = cluster.client().list_shards(shard_ids=[split.lower_shard_id, split.upper_shard_id]).shards
    assert shards[0].hi == shards[1].lo


def test_masters_stop_cleanly_and_the_leader_hands_over(cluster: LocalCluster) -> None:
    """SIGTERM ends a leader with status 0 within its bound, and another one leads almost at once."""
    leader = cluster.wait_leader()
    began_s = time.monotonic()
    assert cluster.stop([leader]) == []
    assert cluster.process(leader).exit_status == 0
    assert time.monotonic() - began_s < 6.0
    cluster.wait_leader(other_than=leader)
    assert "could not be handed on" not in cluster.process(leader).log.read_text()


def test_reads_and_changes_through_every_master(cluster: LocalCluster) -> None:
    """A change through one master is seen by a linearizable read through any other; refusals keep their class."""
    first, second, third = (cluster.client([master_id]) for master_id in cluster.master_ids)
    assert first.change_settings(cron_paused=True).settings.cron_paused
    assert second.get_status().settings.cron_paused
    assert third.change_settings(cron_paused=False).settings.cron_paused is False
    halves = second.split_shard(1)
    assert {shard.id for shard in third.list_shards().shards} >= {halves.lower_shard_id, halves.upper_shard_id}
    assert first.merge_shards(halves.lower_shard_id, halves.upper_shard_id).shard_id
    with pytest.raises(Refused) as caught:
        third.drain_node("w9")
    assert caught.value.reason is RefusalReason.NOT_FOUND
    with pytest.raises(Refused) as caught:
        second.abort_move(4711)
    assert caught.value.reason is RefusalReason.NOT_FOUND


def test_a_request_that_is_repeated_applies_once(cluster: LocalCluster) -> None:
    """The same request id through two masters splits one shard once, and both answers are equal."""
    first, second = cluster.client(["m1"]), cluster.client(["m2"])
    assert first.split_shard(3, request_id="split-3") == second.split_shard(3, request_id="split-3")
    assert first.get_status().shards == 257


def test_keys_are_located_in_the_order_of_the_request(cluster: LocalCluster) -> None:
    """Each key is in the range of the shard that is told, and too many keys are refused with the limit."""
    client = cluster.client()
    keys = [f"user-{number}" for number in range(1_000)]
    response = client.locate_keys(keys)
    ranges = {shard.id: (shard.lo, shard.hi or 1 << 64) for shard in client.list_shards().shards}
    assert [location.key for location in response.locations] == keys
    for location in response.locations:
        lo, hi = ranges[location.shard_id]
        assert lo <= location.key_hash < hi
    with pytest.raises(InvalidRequest, match="10000"):
        client.locate_keys(["x"] * 10_001)
    with pytest.raises(InvalidRequest, match="1 to 512 bytes"):
        client.locate_keys([""])


def test_the_story_is_followed_over_a_change_of_leader(cluster: LocalCluster) -> None:
    """A reader that follows the story sees every sequence once, also when the master that it reads from is killed."""
    client = cluster.client()
    stream = client.stream_events(from_sequence=1, follow=True)
    seen = [next(stream).sequence]
    client.change_settings(rebalance_paused=True)
    seen.append(next(stream).sequence)
    cluster.kill(cluster.wait_leader())
    cluster.wait_leader()
    cluster.client().change_settings(rebalance_paused=False)
    wanted = [event.sequence for event in cluster.client().stream_events(from_sequence=1)]
    while len(seen) < len(wanted):
        seen.append(next(stream).sequence)
    stream.close()
    assert seen == wanted == list(range(1, len(wanted) + 1))


def test_health_is_told_over_http_and_grpc(cluster: LocalCluster) -> None:
    """/health and grpc.health.v1 say healthy with a leader, unhealthy without; /metrics has the figures."""
    alive = cluster.config.masters[2]
    status, document = get_json(alive.http_address)
    assert (status, document["status"], document["instance_id"]) == (200, "healthy", "m3")
    assert document["leader"] == cluster.wait_leader()
    # The form of SPECIFICATION.md 4.3, which is that of the workers too.
    assert set(document["metrics"]) == {
        "cpu_percent", "memory_percent", "disk_percent", "active_connections", "queue_depth"
    }  # fmt: skip
    assert set(document["loops"]) == {"running", "healthy"}
    assert document["services"]["leader"] == "connected"

    credentials = cluster.credentials()
    assert credentials is not None
    shown = tls.channel_credentials(credentials.files)

    def grpc_health() -> object:
        options = tls.channel_options(cluster.config.name, Role.MASTER)
        with grpc.secure_channel(alive.grpc_address, shown, options=options) as channel:
            request = health_pb2.HealthCheckRequest(service="coordinator.api.v1.ClusterService")
            stub: Any = health_pb2_grpc.HealthStub(channel)
            return stub.Check(request, timeout=5).status

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    wait_until(lambda: grpc_health() == serving, 10.0, "m3 is serving")
    def figures_of(master: MasterSettings) -> str:
        with urllib.request.urlopen(f"http://{master.http_address}/metrics", timeout=5) as response:
            text: str = response.read().decode()
        return text

    figures = figures_of(alive)
    for line in ("coordinator_shards 256.0", "coordinator_has_leader 1.0", 'coordinator_nodes{state="active"} 0.0'):
        assert line in figures
    # What launches run and wait is told by the leader alone, so that sums over the masters are right.
    wait_until(
        lambda: sum("\ncoordinator_cron_running 0.0" in figures_of(one) for one in cluster.config.masters) == 1,
        10.0,
        "one master counts launches",
    )
    for master_id in ("m1", "m2"):
        cluster.kill(master_id)
    wait_until(lambda: get_json(alive.http_address)[0] == 503, 15.0, "/health of m3 answers 503")
    wait_until(lambda: grpc_health() == not_serving, 10.0, "m3 is not serving")


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    """Each of the three ports, when taken, ends the start with status 1 and one line that names the address."""
    cluster = LocalCluster(tmp_path, masters=3, workers=0)
    master = cluster.config.masters[0]
    for address in (master.grpc_address, master.peer_address, master.http_address):
        host, _, port = address.rpartition(":")
        with socket.create_server((host, int(port))):
            ended = run_coordinator("--config", str(cluster.config_path), "--id", "m1")
        said = [line for line in ended.stderr.splitlines() if line.startswith("coordinator: ")]
        assert ended.returncode == 1
        assert len(said) == 1
        assert address in said[0]
        assert "Traceback" not in ended.stderr


def test_an_unknown_id_names_those_that_are_known(tmp_path: Path) -> None:
    """--id m9 ends with status 1 and one line that has the ids of the configuration; no --id is wrong usage."""
    cluster = LocalCluster(tmp_path, masters=3, workers=0)
    ended = run_coordinator("--config", str(cluster.config_path), "--id", "m9")
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "m9" in ended.stderr
    assert "m1, m2, m3" in ended.stderr
    assert run_coordinator("--config", str(cluster.config_path)).returncode == 2
    assert run_coordinator("--version").stdout.startswith("coordinator, version")


def test_a_second_daemon_on_the_same_directory_is_refused(cluster: LocalCluster) -> None:
    """The directory's lock is told before a port: one line with the process that holds it."""
    ended = run_coordinator("--config", str(cluster.config_path), "--id", "m1")
    assert ended.returncode == 1
    assert f"in use by another daemon (process {cluster.process('m1').process_id})" in ended.stderr


def test_sessions_of_real_workers(tmp_path: Path) -> None:
    """Two workers become active at the leader, with figures; a leader's death moves their sessions to the next one."""
    with LocalCluster(tmp_path, masters=3, workers=2) as cluster:
        cluster.start()
        status = cluster.wait_ready(60.0)
        assert dict(status.nodes_by_state) == {"active": 2}
        followers = [master_id for master_id in cluster.master_ids if master_id != status.leader_id]

        def connected(client: ClusterClient) -> list[cluster_pb2.NodeView]:
            views = client.list_nodes().nodes
            return [view for view in views if view.connected and 0 <= view.heartbeat_age_ms < 5_000]

        through_follower = cluster.client([followers[0]])
        wait_until(lambda: len(connected(through_follower)) == 2, 10.0, "both workers are seen through a follower")
        plan = through_follower.plan_rebalance()
        assert sum(load.replicas_before for load in plan.loads) == 2 * status.shards
        assert not through_follower.drain_node("w1", dry_run=True).safe
        with pytest.raises(Refused, match="w1 cannot be drained safely"):
            through_follower.drain_node("w1")
        before = {shard.id: list(shard.in_sync) for shard in cluster.client().list_shards().shards}
        cluster.kill(status.leader_id)
        cluster.wait_leader(other_than=status.leader_id)
        wait_until(
            lambda: len(connected(cluster.client(followers))) == 2, 20.0, "both workers have found the new leader"
        )
        states = {view.node.id: view.node.state for view in cluster.client().list_nodes().nodes}
        assert states == {"w1": types_pb2.NODE_STATE_ACTIVE, "w2": types_pb2.NODE_STATE_ACTIVE}
        assert {shard.id: list(shard.in_sync) for shard in cluster.client().list_shards().shards} == before
