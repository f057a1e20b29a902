"""One master's part in the consensus: the rules that PySyncObj is held to. Passive: no clock of its own, no task.

PySyncObj (engine.py) keeps what is well tested in it: elections, terms, votes, counting acknowledgements,
committing, calling back. What it does unsafely or slowly is done here; DESIGN.md section 4 has the findings.

Order rules:

1. Time is stamped by the master that appends: `admit` is the one way into the log, also for what a follower
   forwarded, so the leader stamps over the follower's stamp.
2. Nothing unpickles: `apply` hands the payload to the machine. If the machine raises, this master stops for
   good (`ApplyFailed`); PySyncObj would try the entry again for ever.
3. What an append may do to a follower's log is append_rules.py's.
4. A snapshot never takes a follower back, and its acknowledgement covers the snapshot alone. While a received one is
   checked in its thread nothing is appended; the leader is answered, so that it keeps its lease. That is sound
   because what the snapshot includes is committed: whoever leads meanwhile has it too.
5. An answer carries the follower's term, and counts only in that term: one that outlived a change of leader
   could otherwise commit what the follower no longer has.
6. What followers are sent, and how much at once, is replication.py's.
7. "Committed" means on the disks of a majority. A step begins with one sync for all that came in since the last
   one (group commit). Only then do the answers leave that acknowledge it, and only then does PySyncObj count, so
   the leader's own entry counts once it is synced too. Appends leave before the leader's sync: the followers'
   disks work at the same time as its own.
8. Who may stand, vote and rely on leading is elections.py's; whose disk counts at all is voters.py's.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from pysyncobj import FAIL_REASON
from pysyncobj.node import Node

from coordinator.api.v1 import command_pb2
from coordinator.config import RaftSettings
from coordinator.machine.state import State, Transition
from coordinator.model import WallMs
from coordinator.model.errors import Damaged
from coordinator.raft.append_rules import adjust_append
from coordinator.raft.clock_links import ClockedLinks
from coordinator.raft.clocks import Clocks
from coordinator.raft.elections import Elections, Outbox, Protections
from coordinator.raft.engine import Callback, Links, SyncEngine, now_s
from coordinator.raft.entry import NO_OP, is_command, payload_of, stamp, time_of
from coordinator.raft.figures import RaftFigures, Traffic
from coordinator.raft.files import ADVICE
from coordinator.raft.frames import Message, ProtocolViolation
from coordinator.raft.gathering import Gathering
from coordinator.raft.journal import Journal
from coordinator.raft.replication import Replication
from coordinator.raft.snapshot import Snapshot, SnapshotStore
from coordinator.raft.voters import Membership, Voters

TERM_MAX = 1 << 62
"""A term is kept on disk for ever and only grows, in 64 bits: one beyond this would end all elections."""
TRANSFER_HOLD_S = 0.05
"""How long nothing is appended after a follower was asked to take over, or could not be."""
COMMAND_BYTES_LIMIT = 8 << 20
"""No configuration may allow larger commands; half a frame."""

Apply = Callable[[State, bytes, int, WallMs], Transition]


class ApplyFailed(Exception):
    """The machine raised, which it never may; the entry would fail on every master, so nothing goes on here."""


class Consensus:
    """`step` and `receive` are called; nothing runs by itself.

    `transitions` collects what was applied until `take_transitions`. Raises ApplyFailed, Damaged or OSError from `step`
    and `receive` when the master must stop.
    """

    def __init__(
        self,
        *,
        transport: Links,
        journal: Journal,
        snapshots: SnapshotStore,
        apply: Apply,
        settings: RaftSettings,
        wall_ms: Callable[[], WallMs],
        rng: random.Random,
        protections: Protections | None = None,
        membership: Membership | None = None,
    ) -> None:
        self._transport = ClockedLinks(transport, Clocks(transport.nodes, settings, wall_ms))
        self._protections = protections or Protections()
        self._journal = journal
        self._snapshots = snapshots
        self._apply = apply
        self._settings = settings
        self._rng = rng
        self._wall_ms = wall_ms
        self.state = State()
        self._transitions: list[Transition] = []
        self._installed_index: int | None = None
        self._leader_commit_index = 0
        self._has_caught_up = False
        self._others = others = [transport.nodes[id] for id in sorted(transport.nodes)]
        self._held: list[tuple[Node, Message]] = []
        """Answers that wait for the disk."""
        self._answering_us = 0
        """`sent_at_us` of the append that is being taken in."""
        self._leader_sent_us = 0
        """`sent_at_us` of the latest append or chunk of a leader that was followed."""
        outbox = Outbox(self._transport, lambda: self.elections.is_transfer)
        self._engine = SyncEngine(self, transport.self_id, others, settings, outbox, rng.getrandbits(62))
        self.voters = Voters(transport.self_id, membership or Membership(), journal, transport.disk_of)
        self.elections = Elections(self._engine, others, settings, self._protections, self.voters, self._transport)
        self.replication = Replication(self._engine, journal, snapshots, self._transport, settings)
        self._gathering = Gathering()
        self._is_admission_queued = False
        self._take_over()
        self.voters.applied(self.state, self.applied_index)

    def _take_over(self) -> None:
        """Puts the journal, the snapshot store and what is on disk in the place of PySyncObj's own."""
        engine, journal, snapshots = self._engine, self._journal, self._snapshots
        snapshot = snapshots.load(journal.holds)
        journal.needed_from = lambda: snapshots.needed_from
        if snapshot is not None:
            self._align(snapshot)
            self.state = snapshot.state
        elif len(journal) == 0:
            journal.add(NO_OP, 1, 0)
        elif journal[0][1] != 1:
            raise Damaged(
                f"{journal.begin}: the log begins at entry {journal[0][1]}, but there is no snapshot of what was "
                f"before; {ADVICE}"
            )
        last_term = journal[-1][2]
        # The term is durable before any entry of it is, so a lower one means that the vote is of an older term.
        voted_for = journal.getVotedForNodeId() if journal.getCurrentTerm() >= last_term else None
        engine.take_over(journal, snapshots, max(journal.getCurrentTerm(), last_term), voted_for)
        engine.set_applied(snapshot.index if snapshot is not None else 1, has_snapshot=snapshot is not None)
        snapshots.state_now = lambda: self.state
        # A leader's log has all that was committed, so it needs nobody's snapshot.
        snapshots.applied_index = lambda: self._last_index if self.is_raft_leader else self.applied_index
        snapshots.may_send = lambda node: not self._transport.is_congested(node)
        snapshots.on_damaged = engine.forceLogCompaction
        self._transport.setOnMessageReceivedCallback(self.receive)
        self._transport.on_unsent = self._on_unsent

    # What the node asks and does

    @property
    def term(self) -> int:
        """The current term."""
        return int(self._engine.raftCurrentTerm)

    @property
    def commit_index(self) -> int:
        """Index of the last entry that this master knows to be committed."""
        return int(self._engine.raftCommitIndex)

    @property
    def applied_index(self) -> int:
        """Index of the last entry that `state` includes."""
        return int(self._engine.raftLastApplied)

    @property
    def leader_id(self) -> str | None:
        """Who leads, as far as this master knows; None while it is cut off from the one that it knew.

        PySyncObj never forgets one without an election, and a master that reaches nobody holds none.
        """
        node = self._engine._getLeader()
        is_reachable = node is not None and (self.is_raft_leader or self._engine.isNodeConnected(node))
        return str(node.id) if node is not None and is_reachable else None

    @property
    def is_raft_leader(self) -> bool:
        """True from the election on."""
        return bool(self._engine._isLeader())

    @property
    def leads_whole(self) -> bool:
        """True for a leader that has applied everything that was committed before its term."""
        return self.is_raft_leader and self.applied_index >= self._engine.no_op_index()

    @property
    def role(self) -> str:
        """One of "follower", "candidate", "leader", and "learner" where its disk does not vote."""
        if not self.voters.speaks:
            return "learner"
        return ("follower", "candidate", "leader")[self._engine.role_number()]

    @property
    def has_history(self) -> bool:
        """True once this disk has seen a term or an entry."""
        return self.term > 0 or self._last_index > 1

    @property
    def has_caught_up(self) -> bool:
        """True once this master has applied all that some leader told it to be committed; stays true."""
        return self._has_caught_up

    @property
    def wants_step(self) -> bool:
        """True when another step would do something without any message: sync, or commit where a master is alone."""
        is_alone = not self._others and self.is_raft_leader and self.commit_index < self._last_index
        return bool(self._held) or self._journal.is_dirty or is_alone

    @property
    def has_lease(self) -> bool:
        """True for a leader whose `state` shows everything that was acknowledged anywhere, at this moment."""
        return self.leads_whole and self.elections.has_lease()

    @property
    def _last_index(self) -> int:
        return int(self._journal[-1][1])

    def figures(self, traffic: Traffic, queued_bytes: dict[str, int], proposals: int) -> RaftFigures:
        """Figures for those who watch; what others count is handed in."""
        last = self._last_index
        followers = self._others if self.is_raft_leader else ()
        return RaftFigures(
            last_index=last,
            commit_index=self.commit_index,
            applied_index=self.applied_index,
            has_lease=self.has_lease,
            elections=self._engine.elections,
            pre_votes=self.elections.pre_votes,
            syncs=self._journal.syncs,
            traffic=traffic,
            proposals=proposals,
            queued_bytes=queued_bytes,
            behind={node.id: last - self.replication.match_index(node) for node in followers},
            snapshot=self._snapshots.figures,
            clocks=self.elections.duty.clocks.figures(now_s()),
        )

    def propose(self, payload: bytes, callback: Callback, *, is_urgent: bool = False) -> None:
        """Queues a command; the next step appends or forwards it, or one soon after (gathering.py)."""
        self._engine._applyCommand(payload, callback)
        self._gathering.is_urgent |= is_urgent

    def step(self) -> None:
        """Syncs, answers, elects, commits, applies, appends and sends, as far as it is time to."""
        self._install_received()
        self._make_durable()
        self.elections.advance()
        self.elections.duty.hand_over(self.transfer)
        self._engine.doTick(0.0)
        if self.is_raft_leader:
            self.replicate(is_heartbeat=False)
            self._has_caught_up |= self.leads_whole
        else:
            self.replication.clear()
        if not self.is_raft_leader and self._engine._getLeader() is not None:
            self._has_caught_up |= 0 < self._leader_commit_index <= self.applied_index

    def _make_durable(self) -> None:
        """Order rule 7."""
        if self._journal.is_dirty and self._protections.syncs_before_answering:
            self._journal.sync()
        held, self._held = self._held, []
        for node, message in held:
            self._transport.send(node, message)

    def take_transitions(self) -> list[Transition]:
        """What was applied since the last call, in order. A whole new state is a Transition without changes."""
        transitions, self._transitions = self._transitions, []
        return transitions

    def forget(self, is_done: Callable[[Callback], bool]) -> None:
        """Drops the callbacks that nobody waits for any more."""
        self._engine.forget(is_done)

    def become_voter(self) -> None:
        """This master's disk may speak from now on (voters.py); in the present term it gives no vote any more."""
        self._engine.give_no_vote()
        self.voters.is_voter = True

    def transfer(self, target_id: str | None) -> int:
        """Asks a follower that has everything to take over; FAIL_REASON of asking.

        Where none has, this leader appends nothing for a moment, so that asking again succeeds.
        """
        self._gathering.closed_until_s = now_s() + TRANSFER_HOLD_S
        reason = self._engine.transfer_to(self.elections.duty.choose(target_id))
        if reason == FAIL_REASON.SUCCESS:
            self.elections.transfer_asked()
        return reason

    def write_snapshot(self) -> None:
        """Has a snapshot written at the next step."""
        self._engine.forceLogCompaction()

    def close(self) -> None:
        """Closes the files. Its connections may outlive it for a moment; what still comes over them is not taken in."""
        self._transport.setOnMessageReceivedCallback(lambda node, message: None)
        self._snapshots.close()
        self._journal.close()

    # What comes in

    def receive(self, node: Node, message: Message) -> None:
        """Takes a peer's message. Raises ProtocolViolation for one that no sound peer sends."""
        if max(message.get("term", 0), message.get("voter_term", 0)) > TERM_MAX:
            raise ProtocolViolation("a term that no number of elections can reach")
        counts = True
        match message["type"]:
            case "request_vote" | "pre_vote" | "response_vote" | "pre_vote_answer" if not self._may_speak(node):
                return
            case "timeout_now" if not self.voters.speaks:
                return
            case "append_entries":
                self._answering_us = message["sent_at_us"]
                if message["term"] < self.term:
                    # Not heard as a leader, so no lease may be counted from its sending.
                    self._answering_us = 0
                    self.answer_append(node, False, None, False)
                    return
                self.elections.heard_leader()
                self._leader_sent_us = message["sent_at_us"]
                self._leader_commit_index = message["commit_index"]
                if self._snapshots.is_checking:
                    # Taken for a chunk that has nothing in it: a sign of life.
                    message.pop("prevLogIdx", None)
                    message["serialized"] = None
                if "serialized" in message:
                    # The commit index is beyond anything that a chunk shows of our own log.
                    message["commit_index"] = self.commit_index
                else:
                    self._adjust_append(node, message)
            case "next_node_idx":
                if not self._is_answer(message):
                    return
                counts = not message.get("is_learner") and self._may_speak(node)
                self.replication.answered(node, message, counts=counts)
                if counts:
                    self.elections.answered(node, message["sent_at_us"])
            case "request_vote" if not self.elections.may_vote(message):
                return
            case "pre_vote":
                self.elections.take_pre_vote(node, message)
                return
            case "pre_vote_answer":
                self.elections.take_pre_vote_answer(node, message)
                return
            case "apply_command" if not self._is_command(message["command"]):
                raise ProtocolViolation("a forwarded command that cannot be one")
        before, last = self._engine.next_index(node), self._last_index
        answered_s = 0.0 if counts else self._engine.answered_s(node)
        self._engine.deliver(node, message)
        if not counts:
            self._engine.disregard(node, answered_s)
        if "serialized" in message:
            self.answer_append(node, False, None, False)
        # A new leader's shorter log took the place of own entries; others may have them still, and nobody tells soon.
        self._engine.end_commits(self._last_index + 1, last, FAIL_REASON.UNKNOWN_OUTCOME)
        if message["type"] == "next_node_idx" and message["success"] and not message["reset"]:
            # PySyncObj goes back to what was acknowledged, and would send again what is on its way.
            self._engine.set_next_index(node, max(before, self._engine.next_index(node)))

    def _adjust_append(self, node: Node, message: Message) -> None:
        adjust_append(message, self._journal, self.commit_index, self._is_command, str(node.id))

    def _is_answer(self, message: Message) -> bool:
        """True for an answer in this leader's term (order rule 5). Raises ProtocolViolation for an impossible one."""
        if message["term"] > self.term:
            self._engine.become_follower(message["term"])
        if not self.is_raft_leader or (message["term"] != self.term and self._protections.checks_term_of_answers):
            return False
        if message["success"] and not 1 <= message["next_node_idx"] <= self._last_index + 1:
            raise ProtocolViolation(f"it acknowledged up to {message['next_node_idx'] - 1}, beyond the log")
        if message["sent_at_us"] > now_s() * 1e6 + 1:
            raise ProtocolViolation("it answers what this master has not sent yet, which would lengthen the lease")
        return True

    def _may_speak(self, node: Node) -> bool:
        return self.voters.may_speak(str(node.id))

    def admit(self, command: bytes, *, is_forwarded: bool) -> bytes | None:
        """The log entry for a command, with this master's time (order rule 1); None for what cannot be one.

        A forwarded command comes as a log entry with the time of the master that forwarded it.
        """
        if is_forwarded:
            if not self._is_command(command):
                return None
            command = payload_of(command)
        entry = stamp(command, self._wall_ms())
        if self.voters.admission(entry) is not None:
            # One at a time, and only by a leader that has committed in its term.
            if not self.leads_whole or self._is_admission_queued or self.voters.has_admission_on_its_way:
                return None
            self._is_admission_queued = True
        self._gathering.proposed(now_s())
        return entry

    def _is_command(self, entry: bytes) -> bool:
        return is_command(entry, self._settings.command_bytes_max)

    def connection_changed(self, node: Node) -> None:
        """A peer came or went: what was on the way is lost."""
        engine = self._engine
        self.replication.connection_changed(node)
        if engine._getLeader() == node and not engine.isNodeConnected(node):
            engine.end_replies(FAIL_REASON.UNKNOWN_OUTCOME)

    def _on_unsent(self, node: Node, message: Message) -> None:
        """A forwarded command that did not leave is definitely not applied; PySyncObj would wait for its answer."""
        if message["type"] == "apply_command" and "request_id" in message:
            self._engine.end_reply(message["request_id"], FAIL_REASON.MISSING_LEADER)

    # What PySyncObj's overridden methods do

    def apply(self, command: bytes) -> command_pb2.CommandResult | None:
        """Applies the entry behind `applied_index`. Raises ApplyFailed, and never swallows."""
        index = self.applied_index + 1
        if command == NO_OP:
            return None
        try:
            if not self._is_command(command):
                raise ValueError(f"an entry of type {command[:1]!r} with {len(command)} bytes")
            transition = self._apply(self.state, payload_of(command), index, time_of(command))
        except Exception as error:
            raise ApplyFailed(f"log entry {index} cannot be applied: {type(error).__name__}: {error}") from error
        self.state = transition.state
        self._transitions.append(transition)
        self.voters.applied(self.state, index)
        return transition.result

    def may_take_commands(self) -> bool:
        """False while another master is to take over with this log, and while commands gather (gathering.py)."""
        is_gathering = self.is_raft_leader and self._gathering.holds(self.commit_index, now_s())
        return not is_gathering and not self.elections.is_handing_over()

    def took_commands(self) -> None:
        """The queue is empty: what was in it is in the log, or on its way to the leader."""
        self._is_admission_queued = False
        self._gathering.appended(self._last_index, now_s())

    def election_timeout_s(self) -> float:
        """How long to wait for a leader this time."""
        return self._rng.uniform(self._settings.election_timeout_s_min, self._settings.election_timeout_s_max)

    def replicate(self, *, is_heartbeat: bool) -> None:
        """Sends appends."""
        self.replication.send_due(is_heartbeat=is_heartbeat)

    def answer_append(self, node: Node, reset: bool, next_index: int | None, success: bool) -> None:
        """Answers an append or a snapshot, with the term (order rule 5)."""
        if success and next_index is None:
            # After a snapshot. What the log kept behind it was not compared with the leader's (order rule 4).
            assert self._installed_index is not None
            next_index = self._installed_index + 1
        elif next_index is None:
            next_index = self._last_index + 1
        elif reset and next_index <= self._last_index and self._protections.resumes_at_commit:
            # Another term at this place: everything up to the commit index is the same, so resume there at once.
            next_index = self.commit_index + 1
        answer: Message = {
            "type": "next_node_idx",
            "next_node_idx": next_index,
            "reset": reset,
            "success": success,
            "term": self.term,
            "sent_at_us": self._answering_us,
            "is_learner": not self.voters.speaks,
        }
        self._held.append((node, answer))

    def _align(self, snapshot: Snapshot) -> None:
        if not self._journal.align(snapshot.before, snapshot.last):
            self._snapshots.drop_previous()

    def _install_received(self) -> None:
        """Takes over a snapshot that a leader sent, once the store has checked it and put it in place."""
        snapshot = self._snapshots.take_received()
        if snapshot is None:
            return
        self._align(snapshot)
        self._engine.set_applied(snapshot.index, has_snapshot=True)
        self._installed_index = snapshot.index
        self.state = snapshot.state
        self._transitions.append(Transition(snapshot.state, command_pb2.CommandResult()))
        self.voters.applied(self.state, snapshot.index)
        self._engine.end_commits(0, snapshot.index, FAIL_REASON.UNKNOWN_OUTCOME)
        leader = self._engine._getLeader()
        if leader is not None:
            self._answering_us = self._leader_sent_us
            self.answer_append(leader, False, None, True)
