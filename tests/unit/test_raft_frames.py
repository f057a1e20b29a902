"""The wire format between masters."""

from __future__ import annotations

import random

import pytest

from coordinator.api.v1 import peer_pb2
from coordinator.raft.frames import (
    FRAME_BYTES_MAX,
    KEEP_ALIVE,
    FrameSplitter,
    Message,
    ProtocolViolation,
    pack,
    parse,
    to_frame,
    to_message,
)

SENT = {"sent_at_us": 9}
MESSAGES: list[Message] = [
    {
        "type": "append_entries",
        "sent_at_us": 9,
        "term": 3,
        "commit_index": 7,
        "prevLogIdx": 8,
        "prevLogTerm": 2,
        "entries": [(b"\x00abc", 9, 3), (b"\x01", 10, 3)],
    },
    {"type": "append_entries", "term": 3, "commit_index": 7, "prevLogIdx": 8, "prevLogTerm": 2, "entries": []} | SENT,
    {"type": "append_entries", "term": 3, "commit_index": 7, "serialized": (b"chunk", True, False)} | SENT,
    {"type": "append_entries", "term": 3, "commit_index": 7, "serialized": (b"", False, True)} | SENT,
    {"type": "append_entries", "term": 3, "commit_index": 7, "serialized": None} | SENT,
    {"type": "next_node_idx", "next_node_idx": 11, "reset": False, "success": True, "term": 3, "is_learner": True}
    | SENT,
    {"type": "next_node_idx", "next_node_idx": 5, "reset": True, "success": False, "term": 4, "is_learner": False}
    | SENT,
    {"type": "request_vote", "term": 4, "last_log_index": 10, "last_log_term": 3, "is_transfer": True},
    {"type": "pre_vote", "term": 4, "last_log_index": 10, "last_log_term": 3},
    {"type": "pre_vote_answer", "term": 4, "is_granted": True, "voter_term": 3},
    {"type": "response_vote", "term": 4},
    {"type": "apply_command", "command": b"\x00payload", "request_id": 12},
    {"type": "apply_command", "command": b"\x00payload"},
    {"type": "apply_command_response", "request_id": 12, "log_idx": 10, "log_term": 3},
    {"type": "apply_command_response", "request_id": 12, "error": 4},
    {"type": "timeout_now", "term": 4},
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: str(message["type"]))
def test_message_survives_the_wire(message: Message) -> None:
    """Each of PySyncObj's messages comes out as it went in."""
    assert to_message(parse(pack(to_frame(message))[4:])) == message


def test_pickled_parts_do_not_travel() -> None:
    """The message whose receiver would unpickle bytes has no frame."""
    message = MESSAGES[0] | {"transmission": "start", "data": b""}
    with pytest.raises(ValueError, match="pickles"):
        to_frame(message)


def test_unknown_message_does_not_travel() -> None:
    """A message type that PySyncObj may grow is refused rather than guessed at."""
    with pytest.raises(ValueError, match="surprise"):
        to_frame({"type": "surprise"})


def test_splitter_does_not_care_how_bytes_arrive() -> None:
    """Frames come out whole and in order, however the stream is cut."""
    stream = b"".join(pack(to_frame(message)) for message in MESSAGES) + KEEP_ALIVE
    rng = random.Random(7)
    for _ in range(50):
        splitter = FrameSplitter(FRAME_BYTES_MAX)
        bodies: list[bytes] = []
        position = 0
        while position < len(stream):
            size = rng.randint(1, 40)
            bodies += splitter.feed(stream[position : position + size])
            position += size
        assert [to_message(parse(body)) for body in bodies] == [*MESSAGES, None]


def test_splitter_refuses_a_length_above_the_limit() -> None:
    """A peer cannot make a master wait for more bytes than a frame may have."""
    with pytest.raises(ProtocolViolation, match="at most 100"):
        list(FrameSplitter(100).feed((101).to_bytes(4, "big")))


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"\x0a\x80", b"GET / HTTP/1.1\r\n"])
def test_rubbish_is_no_frame(body: bytes) -> None:
    """Bytes that are no PeerFrame are a violation, never another exception."""
    with pytest.raises(ProtocolViolation):
        parse(body)


def test_second_hello_is_a_violation() -> None:
    """A hello has no meaning once a conversation is under way."""
    with pytest.raises(ProtocolViolation, match="hello"):
        to_message(peer_pb2.PeerFrame(hello=peer_pb2.PeerHello()))
