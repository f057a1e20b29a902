"""PySyncObj 0.3.17: the only file that knows its private names. Its user is consensus.py, which has the rules.

`SyncEngine` is PySyncObj with the methods overridden that are unsafe or slow in it, each handed on to `Hooks`;
PySyncObj finds them under their mangled names. Below them stand the accessors, one per private thing that
consensus.py needs. The version is pinned exactly in pyproject.toml; whoever raises it reads `syncobj.py` again,
and tests/unit/test_raft_engine.py fails where a name has moved.

Time for elections and leases comes from `pysyncobj.syncobj.monotonicTime`, which is model/clock.py's clock: PySyncObj's
own stands still while the machine sleeps. A simulation replaces that one name.
"""

from __future__ import annotations

import _socket
import socket
from collections.abc import Callable
from typing import Any, Protocol

import pysyncobj.syncobj
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf
from pysyncobj.node import Node

from coordinator.api.v1 import command_pb2
from coordinator.config import RaftSettings
from coordinator.model.clock import monotonic_s
from coordinator.raft.frames import Message
from coordinator.raft.journal import Entry, Journal

# PySyncObj brings its own versions of these two for Windows, and puts them in Python's place everywhere: for the whole
# process, and there they only raise. Python has had them on every system since 3.4.
socket.inet_pton = _socket.inet_pton
socket.inet_ntop = _socket.inet_ntop

pysyncobj.syncobj.monotonicTime = monotonic_s

COMPACTION_S = 3600.0
"""A snapshot is written at least so often when there is anything new."""

Callback = Callable[[command_pb2.CommandResult | None, int], None]
"""Called once with (result, FAIL_REASON): the result is None unless the reason is SUCCESS."""


CANDIDATE, LEADER = 1, 2
"""PySyncObj's numbers of these roles."""


def now_s() -> float:
    """The monotonic clock that PySyncObj reads, in seconds."""
    return float(pysyncobj.syncobj.monotonicTime())


class Links(Protocol):
    """What carries messages: PeerTransport, or a simulated network. Also a `pysyncobj.transport.Transport`."""

    self_id: str
    nodes: dict[str, Node]
    on_unsent: Callable[[Node, Message], None]

    def send(self, node: Node, message: Message) -> bool: ...

    def is_congested(self, node: Node) -> bool: ...

    def disk_of(self, id: str) -> str: ...

    def setOnMessageReceivedCallback(self, callback: Any) -> None: ...

    def setOnNodeConnectedCallback(self, callback: Any) -> None: ...


class Hooks(Protocol):
    """What consensus.py does in the place of PySyncObj."""

    def admit(self, command: bytes, *, is_forwarded: bool) -> bytes | None:
        """The log entry for a command that came in; None to deny it."""

    def apply(self, command: bytes) -> command_pb2.CommandResult | None:
        """Applies the entry behind the last applied one."""

    def may_take_commands(self) -> bool:
        """False while what was proposed stays queued, neither appended nor forwarded."""

    def took_commands(self) -> None:
        """All that was queued is appended now, or on its way to the leader."""

    def election_timeout_s(self) -> float:
        """How long to wait for a leader this time."""

    def replicate(self, *, is_heartbeat: bool) -> None:
        """Sends appends."""

    def answer_append(self, node: Node, reset: bool, next_index: int | None, success: bool) -> None:
        """Answers an append."""

    def connection_changed(self, node: Node) -> None:
        """A peer came or went."""


class _NoPoller:
    """PySyncObj polls its own sockets at the end of a tick; there are none."""

    def poll(self, timeout: float) -> None:
        pass


