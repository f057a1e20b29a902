"""PySyncObj 0.3.17 as the Raft engine: the only file that knows its private names.

PySyncObj keeps what is well tested in it: elections, terms, votes, counting acknowledgements, committing,
calling back. Taken from it is what is unsafe or slow, through a subclass (its double-underscore methods are
found under their mangled names) and three attributes (journal, serializer, poller). DESIGN.md section 4.

A log entry is one byte of type, then for type 0 (a command) 8 bytes of unix milliseconds, big-endian, and a
serialized Command. Type 1 is the entry that a new leader appends; the other types of PySyncObj are pickles,
and are refused.

Order rules:

1. Time is stamped by the master that appends: `_applyCommand` is the one way into the log, also for what a
   follower forwarded, so the leader stamps over the follower's stamp.
2. Nothing unpickles: `__doApplyCommand` hands the payload to the machine. If the machine raises, the engine
   stops for good (`ApplyFailed`); PySyncObj would try the entry again for ever.
3. A follower never cuts entries that do not contradict the leader (journal.py), so behind what an append
   covered there may be entries that the leader does not have. Therefore `receive` lowers the commit index of
   a message to what that message covers, and lifts a message that begins below the follower's own commit
   index up to it: committed entries are the leader's too.
4. A snapshot never takes a follower back, and its acknowledgement covers the snapshot alone.
5. An answer carries the follower's term, and counts only in that term: one that outlived a change of leader
   could otherwise commit what the follower no longer has.
6. Appends: at most APPENDS_IN_FLIGHT_MAX unanswered ones per follower, so commands gather meanwhile; the
   heartbeat goes regardless. Nothing but heartbeats to a follower whose connection is congested.

Time for elections comes from `pysyncobj.syncobj.monotonicTime`; a simulation replaces that one name.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import pysyncobj.syncobj
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf
from pysyncobj.node import Node

from coordinator.api.v1 import command_pb2
from coordinator.config import RaftSettings
from coordinator.machine.state import State, Transition
from coordinator.model import WallMs
from coordinator.model.errors import Damaged
from coordinator.raft.frames import Message, ProtocolViolation
from coordinator.raft.journal import Journal
from coordinator.raft.snapshot import SnapshotStore
from coordinator.raft.transport import PeerTransport

APPEND_BYTES = 1 << 20
"""Bytes of commands in one AppendEntries, the last one excepted: with the largest command it fits a frame."""
APPEND_ENTRIES_MAX = 4096
APPENDS_IN_FLIGHT_MAX = 2
COMMAND_BYTES_LIMIT = 8 << 20
"""No configuration may allow larger commands; half a frame."""
COMPACTION_S = 3600.0
"""A snapshot is written at least so often when there is anything new."""

_COMMAND = b"\x00"
_NO_OP = b"\x01"
_STAMP = struct.Struct(">Q")
_STAMPED_BYTES = 1 + _STAMP.size

Apply = Callable[[State, bytes, int, WallMs], Transition]
Callback = Callable[[command_pb2.CommandResult | None, int], None]
"""Called once with (result, FAIL_REASON): the result is None unless the reason is SUCCESS."""


class ApplyFailed(Exception):
    """The machine raised, which it never may; the entry would fail on every master, so nothing goes on here."""


class _Core(SyncObj):  # type: ignore[misc]
    """PySyncObj with the changes that the module's docstring lists. `Engine` is its only user."""

    def __init__(self, engine: Engine, self_node: Node, other_nodes: list[Node], conf: Any, transport: Any) -> None:
        self._engine = engine
        super().__init__(self_node, other_nodes, conf=conf, transport=transport)

    def _applyCommand(self, command: bytes, callback: Any, commandType: int | None = None) -> None:
        # A tuple as callback is (node, request id): the command was forwarded, and carries its type and an older stamp.
        if isinstance(callback, tuple) or callback is None:
            if not self._engine.may_append(command):
                self._SyncObj__callErrCallback(FAIL_REASON.REQUEST_DENIED, callback)
                return
            command = command[_STAMPED_BYTES:]
        super()._applyCommand(_COMMAND + _STAMP.pack(self._engine.wall_ms()) + command, callback, None)

    def _SyncObj__doApplyCommand(self, command: bytes) -> command_pb2.CommandResult | None:
        return self._engine.apply(command)

    def _SyncObj__generateRaftTimeout(self) -> float:
        return self._engine.election_timeout_s()

    def _SyncObj__sendAppendEntries(self) -> None:
        self._engine.replicate(is_heartbeat=True)

    def _SyncObj__sendNextNodeIdx(
        self, node: Node, reset: bool = False, nextNodeIdx: int | None = None, success: bool = False
    ) -> None:
        self._engine.answer_append(node, reset, nextNodeIdx, success)

    def _SyncObj__loadDumpFile(self, clearJournal: bool) -> None:
        self._engine.install_received()

    def _SyncObj__onNodeConnected(self, node: Node) -> None:
        super()._SyncObj__onNodeConnected(node)
        self._engine.connection_changed(node)

    def _SyncObj__onNodeDisconnected(self, node: Node) -> None:
        super()._SyncObj__onNodeDisconnected(node)
        self._engine.connection_changed(node)


