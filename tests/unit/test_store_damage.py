"""The store of one shard on a bad day: damage, a full disk, a failed sync, a power cut."""

from __future__ import annotations

import errno
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from coordinator.model import HASH_SPACE
from coordinator.model.errors import Damaged
from tests.unit.test_store import SHARD, record, rows, scrub, write
from worker_agent.store import ShardStore, StoreSettings, create_store, open_store
from worker_agent.store_cut import split_store
from worker_agent.store_database import SyncFailed, meaning
from worker_agent.store_files import ADVICE, Mark, MarkFile, beside
from worker_agent.store_interface import StateItem, StoreFull

USERS = [f"user-{number}" for number in range(30)]
KEYS = ["a", "b", "c"]
DISK_BYTES = 1 << 20


def filled(path: Path) -> ShardStore:
    """A store with rows of several sizes, requests, and records that are not applied."""
    store = create_store(path, *SHARD)
    for place, user in enumerate(USERS):
        write(store, user, {key: bytes([place]) * (place * 60) for key in KEYS}, f"r{place}", 1_000 + place)
    store.append([record(store.position().last + 1 + more, "ann", {"a": b"tail"}) for more in range(3)])
    store.see_epoch(4)
    return store


def answers(store: ShardStore) -> list[object]:
    """Everything that it can be asked."""
    reader = store.reader()
    told: list[object] = [store.position(), store.digest(), store.figures(), reader.applied()]
    told += store.read_log(store.position().first, records_max=99, bytes_max=1 << 20)
    told += rows(store)
    for place, user in enumerate(USERS):
        told += [reader.get(user, KEYS), reader.scan(user, "", "", 9), reader.size(user)]
        told.append(reader.request(user, f"r{place}"))
    return told


def complaint(path: Path, expected: list[object]) -> str:
    """What a store says when it is opened and scrubbed; empty when it is sound, and then it answers as expected."""
    try:
        with closing(open_store(path, *SHARD)) as opened:
            scrub(opened)
            assert answers(opened) == expected
    except Damaged as error:
        return str(error)
    return ""


