"""Damage on the disk of a running worker, found by its scrub and mended from another worker."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.client import StateClient
from coordinator.config import ClusterConfig
from tools.lib.local_cluster import LocalCluster, wait_until
from worker_agent.store import ShardStore
from worker_agent.store_interface import Digest

CLUSTERCTL = str(Path(sys.executable).with_name("clusterctl"))
USER, SECRET = "ann", b"a value that stands nowhere else"


def scrubbing(config: ClusterConfig) -> ClusterConfig:
    """A few shards, which are checked every other second and mended soon."""
    placement = replace(config.placement, shards=4, hold_s=1.0, dwell_s=0.0)
    return replace(config, placement=placement, state=replace(config.state, scrub_s=2.0))


def files_of(cluster: LocalCluster, worker: str, shard_id: int) -> list[Path]:
    """Database and write-ahead log of a replica."""
    folder = cluster.directory / cluster.config.data_directory / worker / "shards"
    return [folder / f"{shard_id}.sqlite", folder / f"{shard_id}.sqlite-wal"]


def flip(paths: Iterable[Path]) -> int:
    """Flips a bit of the value wherever it stands in these files; how often that was."""
    count = 0
    for path in paths:
        content = path.read_bytes()
        place = content.find(SECRET)
        with open(path, "r+b") as file:
            while place >= 0:
                file.seek(place)
                file.write(bytes([content[place] ^ 1]))
                count += 1
                place = content.find(SECRET, place + 1)
    return count


def digest_of(path: Path) -> Digest:
    """What a replica has, checked from the first row to the last."""
    store = ShardStore(path)
    try:
        cursor = store.scrub(b"")
        while cursor:
            cursor = store.scrub(cursor)
        store.apply(store.position().last, keeps_tombstones=False)
        return store.digest()
    finally:
        store.close()


@pytest.mark.parametrize("role", ["replica", "primary"])
@pytest.mark.timeout(120)
def test_a_flipped_bit_is_found_and_mended(tmp_path: Path, role: str) -> None:
    """A bit of a row flips on a worker's disk: its copy is made anew; the story tells, all are equal."""
    with LocalCluster(tmp_path, workers=2, change=scrubbing) as cluster:
        cluster.start()
        cluster.wait_ready()
        addresses = [master.grpc_address for master in cluster.config.masters]
        client = cluster.client()
        with StateClient(addresses, credentials=cluster.credentials()) as state:
            state.put(USER, "secret", SECRET)
            shard_id = state.describe_user(USER).shard_id
            [shard] = client.list_shards(shard_ids=[shard_id]).shards
            [other] = set(shard.in_sync) - {shard.primary}
            victim = shard.primary if role == "primary" else other
            # The other replica applies with the next word of its primary; a row that is not there cannot be hit.
            wait_until(lambda: state.read(USER, ["secret"], stale=True).entries, 10, "the row is applied")
            wait_until(lambda: flip(files_of(cluster, victim, shard_id)), 10, "the value is in the files")

            def told() -> list[str]:
                return [
                    event.message
                    for event in client.stream_events(latest=200)
                    if f"lost {victim} (its copy is lost" in event.message and "checksum" in event.message
                ]

            wait_until(told, 30, "the story tells of the loss")

            def mended() -> bool:
                [now] = client.list_shards(shard_ids=[shard_id]).shards
                return sorted(now.in_sync) == ["w1", "w2"] and not now.joining and now.epoch > shard.epoch

            wait_until(mended, 30, "the copy is made anew")
            entry = state.get(USER, "secret")
            assert entry is not None
            assert entry.value == SECRET
        assert metric(cluster, victim, "damaged_copies_found_total") >= 1
        wait_until(lambda: metric(cluster, victim, "damaged_copies_mended_total") >= 1, 10, "the worker counts it")
        assert cluster.stop() == []
        digests = {digest_of(files_of(cluster, worker, shard_id)[0]) for worker in cluster.worker_ids}
        assert len(digests) == 1


def single(config: ClusterConfig) -> ClusterConfig:
    """The same with one copy of each shard."""
    made = scrubbing(config)
    return replace(made, placement=replace(made.placement, replicas=1))


def metric(cluster: LocalCluster, worker: str, name: str) -> float:
    """One figure of a worker's /metrics."""
    [address] = [view.node.http_address for view in cluster.client().list_nodes().nodes if view.node.id == worker]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"coordinator_worker_{name} "))


@pytest.mark.timeout(120)
def test_a_damaged_last_copy_is_told_until_it_is_mended(tmp_path: Path) -> None:
    """A row's only copy rots: status, shards show and metrics say so, all else goes on, until it is written again."""
    with LocalCluster(tmp_path, workers=1, change=single) as cluster:
        cluster.start()
        cluster.wait_ready()
        addresses = [master.grpc_address for master in cluster.config.masters]
        client = cluster.client()
        with StateClient(addresses, credentials=cluster.credentials()) as state:
            state.put(USER, "secret", SECRET)
            shard_id = state.describe_user(USER).shard_id
            wait_until(lambda: flip(files_of(cluster, "w1", shard_id)), 10, "the value is in the files")

            def told() -> list[str]:
                last_copy = f"last copy of shard {shard_id}, on w1"
                return [line for line in client.get_status().problems if last_copy in line]

            [problem] = wait_until(told, 30, "the status tells of the damage")
            assert "is damaged" in problem
            assert "checksum" in problem
            shown = subprocess.run(
                [CLUSTERCTL, "--config", str(cluster.config_path), "shards", "show", str(shard_id)],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
            assert "does not match its checksum" in shown.stdout
            assert metric(cluster, "w1", "damaged_shards") == 1
            state.put(USER, "other", b"1")
            entry = state.get(USER, "other")
            assert entry is not None, "what is sound is served"
            state.put(USER, "secret", SECRET)
            wait_until(lambda: not told(), 30, "the damage is gone")
        assert metric(cluster, "w1", "damaged_shards") == 0
        assert metric(cluster, "w1", "damaged_copies_found_total") == 1
        assert metric(cluster, "w1", "damaged_copies_mended_total") == 1
        assert metric(cluster, "w1", "scrub_rounds_total") >= 1
        assert metric(cluster, "w1", "scrub_bytes_total") > 0
        assert metric(cluster, "w1", "scrub_age_seconds") < 30
        assert cluster.stop() == []
