"""tools/node-join and tools/node-leave against a real cluster, with embedded discovery and with Consul."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from coordinator.api.v1 import types_pb2
from coordinator.config import ClusterConfig, ConsulSettings, DiscoverySettings
from tools.lib.consul_agent import ConsulAgent
from tools.lib.local_cluster import LocalCluster
from tools.lib.node_place import Place, consul_has

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs one of the two tools."""
    command = [sys.executable, "-B", str(ROOT / "tools" / "lib" / "bootstrap.py"), "--here", name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def swift(config: ClusterConfig) -> ClusterConfig:
    """The configuration with more moves at once and shorter waits, so that the tests are short."""
    placement = dataclasses.replace(
        config.placement, shards=64, moves_max=64, moves_in_max=32, moves_out_max=32, hold_s=1.0, dwell_s=0.0
    )
    session = dataclasses.replace(config.session, heartbeat_s=0.25, session_lease_s=3.0, suspect_s=1.0)
    return dataclasses.replace(config, placement=placement, session=session)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three masters and two workers, for all tests: each leaves those two as they were, the last stops the masters."""
    with LocalCluster(tmp_path_factory.mktemp("cluster"), workers=2, change=swift) as local:
        local.start()
        local.wait_ready()
        yield local


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """The directory of the worker w9; its agent ends with the test."""
    made = Place("w9", tmp_path / "w9")
    try:
        yield made
    finally:
        if process := made.process():
            process.kill()
            process.wait(10)


def arguments(cluster: LocalCluster, place: Place) -> list[str]:
    """The options that both tools take."""
    return ["--id", place.worker_id, "--config", str(cluster.config_path), "--dir", str(place.directory)]


def state_of(cluster: LocalCluster, worker_id: str) -> types_pb2.NodeState.ValueType | None:
    """The agreed state of a worker; None when nobody knows it."""
    views = {view.node.id: view for view in cluster.client().list_nodes().nodes}
    return views[worker_id].node.state if worker_id in views else None


def test_join_and_leave(cluster: LocalCluster, place: Place) -> None:
    """Shows a worker that joins, gets its share, and leaves; each step again, and each dry run, changes nothing."""
    options = arguments(cluster, place)
    dry = tool("node-join", *options, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "33.3% of the load" in dry.stdout
    assert not place.directory.exists()
    joined = tool("node-join", *options, "--weight", "1", "--zone", "")
    assert joined.returncode == 0, joined.stderr
    view = next(view for view in cluster.client().list_nodes(node_id="w9").nodes)
    assert view.node.state == types_pb2.NODE_STATE_ACTIVE
    assert 0.85 * 128 / 3 <= view.replicas <= 1.15 * 128 / 3
    process = place.process()
    assert process is not None
    again = tool("node-join", *options)
    assert again.returncode == 0, again.stderr
    assert "runs already" in again.stdout
    assert place.process() == process

    dry = tool("node-leave", *options, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "it is safe" in dry.stdout
    assert state_of(cluster, "w9") == types_pb2.NODE_STATE_ACTIVE
    left = tool("node-leave", *options)
    assert left.returncode == 0, left.stderr
    assert state_of(cluster, "w9") == types_pb2.NODE_STATE_LEFT
    assert not psutil.pid_exists(process.pid) or process.status() == psutil.STATUS_ZOMBIE
    again = tool("node-leave", *options)
    assert again.returncode == 0, again.stderr
    assert "has left already" in again.stdout


def test_leave_is_refused_where_copies_would_be_missing(cluster: LocalCluster) -> None:
    """Shows that one of two workers may not leave while every shard has two copies, and that nothing was changed."""
    done = tool("node-leave", "--id", "w1", "--config", str(cluster.config_path))
    assert done.returncode == 1
    assert done.stderr.startswith("tools/node-leave: w1 cannot leave now")
    view = next(view for view in cluster.client().list_nodes(node_id="w1").nodes)
    assert view.node.state == types_pb2.NODE_STATE_ACTIVE
    assert not view.node.drain_requested
    assert cluster.process("w1").process_id is not None


def test_join_goes_on_after_a_kill_and_takes_a_drain_back(cluster: LocalCluster, place: Place) -> None:
    """Shows that a join repeated after the agent was killed, or after a drain was begun, ends with a serving worker."""
    options = arguments(cluster, place)
    assert tool("node-join", *options).returncode == 0
    process = place.process()
    assert process is not None
    process.kill()
    process.wait(10)
    cluster.client().drain_node("w9")
    joined = tool("node-join", *options)
    assert joined.returncode == 0, joined.stderr
    view = next(view for view in cluster.client().list_nodes(node_id="w9").nodes)
    assert view.node.state == types_pb2.NODE_STATE_ACTIVE
    assert not view.node.drain_requested
    assert view.replicas > 0


def test_what_cannot_be(cluster: LocalCluster, place: Place, tmp_path: Path) -> None:
    """Shows one clear line for an id that is in use, a cluster that is away, and a wrong configuration."""
    taken = tool("node-join", "--id", "w1", "--config", str(cluster.config_path), "--dir", str(tmp_path / "other"))
    if taken.returncode == 1:
        assert "w1 runs already" in taken.stderr
    else:
        # Its agent was started with the cluster's own configuration, so it counts as started here.
        assert "its agent runs already" in taken.stdout
    as_master = tool("node-join", "--id", "m1", "--config", str(cluster.config_path), "--dir", str(tmp_path / "m"))
    assert as_master.returncode == 1
    assert "m1" in as_master.stderr
    missing = tool("node-join", "--id", "w9", "--config", str(tmp_path / "missing.toml"))
    assert missing.returncode == 1
    assert "missing.toml" in missing.stderr
    cluster.stop(["m1", "m2", "m3"])
    away = tool("node-join", *arguments(cluster, place))
    assert away.returncode == 1
    assert "no master answers" in away.stderr
    assert not place.directory.exists()


@pytest.mark.timeout(240)
def test_consul_agrees(tmp_path: Path, place: Place) -> None:
    """Shows that with Consul a joined worker is listed there, and that leaving waits until it is gone there too."""
    with ConsulAgent(tmp_path / "consul") as consul:
        discovery = DiscoverySettings("consul", ConsulSettings(address=consul.address, check_interval_s=1.0))
        with LocalCluster(tmp_path / "cluster", workers=2, discovery=discovery, change=swift) as cluster:
            cluster.start()
            cluster.wait_ready(60)
            options = arguments(cluster, place)
            joined = tool("node-join", *options)
            assert joined.returncode == 0, joined.stderr
            assert consul_has(cluster.config, "w9")
            left = tool("node-leave", *options)
            assert left.returncode == 0, left.stderr
            assert "the masters and Consul agree" in left.stdout
            assert not consul_has(cluster.config, "w9")
            consul.stop()
            away = tool("node-join", *options)
            assert away.returncode == 1
            assert f"Consul at {consul.address} does not answer" in away.stderr
            consul.start()
