"""A shard whose workers are killed one after another, on real workers: it stops moving, is shown, and is released."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import types_pb2
from coordinator.client import StateClient
from coordinator.config import ClusterConfig
from tools.lib.local_cluster import LocalCluster, wait_until

CLUSTERCTL = str(Path(sys.executable).with_name("clusterctl"))


def one_shard(config: ClusterConfig) -> ClusterConfig:
    """One shard; the second worker that is lost as its primary is one too many."""
    placement = replace(config.placement, shards=1, hold_s=0.0)
    return replace(config, placement=placement, moves=replace(config.moves, quarantine_workers=2))


@pytest.mark.timeout(180)
def test_a_shard_that_takes_workers_down_stops_moving(tmp_path: Path) -> None:
    """The third worker is spared; status and show say why; nothing is lost, and it serves again when it is released."""
    with LocalCluster(tmp_path, workers=3, change=one_shard) as cluster:
        cluster.start()
        cluster.wait_ready()
        client = cluster.client()

        def shard() -> types_pb2.Shard:
            [only] = client.list_shards().shards
            return only

        def is_whole() -> bool:
            now = shard()
            return len(now.in_sync) == 2 and not now.joining

        addresses = [master.grpc_address for master in cluster.config.masters]
        with StateClient(addresses, credentials=cluster.credentials(), timeout_s=20) as state:
            state.put("ann", "name", b"Ann")
            first = shard().primary
            cluster.kill(first)
            wait_until(lambda: shard().primary != first and is_whole(), 60, "another one serves, with a copy")
            state.put("ann", "name", b"Anna")
            second = shard().primary
            cluster.kill(second)
            wait_until(lambda: shard().quarantine, 30, "it is in quarantine")
            [third] = set(cluster.worker_ids) - {first, second}
            quarantined = shard()
            assert quarantined.primary == second, "nobody is given it"
            words = f"2 workers were lost within 600 s while they were its primary: {first}, {second}"
            assert words in quarantined.quarantine
            assert any(words in problem for problem in client.get_status().problems)
            line = [CLUSTERCTL, "--config", str(cluster.config_path), "shards"]
            number = str(quarantined.id)
            shown = subprocess.run([*line, "show", number], capture_output=True, text=True, timeout=60, check=True)
            assert words in shown.stdout
            assert not client.list_moves().moves

            subprocess.run([*line, "release", number], capture_output=True, text=True, timeout=60, check=True)
            wait_until(lambda: shard().primary == third, 30, "the third one serves")
            entry = state.get("ann", "name")
            assert entry is not None
            assert entry.value == b"Anna"
            cluster.start([first, second])
            wait_until(lambda: is_whole() and not shard().quarantine, 60, "it has its copies again")
        assert cluster.stop() == []
