"""What a write to a user's state becomes: conditions, limits, request ids, and what has to wait for what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.api.v1 import replication_pb2, state_pb2
from coordinator.config import StateSettings
from coordinator.model import HASH_SPACE, WallMs
from coordinator.model.errors import InvalidRequest, Refused, VersionConflict
from tests.played_state import Rows
from worker_agent.store import create_store
from worker_agent.store_interface import LogRecord, StateItem
from worker_agent.user_state import (
    MUTATIONS_MAX,
    READ_BYTES_MAX,
    SCAN_ITEMS_MAX,
    Accept,
    Overlay,
    PendingWrite,
    Refuse,
    Repeat,
    SameAs,
    Verdict,
    WaitFor,
    check_read,
    check_scan,
    check_user,
    check_write,
    judge,
    read,
    scan,
)

SETTINGS = StateSettings(user_keys_max=3, user_bytes_max=100, value_bytes_max=50)
ANN = "ann"


def put(key: str, value: bytes = b"x", expected: int | None = None) -> state_pb2.Mutation:
    return state_pb2.Mutation(key=key, put=value, expected_version=expected)


def delete(key: str, expected: int | None = None) -> state_pb2.Mutation:
    return state_pb2.Mutation(key=key, delete=True, expected_version=expected)


def write(*mutations: state_pb2.Mutation, request_id: str = "") -> state_pb2.WriteRequest:
    return state_pb2.WriteRequest(user=ANN, mutations=mutations, request_id=request_id)


class Shard:
    """Rows, and writes that are pending in front of them."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.overlay = Overlay()
        self.log: list[tuple[bytes, PendingWrite]] = []

    def judge(self, request: state_pb2.WriteRequest) -> Verdict:
        return judge(request, self.rows, self.overlay, SETTINGS)

    def submit(self, *mutations: state_pb2.Mutation, request_id: str = "") -> PendingWrite:
        verdict = self.judge(write(*mutations, request_id=request_id))
        assert isinstance(verdict, Accept), verdict
        self.overlay.add(verdict.write)
        self.log.append((verdict.payload, verdict.write))
        return verdict.write

    def apply_all(self) -> None:
        for payload, pending in self.log:
            self.rows.apply(payload)
            self.overlay.drop(pending)
        self.log.clear()


def test_an_accepted_write_becomes_effects_without_conditions() -> None:
    """The record has the rows to put and to remove, and the request id; nothing of the conditions."""
    shard = Shard()
    verdict = shard.judge(write(put("a", b"1", expected=0), delete("b"), put("c", b""), request_id="r1"))
    assert isinstance(verdict, Accept)
    effects = replication_pb2.Effects.FromString(verdict.payload)
    assert (effects.user, effects.request_id) == (ANN, "r1")
    rows = [(effect.key, effect.value if effect.HasField("value") else None) for effect in effects.effects]
    assert rows == [("a", b"1"), ("b", None), ("c", b"")]


@pytest.mark.parametrize(
    ("mutations", "found"),
    [
        ((put("a", expected=1),), None),
        ((put("a", expected=0),), ("a", 1)),
        ((put("a", expected=2),), ("a", 1)),
        ((delete("a", expected=1),), None),
        ((delete("a", expected=7),), ("a", 1)),
        ((put("new", expected=0),), None),
        ((put("new", expected=1),), ("new", 0)),
        ((delete("new", expected=0),), None),
        ((put("a", expected=1), put("new", expected=4)), ("new", 0)),
    ],
)
def test_conditions(mutations: Sequence[state_pb2.Mutation], found: tuple[str, int] | None) -> None:
    """A condition holds for the version of the applied row, 0 for none; a conflict names the key and what it has."""
    shard = Shard()
    shard.submit(put("a"))
    shard.apply_all()
    verdict = shard.judge(write(*mutations))
    if found is None:
        assert isinstance(verdict, Accept)
    else:
        assert isinstance(verdict, Refuse)
        assert isinstance(verdict.error, VersionConflict)
        assert (verdict.error.key, verdict.error.found_version) == found


def test_a_condition_waits_for_pending_writes_of_its_key_only() -> None:
    """While a pending write touches the key its version is not known, so the judgement waits for that write alone."""
    shard = Shard()
    first = shard.submit(put("a"))
    shard.submit(put("b"))
    assert shard.judge(write(put("a", expected=0))) == WaitFor((first,))
    assert isinstance(shard.judge(write(put("c", expected=0))), Accept)
    shard.apply_all()
    assert isinstance(shard.judge(write(put("a", expected=1))), Accept)


