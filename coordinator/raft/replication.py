"""The leader's side of replication: what each follower is sent, and what its answers show. Passive, as consensus.py is.

At most APPENDS_IN_FLIGHT_MAX unanswered appends per follower, so commands gather meanwhile; the heartbeat goes
regardless. Nothing but heartbeats to a follower whose connection is congested.
"""

from __future__ import annotations

from pysyncobj.node import Node

from coordinator.config import RaftSettings
from coordinator.raft.engine import Links, SyncEngine, now_s
from coordinator.raft.frames import Message
from coordinator.raft.journal import Journal
from coordinator.raft.snapshot import SnapshotStore

APPEND_BYTES = 1 << 20
"""Bytes of commands in one AppendEntries, the last one excepted: with the largest command it fits a frame."""
APPEND_ENTRIES_MAX = 4096
APPENDS_IN_FLIGHT_MAX = 2


class Replication:
    """What one leader knows of its followers."""

    def __init__(
        self, engine: SyncEngine, journal: Journal, snapshots: SnapshotStore, transport: Links, settings: RaftSettings
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._snapshots = snapshots
        self._transport = transport
        self._settings = settings
        self._others = [transport.nodes[id] for id in sorted(transport.nodes)]
        self._in_flight: dict[Node, int] = {}
        self._commit_told: dict[Node, int] = {}
        self._learners: dict[Node, int] = {}
        """Followers whose latest answer did not count, and how far their log is known to be this leader's."""
        self._has_answered: set[Node] = set()
        """Followers that have answered over the present connection, in this leader's time."""

    # What answers show

    def answered(self, node: Node, message: Message, *, counts: bool) -> None:
        """A follower has answered in this term; `counts` when its disk speaks for it (voters.py)."""
        self._in_flight[node] = max(0, self._in_flight.get(node, 0) - 1)
        self._has_answered.add(node)
        if counts:
            self._learners.pop(node, None)
        else:
            known = max(self._learners.get(node, 0), message["next_node_idx"] - 1 if message["success"] else 0)
            self._learners[node] = known

    def match_index(self, node: Node) -> int:
        """Index up to which a follower's log is known to be this leader's."""
        return self._learners.get(node, self._engine.match_index(node))

    def standing(self, id: str) -> tuple[bool, int] | None:
        """Whether a follower's latest answer counted, and up to which index its log is the leader's.

        None before it has answered over the present connection: what an earlier one showed may be of another disk.
        """
        node = self._transport.nodes[id]
        return (node not in self._learners, self.match_index(node)) if node in self._has_answered else None

    def clear(self) -> None:
        """This master does not lead (any more)."""
        self._learners.clear()
        self._has_answered.clear()
        # What a deposed leader sent is answered with a later term, which counts for nothing, or not at all.
        self._in_flight.clear()
        self._commit_told.clear()

    def connection_changed(self, node: Node) -> None:
        """A peer came or went: what was on the way is lost."""
        self._learners.pop(node, None)
        self._has_answered.discard(node)
        self._in_flight.pop(node, None)
        self._commit_told.pop(node, None)
        self._snapshots.cancelTransmisstion(node)
        if matched := self._engine.match_index(node):
            self._engine.set_next_index(node, matched + 1)

    # What followers are sent

    def send_due(self, *, is_heartbeat: bool) -> None:
        """Sends each follower what it lacks, and news of the commit index; a heartbeat goes in any case."""
        if is_heartbeat:
            self._engine.heartbeat_after(self._settings.append_period_s)
        last_index, commit_index = int(self._journal[-1][1]), self._engine.raftCommitIndex
        for node in self._others:
            if not self._engine.isNodeConnected(node):
                continue
            next_index = min(self._engine.next_index(node), last_index + 1)
            lacks = next_index <= last_index or self._commit_told.get(node, 0) < commit_index
            has_room = self._in_flight.get(node, 0) < APPENDS_IN_FLIGHT_MAX
            if not is_heartbeat and not (lacks and has_room):
                continue
            if next_index <= self._journal[0][1]:
                self._send_snapshot(node)
            else:
                self._send_append(node, next_index)

    def _head(self) -> Message:
        return {
            "type": "append_entries",
            "term": self._engine.raftCurrentTerm,
            "commit_index": self._engine.raftCommitIndex,
            "sent_at_us": round(now_s() * 1e6),
        }

    def _send_append(self, node: Node, next_index: int) -> None:
        entries = []
        if not self._transport.is_congested(node):
            entries = self._engine.entries_from(next_index, APPEND_ENTRIES_MAX, APPEND_BYTES)
        self._engine.set_next_index(node, next_index + len(entries))
        self._commit_told[node] = self._engine.raftCommitIndex
        self._in_flight[node] = self._in_flight.get(node, 0) + 1
        before = {"prevLogIdx": next_index - 1, "prevLogTerm": self._journal.term_at(next_index - 1)}
        self._transport.send(node, self._head() | before | {"entries": entries})

    def _send_snapshot(self, node: Node) -> None:
        """Sends chunks until the connection has enough; a heartbeat goes also when there is no chunk."""
        head = self._head()
        while True:
            chunk = self._snapshots.getTransmissionData(node)
            if not self._transport.send(node, head | {"serialized": chunk}) or chunk is None:
                return
            if chunk[2]:
                self._engine.set_next_index(node, self._journal[1][1] + 1)
                return
