"""Who may lead, and for how long it may rely on that: pre-votes, steady voters, the leader's lease. Passive.

Invariant: while a leader's lease runs, no other master is elected. The lease runs from the moment at which the leader
*sent* what a majority has answered, for LEASE_SHARE of the shortest election timeout; a voter does not vote within
the shortest election timeout after it *received* that (Raft thesis, sections 4.2.3 and 6.4). Receiving comes after
sending, and the share leaves room for clocks whose rates differ by a fifth.

Order rules:

1. A voter that hears a leader ignores candidates: it neither votes nor takes over their term. A leader whose lease
   runs hears itself. A voter that has just started may have heard a leader before it forgot, so it counts as having
   heard one at its start.
2. Nobody stands for election before a majority has said that it would vote for it (pre-vote, thesis 9.6). So a master
   that was cut off comes back with the term that it left with, and deposes nobody. Two that stand in one term each
   vote for themselves, and another election timeout passes without a leader: so of two that ask at the same moment one
   withdraws, and who said yes lets the other stand before it asks itself. Without this one failover in thirty took
   twice as long: timeouts are looked at every half append period, and whenever a message comes.
3. Should a follower have a later term all the same (it stood, and lost), its answer says so and the leader steps down:
   otherwise neither would ever accept the other.
4. A leader that has asked a follower to take over breaks rule 1 on purpose, so from then on it has no lease in its
   term; if it still leads after two election timeouts it steps down, so that the next term has a lease again. It also
   appends nothing more (thesis 3.10), or the follower would lack that and lose the election; commands wait meanwhile.
5. Whose wall clock is far off does not stand, though a majority would vote for it (clock_duty.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pysyncobj.node import Node

from coordinator.config import RaftSettings
from coordinator.raft.clock_duty import ClockDuty
from coordinator.raft.clock_links import ClockedLinks
from coordinator.raft.engine import Links, SyncEngine, now_s
from coordinator.raft.frames import Message
from coordinator.raft.voters import Voters

LEASE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Protections:
    """What keeps PySyncObj from losing data, each to be switched off by the tests that show why it is there."""

    syncs_before_answering: bool = True
    """An answer leaves, and an entry counts, only once the entry is on disk."""
    hears_leader: bool = True
    """Voters ignore candidates while they hear a leader, and pre-votes come first."""
    lease_counts_from_sending: bool = True
    """The lease begins when the append was sent, not when its answer came."""
    checks_term_of_answers: bool = True
    """An answer of another term counts for nothing."""
    resumes_at_commit: bool = True
    """A follower that differs names the place after its commit index."""


class Outbox:
    """What PySyncObj sends through: adds to a candidate's request whether the leader asked for the election."""

    def __init__(self, links: Links, is_transfer: Callable[[], bool]) -> None:
        self._links = links
        self._is_transfer = is_transfer

    def send(self, node: Node, message: Message) -> bool:
        if message["type"] == "request_vote":
            message["is_transfer"] = self._is_transfer()
        return self._links.send(node, message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._links, name)


