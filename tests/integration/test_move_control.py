"""A move of real data as an operator sees it: progress, rate and estimate, the throttle at run time, an abort."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import types_pb2
from coordinator.client import StateClient
from coordinator.client.state_types import Put, Read, Write
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError
from tools.lib.local_cluster import LocalCluster, wait_until

CLUSTERCTL = str(Path(sys.executable).with_name("clusterctl"))
USERS = [f"user-{number}" for number in range(80)]
VALUE = bytes(100_000)


def one_copy(config: ClusterConfig) -> ClusterConfig:
    """One shard with one copy; a receiver that takes nothing for a second is given up."""
    placement = replace(config.placement, shards=1, replicas=1)
    return replace(config, placement=placement, moves=replace(config.moves, copy_stall_s=1.0))


@pytest.mark.timeout(180)
def test_a_move_is_seen_slowed_down_and_rolled_back(tmp_path: Path) -> None:
    """Moves list and show tell how far a copy is; a rate holds at once, also for a copy that runs, and is no stall."""
    with LocalCluster(tmp_path, workers=2, change=one_copy) as cluster:
        cluster.start()
        cluster.wait_ready()
        client = cluster.client()

        def ctl(*words: str) -> str:
            line = [CLUSTERCTL, "--config", str(cluster.config_path), *words]
            return subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout

        def running() -> types_pb2.Move | None:
            return next(iter(client.list_moves().moves), None)

        def copied_bytes() -> int:
            return sum(item.copied_bytes for item in client.list_moves(with_progress=True).progress)

        addresses = [master.grpc_address for master in cluster.config.masters]
        with StateClient(addresses, credentials=cluster.credentials(), timeout_s=20) as state:
            for outcome in state.execute([Write(user, [Put("value", VALUE)]) for user in USERS]):
                assert not isinstance(outcome, CoordinatorError), outcome
            [shard] = client.list_shards().shards
            ctl("rebalance", "--copy-rate", "300000")
            ctl("nodes", "drain", shard.primary)
            move = wait_until(running, 20, "the move begins")
            told = r"copied +[1-9]\d* of about \d+ rows \([\d.]+%\), .*/s, .* left"
            show = ("moves", "show", str(move.id))
            wait_until(lambda: re.search(told, ctl(*show)), 30, "how far it is, the rate and the estimate are known")
            row = ctl("moves", "list").splitlines()[1]
            assert row.split()[:3] == [str(move.id), str(shard.id), "drain"]
            assert re.search(r" [\d.]+% +[\d.]+ (KiB|MiB|B)/s +\d+\S*s ", row), f"copied, rate and what is left: {row}"

            ctl("rebalance", "--copy-rate", "1")
            time.sleep(3)  # What was read already leaves, and two reports of the figures come.
            before = copied_bytes()
            time.sleep(5)
            assert copied_bytes() == before, "hardly anything leaves any more"
            still = running()
            assert still is not None
            assert still.id == move.id, "and that is no stall"

            ctl("moves", "abort", str(move.id), "--reason", "too slow for me")
            ended = ctl(*show)
            assert re.search(r"phase +aborted", ended)
            assert "too slow for me" in ended
            ctl("rebalance", "--copy-rate", "0")
            wait_until(lambda: client.list_shards().shards[0].primary != shard.primary, 30, "the drain has gone on")
            wait_until(lambda: running() is None, 30, "it is done")
            found = state.execute([Read(user, ["value"]) for user in USERS])
            assert all(not isinstance(one, CoordinatorError) and one.entries[0].value == VALUE for one in found)  # type: ignore[union-attr]
        assert cluster.stop() == []
