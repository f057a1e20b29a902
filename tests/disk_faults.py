"""What happens to the disks of real masters in tests: bits flip, ends are cut off, a disk is full or empty.

A master whose log was damaged either says so and ends, or it starts because the damage looks like a torn write behind
its latest mark (journal.py, rule 6). So it is damaged only once the others have all that it acknowledged.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from coordinator.client import ClusterClient
from coordinator.raft.files import ADVICE
from tests.small_disk import fill
from tools.lib.local_cluster import LocalCluster, wait_until

DISK_S_MAX = 30.0
"""For a process to start or to end, on a machine that may be busy."""


def wait_end(cluster: LocalCluster, master_id: str) -> str:
    """Waits until a master has ended by itself with status 1, and returns the one line that says why."""
    process = cluster.process(master_id)
    wait_until(lambda: process.process_id is None, 20.0, f"{master_id} ends")
    assert process.exit_status == 1
    latest = process.log.read_text().rpartition("begins to run\n")[2]
    said = [line for line in latest.splitlines() if line.startswith("coordinator: ")]
    assert "Traceback" not in latest
    assert len(said) == 1, latest
    return said[0]


def start(cluster: LocalCluster, master_id: str) -> None:
    """Starts a master, with a line in its log where this run begins."""
    with cluster.process(master_id).log.open("a") as log:
        log.write("begins to run\n")
    cluster.start([master_id])


def flip(path: Path, place: int) -> None:
    """Flips a bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def damage_a_log(directory: Path, rng: random.Random) -> str:
    """Flips a bit of some segment of a log, or cuts the last one, at a random offset; what was done."""
    segments = sorted(directory.glob("journal-*.log"))
    is_cut = rng.random() < 0.5
    path = segments[-1] if is_cut else rng.choice(segments)
    place = rng.randrange(path.stat().st_size)
    if is_cut:
        path.write_bytes(path.read_bytes()[:place])
    else:
        flip(path, place)
    return f"{path.name} {'cut' if is_cut else 'flipped'} at {place}"


def follows(client: ClusterClient, master_id: str) -> bool:
    """True when a master votes and has applied nearly all that any other one knows to be committed."""
    masters = client.list_masters().masters
    one = next(master for master in masters if master.id == master_id)
    committed = max(master.commit_index for master in masters)
    # Clients write all the time, and the masters are asked one after the other.
    return one.role in ("follower", "leader") and committed - one.applied_index < 50


def start_damaged(cluster: LocalCluster, master_id: str) -> str:
    """Starts a master on what is left of its log; follows the advice where it refuses. What it said, if anything."""
    process, client = cluster.process(master_id), cluster.client()
    start(cluster, master_id)
    said = ""
    wait_until(lambda: process.process_id is None or follows(client, master_id), DISK_S_MAX, "it starts or ends")
    if process.process_id is None:
        said = wait_end(cluster, master_id)
        assert "journal-" in said, said
        assert "offset " in said, said
        assert ADVICE in said, said
        empty(cluster.directory / "data" / master_id)
        start(cluster, master_id)
        wait_until(lambda: client.replace_master(master_id).disk_id, DISK_S_MAX, "it is replaced")
    wait_until(lambda: follows(client, master_id), DISK_S_MAX, f"{master_id} has caught up")
    return said


def empty(directory: Path) -> None:
    """Removes everything in a directory, which may be a disk."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def fill_until_it_ends(cluster: LocalCluster, master_id: str) -> str:
    """Fills a master's disk, waits until it has ended because of that, makes room and starts it. What it said."""
    directory = cluster.directory / "data" / master_id
    with cluster.process(master_id).log.open("a") as log:
        log.write("begins to run\n")
    ballast = fill(directory)
    try:
        said = wait_end(cluster, master_id)
        assert str(directory) in said, said
        assert "No space left on device" in said, said
    finally:
        ballast.unlink()
    start(cluster, master_id)
    client = cluster.client()
    wait_until(lambda: follows(client, master_id), DISK_S_MAX, f"{master_id} has caught up")
    return said
