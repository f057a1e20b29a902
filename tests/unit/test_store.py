"""The store of one shard: what it answers, forgets, keeps in order, and refuses."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.api.v1 import replication_pb2
from coordinator.model import HASH_SPACE, WallMs, key_hash
from coordinator.model.errors import Damaged
from worker_agent.store import ShardStore, StoreSettings, create_store, delete_store, open_store
from worker_agent.store_cut import merge_stores, split_store
from worker_agent.store_files import StoreInUse, beside
from worker_agent.store_interface import CopyChunk, LogRecord, Reader, StateItem, Store, UserSize

SHARD = (7, 0, HASH_SPACE)
Changes = Mapping[str, bytes | None]
Keep = Callable[[ShardStore], ShardStore]


def record(
    sequence: int, user: str, changes: Changes, *, epoch: int = 1, request_id: str = "", time_ms: int = 0
) -> LogRecord:
    """One record of users' state; a change to None removes the key."""
    effects = [replication_pb2.Effect(key=key, value=value) for key, value in changes.items()]
    payload = replication_pb2.Effects(user=user, request_id=request_id, effects=effects).SerializeToString()
    return LogRecord(sequence, epoch, WallMs(time_ms), payload)


def write(store: ShardStore, user: str, changes: Changes, request_id: str = "", time_ms: int = 0) -> int:
    """Appends one record and applies it; its sequence."""
    sequence = store.position().last + 1
    store.append([record(sequence, user, changes, request_id=request_id, time_ms=time_ms)])
    store.apply(sequence, keeps_tombstones=False)
    return sequence


def chunks(store: ShardStore, bytes_max: int) -> Iterator[CopyChunk]:
    """A whole copy."""
    cursor = b""
    while True:
        chunk = store.read_chunk(cursor, bytes_max=bytes_max)
        yield chunk
        if chunk.is_last:
            return
        cursor = chunk.next_cursor


def rows(store: ShardStore) -> list[replication_pb2.Row]:
    """Everything in its tables."""
    return [row for chunk in chunks(store, 1 << 20) for row in chunk.rows]


