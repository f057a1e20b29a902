"""Snapshot files and the store."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pysyncobj.config import SERIALIZER_STATE

from coordinator.machine.state import State
from coordinator.model.errors import Damaged
from coordinator.raft.snapshot import CHUNK_BYTES, Snapshot, SnapshotStore, decode_file, encode_file
from tests.raft_machine import MACHINE


def snapshot_at(index: int, text: str = "0 0 a\n") -> Snapshot:
    """A snapshot whose entries and state can be told apart."""
    state = State(cluster_id=text, index=index)
    return Snapshot((b"\x00before", index - 1, 2), (b"\x00last", index, 3), state)


class LateExecutor(Executor):
    """Runs what was submitted when the test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self) -> None:
        """Runs it."""
        for future, call in self.work:
            try:
                future.set_result(call())
            except OSError as error:
                future.set_exception(error)
        self.work.clear()


def make_store(directory: Path, executor: Executor) -> SnapshotStore:
    """A store over the test machine."""
    return SnapshotStore(directory, executor, MACHINE.encode, MACHINE.decode)


def write(store: SnapshotStore, snapshot: Snapshot) -> None:
    """Starts to write, as PySyncObj does."""
    store.state_now = lambda: snapshot.state
    store.serialize((None, snapshot.last, snapshot.before, set()), snapshot.index - 1)


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """One thread, as in a master."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_file_round_trip() -> None:
    """What was encoded comes back whole."""
    snapshot = snapshot_at(9)
    assert decode_file(encode_file(snapshot, MACHINE.encode), "file", MACHINE.decode) == snapshot


def test_every_damage_is_found() -> None:
    """Each flipped byte and each cut raises Damaged with the file's name, never anything else."""
    content = encode_file(snapshot_at(9), MACHINE.encode)
    damaged = [content[:size] for size in range(len(content))]
    damaged += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(len(content))]
    for data in damaged:
        with pytest.raises(Damaged, match="some file"):
            decode_file(data, "some file", MACHINE.decode)


def test_entries_must_fit_the_state() -> None:
    """A state from behind its own log entries is no snapshot, though every checksum is right."""
    good = snapshot_at(9)
    wrong = Snapshot(good.before, good.last, State(index=10))
    with pytest.raises(Damaged, match="do not fit"):
        decode_file(encode_file(wrong, MACHINE.encode), "file", MACHINE.decode)


def test_written_snapshot_is_loaded(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    """A snapshot that was written is what the next process finds; the log may go up to its last two entries."""
    store = make_store(tmp_path, executor)
    assert store.load() is None
    write(store, snapshot_at(9))
    executor.submit(lambda: None).result()
    assert store.checkSerializing() == (SERIALIZER_STATE.SUCCESS, 8)
    assert store.checkSerializing() == (SERIALIZER_STATE.NOT_SERIALIZING, None)
    assert make_store(tmp_path, executor).load() == snapshot_at(9)


def send(sender: SnapshotStore, receiver: SnapshotStore) -> tuple[bool, int]:
    """Sends a whole snapshot; (was it installed, number of chunks)."""
    for number in range(1, 100):
        chunk = sender.getTransmissionData("peer")
        assert chunk is not None
        installed = receiver.setTransmissionData(chunk)
        if chunk[2]:
            return installed, number
    raise AssertionError("no last chunk")


def test_snapshot_travels_in_chunks(tmp_path: Path) -> None:
    """A large snapshot arrives in pieces and is installed once it is whole."""
    late = LateExecutor()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    sender, receiver = make_store(tmp_path / "a", late), make_store(tmp_path / "b", late)
    snapshot = snapshot_at(9, "0 0 x\n" * CHUNK_BYTES)
    write(sender, snapshot)
    late.run()
    sender.checkSerializing()
    installed, chunks = send(sender, receiver)
    assert installed
    assert chunks > 3
    assert receiver.received == snapshot
    assert make_store(tmp_path / "b", late).load() == snapshot
    sender.close()


def test_slow_write_does_not_overtake_an_installed_snapshot(tmp_path: Path) -> None:
    """An older snapshot that is finished late is dropped; the bare library would put it over the newer one."""
    late = LateExecutor()
    store = make_store(tmp_path, late)
    write(store, snapshot_at(9))
    assert store.checkSerializing()[0] == SERIALIZER_STATE.SERIALIZING
    content = encode_file(snapshot_at(20), MACHINE.encode)
    assert store.setTransmissionData((content, True, True))
    late.run()
    assert store.checkSerializing()[0] == SERIALIZER_STATE.FAILED
    assert make_store(tmp_path, late).load() == snapshot_at(20)


def test_damaged_and_old_snapshots_are_not_installed(tmp_path: Path) -> None:
    """What the leader sent is checked before it replaces anything, and never takes this master back."""
    store = make_store(tmp_path, LateExecutor())
    store.applied_index = lambda: 30
    content = encode_file(snapshot_at(40), MACHINE.encode)
    assert not store.setTransmissionData((content[:-1] + b"?", True, True))
    assert not store.setTransmissionData((encode_file(snapshot_at(30), MACHINE.encode), True, True))
    assert store.load() is None
    assert store.setTransmissionData((content, True, True))


def test_chunk_without_a_beginning_is_ignored(tmp_path: Path) -> None:
    """A connection that was lost in the middle of a snapshot leaves nothing behind that counts."""
    store = make_store(tmp_path, LateExecutor())
    assert not store.setTransmissionData((b"tail", False, True))
    assert not store.setTransmissionData(None)


def test_damaged_snapshot_is_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A leader that finds its own file damaged writes a new one instead of spreading it."""
    store = make_store(tmp_path, LateExecutor())
    asked: list[bool] = []
    store.on_damaged = lambda: asked.append(True)
    (tmp_path / "snapshot").write_bytes(encode_file(snapshot_at(9), MACHINE.encode)[:-3])
    assert store.getTransmissionData("peer") is None
    assert asked == [True]
    assert "writing a new one" in caplog.text


def test_failed_write_is_tried_again_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk does not make a master try in every tick, nor cut its log."""
    now = 0.0
    late = LateExecutor()
    store = SnapshotStore(tmp_path / "gone", late, MACHINE.encode, MACHINE.decode, monotonic=lambda: now)
    write(store, snapshot_at(9))
    late.run()
    assert store.checkSerializing()[0] == SERIALIZER_STATE.FAILED
    assert "could not write a snapshot" in caplog.text
    assert store.checkSerializing()[0] == SERIALIZER_STATE.SERIALIZING
    now = 60.0
    assert store.checkSerializing()[0] == SERIALIZER_STATE.NOT_SERIALIZING
