"""What a RaftNode is made of beside its connections: all that lives on its disk, and the consensus over it.

In a module of its own so that simulations can put disks, threads and clocks of theirs in the place of the real ones
(`Makers`, `tests/sim/raft_master.py`), with the node, its transport and the way they are put together as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import RaftSettings
from coordinator.model import WallMs
from coordinator.raft.consensus import Consensus
from coordinator.raft.identity import Identity
from coordinator.raft.interface import Machine
from coordinator.raft.journal import Journal
from coordinator.raft.seat import Seat
from coordinator.raft.snapshot import SnapshotStore
from coordinator.raft.transport import PeerTransport


@dataclass(frozen=True, slots=True)
class Parts:
    """Open, until the consensus is closed and the executor shut down."""

    executor: Executor
    """Where snapshots are written and read; one at a time."""
    journal: Journal
    seat: Seat
    consensus: Consensus


@dataclass(frozen=True, slots=True)
class Setting:
    """What the parts are to know of the node that they belong to."""

    transport: PeerTransport
    directory: Path
    name: str
    """Of the log: what it belongs to, checked when it is opened."""
    machine: Machine
    settings: RaftSettings
    wall_ms: Callable[[], WallMs]
    rng: random.Random
    on_snapshot: Callable[[], None]
    """Called from the executor once a snapshot is written, or could not be."""


def _executor(name: str) -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix=name)


@dataclass(frozen=True, slots=True)
class Makers:
    """Of what the parts are made; a simulation has other disks, threads and clocks, and leaves protections out."""

    executor: Callable[[str], Executor] = _executor
    """Called with a name."""
    identity: Callable[[Path], Identity] = Identity
    snapshots: Callable[..., SnapshotStore] = SnapshotStore
    journal: Callable[[Path, str], Journal] = Journal
    consensus: Callable[..., Consensus] = Consensus


def open_parts(setting: Setting, makers: Makers) -> Parts:
    """Opens what is on disk. Raises Damaged, OSError."""
    directory, machine = setting.directory, setting.machine
    directory.mkdir(parents=True, exist_ok=True)
    executor = makers.executor(f"snapshot-{setting.transport.self_id}")
    snapshots = makers.snapshots(directory, executor, machine.encode, machine.decode)
    snapshots.on_written = setting.on_snapshot
    seat = Seat(setting.transport, makers.identity(directory), machine)
    journal = makers.journal(directory, setting.name)
    try:
        consensus = makers.consensus(
            transport=setting.transport,
            journal=journal,
            snapshots=snapshots,
            apply=machine.apply,
            settings=setting.settings,
            wall_ms=setting.wall_ms,
            rng=setting.rng,
            membership=seat.membership,
        )
        seat.take(consensus)
    except BaseException:
        journal.close()
        raise
    return Parts(executor, journal, seat, consensus)
