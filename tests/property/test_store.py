"""The store of a shard agrees with the model of it, whatever happens to both, also to their power."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.api.v1 import replication_pb2
from coordinator.model import HASH_SPACE, WallMs
from tests.model_store import ModelStore, merge_models, split_model
from worker_agent.store import StoreSettings, create_store, open_store
from worker_agent.store_codec import CURSOR_END
from worker_agent.store_cut import merge_stores, split_store
from worker_agent.store_interface import LogRecord

SETTINGS = StoreSettings(
    remembered_ms=50, requests_kept=6, log_records_kept=8, log_bytes_kept=150, checkpoint_pages=1 << 40
)
USERS = ["ann", "\u00fc\u0000r", "zoe"]
KEYS = ["", "a", "b\u0000", "\U0001f600"]
MEMORY = Path("/dev/shm")
"""Power is cut here by cutting files, so no disk is needed to wait for."""

effects = st.builds(
    lambda user, changes, request_id: replication_pb2.Effects(
        user=user, request_id=request_id,
        effects=[replication_pb2.Effect(key=key, value=value) for key, value in changes.items()],
    ),
    st.sampled_from(USERS),
    st.dictionaries(st.sampled_from(KEYS), st.none() | st.binary(max_size=20), max_size=3),
    st.sampled_from(["", "r1", "r2", "r3", "r4"]),
)  # fmt: skip


class Pair:
    """A store and its model, and how many bytes of the store's write-ahead log are synced."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f"{name}.db"
        self.real = create_store(self.path, 7, 0, HASH_SPACE, SETTINGS)
        self.model = ModelStore(7, 0, HASH_SPACE, SETTINGS)
        self.synced = self.wal_bytes()

    def wal_bytes(self) -> int:
        """Length of the write-ahead log; it only grows here, for no checkpoint is due."""
        wal = self.path.with_name(self.path.name + "-wal")
        return wal.stat().st_size if wal.exists() else 0

    def both(self, call: str, *args: object, **named: object) -> Any:
        """The same call on both, with the same result or kind of error."""
        outcomes: list[tuple[object, type[Exception] | None]] = []
        for store in (self.real, self.model):
            before = store.position()
            try:
                outcomes.append((getattr(store, call)(*args, **named), None))
            except (ValueError, KeyError) as error:
                outcomes.append((None, type(error)))
                assert store.position() == before
        assert outcomes[0] == outcomes[1], call
        if call not in ("apply", "merge_chunk") and self.model.disk() is self.model.disk(has_power=False):
            self.synced = self.wal_bytes()
        return outcomes[0][0]

    def compare(self) -> None:
        """All rows and counts."""
        real, model = self.real, self.model
        assert real.position() == model.position()
        assert real.digest() == model.digest()
        assert real.figures() == model.figures()
        assert real._meta.tombstones == sum(value is None for *_, value in model.disk().rows())
        assert real.read_chunk(b"", bytes_max=1 << 20) == model.read_chunk(b"", bytes_max=1 << 20)

    def compare_reads(self) -> None:
        """The log, and everything that a reader can be asked."""
        real, model = self.real, self.model
        first = real.position().first
        assert real.read_log(first, records_max=99, bytes_max=9_999) == model.read_log(
            first, records_max=99, bytes_max=9_999
        )
        left, right = real.reader(), model.reader()
        assert left.applied() == right.applied()
        for user in USERS:
            assert left.get(user, KEYS) == right.get(user, KEYS)
            assert left.size(user) == right.size(user)
            assert left.users(user, 2) == right.users(user, 2)
            for request_id in ("r1", "r2", "r3", "r4"):
                assert left.request(user, request_id) == right.request(user, request_id)

    def scrub(self) -> None:
        """A whole round finds nothing."""
        cursor = self.real.scrub(b"")
        while cursor:
            cursor = self.real.scrub(cursor)

    def reopen_as(self, directory: Path, wal_bytes: int | None) -> None:
        """Goes on with copies of the files as they are now; with the write-ahead log cut where that is given."""
        directory.mkdir()
        for file in self.path.parent.glob(f"{self.path.name}*"):
            if not file.name.endswith("-shm"):
                shutil.copyfile(file, directory / file.name)
        wal = directory / f"{self.path.name}-wal"
        if wal_bytes is not None and wal.exists():
            wal.write_bytes(wal.read_bytes()[:wal_bytes])
        self.real.close()
        self.path = directory / self.path.name
        self.real = open_store(self.path, 7, 0, HASH_SPACE, SETTINGS)
        self.synced = self.wal_bytes()


