"""What PySyncObj 0.3.17 does by itself: the rows of DESIGN.md, section 4, that need no cluster to be seen.

Each test shows a fact on the bare library, not on our code; should one fail after a new version was pinned, the library
has changed there, and what we do about it may go. tests/sim/test_raft_mutations.py lists all rows and their tests.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pysyncobj import SyncObj, SyncObjConf, replicated
from pysyncobj.journal import FileJournal
from pysyncobj.node import Node
from pysyncobj.transport import Transport

# The library leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


class Nowhere(Transport):  # type: ignore[misc]
    """Sends nothing, and is told of nobody."""

    def __init__(self) -> None:
        super().__init__(None, None, None)

    def send(self, node: Node, message: object) -> bool:
        return True

    def destroy(self) -> None:
        pass


class Bare(SyncObj):  # type: ignore[misc]
    """A master on the bare library, with two attributes: one made before `super().__init__()` and one after."""

    def __init__(self, others: list[Node], **settings: Any) -> None:
        self.early: list[int] = []
        conf = SyncObjConf(autoTick=False, **settings)
        super().__init__(Node("m1"), others, conf=conf, transport=Nowhere())
        self.late: list[int] = []

    @replicated  # type: ignore[untyped-decorator]
    def add(self, number: int) -> None:
        self.early.append(number)
        self.late.append(number)

    @replicated  # type: ignore[untyped-decorator]
    def fail(self) -> None:
        raise RuntimeError("a bad command")


@contextmanager
def alone(monkeypatch: pytest.MonkeyPatch, now_s: list[float], **settings: Any) -> Iterator[Bare]:
    """A cluster of one, leading."""
    monkeypatch.setattr("pysyncobj.syncobj.monotonicTime", lambda: now_s[0])
    master = Bare([], **settings)
    try:
        for _ in range(3):
            now_s[0] += 2.0
            master.doTick()
        assert master._isLeader()
        yield master
    finally:
        master.destroy()


def commit(master: Bare, now_s: list[float], numbers: range) -> None:
    for number in numbers:
        master.add(number)
    for _ in range(3):
        now_s[0] += 0.1
        master.doTick()
    assert master.late[-1] == numbers[-1]


def compact(master: Bare, now_s: list[float]) -> None:
    master.forceLogCompaction()
    for _ in range(3):
        now_s[0] += 0.1
        master.doTick()


def test_the_journal_is_never_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an entry nor a vote is on the disk when the library goes on."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "fdatasync", synced.append, raising=False)
    journal = FileJournal(str(tmp_path / "journal"))
    monkeypatch.setattr(journal, "flush", lambda: synced.append(0))
    journal.add(b"command", 1, 1)
    journal.setCurrentTerm(2, "m2")
    journal.onOneSecondTimer()
    assert synced == []
    journal._destroy()


def test_the_journal_has_no_checksums(tmp_path: Path) -> None:
    """A flipped bit is taken for another command."""
    path = tmp_path / "journal"
    journal = FileJournal(str(path))
    journal.add(b"give 1", 1, 1)
    journal._destroy()
    path.write_bytes(path.read_bytes().replace(b"give 1", b"give 9"))
    journal = FileJournal(str(path))
    assert journal[0] == (b"give 9", 1, 1)
    journal._destroy()


def test_a_kill_in_the_middle_of_a_compaction_loses_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that stay are written again, in place: who is killed meanwhile has lost the rest of them."""
    path = tmp_path / "journal"
    journal = FileJournal(str(path))
    for index in range(1, 51):
        journal.add(b"command", index, 1)
    real_add = journal.add
    written: list[object] = []

    def add(*entry: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(entry)
        real_add(*entry)

    monkeypatch.setattr(journal, "add", add)
    with pytest.raises(KeyboardInterrupt):
        journal.deleteEntriesTo(10)
    journal._destroy()
    journal = FileJournal(str(path))
    assert len(journal) == 3, "of 40 that were to stay"
    journal._destroy()


def test_an_append_that_overlaps_cuts_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter append that comes again takes away what was acknowledged since, without any conflict."""
    monkeypatch.setattr("pysyncobj.syncobj.monotonicTime", lambda: 0.0)
    leader = Node("m2")
    follower = Bare([leader, Node("m3")])
    entries = [(b"\x01", index, 1) for index in range(2, 7)]
    append = {"type": "append_entries", "term": 1, "commit_index": 1, "prevLogIdx": 1, "prevLogTerm": 0}
    follower._SyncObj__onMessageReceived(leader, append | {"entries": entries})
    assert follower._getRaftLogSize() == 6
    follower._SyncObj__onMessageReceived(leader, append | {"entries": entries[:1]})
    assert follower._getRaftLogSize() == 2
    follower.destroy()


def test_a_method_that_raises_is_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad command stops the cluster: nothing behind it is ever applied."""
    now_s = [1_000.0]
    with alone(monkeypatch, now_s) as master:
        master.fail()
        master.add(1)
        master.doTick()
        for _ in range(5):
            now_s[0] += 0.1
            with pytest.raises(RuntimeError, match="a bad command"):
                master.doTick()
        assert master.late == []


def test_a_snapshot_that_does_not_load_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library logs it and goes on with an empty state."""
    now_s = [1_000.0]
    path = tmp_path / "dump"
    with alone(monkeypatch, now_s, fullDumpFile=str(path), useFork=False) as master:
        commit(master, now_s, range(10))
        compact(master, now_s)
    path.write_bytes(path.read_bytes()[:-20])
    with alone(monkeypatch, now_s, fullDumpFile=str(path), useFork=False) as master:
        assert master.late == []


def test_attributes_made_early_are_left_out_of_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was set before `super().__init__()` is silently not there after a restart."""
    now_s = [1_000.0]
    path = str(tmp_path / "dump")
    with alone(monkeypatch, now_s, fullDumpFile=path, useFork=False) as master:
        commit(master, now_s, range(10))
        compact(master, now_s)
    with alone(monkeypatch, now_s, fullDumpFile=path, useFork=False) as master:
        assert master.late[:9] == list(range(9))
        assert 0 not in master.early


def test_a_journal_without_a_snapshot_file_loses_what_is_compacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot is in memory, the entries go from the disk."""
    now_s = [1_000.0]
    path = str(tmp_path / "journal")
    with alone(monkeypatch, now_s, journalFile=path) as master:
        commit(master, now_s, range(100))
        compact(master, now_s)
    monkeypatch.setattr("pysyncobj.syncobj.monotonicTime", lambda: now_s[0])
    again = Bare([], journalFile=path)
    for _ in range(5):
        now_s[0] += 1.0
        again.doTick()
    assert 50 not in again.late
    again.destroy()


def test_snapshots_fork_by_default() -> None:
    """Forking under gRPC hangs; the engine switches it off."""
    assert SyncObjConf().useFork


SPRUNG: list[str] = []


def spring(where: str) -> None:
    SPRUNG.append(where)


class Trap:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (spring, ("here",))


def test_a_peer_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that comes in parts is a pickle of the sender's making; frames.py refuses such messages."""
    monkeypatch.setattr("pysyncobj.syncobj.monotonicTime", lambda: 0.0)
    peer = Node("m2")
    master = Bare([peer])
    message = {"type": "append_entries", "term": 1, "commit_index": 1, "prevLogIdx": 1, "prevLogTerm": 0}
    part = message | {"transmission": "start", "data": pickle.dumps(Trap())}
    master._SyncObj__onMessageReceived(peer, part)
    with pytest.raises(TypeError):
        master._SyncObj__onMessageReceived(peer, message | {"transmission": "finish", "data": b""})
    assert SPRUNG == ["here"]
    master.destroy()
