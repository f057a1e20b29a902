"""The wire format between masters: PySyncObj's message dictionaries as PeerFrame, and cutting a byte stream.

A frame is a 4-byte big-endian length and a PeerFrame of that many bytes; length 0 is a sign of life. Nothing
here ever unpickles: PySyncObj's one message that would (a log entry cut in parts, `transmission`) has no
frame and is refused. Pure: bytes in, dictionaries out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError

from coordinator.api.v1 import peer_pb2

FRAME_BYTES_MAX = 16 << 20
"""Largest frame from a peer that has said hello; four times what the engine packs into one AppendEntries."""
HELLO_BYTES_MAX = 4 << 10
"""Largest frame from a stranger, so that nobody makes a master hold 16 MiB before it is known."""
PROTOCOL_VERSION = 1

Message = dict[str, Any]
"""A message as PySyncObj sends and takes it: `type` and fields (pysyncobj/syncobj.py, `__onMessageReceived`)."""


class ProtocolViolation(Exception):
    """A peer sent what no sound peer sends; its connection is cut."""


def pack(frame: peer_pb2.PeerFrame) -> bytes:
    """The frame as it goes on the wire. Raises ValueError when it is larger than FRAME_BYTES_MAX."""
    body: bytes = frame.SerializeToString()
    if len(body) > FRAME_BYTES_MAX:
        raise ValueError(f"a frame has at most {FRAME_BYTES_MAX} bytes, this one would have {len(body)}")
    return len(body).to_bytes(4, "big") + body


KEEP_ALIVE = (0).to_bytes(4, "big")
"""A frame of length 0."""


class FrameSplitter:
    """Cuts the bytes of one connection into frames.

    Invariant: holds at most `bytes_max` + 4 bytes plus what one read delivered.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are whole now, without their length. Raises ProtocolViolation on a length above the limit."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= 4:
                length = int.from_bytes(self._buffer[start : start + 4], "big")
                if length > self.bytes_max:
                    raise ProtocolViolation(f"a frame of {length} bytes where at most {self.bytes_max} may come")
                if len(self._buffer) - start - 4 < length:
                    break
                body = bytes(self._buffer[start + 4 : start + 4 + length])
                start += 4 + length
                yield body
        finally:
            del self._buffer[:start]


def parse(body: bytes) -> peer_pb2.PeerFrame:
    """Reads one frame. Raises ProtocolViolation when it is none."""
    try:
        frame: peer_pb2.PeerFrame = peer_pb2.PeerFrame.FromString(body)
    except DecodeError:
        raise ProtocolViolation(f"{len(body)} bytes that are no PeerFrame") from None
    return frame


def to_frame(message: Message) -> peer_pb2.PeerFrame:
    """PySyncObj's message as a frame, with what it says of clocks. Raises ValueError for one that must not travel."""
    frame = _unstamped_frame(message)
    if "clock" in message:
        frame.clock.CopyFrom(message["clock"])
    return frame


def _unstamped_frame(message: Message) -> peer_pb2.PeerFrame:
    match message["type"]:
        case "append_entries" if "transmission" in message:
            raise ValueError("PySyncObj's split entries are pickles, which never travel")
        case "append_entries" if "serialized" in message:
            return peer_pb2.PeerFrame(install_snapshot=_install_snapshot(message))
        case "append_entries":
            entries = [
                peer_pb2.LogEntry(index=index, term=term, command=command)
                for command, index, term in message["entries"]
            ]
            return peer_pb2.PeerFrame(
                append_entries=peer_pb2.AppendEntries(
                    term=message["term"],
                    commit_index=message["commit_index"],
                    previous_log_index=message["prevLogIdx"],
                    previous_log_term=message["prevLogTerm"],
                    entries=entries,
                    sent_at_us=message["sent_at_us"],
                )
            )
        case "next_node_idx":
            return peer_pb2.PeerFrame(next_node_index=_answer(message))
        case "request_vote" | "pre_vote" | "pre_vote_answer" | "response_vote" | "timeout_now":
            return _election_frame(message)
        case "apply_command":
            command = peer_pb2.ApplyCommand(command=message["command"], request_id=message.get("request_id", 0))
            return peer_pb2.PeerFrame(apply_command=command)
        case "apply_command_response":
            return peer_pb2.PeerFrame(
                apply_command_response=peer_pb2.ApplyCommandResponse(
                    request_id=message["request_id"],
                    error=message.get("error"),
                    log_index=message.get("log_idx", 0),
                    log_term=message.get("log_term", 0),
                )
            )
        case other:
            raise ValueError(f"PySyncObj's message {other!r} has no frame")