def flip(path: Path, bit: int) -> None:
    """Turns one bit over."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def copy_of(source: Path, directory: Path) -> Path:
    """The files as they are, as a killed process leaves them."""
    directory.mkdir()
    for file in source.parent.glob(f"{source.name}*"):
        if not file.name.endswith("-shm"):
            shutil.copyfile(file, directory / file.name)
    return directory / source.name


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """Anywhere in the database: once opened and scrubbed, a store answers as before, or said that it is damaged."""
    store = filled(tmp_path / "shard.db")
    expected = answers(store)
    store.close()
    sound, places, found = (tmp_path / "shard.db").read_bytes(), random.Random(11), []
    for number in range(150):
        path = tmp_path / f"{number}.db"
        path.write_bytes(sound)
        flip(path, places.randrange(8 * len(sound)))
        if said := complaint(path, expected):
            found.append(said)
            assert str(path) in said
            assert ADVICE in said
        path.unlink()
    # The others lie in pages that are not in use.
    assert len(found) > 50


def test_a_flipped_bit_is_not_served_before_the_scrub(tmp_path: Path) -> None:
    """Whatever row a reader gives away is as it was written; it may only miss one until the scrub comes by."""
    store = filled(tmp_path / "shard.db")
    expected = {user: {item.key: item for item in store.reader().get(user, KEYS)} for user in USERS}
    store.close()
    sound, places = (tmp_path / "shard.db").read_bytes(), random.Random(12)
    for number in range(60):
        path = tmp_path / f"{number}.db"
        path.write_bytes(sound)
        flip(path, places.randrange(8 * len(sound)))
        try:
            with closing(open_store(path, *SHARD)) as opened:
                for user in USERS:
                    for item in opened.reader().get(user, KEYS):
                        assert item == expected[user][item.key], number
        except Damaged:
            pass
        path.unlink()


def test_records_lost_from_the_write_ahead_log_are_missed(tmp_path: Path) -> None:
    """A bit flipped there, or the file gone, and SQLite shows an older state as sound: the mark tells it is not."""
    store = filled(tmp_path / "shard.db")
    expected, wal = answers(store), beside(store.path, "wal").read_bytes()
    places, found = random.Random(13), 0
    for number in range(40):
        path = copy_of(store.path, tmp_path / str(number))
        flip(beside(path, "wal"), places.randrange(8 * len(wal)))
        found += complaint(path, expected) != ""
    assert found > 20
    path = copy_of(store.path, tmp_path / "gone")
    beside(path, "wal").unlink()
    with pytest.raises(Damaged, match="it ends with record 0, but once had record 33 on disk"):
        open_store(path, *SHARD)
    store.close()
    open_store(store.path, *SHARD).close()


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        (Mark(34, 1, 0, False), "ends with record 33"),
        (Mark(1, 1, 5, False), "knows epoch 4"),
        (Mark(33, 2, 0, False), "record 33 is of epoch 1"),
    ],
)
def test_a_store_with_less_than_its_mark_is_damaged(tmp_path: Path, mark: Mark, words: str) -> None:
    """A record, an epoch or another log that was once on disk; a mark that cannot be read says nothing."""
    store = filled(tmp_path / "shard.db")
    store.close()
    mark_file = MarkFile(store.path)
    assert mark_file.read() == Mark(33, 1, 4, True)
    mark_file.write(mark)
    mark_file.close()
    with pytest.raises(Damaged, match=words):
        open_store(store.path, *SHARD)
    flip(beside(store.path, "mark"), 50)
    open_store(store.path, *SHARD).close()


def test_an_unfinished_copy_that_was_complete_is_damaged(tmp_path: Path) -> None:
    """The end of a copy is marked; a copy begun anew takes that back."""
    store = create_store(tmp_path / "shard.db", *SHARD)
    store.begin_copy(0, 0)
    store.close()
    mark_file = MarkFile(store.path)
    mark_file.write(Mark(is_complete=True))
    mark_file.close()
    with pytest.raises(Damaged, match="unfinished copy"):
        open_store(store.path, *SHARD)


ALTERATIONS = {
    "UPDATE log SET payload = x'00' WHERE sequence = 5": "log record 5",
    "UPDATE log SET epoch = 2 WHERE sequence = 6": "log record 6",
    "DELETE FROM log WHERE sequence = 7": "log",
    "UPDATE entries SET value = x'00' WHERE user = CAST('user-3' AS BLOB)": "user-3",
    "UPDATE entries SET version = version + 1 WHERE user = CAST('user-3' AS BLOB)": "user-3",
    "UPDATE entries SET value = NULL WHERE user = CAST('user-3' AS BLOB)": "user-3",
    "UPDATE entries SET value = 5 WHERE user = CAST('user-3' AS BLOB)": "cannot be read",
    "DELETE FROM entries WHERE user = CAST('user-3' AS BLOB)": "user-3",
    "UPDATE users SET keys = keys + 1 WHERE user = CAST('user-3' AS BLOB)": "sums over all users",
    "DELETE FROM users WHERE user = CAST('user-3' AS BLOB)": "sums over all users",
    "UPDATE users SET proof = 0 WHERE user = CAST('user-3' AS BLOB)": "size of user b'user-3'",
    "UPDATE requests SET version = 1 WHERE user = CAST('user-3' AS BLOB)": "request b'r3'",
    "UPDATE meta SET digest = digest + 1": "meta",
    "DELETE FROM meta": "meta",
    "DROP TABLE users": "no such table",
}


@pytest.mark.parametrize("statement", ALTERATIONS)
def test_the_scrub_finds_what_does_not_add_up(tmp_path: Path, statement: str) -> None:
    """Rows, sizes, sums, requests and records that SQLite itself finds sound; on an open store, past its cache."""
    with closing(filled(tmp_path / "shard.db")) as store:
        scrub(store)
        answers(store)
        with closing(sqlite3.connect(store.path)) as connection:
            connection.execute(statement)
            connection.commit()
        with pytest.raises(Damaged, match=ALTERATIONS[statement]) as told:
            scrub(store)
        assert ADVICE in str(told.value)


def test_a_reader_does_not_give_away_what_was_altered(tmp_path: Path) -> None:
    """Values, sizes and requests are checked when they are read; those of other users stay readable."""
    with closing(filled(tmp_path / "shard.db")) as store:
        with closing(sqlite3.connect(store.path)) as connection:
            for table in ("entries", "users", "requests"):
                connection.execute(f"UPDATE {table} SET digest = digest + 1 WHERE user = CAST('user-3' AS BLOB)")
            connection.commit()
        reader = store.reader()
        for call in (
            lambda: reader.get("user-3", ["a"]), lambda: reader.scan("user-3", "", "", 1),
            lambda: reader.size("user-3"), lambda: reader.request("user-3", "r3"), lambda: rows(store),
        ):  # fmt: skip
            with pytest.raises(Damaged, match="user-3"):
                call()
        assert reader.get("user-4", ["a"]) == [StateItem("a", b"\x04" * 240, 5)]


def test_a_file_that_is_no_database_is_damaged(tmp_path: Path) -> None:
    """Text, zeros, half a file, nothing: one line with the file and what becomes of it."""
    store = filled(tmp_path / "shard.db")
    store.close()
    content = store.path.read_bytes()
    for number, other in enumerate([b"text" * 2_000, bytes(len(content)), content[: len(content) // 2], b""]):
        path = tmp_path / f"{number}.db"
        path.write_bytes(other)
        with pytest.raises(Damaged, match=ADVICE) as told:
            open_store(path, *SHARD)
        assert "\n" not in str(told.value)


def small(store: ShardStore) -> Callable[[], object]:
    """Gives the store no more pages than it has; returns what takes that back."""
    connection = store._writer.connection
    count = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={count}")
    return lambda: connection.execute("PRAGMA max_page_count=1000000")


def test_a_write_without_room_changes_nothing(tmp_path: Path) -> None:
    """Each kind of write on a full store is refused as such and keeps nothing; reads go on; with room it succeeds."""
    source = filled(tmp_path / "source.db")
    store = filled(tmp_path / "shard.db")
    joiner = create_store(tmp_path / "joiner.db", *SHARD)
    joiner.begin_copy(30, 1)
    last = store.position().last
    store.append([record(last + 1, "zoe", {"big": b"x" * 50_000})])
    expected, chunk, large = answers(store), source.read_chunk(b"", bytes_max=1 << 20), b"x" * 100_000
    give_room = [small(store), small(joiner)]
    for write_it in (
        lambda: store.append([record(last + 2, "ann", {"a": large})]),
        lambda: store.apply(last + 1, keeps_tombstones=True),
        lambda: joiner.merge_chunk(chunk),
    ):
        with pytest.raises(StoreFull, match="the disk is full"):
            write_it()
        assert answers(store) == expected
        assert joiner.position().copy_cursor == b""
        scrub(store)
    for give in give_room:
        give()
    store.append([record(last + 2, "ann", {"a": large})])
    store.apply(last + 2, keeps_tombstones=True)
    assert store.reader().get("ann", ["a"]) == [StateItem("a", large, last + 2)]
    joiner.merge_chunk(chunk)
    for made in (source, store, joiner):
        scrub(made)
        made.close()


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of DISK_BYTES; skips where none may be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
def test_a_full_disk_refuses_writes_and_is_used_again(tmp_path: Path) -> None:
    """On a real file system without room: StoreFull, reads and reopening work, and with room again writes do."""
    disk = tmp_path / "disk"
    with small_disk(disk):
        settings = StoreSettings(checkpoint_pages=20)
        store, ballast = create_store(disk / "shard.db", *SHARD, settings), disk / "ballast"
        ballast.write_bytes(bytes(DISK_BYTES // 4))
        written, refused = 0, 0
        while refused < 5:
            try:
                written = write(store, f"user-{written % 30}", {"a": b"%d" % written, f"b{written}": bytes(300)})
            except StoreFull:
                refused += 1
        position = store.position()
        reader = store.reader()
        assert reader.get(f"user-{(written - 1) % 30}", ["a"]) == [StateItem("a", b"%d" % (written - 1), written)]
        with pytest.raises(StoreFull):
            split_store_of(store, disk)
        store = open_store(disk / "shard.db", *SHARD, settings)
        assert store.position().last == position.last
        ballast.unlink()
        for _ in range(50):
            write(store, "ann", {"a": b"1"})
        scrub(store)
        store.close()


def split_store_of(store: ShardStore, directory: Path) -> None:
    """Closes it and cuts it in two."""
    store.close()
    children = [(directory / "low.db", 8, 0, 1 << 63), (directory / "high.db", 9, 1 << 63, HASH_SPACE)]
    split_store(store.path, children)


def failure(code: int) -> sqlite3.OperationalError:
    """An error of SQLite's."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode, error.sqlite_errorname = code, "SQLITE_IOERR"
    return error


