"""What Prometheus is told about the consensus, from real masters over real sockets."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from coordinator.config import RaftSettings
from coordinator.raft import RaftNode
from coordinator.raft.figures import Durations, kind_of
from coordinator.server import raft_metrics
from coordinator.server.raft_metrics import RaftMetrics
from tests.raft_cluster import cluster, until
from tests.raft_machine import command


def figures_of(raft: RaftNode) -> dict[str, float]:
    """All samples by name and labels."""
    registry = CollectorRegistry()
    registry.register(RaftMetrics(raft))
    lines = generate_latest(registry).decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.removeprefix("coordinator_"): float(value) for name, _, value in samples}


async def test_figures_tell_what_happened(tmp_path: Path) -> None:
    """After some commits the leader shows its lease, syncs, messages and followers; a lost follower falls behind."""
    async with cluster(tmp_path, RaftSettings(snapshot_entries=10)) as masters:
        leader = await masters.leader()
        for number in range(30):
            await leader.propose(command(f"c{number}"))
        await masters.agree()
        await until(lambda: figures_of(leader)["snapshot_index"] > 0)
        found = figures_of(leader)
        status = leader.status()
        assert found["last_index"] == status.commit_index == status.applied_index
        assert (found["commit_lag"], found["apply_lag"], found["has_lease"]) == (0, 0, 1)
        assert found["elections_total"] >= 1
        assert found["pre_votes_total"] >= 1
        assert found["journal_sync_seconds_count"] == found['journal_sync_seconds_bucket{le="+Inf"}'] >= 10
        assert found["journal_sync_seconds_sum"] > 0
        assert found['peer_messages_total{direction="sent",type="append_entries"}'] >= 30
        assert found['peer_messages_total{direction="received",type="next_node_idx"}'] >= 30
        assert found["snapshot_bytes"] == (tmp_path / leader.self_id / "snapshot").stat().st_size
        assert 0 <= found["snapshot_age_seconds"] < 60
        waiting = [asyncio.create_task(leader.propose(command(f"w{number}"))) for number in range(7)]
        await asyncio.sleep(0)
        assert figures_of(leader)["proposals_in_flight"] == len(waiting)
        await asyncio.gather(*waiting)
        assert figures_of(leader)["proposals_in_flight"] == 0
        gone, stays = await masters.followers()
        queued = {name for name in found if name.startswith("peer_queued_bytes")}
        assert queued == {f'peer_queued_bytes{{peer="{one.self_id}"}}' for one in (gone, stays)}
        assert not any(name.startswith("peer_lag") for name in figures_of(stays))
        await masters.stop(gone.self_id)
        for number in range(5):
            await leader.propose(command(f"d{number}"))
        await until(lambda: figures_of(leader)[f'peer_lag{{peer="{stays.self_id}"}}'] == 0)
        assert figures_of(leader)[f'peer_lag{{peer="{gone.self_id}"}}'] >= 5
        await masters.start(gone.self_id)
        await masters.leader()
    assert figures_of(leader) == {}


async def test_every_name_is_in_the_docstring(tmp_path: Path) -> None:
    """The table of names at the head of the module says what there is, no more and no less."""
    async with cluster(tmp_path, RaftSettings(snapshot_entries=2)) as masters:
        leader = await masters.leader()
        await leader.propose(command("one"))
        await leader.propose(command("two"))
        await until(lambda: figures_of(leader)["snapshot_index"] > 0)
        told = {re.sub(r"(?<=seconds)_(bucket|count|sum)$", "", name.split("{")[0]) for name in figures_of(leader)}
    documented = re.findall(r"^    (\w+) +(?:gauge|counter|histogram) ", raft_metrics.__doc__ or "", re.MULTILINE)
    assert sorted(documented) == sorted(told)


def test_buckets_add_up() -> None:
    """Each bucket counts what took at most so long; what is longer than all is in the last one alone."""
    durations = Durations((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7.0):
        durations.observe(seconds)
    assert durations.buckets() == [("0.1", 2), ("1.0", 3), ("+Inf", 4)]
    assert durations.sum_s == 7.65


def test_chunks_are_told_from_appends() -> None:
    """PySyncObj gives both the same type; the figures do not."""
    assert kind_of({"type": "append_entries", "entries": []}) == "append_entries"
    assert kind_of({"type": "append_entries", "serialized": None}) == "install_snapshot"