def test_a_pending_write_that_fails_leaves_no_trace() -> None:
    """When the pending write is dropped unapplied, the next one is judged as if it had never been."""
    shard = Shard()
    shard.overlay.drop(shard.submit(put("a"), request_id="r1"))
    assert isinstance(shard.judge(write(put("a", expected=0), request_id="r1")), Accept)
    assert shard.overlay.of(ANN) == ()


def test_a_request_id_is_one_request() -> None:
    """A repeat of a pending request is that request; one of an applied request has its version, whatever it says."""
    shard = Shard()
    first = shard.submit(put("a", expected=0), request_id="r1")
    assert shard.judge(write(put("a", expected=0), request_id="r1")) == SameAs(first)
    shard.apply_all()
    assert shard.judge(write(put("a", expected=0), request_id="r1")) == Repeat(1)
    assert isinstance(shard.judge(write(put("a", expected=0), request_id="r2")), Refuse)


@pytest.mark.parametrize(
    ("mutations", "expected"),
    [
        ((put("a"), put("b"), put("c")), None),
        ((put("a"), put("b"), put("c"), put("d")), "would keep 4 keys, and 3 are allowed"),
        ((put("a", b"x" * 49), put("b", b"x" * 49)), None),
        ((put("a", b"x" * 50), put("b", b"x" * 49)), "would keep 101 bytes, and 100 are allowed"),
    ],
)
def test_limits(mutations: Sequence[state_pb2.Mutation], expected: str | None) -> None:
    """A user keeps at most so many keys, and so many bytes of keys and values; a refusal has both figures."""
    verdict = Shard().judge(write(*mutations))
    if expected is None:
        assert isinstance(verdict, Accept)
    else:
        assert isinstance(verdict, Refuse)
        assert isinstance(verdict.error, Refused)
        assert expected in str(verdict.error)


def test_limits_count_pending_writes_and_are_exact() -> None:
    """What might go over waits for the pending writes, and is then judged on exact figures: replacing is not adding."""
    shard = Shard()
    pending = tuple(shard.submit(put(key, b"x" * 30)) for key in "abc")
    assert shard.judge(write(put("d"))) == WaitFor(pending)
    assert shard.judge(write(put("a", b"y" * 30))) == WaitFor(pending)
    shard.apply_all()
    assert isinstance(shard.judge(write(put("a", b"y" * 30))), Accept)
    assert isinstance(shard.judge(write(delete("b"), put("d"))), Accept)
    assert isinstance(shard.judge(write(put("d"))), Refuse)


def test_above_a_limit_a_user_may_still_tidy_up() -> None:
    """When the limits were lowered below what a user keeps, writes that do not grow it pass, others do not."""
    shard = Shard()
    for number in range(4):
        shard.rows.apply(
            replication_pb2.Effects(
                user=ANN, effects=[replication_pb2.Effect(key=f"k{number}", value=b"x" * 30)]
            ).SerializeToString()
        )
    assert isinstance(shard.judge(write(delete("k0"))), Accept)
    assert isinstance(shard.judge(write(put("k0", b"y" * 30))), Accept)
    assert isinstance(shard.judge(write(put("k0", b"y" * 31))), Refuse)


LONG = "é" * 257


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (write(), f"1 to {MUTATIONS_MAX} mutations, this one has 0"),
        (write(*(put(f"k{n}") for n in range(MUTATIONS_MAX + 1))), "this one has 1001"),
        (write(put("")), "a key has 1 to 512 bytes of UTF-8, this one has 0"),
        (write(put(LONG)), "a key has 1 to 512 bytes of UTF-8, this one has 514"),
        (write(put("a"), delete("a")), "key 'a' stands twice"),
        (write(state_pb2.Mutation(key="a")), "neither put nor delete"),
        (write(state_pb2.Mutation(key="a", delete=False)), "neither put nor delete"),
        (write(put("a", b"x" * 51)), "has 51 bytes, and 50 are allowed"),
        (write(put("a"), request_id="r" * 129), "a request id has at most 128 bytes"),
        (state_pb2.WriteRequest(user="", mutations=[put("a")]), "a user has 1 to 512 bytes of UTF-8, this one has 0"),
    ],
)
def test_what_can_never_be_right_is_refused(request_: state_pb2.WriteRequest, expected: str) -> None:
    """A faulty write is InvalidRequest, with what is wrong and what is allowed."""
    with pytest.raises(InvalidRequest, match=expected):
        check_write(request_, SETTINGS)