class _NoPoller:
    """PySyncObj polls its own sockets at the end of a tick; there are none."""

    def poll(self, timeout: float) -> None:
        pass


class Engine:
    """One master's part in the consensus. Passive: `step` and `receive` are called, nothing runs by itself.

    `transitions` collects what was applied until `take_transitions`. Raises ApplyFailed, Damaged or OSError from `step`
    and `receive` when the master must stop.
    """

    def __init__(
        self,
        *,
        transport: PeerTransport,
        journal: Journal,
        snapshots: SnapshotStore,
        apply: Apply,
        settings: RaftSettings,
        wall_ms: Callable[[], WallMs],
        rng: random.Random,
    ) -> None:
        self._transport = transport
        self._journal = journal
        self._snapshots = snapshots
        self._apply = apply
        self._settings = settings
        self._rng = rng
        self.wall_ms = wall_ms
        self.state = State()
        self._transitions: list[Transition] = []
        self._appends_in_flight: dict[Node, int] = {}
        self._commit_told: dict[Node, int] = {}
        self._installed_index: int | None = None
        self._leader_commit_index = 0
        self._has_caught_up = False
        others = [transport.nodes[id] for id in sorted(transport.nodes)]
        self._others = others
        self._core = _Core(self, Node(transport.self_id), others, _conf(settings), transport)
        self._take_over()

    def _take_over(self) -> None:
        """Puts the journal, the snapshot store and what is on disk in the place of PySyncObj's own."""
        core, journal, snapshots = self._core, self._journal, self._snapshots
        core._poller = _NoPoller()
        core._SyncObj__serializer = snapshots
        core._SyncObj__raftLog = journal
        snapshot = snapshots.load()
        if snapshot is not None:
            journal.align(snapshot.before, snapshot.last)
            self.state = snapshot.state
        elif len(journal) == 0:
            journal.add(_NO_OP, 1, 0)
        elif journal[0][1] != 1:
            raise Damaged(
                f"the log begins at entry {journal[0][1]}, but there is no snapshot of what was before; take this "
                "master's data directory away and let it be rebuilt from the others, or restore a backup"
            )
        index = snapshot.index if snapshot is not None else 1
        last_term = journal[-1][2]
        # The term is durable before any entry of it is, so a lower one means that the vote belongs to an older term.
        core._SyncObj__raftCurrentTerm = max(journal.getCurrentTerm(), last_term)
        core._SyncObj__votedForNodeId = journal.getVotedForNodeId() if journal.getCurrentTerm() >= last_term else None
        core._SyncObj__raftCommitIndex = index
        core._SyncObj__raftLastApplied = index
        core._SyncObj__lastSerializedEntry = index - 1 if snapshot is not None else None
        snapshots.state_now = lambda: self.state
        snapshots.applied_index = lambda: self.applied_index
        snapshots.may_send = lambda node: not self._transport.is_congested(node)
        snapshots.on_damaged = core.forceLogCompaction
        self._transport.setOnMessageReceivedCallback(self.receive)
        self._transport.on_unsent = self._on_unsent

    # What the node asks and does

    @property
    def term(self) -> int:
        """The current term."""
        return int(self._core.raftCurrentTerm)

    @property
    def commit_index(self) -> int:
        """Index of the last entry that this master knows to be committed."""
        return int(self._core.raftCommitIndex)

    @property
    def applied_index(self) -> int:
        """Index of the last entry that `state` includes."""
        return int(self._core.raftLastApplied)

    @property
    def leader_id(self) -> str | None:
        """Who leads, as far as this master knows."""
        node = self._core._getLeader()
        return None if node is None else str(node.id)

    @property
    def is_raft_leader(self) -> bool:
        """True from the election on."""
        return bool(self._core._isLeader())

    @property
    def leads_whole(self) -> bool:
        """True for a leader that has applied everything that was committed before its term."""
        return self.is_raft_leader and self.applied_index >= self._core._SyncObj__noopIDx

    @property
    def role(self) -> str:
        """"follower", "candidate" or "leader"."""
        return ("follower", "candidate", "leader")[self._core._SyncObj__raftState]

    @property
    def has_caught_up(self) -> bool:
        """True once this master has applied all that some leader told it to be committed; stays true."""
        return self._has_caught_up

    @property
    def wants_step(self) -> bool:
        """True when another step would do something without any message; so it is where a master is alone."""
        return not self._others and self.is_raft_leader and self.commit_index < self._last_index

    @property
    def _last_index(self) -> int:
        return int(self._journal[-1][1])

    def propose(self, payload: bytes, callback: Callback) -> None:
        """Queues a command; the next step appends or forwards it."""
        self._core._applyCommand(payload, callback)

    def step(self) -> None:
        """Elects, commits, applies, appends and sends, as far as it is time to."""
        core = self._core
        core.doTick(0.0)
        if self.is_raft_leader:
            self.replicate(is_heartbeat=False)
            self._has_caught_up |= self.leads_whole
        elif core._getLeader() is not None:
            self._has_caught_up |= 0 < self._leader_commit_index <= self.applied_index

    def take_transitions(self) -> list[Transition]:
        """What was applied since the last call, in order. A whole new state is a Transition without changes."""
        transitions, self._transitions = self._transitions, []
        return transitions

    def forget(self, is_done: Callable[[Callback], bool]) -> None:
        """Drops the callbacks that nobody waits for any more."""
        replies = self._core._SyncObj__commandsWaitingReply
        for number in [number for number, callback in replies.items() if is_done(callback)]:
            del replies[number]
        commits = self._core._SyncObj__commandsWaitingCommit
        for index in list(commits):
            commits[index] = [waiting for waiting in commits[index] if not is_done(waiting[1])]
            if not commits[index]:
                del commits[index]

    def transfer(self, target_id: str | None) -> int:
        """Asks a follower that has everything to take over; FAIL_REASON of asking."""
        reasons: list[int] = []
        target = None if target_id is None else Node(target_id)
        self._core.transferLeadership(target, lambda _, reason: reasons.append(reason))
        return reasons[0]

    def write_snapshot(self) -> None:
        """Has a snapshot written at the next step."""
        self._core.forceLogCompaction()

    def close(self) -> None:
        """Closes the files."""
        self._snapshots.close()
        self._journal.close()

    # What comes in

    def receive(self, node: Node, message: Message) -> None:
        """Takes a peer's message. Raises ProtocolViolation for one that no sound peer sends."""
        match message["type"]:
            case "append_entries":
                if message["term"] < self.term:
                    return
                self._leader_commit_index = message["commit_index"]
                if "serialized" in message:
                    # The commit index is beyond anything that a chunk shows of our own log.
                    message["commit_index"] = self.commit_index
                else:
                    self._adjust_append(node, message)
            case "next_node_idx":
                if not self._take_answer(node, message):
                    return
            case "apply_command" if not self.may_append(message["command"]):
                raise ProtocolViolation("a forwarded command that cannot be one")
        before = self._core._SyncObj__raftNextIndex.get(node, 0)
        self._core._SyncObj__onMessageReceived(node, message)
        if message["type"] == "next_node_idx" and message["success"] and not message["reset"]:
            # PySyncObj goes back to what was acknowledged, and would send again what is on its way.
            following = self._core._SyncObj__raftNextIndex
            following[node] = max(before, following.get(node, 0))

    def _adjust_append(self, node: Node, message: Message) -> None:
        """Order rule 3."""
        previous, entries, commit = message["prevLogIdx"], message["entries"], self.commit_index
        for offset, (command, index, _) in enumerate(entries):
            if index != previous + 1 + offset:
                raise ProtocolViolation(f"entry {index} where {previous + 1 + offset} must stand")
            if command != _NO_OP and not self.may_append(command):
                raise ProtocolViolation(f"entry {index} of an unknown type or size")
        if previous < commit:
            for _, index, term in entries:
                own = self._term_at(index) if index <= commit else None
                if own is not None and own != term:
                    raise Damaged(
                        f"leader {node.id} has entry {index} of term {term}, this master committed it in term {own}: "
                        "one of them lost its disk; take the data directory of the one that did away"
                    )
            message["entries"] = entries = [entry for entry in entries if entry[1] > commit]
            message["prevLogIdx"] = previous = commit
            message["prevLogTerm"] = self._term_at(commit)
        message["commit_index"] = min(message["commit_index"], previous + len(entries))

    def _take_answer(self, node: Node, message: Message) -> bool:
        if message["term"] != self.term or not self.is_raft_leader:
            return False
        if message["success"] and not 1 <= message["next_node_idx"] <= self._last_index + 1:
            raise ProtocolViolation(f"it acknowledged up to {message['next_node_idx'] - 1}, beyond the log")
        self._appends_in_flight[node] = max(0, self._appends_in_flight.get(node, 0) - 1)
        return True

    def may_append(self, command: bytes) -> bool:
        """True for the bytes of a log entry with a command of a size that is allowed."""
        size = len(command) - _STAMPED_BYTES
        return command[:1] == _COMMAND and 0 <= size <= self._settings.command_bytes_max

    def connection_changed(self, node: Node) -> None:
        """A peer came or went: what was on the way is lost."""
        core = self._core
        self._appends_in_flight.pop(node, None)
        self._commit_told.pop(node, None)
        self._snapshots.cancelTransmisstion(node)
        matched = core._SyncObj__raftMatchIndex.get(node, 0)
        if matched:
            core._SyncObj__raftNextIndex[node] = matched + 1
        if core._getLeader() == node and not core.isNodeConnected(node):
            waiting, core._SyncObj__commandsWaitingReply = core._SyncObj__commandsWaitingReply, {}
            for number in sorted(waiting):
                waiting[number](None, FAIL_REASON.UNKNOWN_OUTCOME)

    def _on_unsent(self, node: Node, message: Message) -> None:
        """A forwarded command that did not leave is definitely not applied; PySyncObj would wait for its answer."""
        if message["type"] == "apply_command" and "request_id" in message:
            callback = self._core._SyncObj__commandsWaitingReply.pop(message["request_id"], None)
            if callback is not None:
                callback(None, FAIL_REASON.MISSING_LEADER)

    # What PySyncObj's overridden methods do

    def apply(self, command: bytes) -> command_pb2.CommandResult | None:
        """Applies the entry behind `applied_index`. Raises ApplyFailed, and never swallows."""
        index = self.applied_index + 1
        if command[:1] == _NO_OP:
            return None
        try:
            if not self.may_append(command):
                raise ValueError(f"an entry of type {command[:1]!r} with {len(command)} bytes")
            time_ms = WallMs(_STAMP.unpack_from(command, 1)[0])
            transition = self._apply(self.state, command[_STAMPED_BYTES:], index, time_ms)
        except Exception as error:
            raise ApplyFailed(f"log entry {index} cannot be applied: {type(error).__name__}: {error}") from error
        self.state = transition.state
        self._transitions.append(transition)
        return transition.result

    def election_timeout_s(self) -> float:
        """How long to wait for a leader this time."""
        return self._rng.uniform(self._settings.election_timeout_s_min, self._settings.election_timeout_s_max)

    def replicate(self, *, is_heartbeat: bool) -> None:
        """Sends each follower what it lacks, and news of the commit index; a heartbeat goes in any case."""
        core = self._core
        if is_heartbeat:
            core._SyncObj__newAppendEntriesTime = pysyncobj.syncobj.monotonicTime() + self._settings.append_period_s
        for node in self._others:
            if not core.isNodeConnected(node):
                continue
            next_index = min(core._SyncObj__raftNextIndex[node], self._last_index + 1)
            lacks = next_index <= self._last_index or self._commit_told.get(node, 0) < self.commit_index
            has_room = self._appends_in_flight.get(node, 0) < APPENDS_IN_FLIGHT_MAX
            if not is_heartbeat and not (lacks and has_room):
                continue
            if next_index <= self._journal[0][1]:
                self._send_snapshot(node)
            else:
                self._send_append(node, next_index)

    def _send_append(self, node: Node, next_index: int) -> None:
        entries = []
        if not self._transport.is_congested(node):
            entries = self._core._SyncObj__getEntries(next_index, APPEND_ENTRIES_MAX, APPEND_BYTES)
        self._core._SyncObj__raftNextIndex[node] = next_index + len(entries)
        self._commit_told[node] = self.commit_index
        self._appends_in_flight[node] = self._appends_in_flight.get(node, 0) + 1
        self._transport.send(
            node,
            {
                "type": "append_entries",
                "term": self.term,
                "commit_index": self.commit_index,
                "entries": entries,
                "prevLogIdx": next_index - 1,
                "prevLogTerm": self._term_at(next_index - 1),
            },
        )

    def _send_snapshot(self, node: Node) -> None:
        """Sends chunks until the connection has enough; a heartbeat goes also when there is no chunk."""
        message: Message = {"type": "append_entries", "term": self.term, "commit_index": self.commit_index}
        while True:
            chunk = self._snapshots.getTransmissionData(node)
            if not self._transport.send(node, message | {"serialized": chunk}) or chunk is None:
                return
            if chunk[2]:
                self._core._SyncObj__raftNextIndex[node] = self._journal[1][1] + 1
                return

    def answer_append(self, node: Node, reset: bool, next_index: int | None, success: bool) -> None:
        """Answers an append or a snapshot, with the term (order rule 5)."""
        if success and next_index is None:
            # After a snapshot. What the log kept behind it was not compared with the leader's (order rule 4).
            assert self._installed_index is not None
            next_index = self._installed_index + 1
        elif next_index is None:
            next_index = self._last_index + 1
        elif reset and next_index <= self._last_index:
            # Another term at this place: everything up to the commit index is the same, so resume there at once.
            next_index = self.commit_index + 1
        self._transport.send(
            node,
            {
                "type": "next_node_idx",
                "next_node_idx": next_index,
                "reset": reset,
                "success": success,
                "term": self.term,
            },
        )

    def install_received(self) -> None:
        """Takes over the snapshot that the store has received, checked and put in place."""
        snapshot, self._snapshots.received = self._snapshots.received, None
        assert snapshot is not None
        core = self._core
        self._journal.align(snapshot.before, snapshot.last)
        core._SyncObj__raftLastApplied = snapshot.index
        core._SyncObj__raftCommitIndex = max(self.commit_index, snapshot.index)
        core._SyncObj__lastSerializedEntry = snapshot.index - 1
        self._installed_index = snapshot.index
        self.state = snapshot.state
        self._transitions.append(Transition(snapshot.state, command_pb2.CommandResult()))
        commits = core._SyncObj__commandsWaitingCommit
        for index in [index for index in sorted(commits) if index <= snapshot.index]:
            for _, callback in commits.pop(index):
                callback(None, FAIL_REASON.UNKNOWN_OUTCOME)

    def _term_at(self, index: int) -> int | None:
        """Term of the entry at `index`; None when the log does not hold it."""
        position = index - self._journal[0][1]
        return int(self._journal[position][2]) if 0 <= position < len(self._journal) else None


def _conf(settings: RaftSettings) -> Any:
    return SyncObjConf(
        autoTick=False,
        raftMinTimeout=settings.election_timeout_s_min,
        raftMaxTimeout=settings.election_timeout_s_max,
        appendEntriesPeriod=settings.append_period_s,
        leaderFallbackTimeout=settings.leader_fallback_s,
        # Unused by our transport, but PySyncObj compares it with the election timeout.
        connectionTimeout=settings.election_timeout_s_max,
        # True only means that PySyncObj sends nothing between heartbeats and makes no pipe: `step` sends.
        appendEntriesUseBatch=True,
        commandsQueueSize=settings.proposals_max,
        commandsWaitLeader=False,
        logCompactionMinEntries=max(2, settings.snapshot_entries),
        logCompactionMinTime=COMPACTION_S,
        dynamicMembershipChange=False,
        useFork=False,
        journalFile=None,
        fullDumpFile=None,
    )