def scrub(store: ShardStore) -> int:
    """A whole round; how many steps it took."""
    steps, cursor = 1, store.scrub(b"")
    while cursor:
        steps, cursor = steps + 1, store.scrub(cursor)
    return steps


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Closes at the end what was opened."""
    with ExitStack() as opened:

        def take(store: ShardStore) -> ShardStore:
            opened.callback(store.close)
            return store

        yield take


@pytest.fixture
def store(tmp_path: Path, keep: Keep) -> ShardStore:
    return keep(create_store(tmp_path / "shard-7.db", *SHARD))


def test_it_is_what_the_interface_says(store: ShardStore) -> None:
    """Types hold it to the protocols, and a new store is complete, empty and at 0."""
    by_interface: Store = store
    reader: Reader = by_interface.reader()
    position = by_interface.position()
    assert (position.first, position.last, position.applied, position.epoch_seen) == (1, 0, 0, 0)
    assert position.is_complete
    assert reader.applied() == 0
    assert reader.get("ann", ["a"]) == []
    assert reader.size("ann") == UserSize()
    assert rows(store) == []


def test_reads_show_what_was_applied(store: ShardStore) -> None:
    """Values, versions, the order of bytes, prefixes, sizes and requests; what is only in the log is not shown."""
    reader = store.reader()
    write(store, "ann", {"b": b"1", "a": b"22", "\u00e9": b"", "a/\U0001f600": b"x", "a/\u00ff": b"y"}, "r1")
    assert [item.key for item in reader.scan("ann", "", "", 10)] == ["a", "a/\u00ff", "a/\U0001f600", "b", "\u00e9"]
    assert [item.key for item in reader.scan("ann", "", "a/", 10)] == ["a/\u00ff", "a/\U0001f600"]
    assert [item.key for item in reader.scan("ann", "a/\U0001f600", "a", 10)] == ["a/\U0001f600"]
    assert [item.key for item in reader.scan("ann", "a", "", 2)] == ["a", "a/\u00ff"]
    assert reader.scan("ann", "z", "a", 10) == []
    assert reader.get("ann", ["\u00e9", "no", "b"]) == [StateItem("\u00e9", b"", 1), StateItem("b", b"1", 1)]
    store.append([record(2, "ann", {"a": None, "b": b"333"}, request_id="r2")])
    assert reader.get("ann", ["a"]) == [StateItem("a", b"22", 1)]
    assert reader.request("ann", "r2") is None
    store.apply(2, keeps_tombstones=False)
    assert reader.get("ann", ["a", "b"]) == [StateItem("b", b"333", 2)]
    assert reader.size("ann") == UserSize(4, 3 + 1 + 2 + len("a/\U0001f600a/\u00ffb\u00e9".encode()) - 1)
    assert (reader.request("ann", "r1"), reader.request("ann", "r2"), reader.request("bob", "r1")) == (1, 2, None)
    assert reader.applied() == 2
    write(store, "ann", dict.fromkeys(("a", "b", "\u00e9", "a/\U0001f600", "a/\u00ff")))
    assert reader.size("ann") == UserSize()
    assert store.figures().users == 0


def test_a_moment_stands_still(store: ShardStore) -> None:
    """What is asked inside a moment is as of its first question, whatever is applied meanwhile; moments nest."""
    reader = store.reader()
    write(store, "ann", {"a": b"1"})
    with reader.moment():
        assert reader.size("ann").keys == 1
        write(store, "ann", {"b": b"2"})
        with reader.moment():
            assert reader.size("ann").keys == 1
        assert [item.key for item in reader.get("ann", ["a", "b"])] == ["a"]
        assert [item.key for item in reader.scan("ann", "", "", 9)] == ["a"]
        assert reader.users("", 9) == ["ann"]
    assert reader.size("ann").keys == 2


def test_users_are_listed_by_hash(store: ShardStore) -> None:
    """Pages of the users that have a key, each once, whoever has come or gone."""
    reader = store.reader()
    assert reader.users("", 10) == []
    names = sorted((f"user-{number}" for number in range(25)), key=key_hash)
    for name in names:
        write(store, name, {"a": b"1"})
    write(store, names[3], {"a": None})
    del names[3]
    pages = [reader.users("", 10)]
    while len(pages[-1]) == 10:
        pages.append(reader.users(pages[-1][-1], 10))
    assert [name for page in pages for name in page] == names
    with store._writer.transaction(is_durable=True) as connection:
        connection.execute("UPDATE users SET keys = 2 WHERE user = ?", (names[0].encode(),))
    with pytest.raises(Damaged, match="does not match its checksum"):
        reader.users("", 10)


def test_the_log_has_no_gaps(store: ShardStore) -> None:
    """Records that do not follow, a truncation of what is applied, applying what is not there: refused, unchanged."""
    store.append([record(1, "ann", {"a": b"1"}), record(2, "ann", {"a": b"2"})])
    store.apply(1, keeps_tombstones=True)
    before = store.position()
    refused: Sequence[Sequence[LogRecord]] = ([record(4, "a", {})], [record(2, "a", {})], [record(3, "a", {})] * 2)
    for records in refused:
        with pytest.raises(ValueError, match="cannot follow"):
            store.append(records)
    with pytest.raises(ValueError, match="1 is applied"):
        store.truncate(0)
    with pytest.raises(ValueError, match="the last one is 2"):
        store.apply(3, keeps_tombstones=True)
    with pytest.raises(KeyError):
        store.read_log(0, records_max=1, bytes_max=1)
    assert store.position() == before
    assert store.read_log(3, records_max=1, bytes_max=1) == []


def test_another_log_takes_the_place_of_what_was_not_applied(store: ShardStore, keep: Keep) -> None:
    """A truncation gives back the epoch of the record that is last now; the epoch seen never falls; also on disk."""
    store.see_epoch(4)
    store.append([record(number, "ann", {"a": b"%d" % number}, epoch=number) for number in (1, 2, 3, 4)])
    store.apply(1, keeps_tombstones=True)
    store.truncate(3)
    assert (store.position().last, store.position().last_epoch) == (3, 3)
    store.truncate(1)
    assert (store.position().last, store.position().last_epoch) == (1, 1)
    store.see_epoch(9)
    store.see_epoch(5)
    store.append([record(2, "ann", {"a": b"new"}, epoch=9)])
    store.close()
    again = keep(open_store(store.path, *SHARD))
    position = again.position()
    assert (position.epoch_seen, position.last, position.last_epoch, position.applied) == (9, 2, 9, 1)
    again.apply(2, keeps_tombstones=True)
    assert again.reader().get("ann", ["a"]) == [StateItem("a", b"new", 2)]
    again.close()


def test_the_log_keeps_what_may_be_needed(tmp_path: Path, keep: Keep) -> None:
    """Applied records leave beyond a number or their bytes; what is not applied stays, however much it is."""
    settings = StoreSettings(log_records_kept=16, log_bytes_kept=1_000)
    store = keep(create_store(tmp_path / "shard.db", *SHARD, settings))
    store.append([record(number, "ann", {"a": b"1"}) for number in range(1, 101)])
    store.apply(10, keeps_tombstones=False)
    assert (store.position().first, store.figures().log_records) == (1, 100)
    store.apply(40, keeps_tombstones=False)
    assert (store.position().first, store.position().last) == (27, 100)
    with pytest.raises(KeyError):
        store.read_log(26, records_max=1, bytes_max=1)
    assert [held.sequence for held in store.read_log(27, records_max=3, bytes_max=999)] == [27, 28, 29]
    assert [held.sequence for held in store.read_log(27, records_max=9, bytes_max=1)] == [27]
    store.apply(100, keeps_tombstones=False)
    assert (store.position().first, store.position().last) == (87, 100)
    store.append([record(101, "ann", {"a": b"x" * 2_000})])
    store.apply(101, keeps_tombstones=False)
    assert (store.position().first, store.position().last) == (102, 101)
    store.close()
    store = keep(open_store(tmp_path / "shard.db", *SHARD, settings))
    assert (store.position().first, store.position().last, store.position().last_epoch) == (102, 101, 1)
    store.close()


def test_requests_are_forgotten_by_the_times_in_the_records(tmp_path: Path, keep: Keep) -> None:
    """Never by a clock: those an hour older than the latest record go, and the oldest where there are too many."""
    store = keep(create_store(tmp_path / "shard.db", *SHARD, StoreSettings(remembered_ms=1_000, requests_kept=3)))
    reader = store.reader()

    def known() -> list[str]:
        return [name for name in ("r1", "r2", "r3", "r4", "r5") if reader.request("ann", name)]

    write(store, "ann", {}, "r1", 5_000)
    write(store, "ann", {}, "r2", 5_500)
    write(store, "ann", {"a": b""}, "", 5_999)
    assert known() == ["r1", "r2"]
    write(store, "bob", {"a": b""}, "", 6_000)
    assert known() == ["r2"]
    for number in (3, 4, 5):
        write(store, "ann", {}, f"r{number}", 5_800 + number)
    assert known() == ["r3", "r4", "r5"]
    assert store.figures().requests == 3
    write(store, "ann", {}, "r4", 6_100)
    assert reader.request("ann", "r4") == store.position().last
    store.close()


def test_tombstones_stay_only_while_they_are_kept(store: ShardStore) -> None:
    """A removed key is a row of a copy while a replica joins, counts for no size or digest, and goes afterwards."""
    write(store, "ann", {"a": b"1", "b": b"2"})
    digest = store.digest()
    store.append([record(2, "ann", {"a": None, "never": None}), record(3, "ann", {"c": b"3"})])
    store.apply(3, keeps_tombstones=True)
    assert [(row.key[5:], row.value, row.version) for row in rows(store)] == [
        (b"a", b"", 2), (b"b", b"\x012", 1), (b"c", b"\x013", 3), (b"never", b"", 2),
    ]  # fmt: skip
    assert store.digest().rows == 2
    assert store.reader().size("ann") == UserSize(2, 4)
    scrub(store)
    store.append([record(4, "ann", {"c": None}), record(5, "ann", {"a": b"1"})])
    store.apply(5, keeps_tombstones=False)
    assert [row.key[5:] for row in rows(store)] == [b"a", b"b"]
    assert store.digest().rows == digest.rows
    scrub(store)


def test_a_digest_is_of_the_rows_not_of_their_way(tmp_path: Path, keep: Keep) -> None:
    """One by one, all at once, or by a copy beside the log, in chunks of any size: the same rows, digest and counts."""
    random_numbers = random.Random(4)
    records = [
        record(number, f"user-{random_numbers.randrange(9)}",
               {random_numbers.choice("abcdef"): random_numbers.choice([None, random_numbers.randbytes(9)])
                for _ in range(3)}, request_id=f"r{number}")
        for number in range(1, 121)
    ]  # fmt: skip
    stores = [keep(create_store(tmp_path / f"{number}.db", *SHARD)) for number in range(5)]
    for one in records:
        stores[0].append([one])
        stores[0].apply(one.sequence, keeps_tombstones=False)
    stores[1].append(records)
    stores[1].apply(120, keeps_tombstones=False)
    source = stores[2]
    source.append(records[:50])
    source.apply(50, keeps_tombstones=True)
    for joiner in stores[3:]:
        joiner.begin_copy(50, 1)
    for place in range(50, 120):
        source.append([records[place]])
        source.apply(place + 1, keeps_tombstones=True)
        for joiner, bytes_max in ((stores[3], 300), (stores[4], 3_000)):
            if joiner.position().copy_cursor != b"\xff":
                joiner.merge_chunk(source.read_chunk(joiner.position().copy_cursor, bytes_max=bytes_max))
    for joiner in stores[3:]:
        with pytest.raises(ValueError, match="the copy is not whole"):
            joiner.finish_copy()
        joiner.append(records[50:])
        joiner.apply(120, keeps_tombstones=True)
        joiner.finish_copy()
        assert joiner.position().is_complete
    for other in stores:
        other.apply(120, keeps_tombstones=False)
        assert other.digest() == stores[0].digest()
        assert rows(other) == rows(stores[0])
        assert other.figures().bytes == stores[0].figures().bytes
        scrub(other)


def test_a_copy_begun_anew_forgets_everything_but_the_epoch(store: ShardStore, keep: Keep) -> None:
    """Rows, records, requests and the marks of them are gone, also after a reopen; chunks out of turn are refused."""
    store.see_epoch(5)
    write(store, "ann", {"a": b"1"}, "r1")
    chunk = store.read_chunk(b"", bytes_max=1)
    with pytest.raises(ValueError, match="cannot follow"):
        store.merge_chunk(chunk)
    store.begin_copy(40, 3)
    store.close()
    again = keep(open_store(store.path, *SHARD))
    position = again.position()
    assert (position.epoch_seen, position.first, position.last, position.last_epoch) == (5, 41, 40, 3)
    assert (position.is_complete, position.copy_start, again.figures().requests) == (False, 40, 0)
    again.merge_chunk(chunk)
    with pytest.raises(ValueError, match="cannot follow"):
        again.merge_chunk(chunk)
    assert again.position().copy_cursor == chunk.next_cursor
    assert again.reader().get("ann", ["a"]) == [StateItem("a", b"1", 1)]
    stranger = replication_pb2.Row(table=9, key=b"\x00\x00", value=b"", version=1)
    with pytest.raises(ValueError, match="table 9"):
        again.merge_chunk(CopyChunk(chunk.next_cursor, b"\xff", True, 40, [stranger]))
    again.close()


def test_figures_name_the_median_of_the_users(store: ShardStore) -> None:
    """Half of the users lie below it, by the hash of their names, however many keys they have."""
    assert store.figures().median_hash == 0
    write(store, "user-0", {str(number): b"" for number in range(50)})
    assert store.figures().median_hash == 0
    for number in range(1, 11):
        write(store, f"user-{number}", {"a": b""})
    hashes = sorted(key_hash(f"user-{number}") for number in range(11))
    assert store.figures().median_hash == hashes[5]
    assert (store.figures().users, store.figures().rows) == (11, 60)


def test_a_store_is_opened_once(store: ShardStore) -> None:
    """A second opener is refused, in this process and in another one; so is its removal; closing frees it."""
    with pytest.raises(StoreInUse, match="open already"):
        open_store(store.path, *SHARD)
    with pytest.raises(StoreInUse):
        delete_store(store.path)
    with pytest.raises(FileExistsError):
        create_store(store.path, *SHARD)
    code = (
        "import sys, pathlib; from worker_agent.store import open_store; "
        "open_store(pathlib.Path(sys.argv[1]), 7, 0, 1 << 64).close()"
    )
    other = subprocess.run([sys.executable, "-c", code, str(store.path)], capture_output=True, text=True, check=False)
    assert "StoreInUse" in other.stderr
    store.close()
    store.close()
    assert subprocess.run([sys.executable, "-c", code, str(store.path)], check=False).returncode == 0


def test_a_store_is_of_one_shard(store: ShardStore) -> None:
    """The file of another shard or range is refused; one that is not there is said to be not there."""
    store.close()
    with pytest.raises(Damaged, match="it holds shard 7"):
        open_store(store.path, 8, 0, HASH_SPACE)
    with pytest.raises(Damaged, match="not shard 7 from 0x0 to 0x10"):
        open_store(store.path, 7, 0, 16)
    with pytest.raises(FileNotFoundError):
        open_store(store.path.with_name("none.db"), *SHARD)
    with pytest.raises(ValueError, match="range"):
        create_store(store.path.with_name("none.db"), 8, 16, 16)
    open_store(store.path, *SHARD).close()


def test_what_is_deleted_is_gone(store: ShardStore, tmp_path: Path, keep: Keep) -> None:
    """No file is left, deleting again does nothing, and leftovers do not come back under the same name."""
    write(store, "ann", {"a": b"1"})
    wal = beside(store.path, "wal").read_bytes()
    mark = beside(store.path, "mark").read_bytes()
    store.close()
    delete_store(store.path)
    delete_store(store.path)
    assert list(tmp_path.iterdir()) == []
    beside(store.path, "wal").write_bytes(wal)
    beside(store.path, "mark").write_bytes(mark)
    beside(store.path, "new").write_bytes(b"half")
    again = keep(create_store(store.path, *SHARD))
    assert again.position().last == 0
    assert rows(again) == []
    again.close()


def family(tmp_path: Path, keep: Keep) -> tuple[ShardStore, list[tuple[Path, int, int, int]]]:
    """A store with some users, and the two children that it shall have."""
    parent = keep(create_store(tmp_path / "shard-7.db", *SHARD))
    parent.see_epoch(3)
    for number in range(40):
        write(parent, f"user-{number}", {"a": b"%d" % number, "b": b""}, f"r{number}", 1_000 + number)
    cut = parent.figures().median_hash
    return parent, [(tmp_path / "shard-8.db", 8, 0, cut), (tmp_path / "shard-9.db", 9, cut, HASH_SPACE)]


def test_children_have_their_parents_rows(tmp_path: Path, keep: Keep) -> None:
    """Split at the median: each row in one child, versions and requests too; merged again it is the parent."""
    parent, children = family(tmp_path, keep)
    parent.append([record(41, "user-3", {"a": None}, epoch=3)])
    digest, before = parent.apply(41, keeps_tombstones=True), rows(parent)
    parent.close()
    split_store(parent.path, children)
    lower, upper = (keep(open_store(*child)) for child in children)
    assert (lower.figures().users, upper.figures().users) == (20, 20)
    position = lower.position()
    assert (position.first, position.last, position.last_epoch, position.epoch_seen) == (42, 41, 3, 3)
    assert (lower.digest().value + upper.digest().value) % HASH_SPACE == digest.value
    live = [row for row in before if row.table == 2 or row.value]
    assert sorted(map(repr, rows(lower) + rows(upper))) == sorted(map(repr, live))
    scrub(lower)
    user = next(f"user-{number}" for number in range(40) if key_hash(f"user-{number}") < lower.hi)
    assert write(lower, user, {"c": b"new"}) == 42
    lower.close()
    upper.close()
    merge_stores([child[0] for child in children], (tmp_path / "shard-10.db", 10, 0, HASH_SPACE))
    merged = keep(open_store(tmp_path / "shard-10.db", 10, 0, HASH_SPACE))
    assert (merged.position().last, merged.position().applied, merged.digest().rows) == (42, 42, 80)
    assert merged.figures().requests == 40
    scrub(merged)
    merged.close()
    assert parent.path.exists()


def test_an_interrupted_split_is_done_again(tmp_path: Path, keep: Keep) -> None:
    """Half-made files count for nothing, a child that is there stays, records that were not applied are."""
    parent, children = family(tmp_path, keep)
    parent.append([record(41, "user-3", {"z": b"!"})])
    parent.close()
    beside(children[0][0], "new").write_bytes(b"half a database")
    split_store(parent.path, children)
    stores = [keep(open_store(*child)) for child in children]
    assert sum(store.digest().rows for store in stores) == 81
    kept, lost = stores[0].digest(), stores[1].digest()
    for store in stores:
        store.close()
    delete_store(children[1][0])
    inode = children[0][0].stat().st_ino
    split_store(parent.path, children)
    split_store(tmp_path / "not there", children)
    for child, digest in zip(children, (kept, lost), strict=True):
        store = keep(open_store(*child))
        assert store.digest() == digest
        store.close()
    assert children[0][0].stat().st_ino == inode


def test_a_split_may_make_one_child_alone(tmp_path: Path, keep: Keep) -> None:
    """A worker that holds one of the children makes that one, with the same rows as beside the other."""
    parent, (lower, upper) = family(tmp_path, keep)
    parent.close()
    split_store(parent.path, [upper])
    alone = keep(open_store(*upper)).digest()
    assert not lower[0].exists()
    assert alone.rows > 0


def test_a_split_needs_ranges_that_fit_and_a_whole_parent(tmp_path: Path, keep: Keep) -> None:
    """Ranges that do not fit, an unfinished copy and a parent in use make no child."""
    parent, (lower, upper) = family(tmp_path, keep)
    with pytest.raises(StoreInUse):
        split_store(parent.path, [lower, upper])
    parent.close()
    with pytest.raises(ValueError, match="are not those of the parents"):
        split_store(parent.path, [(*lower[:2], lower[2], upper[3] + 1)])
    with pytest.raises(ValueError, match="do not join"):
        split_store(parent.path, [lower, (*upper[:2], upper[2] + 1, upper[3])])
    again = keep(open_store(parent.path, *SHARD))
    again.begin_copy(50, 1)
    again.close()
    with pytest.raises(ValueError, match="unfinished copy"):
        split_store(parent.path, [lower, upper])
    assert not lower[0].exists()
    assert not upper[0].exists()


def test_a_user_is_not_copied_into_a_foreign_shard(tmp_path: Path, keep: Keep) -> None:
    """A row whose user does not belong to the range is refused, and nothing of its chunk is kept."""
    parent, children = family(tmp_path, keep)
    joiner = keep(create_store(*children[0]))
    joiner.begin_copy(40, 1)
    with pytest.raises(ValueError, match="does not belong"):
        joiner.merge_chunk(parent.read_chunk(b"", bytes_max=1 << 20))
    assert rows(joiner) == []
    joiner.close()
    parent.close()


def test_the_write_ahead_log_does_not_grow_for_ever(tmp_path: Path, keep: Keep) -> None:
    """After so many changed pages it moves into the database, and is written over from its start."""
    store = keep(create_store(tmp_path / "shard.db", *SHARD, StoreSettings(checkpoint_pages=50)))
    for number in range(400):
        write(store, f"user-{number}", {"a": b"x" * 500})
    assert beside(store.path, "wal").stat().st_size < 200 * 4_120
    assert store.path.stat().st_size > 400 * 500
    assert scrub(store) > 1
    store.close()


def test_it_is_sqlite(store: ShardStore) -> None:
    """People can look into a store with SQLite's own tools while it is in use; SQLite finds nothing wrong."""
    write(store, "ann", {"a": b"1"})
    connection = sqlite3.connect(store.path)
    assert connection.execute("SELECT user, key, value FROM entries").fetchall() == [(b"ann", b"a", b"1")]
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