class Elections:
    """One master's view of who leads."""

    def __init__(
        self,
        engine: SyncEngine,
        others: list[Node],
        settings: RaftSettings,
        protections: Protections,
        voters: Voters,
        links: ClockedLinks,
    ) -> None:
        self._engine = engine
        self._others = others
        self._settings = settings
        self._protections = protections
        self._voters = voters
        self._send = links.send
        self.duty = ClockDuty(engine, others, settings, links.clocks, voters.may_speak)
        self._heard_s = now_s()
        self.pre_votes = 0
        """Times that this master has asked for pre-votes."""
        self._asked_term = 0
        """The term that the running pre-vote is for."""
        self._granted: set[Node] = set()
        self._answered_us: dict[Node, int] = {}
        """When the latest append that each follower has answered was sent, in this term."""
        self._lease_term = 0
        self._transfer_term = 0
        self._transfer_s = -math.inf
        self.is_transfer = False
        """True when the election that PySyncObj holds next was asked for by the leader."""

    # The lease

    def has_lease(self) -> bool:
        """True while this leader may rely on it that nobody else leads."""
        return self._engine._isLeader() and now_s() < self._lease_until_s()

    def _lease_until_s(self) -> float:
        if not self._others:
            return math.inf
        term = int(self._engine.raftCurrentTerm)
        if self._lease_term != term or self._transfer_term == term:
            return -math.inf
        needed = (len(self._others) + 1) // 2
        latest = sorted(self._answered_us.values(), reverse=True)
        if len(latest) < needed:
            return -math.inf
        return latest[needed - 1] / 1e6 + LEASE_SHARE * self._settings.election_timeout_s_min

    def answered(self, node: Node, sent_at_us: int) -> None:
        """A follower of this term has answered what was sent at `sent_at_us`."""
        if self._lease_term != self._engine.raftCurrentTerm:
            self._lease_term = int(self._engine.raftCurrentTerm)
            self._answered_us.clear()
        if not self._protections.lease_counts_from_sending:
            sent_at_us = round(now_s() * 1e6)
        self._answered_us[node] = max(sent_at_us, self._answered_us.get(node, 0))

    def transfer_asked(self) -> None:
        """This leader has asked a follower to take over (order rule 4)."""
        self._transfer_term = int(self._engine.raftCurrentTerm)
        self._transfer_s = now_s()

    def is_handing_over(self) -> bool:
        """True for a leader that has asked a follower to take over."""
        return bool(self._engine._isLeader()) and self._transfer_term == self._engine.raftCurrentTerm

    # Hearing a leader

    def heard_leader(self) -> None:
        """An append or a chunk of the present leader came in."""
        self._heard_s = now_s()
        self._asked_term = 0
        self.duty.heard_leader()

    def _hears_leader(self) -> bool:
        if not self._protections.hears_leader:
            return False
        return self.has_lease() or now_s() - self._heard_s < self._settings.election_timeout_s_min

    def may_vote(self, message: Message) -> bool:
        """False for a candidate that is to be ignored (order rule 1), and at a learner (voters.py)."""
        if not self._voters.speaks:
            return False
        is_transfer = message["is_transfer"] and message["term"] == self._engine.raftCurrentTerm + 1
        return is_transfer or not self._hears_leader()

    # Standing for election

    def advance(self) -> None:
        """Asks before an election; to be called before PySyncObj's tick."""
        engine = self._engine
        if engine._isLeader():
            is_stuck = now_s() > self._transfer_s + 2 * self._settings.election_timeout_s_max
            if self._transfer_term == engine.raftCurrentTerm and is_stuck:
                engine.become_follower(engine.raftCurrentTerm)
            return
        if not self._voters.speaks:
            if engine.has_election_due():
                engine.postpone_election()
            return
        self.is_transfer = engine.is_transfer_target()
        is_free = not self._protections.hears_leader or not self._others or self.is_transfer
        if is_free or not engine.has_election_due():
            return
        has_majority = self._asked_term == engine.raftCurrentTerm + 1 and self._has_majority()
        if has_majority and self.duty.may_stand(has_waited=True):
            return  # The majority said yes: PySyncObj may stand now.
        engine.postpone_election()
        self._asked_term = int(engine.raftCurrentTerm) + 1
        self.pre_votes += 1
        self._granted.clear()
        index, term = engine.last_entry()
        for node in self._others:
            self._send(
                node,
                {"type": "pre_vote", "term": self._asked_term, "last_log_index": index, "last_log_term": term},
            )

    def _has_majority(self) -> bool:
        return len(self._granted) + 1 > (len(self._others) + 1) / 2

    def take_pre_vote(self, node: Node, message: Message) -> None:
        """Says whether this master would vote for `node`."""
        index, term = self._engine.last_entry()
        is_complete = (message["last_log_term"], message["last_log_index"]) >= (term, index)
        may_vote = self._voters.speaks and not self._hears_leader()
        is_granted = message["term"] > self._engine.raftCurrentTerm and is_complete and may_vote
        if is_granted:
            self._make_way(node, message)
        self._send(
            node,
            {
                "type": "pre_vote_answer",
                "term": message["term"],
                "is_granted": is_granted,
                "voter_term": int(self._engine.raftCurrentTerm),
            },
        )

    def _make_way(self, node: Node, message: Message) -> None:
        """Lets a peer stand that this master would vote for, unless it asks too and has a majority or more to show."""
        is_rival = message["term"] == self._asked_term
        if is_rival and self._has_majority():
            return
        self._engine.hold_back(self._settings.append_period_s)
        index, term = self._engine.last_entry()
        theirs = (message["last_log_term"], message["last_log_index"], node.id)
        if is_rival and theirs > (term, index, self._engine.selfNode.id):
            self._asked_term = 0

    def take_pre_vote_answer(self, node: Node, message: Message) -> None:
        """Counts the answer; with a majority PySyncObj stands for election at its next tick."""
        engine = self._engine
        if message["voter_term"] > engine.raftCurrentTerm:
            # This master was away for an election or more; with its old term nobody would ever vote for it.
            engine.become_follower(message["voter_term"])
            self._asked_term = 0
            return
        is_current = message["term"] == self._asked_term == engine.raftCurrentTerm + 1
        if not (is_current and message["is_granted"]) or engine._isLeader():
            return
        self._granted.add(node)
        if self._has_majority() and self.duty.may_stand(has_waited=False):
            engine.stand_for_election()