def test_a_write_of_many_large_values_is_refused_whole() -> None:
    """What no message can carry to the replicas is refused before it is judged."""
    large = [put(f"k{number}", b"x" * (1 << 20)) for number in range(9)]
    with pytest.raises(InvalidRequest, match="at most 8388608 bytes"):
        check_write(write(*large), StateSettings())


def test_reads_and_scans_are_checked_too() -> None:
    """So are faulty reads and scans; names of 512 bytes are the longest."""
    check_user("é" * 256)
    with pytest.raises(InvalidRequest, match="this one has 514"):
        check_user(LONG)
    with pytest.raises(InvalidRequest, match="1 to 1000 keys, this one has 0"):
        check_read(state_pb2.ReadRequest(user=ANN))
    with pytest.raises(InvalidRequest, match="at most 1000 items"):
        check_scan(state_pb2.ScanRequest(user=ANN, limit=SCAN_ITEMS_MAX + 1))
    with pytest.raises(InvalidRequest, match="a prefix has"):
        check_scan(state_pb2.ScanRequest(user=ANN, prefix=LONG))


def fill(rows: Rows, values: dict[str, bytes]) -> None:
    effects = [replication_pb2.Effect(key=key, value=value) for key, value in values.items()]
    rows.apply(replication_pb2.Effects(user=ANN, effects=effects).SerializeToString())


def pages(rows: Rows, **fields: object) -> list[list[str]]:
    found, from_key = [], ""
    while True:
        request = state_pb2.ScanRequest(user=ANN, from_key=from_key, **fields)  # type: ignore[arg-type]
        page = scan(request, rows)
        found.append([item.key for item in page.items])
        from_key = page.next_key
        if not from_key:
            return found


def test_scans_page_in_the_order_of_the_bytes() -> None:
    """Pages follow each other without gap or overlap, within the prefix, and the last one says that it is."""
    rows = Rows()
    fill(rows, dict.fromkeys(("b2", "a", "b", "b1", "c", "bé", "😀", "\uffff"), b"v"))
    assert pages(rows, limit=3) == [["a", "b", "b1"], ["b2", "bé", "c"], ["￿", "\U0001f600"]]
    assert pages(rows, limit=2, prefix="b") == [["b", "b1"], ["b2", "bé"]]
    assert pages(rows, limit=8) == [["a", "b", "b1", "b2", "bé", "c", "￿", "\U0001f600"]]
    assert pages(rows, prefix="x") == [[]]


def test_large_values_make_short_pages_and_long_reads_are_refused() -> None:
    """A page ends where an answer is full, however few items it has; a read that is too much says so."""
    rows = Rows()
    keys = [f"k{number:02}" for number in range(12)]
    fill(rows, dict.fromkeys(keys, b"x" * (READ_BYTES_MAX // 3)))
    assert [len(page) for page in pages(rows)] == [3, 3, 3, 3]
    assert [key for page in pages(rows) for key in page] == keys
    for asked in (keys, keys[:4]):
        with pytest.raises(InvalidRequest, match="read fewer keys at once"):
            read(state_pb2.ReadRequest(user=ANN, keys=asked), rows)
    assert [item.key for item in read(state_pb2.ReadRequest(user=ANN, keys=keys[:3]), rows).items] == keys[:3]


def test_a_page_of_large_values_is_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read in several steps, and yet nothing that is applied between them shows; the next page shows it."""
    store = create_store(tmp_path / "1.sqlite", 1, 0, HASH_SPACE)

    def put(*numbers: int) -> None:
        effects = [replication_pb2.Effect(key=f"k{one:02}", value=b"x" * (READ_BYTES_MAX // 10)) for one in numbers]
        record = replication_pb2.Effects(user=ANN, effects=effects)
        sequence = store.position().last + 1
        store.append([LogRecord(sequence, 1, WallMs(0), record.SerializeToString())])
        store.apply(sequence, keeps_tombstones=False)

    put(*range(12))
    reader = store.reader()
    read_step, steps = reader.scan, 0

    def racing(user: str, from_key: str, prefix: str, limit: int) -> list[StateItem]:
        nonlocal steps
        found, steps = read_step(user, from_key, prefix, limit), steps + 1
        put(*range(12))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(reader, "scan", racing)
        page = scan(state_pb2.ScanRequest(user=ANN, limit=100), reader)
    assert steps > 1
    assert len(page.items) == 10
    assert {item.version for item in page.items} == {1}
    rest = scan(state_pb2.ScanRequest(user=ANN, from_key=page.next_key), reader)
    assert [item.version for item in rest.items] == [1 + steps] * 2
    store.close()
