"""What an append may do to a follower's log.

A follower never cuts entries that do not contradict the leader (journal.py), so behind what an append covered there may
be entries that the leader does not have. Therefore the commit index of a message is lowered to what that message
covers, and a message that begins below the follower's own commit index is lifted up to it: committed entries are the
leader's too.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.model.errors import Damaged
from coordinator.raft.entry import NO_OP
from coordinator.raft.frames import Message, ProtocolViolation
from coordinator.raft.journal import Journal


def adjust_append(
    message: Message, journal: Journal, commit_index: int, is_command: Callable[[bytes], bool], leader_id: str
) -> None:
    """Changes a leader's append to what this follower may take in.

    Raises ProtocolViolation for one that no sound leader sends, Damaged when the leader lacks what was committed.
    """
    previous, entries = message["prevLogIdx"], message["entries"]
    for offset, (command, index, term) in enumerate(entries):
        if term > message["term"]:
            raise ProtocolViolation(f"entry {index} of term {term} from a leader of term {message['term']}")
        if index != previous + 1 + offset:
            raise ProtocolViolation(f"entry {index} where {previous + 1 + offset} must stand")
        if command != NO_OP and not is_command(command):
            raise ProtocolViolation(f"entry {index} of an unknown type or size")
    if previous < commit_index:
        for _, index, term in entries:
            own = journal.term_at(index) if index <= commit_index else None
            if own is not None and own != term:
                raise Damaged(
                    f"leader {leader_id} has entry {index} of term {term}, this master committed it in term {own}: "
                    "one of them lost its disk; move the data directory of the one that did away, and run `clusterctl "
                    "masters replace` for it"
                )
        message["entries"] = entries = [entry for entry in entries if entry[1] > commit_index]
        message["prevLogIdx"] = previous = commit_index
        message["prevLogTerm"] = journal.term_at(commit_index)
    message["commit_index"] = min(message["commit_index"], previous + len(entries))
