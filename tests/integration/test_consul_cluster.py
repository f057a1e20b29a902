"""A whole cluster of real masters and workers that find each other through a real Consul."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.api.v1 import types_pb2
from coordinator.client import ClusterClient
from coordinator.config import ClusterConfig, ConsulSettings, DiscoverySettings
from coordinator.config_file import render
from coordinator.model import CronJobSpec, OverlapPolicy
from coordinator.security.certificates import Role
from coordinator.security.provision import ensure
from tools.lib.consul_agent import ConsulAgent
from tools.lib.daemons import Daemon
from tools.lib.local_cluster import LocalCluster, wait_until
from tools.lib.ports import free_ports

AWAY_LAUNCHES = 6
"""Consul stays away for as many launches of a job that is due every second: four times the time of a suspicion."""
STILL_LAUNCHES = 6
"""Nothing may move for as many after Consul is back: its first answers, all critical or empty, are long over then."""
MOVEMENTS = {"shard", "move", "node"}
DEADLINE_S = 30.0
TICK = CronJobSpec(id="tick", schedule="* * * * * *", python="worker_agent.loops:run", overlap=OverlapPolicy.ALLOW)
MASTERS, WORKERS = {"m1", "m2", "m3"}, {"w1", "w2", "w3"}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, consul_binary: Path) -> Iterator[ConsulAgent]:
    """A running agent for all tests."""
    with ConsulAgent(tmp_path_factory.mktemp("consul"), binary=consul_binary) as running:
        yield running


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, agent: ConsulAgent) -> Iterator[LocalCluster]:
    """Three masters and three workers, for all tests: only the last one stops some of them."""
    consul = ConsulSettings(address=agent.address, check_interval_s=1.0, check_timeout_s=0.5, poll_wait_s=10.0)

    def with_tick(config: ClusterConfig) -> ClusterConfig:
        return replace(config, cron=replace(config.cron, jobs=(TICK,)))

    with LocalCluster(
        tmp_path_factory.mktemp("cluster"), discovery=DiscoverySettings("consul", consul), change=with_tick
    ) as running:
        running.start()
        running.wait_ready()
        yield running


@pytest.fixture
def cluster(started: LocalCluster, agent: ConsulAgent) -> LocalCluster:
    """Those, registered and healthy in Consul, at rest."""
    wait_until(lambda: passing(agent, "worker-agent") == WORKERS, DEADLINE_S, "three healthy workers in Consul")
    wait_until(lambda: passing(agent, "coordinator") == MASTERS, DEADLINE_S, "three healthy masters in Consul")
    client = started.client()
    wait_until(lambda: not client.list_moves().moves and not client.plan_rebalance().moves, DEADLINE_S, "rest")
    return started


def entries(agent: ConsulAgent, query: str) -> list[dict[str, Any]]:
    """What Consul tells about a service, for example "coordinator?tag=leader"."""
    try:
        found = agent.get(f"/v1/health/service/{query}")
    except OSError:  # While Consul starts it answers with errors.
        return []
    assert isinstance(found, list)
    return found


def by_status(agent: ConsulAgent, query: str) -> dict[str, str]:
    """The status of each daemon's own check, by its id."""
    return {
        entry["Service"]["Meta"]["id"]: next(check["Status"] for check in entry["Checks"] if check["ServiceID"])
        for entry in entries(agent, query)
    }


def passing(agent: ConsulAgent, query: str) -> set[str]:
    """Ids of the daemons that Consul holds for healthy."""
    return {daemon_id for daemon_id, status in by_status(agent, query).items() if status == "passing"}


def story(client: ClusterClient, after: int = 0) -> list[types_pb2.Event]:
    """The cluster's events, those behind a sequence number only."""
    return [event for event in client.stream_events(latest=10_000) if event.sequence > after]


def shard_map(client: ClusterClient) -> list[tuple[int, int, str, tuple[str, ...]]]:
    """Who holds what, with the epochs, in which every change shows."""
    return [(shard.id, shard.epoch, shard.primary, tuple(shard.in_sync)) for shard in client.list_shards().shards]


def wait_launches(client: ClusterClient, count: int) -> None:
    """Waits until the job that is due every second was launched so many more times and succeeded: so many seconds."""

    def succeeded() -> set[int]:
        launches = client.list_launches(job_id="tick", latest=200).launches
        return {one.scheduled_at_unix_ms for one in launches if one.state == types_pb2.LAUNCH_STATE_SUCCEEDED}

    before = succeeded()
    wait_until(lambda: len(succeeded() - before) >= count, DEADLINE_S, f"{count} launches of a job")