def is_copying(stores: Stores) -> bool:
    """True while the second store is an unfinished copy."""
    return not stores.pairs[1].model.position().is_complete


class Stores(RuleBasedStateMachine):
    """Two pairs; the second one is copied from the first one now and then."""

    @initialize(made=st.lists(effects, min_size=1, max_size=8))
    def begin(self, made: list[replication_pb2.Effects]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="stores-", dir=MEMORY if MEMORY.is_dir() else None))
        self.pairs = [Pair(self.directory, "one"), Pair(self.directory, "two")]
        self.count = 0
        for which in (0, 1):
            self.write(which, made, True)

    which = st.sampled_from([0, 1])

    @rule(
        which=which, made=st.lists(effects, max_size=5), step=st.integers(-10, 30), gap=st.sampled_from([1] * 9 + [2])
    )  # fmt: skip
    def append(self, which: int, made: list[replication_pb2.Effects], step: int, gap: int) -> None:
        position = self.pairs[which].model.position()
        first, epoch, now = position.last + gap, max(1, position.epoch_seen), 1_000 + 10 * position.last + step
        self.pairs[which].both("append", [
            LogRecord(first + place, epoch, WallMs(now + place), effect.SerializeToString())
            for place, effect in enumerate(made)
        ])  # fmt: skip

    @rule(which=which, step=st.integers(-1, 4), keeps=st.booleans())
    def apply(self, which: int, step: int, keeps: bool) -> None:
        pair = self.pairs[which]
        keeps = keeps or not pair.model.position().is_complete
        pair.both("apply", pair.model.position().applied + step, keeps_tombstones=keeps)

    @rule(which=which, made=st.lists(effects, min_size=1, max_size=5), keeps=st.booleans())
    def write(self, which: int, made: list[replication_pb2.Effects], keeps: bool) -> None:
        """The usual thing: records, and they are applied."""
        self.append(which, made, 0, 1)
        self.apply_all(which, keeps)

    @rule(which=which, keeps=st.booleans())
    def apply_all(self, which: int, keeps: bool) -> None:
        position = self.pairs[which].model.position()
        self.apply(which, position.last - position.applied, keeps)

    @rule(which=which, back=st.integers(0, 4), epoch=st.integers(0, 9))
    def follow_another(self, which: int, back: int, epoch: int) -> None:
        """A new primary has another log."""
        self.pairs[which].both("see_epoch", epoch)
        self.pairs[which].both("truncate", self.pairs[which].model.position().last - back)

    @rule(which=which, back=st.integers(-1, 9), records=st.integers(1, 5), size=st.integers(1, 200))
    def read(self, which: int, back: int, records: int, size: int) -> None:
        first = max(0, self.pairs[which].model.position().last - back)
        self.pairs[which].both("read_log", first, records_max=records, bytes_max=size)
        self.pairs[which].compare_reads()

    @precondition(lambda self: not is_copying(self))
    @rule()
    def begin_copy(self) -> None:
        source = self.pairs[0].model.position()
        self.pairs[1].both("begin_copy", source.applied, source.applied_epoch)

    @precondition(is_copying)
    @rule(size=st.integers(1, 150), stale=st.sampled_from([False] * 9 + [True]))
    def copy(self, size: int, stale: bool) -> None:
        """One chunk; a stale one is refused unless it is the first."""
        cursor = b"" if stale else self.pairs[1].model.position().copy_cursor
        self.pairs[1].both("merge_chunk", self.pairs[0].both("read_chunk", cursor, bytes_max=size))

    @precondition(is_copying)
    @rule(made=st.lists(effects, min_size=1, max_size=5))
    def write_both(self, made: list[replication_pb2.Effects]) -> None:
        """Written to the first one, applied there, and streamed to the second one beside the copy."""
        self.write(0, made, True)
        self.stream()

    @precondition(is_copying)
    @rule()
    def stream(self) -> None:
        first = self.pairs[1].model.position().last + 1
        records = self.pairs[0].both("read_log", first, records_max=9, bytes_max=999)
        if records is not None:
            self.pairs[1].both("append", records)

    @precondition(is_copying)
    @rule(size=st.integers(20, 150))
    def copy_all(self, size: int) -> None:
        """The rest of a copy."""
        while (cursor := self.pairs[1].model.position().copy_cursor) != CURSOR_END:
            self.copy(size, False)
            assert self.pairs[1].model.position().copy_cursor != cursor
        self.stream()
        self.apply_all(1, True)
        self.finish_copy()

    @precondition(is_copying)
    @rule()
    def finish_copy(self) -> None:
        self.pairs[1].both("finish_copy")

    @rule(which=which, how=st.sampled_from(["close", "kill", "power"]), more=st.sampled_from([0, 1, 24, 4_119]))
    def restart(self, which: int, how: str, more: int) -> None:
        """A process that is killed loses nothing, one without power what was not synced; a torn frame may be left."""
        self.count += 1
        pair, directory = self.pairs[which], self.directory / str(self.count)
        if how == "close":
            pair.both("close")
            pair.real = open_store(pair.path, 7, 0, HASH_SPACE, SETTINGS)
            pair.synced = pair.wal_bytes()
        elif how == "kill":
            pair.reopen_as(directory, None)
            pair.model = ModelStore(7, 0, HASH_SPACE, SETTINGS, pair.model.disk())
        else:
            pair.reopen_as(directory, pair.synced + more)
            pair.model.lose_power()

    @rule(which=which, cut=st.integers(1, HASH_SPACE - 1))
    def split_and_merge(self, which: int, cut: int) -> None:
        """The children have the parent's rows; and the parent goes on as what they are merged into."""
        pair = self.pairs[which]
        if not pair.model.position().is_complete:
            return
        self.count += 1
        directory = self.directory / str(self.count)
        directory.mkdir()
        low, high, path = (directory / name for name in ("low.db", "high.db", pair.path.name))
        pair.real.close()
        split_store(pair.path, [(low, 8, 0, cut), (high, 9, cut, HASH_SPACE)], SETTINGS)
        children = split_model(pair.model, [(8, 0, cut), (9, cut, HASH_SPACE)])
        for child_path, child in zip((low, high), children, strict=True):
            state = child.disk()
            opened = open_store(child_path, state.shard_id, state.lo, state.hi, SETTINGS)
            assert opened.position() == child.position()
            assert opened.figures() == child.figures()
            assert opened.read_chunk(b"", bytes_max=1 << 20) == child.read_chunk(b"", bytes_max=1 << 20)
            opened.close()
        merge_stores([low, high], (path, 7, 0, HASH_SPACE), SETTINGS)
        pair.path, pair.model = path, merge_models(children, (7, 0, HASH_SPACE))
        pair.real = open_store(path, 7, 0, HASH_SPACE, SETTINGS)
        pair.synced = pair.wal_bytes()

    def teardown(self) -> None:
        for pair in getattr(self, "pairs", []):
            try:
                pair.compare_reads()
                pair.scrub()
            finally:
                pair.real.close()
        shutil.rmtree(self.directory)

    @invariant()
    def agree(self) -> None:
        for pair in getattr(self, "pairs", []):
            pair.compare()


Stores.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestStores = Stores.TestCase
