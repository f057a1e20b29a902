"""Damage on the disk of a running worker, found by its scrub and mended from another worker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.client import StateClient
from coordinator.config import ClusterConfig
from tools.lib.local_cluster import LocalCluster, wait_until
from worker_agent.store import ShardStore
from worker_agent.store_interface import Digest

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
        assert cluster.stop() == []
        digests = {digest_of(files_of(cluster, worker, shard_id)[0]) for worker in cluster.worker_ids}
        assert len(digests) == 1