def test_after_a_failed_sync_nothing_is_written(tmp_path: Path) -> None:
    """The kernel forgets what it could not write, so the next sync proves nothing: only an opening makes it good."""
    store = filled(tmp_path / "shard.db")
    with pytest.raises(SyncFailed), store._writer.transaction(is_durable=True):
        raise failure(sqlite3.SQLITE_IOERR_FSYNC)
    last = store.position().last
    for refused in (
        lambda: store.append([record(last + 1, "ann", {})]), lambda: store.see_epoch(99),
        lambda: store.apply(last, keeps_tombstones=True), lambda: store.begin_copy(1, 1),
    ):  # fmt: skip
        with pytest.raises(SyncFailed, match="open the store again"):
            refused()
    assert store.reader().get("user-1", ["a"])
    store.close()
    again = open_store(store.path, *SHARD)
    again.append([record(last + 1, "ann", {})])
    again.close()


def test_other_errors_are_told_apart(tmp_path: Path) -> None:
    """A busy file or a failing disk is an OSError, a malformed one Damaged; what is no error of SQLite's stays."""
    path = tmp_path / "shard.db"
    assert isinstance(meaning(path, failure(sqlite3.SQLITE_IOERR_READ)), OSError)
    assert isinstance(meaning(path, failure(sqlite3.SQLITE_BUSY)), OSError)
    assert isinstance(meaning(path, failure(sqlite3.SQLITE_FULL)), StoreFull)
    assert isinstance(meaning(path, failure(sqlite3.SQLITE_CORRUPT)), Damaged)
    assert isinstance(meaning(path, sqlite3.ProgrammingError("closed")), sqlite3.ProgrammingError)
    told = meaning(path, failure(sqlite3.SQLITE_IOERR_READ))
    assert isinstance(told, OSError)
    assert (told.errno, told.filename) == (errno.EIO, str(path))