@pytest.mark.parametrize("loses_data", [False, True])
def test_nothing_moves_while_consul_is_away_and_when_it_is_back(
    cluster: LocalCluster, agent: ConsulAgent, loses_data: bool
) -> None:
    """Consul stopped and started again, with or without its data: no shard, move or worker changes, and jobs still run.

    Everybody is registered and healthy again afterwards, without anything having been restarted.
    """
    client = cluster.client()
    before, last = shard_map(client), story(client)[-1].sequence
    agent.stop()
    wait_launches(client, AWAY_LAUNCHES)
    assert [problem for problem in client.get_status().problems if "Consul" in problem]
    if loses_data:
        shutil.rmtree(agent.directory / "data")
    agent.start()
    wait_until(lambda: passing(agent, "worker-agent") == WORKERS, DEADLINE_S, "the workers are healthy again")
    wait_until(lambda: passing(agent, "coordinator") == MASTERS, DEADLINE_S, "the masters are healthy again")
    wait_launches(client, STILL_LAUNCHES)
    assert [event.message for event in story(client, last) if event.kind in MOVEMENTS] == []
    assert shard_map(client) == before
    wait_until(lambda: not client.get_status().problems, DEADLINE_S, "nothing is wrong")
    cluster.raise_if_dead()


def test_a_worker_finds_the_masters_through_consul(cluster: LocalCluster, agent: ConsulAgent) -> None:
    """A worker whose own file has stale addresses of all masters joins all the same, and leaves again."""
    ports = iter(free_ports(3))
    stale = replace(
        cluster.config,
        masters=tuple(replace(master, grpc_address=f"127.0.0.1:{next(ports)}") for master in cluster.config.masters),
    )
    path = cluster.directory / "stale.toml"
    path.write_text(render(stale), encoding="utf-8")
    ensure(cluster.directory / cluster.config.security.directory, cluster.config.name, [(Role.WORKER, "w4")])
    worker = Daemon("worker-agent", "w4", path, cluster.directory / "logs" / "w4.log")
    client = cluster.client()
    try:
        worker.start()
        wait_until(
            lambda: any(view.node.id == "w4" and view.primaries for view in client.list_nodes().nodes),
            DEADLINE_S,
            "w4 carries a share",
        )
        assert worker.stop()
    finally:
        worker.kill()
    assert "w4" not in by_status(agent, "worker-agent")


def test_consul_shows_who_leads_who_is_lost_and_who_has_left(cluster: LocalCluster, agent: ConsulAgent) -> None:
    """In the catalog the tag follows the leader, what is killed turns critical, what is stopped cleanly is gone."""
    (leader,) = passing(agent, "coordinator?tag=leader")
    assert leader == cluster.wait_leader()
    for entry in entries(agent, "worker-agent"):
        assert {"zone", "weight", "version", "grpc_address", "http_address"} <= set(entry["Service"]["Meta"])

    def carried() -> int:
        return sum(int(entry["Service"]["Meta"]["primaries"]) for entry in entries(agent, "worker-agent"))

    wait_until(lambda: carried() == cluster.config.placement.shards, DEADLINE_S, "Consul tells what workers carry")
    cluster.kill(leader)
    cluster.kill("w3")
    successor = cluster.wait_leader(other_than=leader)
    wait_until(lambda: passing(agent, "coordinator?tag=leader") == {successor}, DEADLINE_S, f"{successor} has the tag")
    wait_until(lambda: by_status(agent, "worker-agent").get("w3") == "critical", DEADLINE_S, "w3 is critical")
    cluster.start([leader, "w3"])
    wait_until(lambda: passing(agent, "coordinator") == MASTERS, DEADLINE_S, "the old leader is healthy")
    wait_until(
        lambda: set(by_status(agent, "coordinator?tag=leader")) == {successor}, DEADLINE_S, "only one is called leader"
    )
    wait_until(lambda: "w3" in passing(agent, "worker-agent"), DEADLINE_S, "w3 is healthy again")
    assert cluster.stop(["w1", leader]) == []
    assert set(by_status(agent, "worker-agent")) == {"w2", "w3"}
    assert leader not in by_status(agent, "coordinator")
    assert cluster.stop() == []
    assert entries(agent, "worker-agent") == entries(agent, "coordinator") == []
