"""Users' state against a plain dict: whatever is pending, in whatever order it is applied or fails, the rules hold."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.v1 import state_pb2
from coordinator.config import StateSettings
from coordinator.model.errors import CoordinatorError, Refused, VersionConflict
from tests.played_state import Rows
from worker_agent.user_state import (
    Accept,
    Overlay,
    PendingWrite,
    Refuse,
    Repeat,
    SameAs,
    Verdict,
    WaitFor,
    check_write,
    item_bytes,
    judge,
    scan,
)

SETTINGS = StateSettings(user_keys_max=3, user_bytes_max=12, value_bytes_max=6)
USERS = ("ann", "bob")
KEYS = ("a", "b", "é", "bb", "c")


@dataclass(frozen=True, slots=True)
class Step:
    """A write that comes in, or what becomes of the oldest pending writes first."""

    request: state_pb2.WriteRequest
    applied_first: int
    fails_all: bool


@st.composite
def requests(draw: st.DrawFn) -> state_pb2.WriteRequest:
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True))
    request = state_pb2.WriteRequest(user=draw(st.sampled_from(USERS)))
    for key in keys:
        mutation = request.mutations.add(key=key)
        if draw(st.booleans()):
            mutation.put = b"x" * draw(st.integers(0, 5))
        else:
            mutation.delete = True
        expected = draw(st.one_of(st.none(), st.integers(0, 12)))
        if expected is not None:
            mutation.expected_version = expected
    request.request_id = draw(st.sampled_from(("", "", "r1", "r2", "r3")))
    return request


STEPS = st.lists(st.builds(Step, requests(), st.integers(0, 3), st.sampled_from([False] * 9 + [True])), max_size=40)


class Model:
    """The rules, on a dict, one write after the other."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, tuple[bytes, int]]] = {user: {} for user in USERS}
        self.requests: dict[tuple[str, str], int] = {}
        self.version = 0

    def write(self, request: state_pb2.WriteRequest) -> int | type[CoordinatorError]:
        """Version of a write, or what it is refused with."""
        rows = self.rows[request.user]
        if request.request_id and (request.user, request.request_id) in self.requests:
            return self.requests[request.user, request.request_id]
        for mutation in request.mutations:
            found = rows.get(mutation.key, (b"", 0))[1]
            if mutation.HasField("expected_version") and mutation.expected_version != found:
                return VersionConflict
        after = dict(rows)
        for mutation in request.mutations:
            if mutation.HasField("put"):
                after[mutation.key] = (mutation.put, self.version + 1)
            else:
                after.pop(mutation.key, None)
        if len(after) > max(3, len(rows)) or _bytes(after) > max(12, _bytes(rows)):
            return Refused
        self.version += 1
        self.rows[request.user] = after
        if request.request_id:
            self.requests[request.user, request.request_id] = self.version
        return self.version


def _bytes(rows: dict[str, tuple[bytes, int]]) -> int:
    return sum(item_bytes(key, value) for key, (value, _) in rows.items())


class Primary:
    """What a primary does: judges, keeps what is pending, and waits for it where it must."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.overlay = Overlay()
        self.log: list[tuple[PendingWrite, bytes, state_pb2.WriteRequest]] = []
        self.model = Model()

    def apply(self, count: int) -> None:
        """The oldest pending writes are applied; the model follows in that order."""
        for write, payload, request in self.log[:count]:
            version = self.rows.apply(payload)
            # What was accepted against pending writes is still right once its turn has come.
            assert self.model.write(request) == version
            self.overlay.drop(write)
        del self.log[:count]

    def fail(self) -> None:
        """The shard stops serving, and nothing that was pending is ever applied."""
        for write, _, _ in self.log:
            self.overlay.drop(write)
        self.log.clear()

    def take(self, request: state_pb2.WriteRequest) -> None:
        verdict = self._judge(request)
        while isinstance(verdict, WaitFor | SameAs):
            waits_for = verdict.writes if isinstance(verdict, WaitFor) else (verdict.write,)
            assert {write.user for write in waits_for} == {request.user}
            self.apply(1 + max(index for index, (write, _, _) in enumerate(self.log) if write in waits_for))
            verdict = self._judge(request)
        match verdict:
            case Accept(payload, write):
                self.overlay.add(write)
                self.log.append((write, payload, request))
            case Repeat(version):
                assert self.model.write(request) == version
            case Refuse(error):
                # It tells of applied rows, so it must be right for them as they are, whatever else is pending.
                assert self.model.write(request) is type(error)

    def _judge(self, request: state_pb2.WriteRequest) -> Verdict:
        return judge(request, self.rows, self.overlay, SETTINGS)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_judging_over_pending_writes_equals_a_dict(steps: list[Step]) -> None:
    """Random writes, judged while others are pending, applied late or never, leave what a dict would have."""
    primary = Primary()
    for step in steps:
        primary.apply(step.applied_first)
        if step.fails_all:
            primary.fail()
        check_write(step.request, SETTINGS)
        primary.take(step.request)
    primary.apply(len(primary.log))
    for user in USERS:
        stored = {item.key: (item.value, item.version) for item in primary.rows.get(user, KEYS)}
        assert stored == primary.model.rows[user]
        assert primary.overlay.of(user) == ()


@settings(max_examples=100, deadline=None)
@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4), max_size=20), st.data())
def test_pages_are_the_sorted_keys(keys: set[str], data: st.DataObject) -> None:
    """Pages of any size, from any key and with any prefix, joined, are the keys in the order of their bytes."""
    rows = Rows()
    effects = state_pb2.WriteRequest(user="ann", mutations=[state_pb2.Mutation(key=key, put=b"v") for key in keys])
    if keys:
        verdict = judge(effects, rows, Overlay(), StateSettings())
        assert isinstance(verdict, Accept)
        rows.apply(verdict.payload)
    first = from_key = data.draw(st.sampled_from(["", *sorted(keys)]))
    prefix = data.draw(st.sampled_from(["", "a", *sorted(key[:1] for key in keys)]))
    limit = data.draw(st.integers(1, 5))
    found: list[str] = []
    while True:
        page = scan(state_pb2.ScanRequest(user="ann", from_key=from_key, prefix=prefix, limit=limit), rows)
        assert len(page.items) <= limit
        found += [item.key for item in page.items]
        from_key = page.next_key
        if not from_key:
            break
    expected = [key for key in keys if key.encode() >= first.encode() and key.startswith(prefix)]
    assert found == sorted(expected, key=str.encode)
