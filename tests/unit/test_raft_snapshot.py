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
from coordinator.raft import Machine
from coordinator.raft.journal import Entry
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
            except (OSError, Damaged) as error:
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


def send(sender: SnapshotStore, receiver: SnapshotStore) -> int:
    """Sends a whole snapshot; the number of chunks."""
    for number in range(1, 100):
        chunk = sender.getTransmissionData("peer")
        assert chunk is not None
        assert not receiver.is_checking
        assert not receiver.setTransmissionData(chunk)
        if chunk[2]:
            return number
    raise AssertionError("no last chunk")


def receive(store: SnapshotStore, late: LateExecutor, content: bytes) -> Snapshot | None:
    """Has a store take in a snapshot of one chunk; what it makes of it."""
    assert not store.setTransmissionData((content, True, True))
    assert store.is_checking
    assert store.take_received() is None
    late.run()
    return store.take_received()


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
    assert sender.getTransmissionData("peer") is None, "it is checked first, off the event loop"
    late.run()
    assert send(sender, receiver) > 3
    late.run()
    assert receiver.take_received() == snapshot
    assert receiver.take_received() is None
    assert make_store(tmp_path / "b", late).load() == snapshot
    sender.close()


def test_slow_write_does_not_overtake_an_installed_snapshot(tmp_path: Path) -> None:
    """An older snapshot that is finished late is dropped; the bare library would put it over the newer one."""
    late = LateExecutor()
    store = make_store(tmp_path, late)
    write(store, snapshot_at(9))
    assert store.checkSerializing()[0] == SERIALIZER_STATE.SERIALIZING
    content = encode_file(snapshot_at(20), MACHINE.encode)
    assert receive(store, late, content) == snapshot_at(20)
    assert store.checkSerializing()[0] == SERIALIZER_STATE.FAILED
    assert make_store(tmp_path, late).load() == snapshot_at(20)


def test_damaged_and_old_snapshots_are_not_installed(tmp_path: Path) -> None:
    """What the leader sent is checked before it replaces anything, and never takes this master back."""
    late = LateExecutor()
    store = make_store(tmp_path, late)
    store.applied_index = lambda: 30
    content = encode_file(snapshot_at(40), MACHINE.encode)
    assert receive(store, late, content[:-1] + b"?") is None
    assert receive(store, late, encode_file(snapshot_at(30), MACHINE.encode)) is None
    assert list(tmp_path.iterdir()) == []
    assert store.load() is None
    assert receive(store, late, content) == snapshot_at(40)


def test_chunks_that_come_during_the_check_are_ignored(tmp_path: Path) -> None:
    """A leader that sends again meanwhile does not disturb the file that is being read."""
    late = LateExecutor()
    store = make_store(tmp_path, late)
    store.setTransmissionData((encode_file(snapshot_at(40), MACHINE.encode), True, True))
    store.setTransmissionData((b"another", True, False))
    store.setTransmissionData((b"one", False, True))
    late.run()
    assert store.take_received() == snapshot_at(40)


def test_chunk_without_a_beginning_is_ignored(tmp_path: Path) -> None:
    """A connection that was lost in the middle of a snapshot leaves nothing behind that counts."""
    store = make_store(tmp_path, LateExecutor())
    assert not store.setTransmissionData((b"tail", False, True))
    assert not store.setTransmissionData(None)


def test_damaged_snapshot_is_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A leader that finds its own file damaged writes a new one instead of spreading it."""
    late = LateExecutor()
    store = make_store(tmp_path, late)
    asked: list[bool] = []
    store.on_damaged = lambda: asked.append(True)
    (tmp_path / "snapshot").write_bytes(encode_file(snapshot_at(9), MACHINE.encode)[:-3])
    for _ in range(2):
        assert store.getTransmissionData("peer") is None
        late.run()
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


def written(directory: Path, *indexes: int) -> SnapshotStore:
    """A store that has written snapshots up to these indexes."""
    late = LateExecutor()
    store = make_store(directory, late)
    store.load()
    for index in indexes:
        write(store, snapshot_at(index))
        late.run()
        assert store.checkSerializing()[0] == SERIALIZER_STATE.SUCCESS
    return store


def not_in_log(before: Entry, last: Entry) -> bool:
    """A log that begins later."""
    return False


def test_the_log_is_needed_from_the_older_snapshot_on(tmp_path: Path) -> None:
    """With two snapshots the disk needs the log from the older one's entries on, also after a restart."""
    assert written(tmp_path, 9).needed_from == 8
    assert written(tmp_path, 20).needed_from == 8
    assert written(tmp_path, 30).needed_from == 19
    assert written(tmp_path).needed_from == 19
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshot", "snapshot.previous"]