def level(store: ShardStore) -> int:
    """What the latest transaction promised: 1 NORMAL, 2 FULL."""
    return int(store._writer.connection.execute("PRAGMA synchronous").fetchone()[0])


def test_what_must_be_durable_is_synced(tmp_path: Path) -> None:
    """Records, epochs, truncations, a copy's begin and end are committed at FULL, rows at NORMAL, again and again."""
    store, source = create_store(tmp_path / "shard.db", *SHARD), filled(tmp_path / "source.db")
    for number in range(1, 4):
        store.append([record(number, "ann", {"a": b"1"}), *([] if number < 3 else [record(4, "ann", {})])])
        assert level(store) == 2
        store.apply(number, keeps_tombstones=True)
        assert level(store) == 1
    durables: list[Callable[[], None]] = [
        lambda: store.see_epoch(5), lambda: store.truncate(3), lambda: store.begin_copy(30, 1),
        lambda: store.finish_copy(),
    ]  # fmt: skip
    for place, durable in enumerate(durables, 1):
        if place == len(durables):
            store.merge_chunk(source.read_chunk(b"", bytes_max=1 << 20))
            assert level(store) == 1
        durable()
        assert level(store) == 2
        store._writer.connection.executescript("PRAGMA synchronous=NORMAL")
        store._writer._is_full = False
    source.close()
    store.close()


def test_a_power_cut_takes_no_record(tmp_path: Path) -> None:
    """The write-ahead log ends anywhere behind the last sync, its last frame torn: all records and epochs are there,
    and what was applied is a prefix that the log completes."""
    store = filled(tmp_path / "shard.db")
    synced, last = beside(store.path, "wal").stat().st_size, store.position().last
    before = store.position().applied
    digests = {before: store.digest()}
    for number in range(before + 1, last + 1):
        digests[number] = store.apply(number, keeps_tombstones=True)
    wal, places, seen = beside(store.path, "wal").read_bytes(), random.Random(14), set()
    assert len(wal) > synced
    for number in range(40):
        path = copy_of(store.path, tmp_path / str(number))
        end = places.randrange(synced, len(wal) + 1)
        torn = wal[:end] + places.randbytes(places.choice([0, 10, 4_000])) if number % 2 else wal[:end]
        beside(path, "wal").write_bytes(torn)
        with closing(open_store(path, *SHARD)) as opened:
            position = opened.position()
            assert (position.last, position.epoch_seen) == (last, 4)
            assert opened.digest() == digests[position.applied]
            scrub(opened)
            assert opened.apply(last, keeps_tombstones=True) == digests[last]
            seen.add(position.applied)
    assert seen >= {before, last - 1}
    store.close()
