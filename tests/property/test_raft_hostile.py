"""What a hostile or broken peer sends: only ProtocolViolation or Damaged comes out, and what was applied stays.

The bytes go through FrameSplitter, parse and to_message into the Consensus of a real master, as link.py hands them on:
random ones, frames of random fields, and valid frames with bytes changed. A peer that has said a right hello is trusted
not to lie (mutual TLS says who it is); it is not trusted to be sound.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pysyncobj import FAIL_REASON

from coordinator.api.v1 import peer_pb2
from coordinator.machine.machine import apply_bytes
from coordinator.machine.state import State
from coordinator.model import WallMs
from coordinator.model.errors import Damaged
from coordinator.raft.entry import stamp
from coordinator.raft.frames import (
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    FrameSplitter,
    Message,
    ProtocolViolation,
    pack,
    parse,
    to_message,
)
from tests.raft_machine import applied, command
from tests.raft_network import network

SETTINGS = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LARGE = (2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
numbers = st.one_of(st.integers(0, 30), st.sampled_from(LARGE), st.integers(0, 2**64 - 1))
commands = st.one_of(
    st.binary(max_size=40),
    st.just(b"\x01"),
    st.text("abc", max_size=5).map(lambda text: stamp(command(text).SerializeToString(), WallMs(7))),
)
runs = st.tuples(st.integers(0, 12), st.lists(st.tuples(numbers, commands), max_size=4)).map(
    lambda run: [
        peer_pb2.LogEntry(index=run[0] + number, term=term, command=content)
        for number, (term, content) in enumerate(run[1], 1)
    ]
)
loose = st.lists(st.builds(peer_pb2.LogEntry, index=numbers, term=numbers, command=commands), max_size=3)


def _append(values: tuple[list[peer_pb2.LogEntry], int, int, int, int, int]) -> peer_pb2.AppendEntries:
    entries, term, commit, index, previous_term, sent = values
    previous = entries[0].index - 1 if entries and entries[0].index else index
    return peer_pb2.AppendEntries(
        term=term, commit_index=commit, previous_log_index=previous, previous_log_term=previous_term,
        entries=entries, sent_at_us=sent,
    )  # fmt: skip


MESSAGES: dict[str, SearchStrategy[Any]] = {
    "append_entries": st.tuples(st.one_of(runs, loose), numbers, numbers, numbers, numbers, numbers).map(_append),
    "next_node_index": st.builds(
        peer_pb2.NextNodeIndex, next_node_index=numbers, reset=st.booleans(), success=st.booleans(), term=numbers,
        sent_at_us=numbers,
    ),
    "request_vote": st.builds(
        peer_pb2.RequestVote, term=numbers, last_log_index=numbers, last_log_term=numbers, is_transfer=st.booleans()
    ),
    "response_vote": st.builds(peer_pb2.ResponseVote, term=numbers),
    "pre_vote": st.builds(peer_pb2.PreVote, term=numbers, last_log_index=numbers, last_log_term=numbers),
    "pre_vote_answer": st.builds(
        peer_pb2.PreVoteAnswer, term=numbers, is_granted=st.booleans(), voter_term=numbers
    ),
    "apply_command": st.builds(peer_pb2.ApplyCommand, command=commands, request_id=numbers),
    "apply_command_response": st.builds(
        peer_pb2.ApplyCommandResponse, request_id=numbers, error=st.one_of(st.none(), st.integers(0, 20)),
        log_index=numbers, log_term=numbers,
    ),
    "timeout_now": st.builds(peer_pb2.TimeoutNow, term=numbers),
    "install_snapshot": st.builds(
        peer_pb2.InstallSnapshot, term=numbers, commit_index=numbers, data=st.binary(max_size=60),
        is_first=st.booleans(), is_last=st.booleans(), is_empty=st.booleans(), sent_at_us=numbers,
    ),
}  # fmt: skip


signed = st.one_of(st.integers(-2**63, 2**63 - 1), st.sampled_from((0, 2**63 - 1, -(2**63))))
# Virtual time begins at 1,000 s, so some of these are echoes that may be believed.
echoes = st.one_of(numbers, st.integers(1_000_000_000, 1_002_000_000))
readings = st.builds(
    peer_pb2.ClockReading, wall_unix_ms=signed, sent_at_us=numbers, echo_us=echoes, held_us=numbers,
    others=st.lists(
        st.builds(
            peer_pb2.OtherClock, id=st.sampled_from(("m1", "m2", "m3", "x", "")), offset_us=signed,
            uncertainty_us=numbers, age_us=numbers,
        ),
        max_size=4,
    ),
)  # fmt: skip


def _framed(kind: str, messages: SearchStrategy[Any]) -> SearchStrategy[peer_pb2.PeerFrame]:
    def frame(message: Any, reading: peer_pb2.ClockReading | None) -> peer_pb2.PeerFrame:
        made = peer_pb2.PeerFrame(clock=reading)
        getattr(made, kind).CopyFrom(message)
        return made

    return st.builds(frame, messages, st.none() | readings)


frames = st.one_of(*(_framed(kind, messages) for kind, messages in MESSAGES.items()))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound frame's body with some bytes changed, removed or put in."""
    body = bytearray(draw(frames).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(body)))
        match draw(st.sampled_from(("change", "remove", "insert"))):
            case "change" if place < len(body):
                body[place] = draw(st.integers(0, 255))
            case "remove":
                del body[place : place + draw(st.integers(1, 3))]
            case _:
                body[place:place] = draw(st.binary(min_size=1, max_size=3))
    return bytes(body)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Path]]:
    """Fresh directories, on a disk that does not sync: these tests cut no power."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setattr("coordinator.raft.journal._fdatasync", lambda descriptor: None)
    base = tmp_path_factory.mktemp("masters")
    numbered = (base / str(number) for number in itertools.count())

    def made() -> Iterator[Path]:
        for directory in numbered:
            directory.mkdir()
            yield directory

    yield made()
    patch.undo()


@SETTINGS
@given(bodies=st.lists(st.one_of(frames.map(peer_pb2.PeerFrame.SerializeToString), mutated()), min_size=1, max_size=6),
       at_leader=st.booleans())  # fmt: skip
def test_a_master_survives_any_frames(directories: Iterator[Path], bodies: list[bytes], at_leader: bool) -> None:
    """At a leader and at a follower, between turns: violations and damage are told, what was applied stays applied."""
    with network(next(directories)) as net:
        leader = net.elect()
        for number in range(3):
            net.commit(leader, f"c{number}")
        target = leader if at_leader else next(id for id in net.ids if id != leader)
        sender = next(id for id in net.ids if id not in (target, leader)) if at_leader else leader
        waiting = net.propose(target, "waiting")
        before = applied(net.masters[target].state)
        for body in bodies:
            try:
                message = to_message(parse(body))
                if message is not None:
                    net.links[target]._onMessageReceived(net.links[target].nodes[sender], message)
                for _ in range(3):
                    net.turn()
            except (ProtocolViolation, Damaged):
                break
        else:
            # Long enough for elections in whatever term the master believes in now.
            with contextlib.suppress(ProtocolViolation, Damaged):
                for _ in range(150):
                    net.turn()
        assert applied(net.masters[target].state)[: len(before)] == before
        assert all(reason in range(FAIL_REASON.UNKNOWN_OUTCOME + 1) for _, reason in waiting)


def message_of(frame: peer_pb2.PeerFrame) -> Message:
    """The frame as it arrives."""
    message = to_message(frame)
    assert message is not None
    return message


@pytest.mark.parametrize("kind", ["append_entries", "request_vote", "next_node_index", "pre_vote_answer"])
def test_a_term_that_would_end_all_elections_is_refused(directories: Iterator[Path], kind: str) -> None:
    """A term is for ever: the highest one of 64 bits, taken over, would leave no next one to be elected in."""
    frame = peer_pb2.PeerFrame()
    field = "voter_term" if kind == "pre_vote_answer" else "term"
    setattr(getattr(frame, kind), field, 2**64 - 1)
    with network(next(directories)) as net:
        master = net.masters[net.elect()]
        sender = next(iter(net.links[net.elect()].nodes.values()))
        with pytest.raises(ProtocolViolation, match="no number of elections"):
            master.receive(sender, message_of(frame))


def test_an_answer_from_the_future_does_not_lengthen_the_lease(directories: Iterator[Path]) -> None:
    """The lease counts from what the leader sent; what it has not sent yet cannot have been answered."""
    with network(next(directories)) as net:
        leader = net.elect()
        master = net.masters[leader]
        answer = peer_pb2.NextNodeIndex(next_node_index=1, term=master.term, sent_at_us=2**62)
        for node in net.links[leader].nodes.values():
            with pytest.raises(ProtocolViolation, match="not sent yet"):
                master.receive(node, message_of(peer_pb2.PeerFrame(next_node_index=answer)))
        for other in net.links[leader].nodes:
            net.cut(leader, other)
        for _ in range(40):
            net.turn()
        assert not master.has_lease


def test_an_entry_of_a_later_term_than_its_leader_is_refused(directories: Iterator[Path]) -> None:
    """No leader has an entry of a term that is still to come; taken in, it would be the most complete log of all."""
    with network(next(directories)) as net:
        leader = net.elect()
        follower = next(id for id in net.ids if id != leader)
        index, term = net.masters[leader].applied_index, net.masters[leader].term
        entry = peer_pb2.LogEntry(index=index + 1, term=term + 1, command=b"\x01")
        append = peer_pb2.AppendEntries(
            term=term, previous_log_index=index, previous_log_term=term, commit_index=index, entries=[entry]
        )
        with pytest.raises(ProtocolViolation, match="from a leader of term"):
            net.masters[follower].receive(
                net.links[follower].nodes[leader], message_of(peer_pb2.PeerFrame(append_entries=append))
            )


@SETTINGS
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(1, 50), max_size=8))
def test_random_bytes_are_cut_into_frames_or_refused(data: bytes, cuts: list[int]) -> None:
    """However the bytes are delivered, what comes out is the same, and nothing but a violation is raised."""

    def outcome(parts: list[bytes]) -> list[object]:
        splitter, found = FrameSplitter(64), list[object]()
        try:
            for part in parts:
                for body in splitter.feed(part):
                    found.append(body)
                    parse(body)
        except ProtocolViolation as violation:
            found.append(str(violation))
        return found

    places = [0, *itertools.accumulate(cuts)]
    parts = [data[start:end] for start, end in itertools.pairwise([*places, max(len(data), places[-1])])]
    assert outcome(parts) == outcome([data])


@SETTINGS
@given(body=st.one_of(mutated(), st.binary(max_size=200)))
def test_any_body_is_a_message_or_a_violation(body: bytes) -> None:
    """parse and to_message raise nothing else, also for fields that do not belong together."""
    try:
        message = to_message(parse(body))
    except ProtocolViolation:
        return
    assert message is None or message["type"]


@SETTINGS
@given(payload=st.binary(max_size=120), time_ms=st.integers(0, 2**63 - 1))
def test_the_machine_takes_any_payload(payload: bytes, time_ms: int) -> None:
    """What a peer forwarded as a command may be anything: it is refused, deterministically, and changes nothing."""
    state = State()
    transition = apply_bytes(state, payload, 5, WallMs(time_ms))
    assert transition == apply_bytes(state, payload, 5, WallMs(time_ms))
    assume(transition.result.HasField("refusal"))
    assert transition.state.nodes == state.nodes


def test_what_a_stranger_makes_a_master_hold_is_bounded() -> None:
    """A megabyte for which no length was promised, in small pieces, never makes the splitter hold more than a hello."""
    splitter = FrameSplitter(HELLO_BYTES_MAX)
    tracemalloc.start()
    try:
        promised = (HELLO_BYTES_MAX).to_bytes(4, "big")
        for _ in range(256):
            assert list(splitter.feed(promised + b"x" * (HELLO_BYTES_MAX - 1))) == []
            assert list(splitter.feed(b"x")) == [b"x" * HELLO_BYTES_MAX]
        assert tracemalloc.get_traced_memory()[0] < 64 << 10
    finally:
        tracemalloc.stop()
    with pytest.raises(ProtocolViolation, match="4097 bytes where at most 4096"):
        list(splitter.feed((HELLO_BYTES_MAX + 1).to_bytes(4, "big")))
    with pytest.raises(ValueError, match="at most"):
        pack(peer_pb2.PeerFrame(apply_command=peer_pb2.ApplyCommand(command=bytes(FRAME_BYTES_MAX))))
