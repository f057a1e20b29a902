"""Makes the data directory of a master from a backup: what a master would have that had just taken a snapshot.

The snapshot's two log entries are no-ops, the last two before whatever the new cluster commits first. Every master gets
the same, so any of them may be elected, and none lacks anything.

Order: identity, term, snapshot. A master that is started on a directory in which only a part of them stands finds a
term without a log and refuses (journal.py), and so does a second restore, because the directory is no longer empty.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.machine.state import State
from coordinator.model.errors import RefusalReason, Refused
from coordinator.raft.entry import NO_OP
from coordinator.raft.files import SNAPSHOT_NAME, replace_file
from coordinator.raft.identity import Identity
from coordinator.raft.journal import Journal
from coordinator.raft.snapshot import Snapshot, encode_file

HARMLESS = frozenset({"lock", "lost+found"})
"""What may be in the directory of a master that has no state."""


def require_empty(directory: Path) -> None:
    """Raises Refused when a master's data directory has anything in it."""
    if not directory.exists():
        return
    found = sorted(path.name for path in directory.iterdir() if path.name not in HARMLESS)
    if found:
        raise Refused(
            RefusalReason.PRECONDITION,
            f"{directory} has state ({found[0]}{', ...' if len(found) > 1 else ''}); "
            "a restore never overwrites any: move the directory away first",
        )


def write_master(directory: Path, owner: str, state: State, term: int) -> None:
    """Makes the directory of one master; `owner` is "<cluster name>/<master id>". Raises Refused, OSError."""
    require_empty(directory)
    directory.mkdir(parents=True, exist_ok=True)
    identity = Identity(directory)
    identity.learn(state.cluster_id)
    identity.become_voter()
    journal = Journal(directory, owner)
    try:
        journal.setCurrentTerm(term, None)
    finally:
        journal.close()
    before, last = (NO_OP, state.index, term), (NO_OP, state.index + 1, term)
    replace_file(directory / SNAPSHOT_NAME, encode_file(Snapshot(before, last, state)))