def _election_frame(message: Message) -> peer_pb2.PeerFrame:
    match message["type"]:
        case "request_vote":
            return peer_pb2.PeerFrame(
                request_vote=peer_pb2.RequestVote(
                    term=message["term"],
                    last_log_index=message["last_log_index"],
                    last_log_term=message["last_log_term"],
                    is_transfer=message["is_transfer"],
                )
            )
        case "pre_vote":
            return peer_pb2.PeerFrame(
                pre_vote=peer_pb2.PreVote(
                    term=message["term"],
                    last_log_index=message["last_log_index"],
                    last_log_term=message["last_log_term"],
                )
            )
        case "pre_vote_answer":
            return peer_pb2.PeerFrame(
                pre_vote_answer=peer_pb2.PreVoteAnswer(
                    term=message["term"], is_granted=message["is_granted"], voter_term=message["voter_term"]
                )
            )
        case "response_vote":
            return peer_pb2.PeerFrame(response_vote=peer_pb2.ResponseVote(term=message["term"]))
        case other:
            assert other == "timeout_now"
            return peer_pb2.PeerFrame(timeout_now=peer_pb2.TimeoutNow(term=message["term"]))


def _answer(message: Message) -> peer_pb2.NextNodeIndex:
    return peer_pb2.NextNodeIndex(
        next_node_index=message["next_node_idx"],
        reset=message["reset"],
        success=message["success"],
        term=message["term"],
        sent_at_us=message["sent_at_us"],
        is_learner=message["is_learner"],
    )


def _install_snapshot(message: Message) -> peer_pb2.InstallSnapshot:
    frame = peer_pb2.InstallSnapshot(
        term=message["term"], commit_index=message["commit_index"], sent_at_us=message["sent_at_us"]
    )
    if message["serialized"]:
        frame.data, frame.is_first, frame.is_last = message["serialized"]
    else:
        frame.is_empty = True
    return frame


def _append_message(append: peer_pb2.AppendEntries) -> Message:
    return {
        "type": "append_entries",
        "term": append.term,
        "commit_index": append.commit_index,
        "prevLogIdx": append.previous_log_index,
        "prevLogTerm": append.previous_log_term,
        "entries": [(entry.command, entry.index, entry.term) for entry in append.entries],
        "sent_at_us": append.sent_at_us,
    }


def _answer_message(answer: peer_pb2.NextNodeIndex) -> Message:
    return {
        "type": "next_node_idx",
        "next_node_idx": answer.next_node_index,
        "reset": answer.reset,
        "success": answer.success,
        "term": answer.term,
        "sent_at_us": answer.sent_at_us,
        "is_learner": answer.is_learner,
    }


def to_message(frame: peer_pb2.PeerFrame) -> Message | None:
    """A frame as PySyncObj's message; None for a sign of life. Raises ProtocolViolation for a second hello.

    What it says of clocks is in `clock`, for consensus.py.
    """
    message = _unstamped_message(frame)
    if message is not None and frame.HasField("clock"):
        message["clock"] = frame.clock
    return message


def _unstamped_message(frame: peer_pb2.PeerFrame) -> Message | None:
    match frame.WhichOneof("message"):
        case None:
            return None
        case "append_entries":
            return _append_message(frame.append_entries)
        case "install_snapshot":
            chunk = frame.install_snapshot
            return {
                "type": "append_entries",
                "term": chunk.term,
                "commit_index": chunk.commit_index,
                "serialized": None if chunk.is_empty else (chunk.data, chunk.is_first, chunk.is_last),
                "sent_at_us": chunk.sent_at_us,
            }
        case "next_node_index":
            return _answer_message(frame.next_node_index)
        case "request_vote" | "pre_vote" | "pre_vote_answer" | "response_vote" | "timeout_now":
            return _election_message(frame)
        case "apply_command":
            command: Message = {"type": "apply_command", "command": frame.apply_command.command}
            if frame.apply_command.request_id:
                command["request_id"] = frame.apply_command.request_id
            return command
        case "apply_command_response":
            response = frame.apply_command_response
            answer_message: Message = {"type": "apply_command_response", "request_id": response.request_id}
            if response.HasField("error"):
                answer_message["error"] = response.error
            else:
                answer_message |= {"log_idx": response.log_index, "log_term": response.log_term}
            return answer_message
        case other:
            raise ProtocolViolation(f"a {other} in the middle of a conversation")


def _election_message(frame: peer_pb2.PeerFrame) -> Message:
    match frame.WhichOneof("message"):
        case "request_vote":
            request = frame.request_vote
            return {
                "type": "request_vote",
                "term": request.term,
                "last_log_index": request.last_log_index,
                "last_log_term": request.last_log_term,
                "is_transfer": request.is_transfer,
            }
        case "pre_vote":
            asked = frame.pre_vote
            return {
                "type": "pre_vote",
                "term": asked.term,
                "last_log_index": asked.last_log_index,
                "last_log_term": asked.last_log_term,
            }
        case "pre_vote_answer":
            told = frame.pre_vote_answer
            return {
                "type": "pre_vote_answer",
                "term": told.term,
                "is_granted": told.is_granted,
                "voter_term": told.voter_term,
            }
        case "response_vote":
            return {"type": "response_vote", "term": frame.response_vote.term}
        case other:
            assert other == "timeout_now"
            return {"type": "timeout_now", "term": frame.timeout_now.term}