class SyncEngine(SyncObj):  # type: ignore[misc]
    """PySyncObj with its unsafe parts handed on. No properties: PySyncObj reads all of them before it is made."""

    def __init__(
        self, hooks: Hooks, self_id: str, others: list[Node], settings: RaftSettings, transport: Links, random_bits: int
    ) -> None:
        self._hooks = hooks
        self.elections = 0
        """Elections that this master has held."""
        super().__init__(Node(self_id), others, conf=_conf(settings), transport=transport)
        # A forwarded command's answer is known by its number alone: in each life of the process other numbers, or the
        # answer to a command of the life before would acknowledge one that the leader never got.
        self._SyncObj__commandsLocalCounter = random_bits

    # Overridden: PySyncObj calls these

    def _applyCommand(self, command: bytes, callback: Any, commandType: int | None = None) -> None:
        # A tuple as callback is (node, request id) of a forwarded command; None is one that wants no answer.
        entry = self._hooks.admit(command, is_forwarded=callback is None or isinstance(callback, tuple))
        if entry is None:
            self._SyncObj__callErrCallback(FAIL_REASON.REQUEST_DENIED, callback)
        else:
            super()._applyCommand(entry, callback, None)

    def _SyncObj__setState(self, role: int) -> None:
        self.elections += role == CANDIDATE
        super()._SyncObj__setState(role)

    def _checkCommandsToApply(self) -> None:
        if self._hooks.may_take_commands():
            super()._checkCommandsToApply()
            self._hooks.took_commands()

    def _SyncObj__doApplyCommand(self, command: bytes) -> command_pb2.CommandResult | None:
        return self._hooks.apply(command)

    def _SyncObj__generateRaftTimeout(self) -> float:
        return self._hooks.election_timeout_s()

    def _SyncObj__sendAppendEntries(self) -> None:
        self._hooks.replicate(is_heartbeat=True)

    def _SyncObj__sendNextNodeIdx(
        self, node: Node, reset: bool = False, nextNodeIdx: int | None = None, success: bool = False
    ) -> None:
        self._hooks.answer_append(node, reset, nextNodeIdx, success)

    def _SyncObj__onNodeConnected(self, node: Node) -> None:
        super()._SyncObj__onNodeConnected(node)
        self._hooks.connection_changed(node)

    def _SyncObj__onNodeDisconnected(self, node: Node) -> None:
        super()._SyncObj__onNodeDisconnected(node)
        self._hooks.connection_changed(node)

    # Accessors: consensus.py calls these

    def take_over(self, journal: Journal, snapshots: Any, term: int, voted_for: str | None) -> None:
        """Puts our journal and snapshot store in the place of PySyncObj's own, and our null in that of its poller."""
        self._poller = _NoPoller()
        self._SyncObj__serializer = snapshots
        self._SyncObj__raftLog = journal
        self._SyncObj__raftCurrentTerm = term
        self._SyncObj__votedForNodeId = voted_for

    def set_applied(self, index: int, *, has_snapshot: bool) -> None:
        """The state includes everything up to `index`, which is committed; on disk too when there is a snapshot."""
        self._SyncObj__raftLastApplied = index
        self._SyncObj__raftCommitIndex: int = max(self.raftCommitIndex, index)
        if has_snapshot:
            self._SyncObj__lastSerializedEntry = index - 1

    def deliver(self, node: Node, message: Message) -> None:
        """Has PySyncObj take a message."""
        self._SyncObj__onMessageReceived(node, message)

    def heartbeat_after(self, seconds: float) -> None:
        """When `replicate` is to be called as heartbeat again."""
        self._SyncObj__newAppendEntriesTime = now_s() + seconds

    def has_election_due(self) -> bool:
        """True when PySyncObj would stand for election at its next tick."""
        is_due = self._SyncObj__raftElectionDeadline < now_s()
        return is_due and self.role_number() != LEADER and bool(self._SyncObj__connectedNodes)

    def is_transfer_target(self) -> bool:
        """True while the leader's request to take over is being followed."""
        return bool(self._SyncObj__transferInProgress)

    def postpone_election(self) -> None:
        """Waits another election timeout, without a leader: who waits for one is told that there is none."""
        self._SyncObj__raftElectionDeadline = now_s() + self._hooks.election_timeout_s()
        self._SyncObj__raftLeader = None
        self.end_replies(FAIL_REASON.LEADER_CHANGED)

    def hold_back(self, seconds: float) -> None:
        """Does not stand for election within so many seconds."""
        self._SyncObj__raftElectionDeadline = max(self._SyncObj__raftElectionDeadline, now_s() + seconds)

    def stand_for_election(self) -> None:
        """Has PySyncObj stand for election at its next tick."""
        self._SyncObj__raftElectionDeadline = 0.0

    def transfer_to(self, id: str | None) -> int:
        """Asks a follower that has everything to take over, the most complete one for None; FAIL_REASON of asking."""
        reasons: list[int] = []
        target = None if id is None else Node(id)
        self.transferLeadership(target, lambda _, reason: reasons.append(reason))
        return reasons[0]

    def become_follower(self, term: int) -> None:
        """Gives up what it was; a later term is taken over without a vote in it."""
        if term > self.raftCurrentTerm:
            self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__setState(0)
        self._SyncObj__raftLeader = None
        self._SyncObj__raftElectionDeadline = now_s() + self._hooks.election_timeout_s()

    def role_number(self) -> int:
        """0 follower, 1 candidate, 2 leader."""
        return int(self._SyncObj__raftState)

    def last_entry(self) -> tuple[int, int]:
        """Index and term of the last entry of the log."""
        _, index, term = self._SyncObj__raftLog[-1]
        return int(index), int(term)

    def no_op_index(self) -> int:
        """Index of the entry with which this leader began."""
        return int(self._SyncObj__noopIDx)

    def next_index(self, node: Node) -> int:
        """Index that a leader sends a follower next; 0 when it has never led."""
        return int(self._SyncObj__raftNextIndex.get(node, 0))

    def set_next_index(self, node: Node, index: int) -> None:
        """See `next_index`."""
        self._SyncObj__raftNextIndex[node] = index

    def match_index(self, node: Node) -> int:
        """Index up to which a follower's log is known to be the leader's; 0 when it is not known."""
        return int(self._SyncObj__raftMatchIndex.get(node, 0))

    def disregard(self, node: Node, answered_s: float) -> None:
        """Makes an answer count for nothing but what to send next: no match, no sign of life since `answered_s`."""
        self._SyncObj__raftMatchIndex[node] = 0
        self._SyncObj__lastResponseTime[node] = answered_s

    def answered_s(self, node: Node) -> float:
        """When a follower has last answered this leader."""
        return float(self._SyncObj__lastResponseTime[node])

    def give_no_vote(self) -> None:
        """Has this master count as having voted in the present term."""
        self._SyncObj__setCurrentTerm(self.raftCurrentTerm, self.selfNode.id)

    def entries_from(self, index: int, count_max: int, bytes_max: int) -> list[Entry]:
        """Entries from `index` on; at least one when there is any, and the last may exceed `bytes_max`."""
        entries: list[Entry] = self._SyncObj__getEntries(index, count_max, bytes_max)
        return entries

    # Callbacks of proposals: they wait for the leader's answer, then for the commit

    def end_reply(self, request_id: int, reason: int) -> None:
        """Ends one that waits for the leader's answer."""
        callback = self._SyncObj__commandsWaitingReply.pop(request_id, None)
        if callback is not None:
            callback(None, reason)

    def end_replies(self, reason: int) -> None:
        """Ends all that wait for the leader's answer."""
        waiting: dict[int, Callback] = self._SyncObj__commandsWaitingReply
        for request_id in sorted(waiting):
            waiting.pop(request_id)(None, reason)

    def end_commits(self, first: int, last: int, reason: int) -> None:
        """Ends all that wait for the commit of an entry from `first` to `last`."""
        commits = self._SyncObj__commandsWaitingCommit
        for index in [index for index in sorted(commits) if first <= index <= last]:
            for _, callback in commits.pop(index):
                callback(None, reason)

    def forget(self, is_done: Callable[[Callback], bool]) -> None:
        """Drops the callbacks that nobody waits for any more."""
        replies = self._SyncObj__commandsWaitingReply
        for number in [number for number, callback in replies.items() if is_done(callback)]:
            del replies[number]
        commits = self._SyncObj__commandsWaitingCommit
        for index in list(commits):
            commits[index] = [waiting for waiting in commits[index] if not is_done(waiting[1])]
            if not commits[index]:
                del commits[index]


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