@pytest.mark.parametrize("damage", [b"", b"FCSNAP", b"rubbish" * 10])
def test_a_damaged_snapshot_is_passed_over(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The one before is used, the damaged one named and put aside, and the next write keeps the sound one."""
    written(tmp_path, 9, 20)
    (tmp_path / "snapshot").write_bytes(damage)
    assert make_store(tmp_path, LateExecutor()).load() == snapshot_at(9)
    assert f"{tmp_path / 'snapshot'}, offset" in caplog.text
    assert "going on from" in caplog.text
    assert (tmp_path / "snapshot.damaged").read_bytes() == damage
    assert written(tmp_path, 30).needed_from == 8
    assert make_store(tmp_path, LateExecutor()).load() == snapshot_at(30)


def test_a_previous_snapshot_that_would_forget_something_is_not_used(tmp_path: Path) -> None:
    """Where the log does not go on from it, the damage of the newer one stops the master."""
    written(tmp_path, 9, 20)
    content = (tmp_path / "snapshot").read_bytes()
    (tmp_path / "snapshot").write_bytes(content[:-1])
    with pytest.raises(Damaged, match="snapshot, offset 8: "):
        make_store(tmp_path, LateExecutor()).load(not_in_log)
    (tmp_path / "snapshot").unlink()
    with pytest.raises(Damaged, match="snapshot, offset 0: missing"):
        make_store(tmp_path, LateExecutor()).load(not_in_log)
    (tmp_path / "snapshot").write_bytes(content)
    store = make_store(tmp_path, LateExecutor())
    assert store.load(not_in_log) == snapshot_at(20)
    assert store.needed_from == 19
    assert not (tmp_path / "snapshot.previous").exists()


def test_what_this_software_cannot_read_is_not_passed_over(tmp_path: Path) -> None:
    """A whole file of a newer version, or of a state that does not decode, stops the master: it is no damage."""
    written(tmp_path, 9, 20)
    content = bytearray((tmp_path / "snapshot").read_bytes())
    content[7] += 1
    (tmp_path / "snapshot").write_bytes(content)
    with pytest.raises(Damaged, match="version 2"):
        make_store(tmp_path, LateExecutor()).load()
    bad = Machine(MACHINE.apply, lambda state: b"no state", MACHINE.decode)
    (tmp_path / "snapshot").write_bytes(encode_file(snapshot_at(20), bad.encode))
    with pytest.raises(Damaged, match="no state of the test machine"):
        make_store(tmp_path, LateExecutor()).load()


def test_two_damaged_snapshots_stop_the_master(tmp_path: Path) -> None:
    """Nothing is made up."""
    written(tmp_path, 9, 20)
    (tmp_path / "snapshot").write_bytes(b"x")
    (tmp_path / "snapshot.previous").write_bytes(b"y")
    with pytest.raises(Damaged, match="snapshot"):
        make_store(tmp_path, LateExecutor()).load()


@pytest.mark.parametrize("ends_after", ["the first rename", "the second rename"])
def test_a_process_that_ends_while_it_changes_names(tmp_path: Path, ends_after: str) -> None:
    """Whatever names are there after it, the newest snapshot is found, and only one of each is left."""
    written(tmp_path, 9, 20)
    (tmp_path / "snapshot").replace(tmp_path / "snapshot.previous")
    if ends_after == "the second rename":
        (tmp_path / "snapshot").write_bytes(encode_file(snapshot_at(30), MACHINE.encode))
        assert written(tmp_path).needed_from == 19
        assert make_store(tmp_path, LateExecutor()).load() == snapshot_at(30)
        return
    assert make_store(tmp_path, LateExecutor()).load() == snapshot_at(20)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot"]


def test_a_damaged_snapshot_that_was_to_be_sent_does_not_take_the_sound_one_s_place(tmp_path: Path) -> None:
    """The next write replaces it, and the one before it stays the previous one."""
    late = LateExecutor()
    store = make_store(tmp_path, late)
    for index in (9, 20):
        write(store, snapshot_at(index))
        late.run()
        store.checkSerializing()
    (tmp_path / "snapshot").write_bytes(b"x")
    for _ in range(2):
        assert store.getTransmissionData("peer") is None
        late.run()
    write(store, snapshot_at(30))
    late.run()
    store.checkSerializing()
    assert store.needed_from == 8
    assert decode_file((tmp_path / "snapshot.previous").read_bytes(), "previous", MACHINE.decode) == snapshot_at(9)
