"""What must hold in every simulated run, checked after each call into a master, after each start, and at the end.

After each call: one leader per term; an index and a term name one entry and one log before it, in whichever log they
stand; a new leader has what was committed in earlier terms; what one master calls
committed every other calls committed, at the same index with the same term and bytes; a commit index never falls within
a life; at most one master holds the lease. After each start: an entry that was durable and is committed is still there.
At the end: all states are equal, sound, and what the committed entries give; everything that was acknowledged is among
them, nothing twice, nothing that was denied; and the history is linearizable.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from coordinator.api.v1 import command_pb2
from coordinator.machine.machine import apply_bytes
from coordinator.machine.snapshot import encode_snapshot
from coordinator.machine.state import State
from coordinator.machine.validate import validate
from coordinator.raft.entry import NO_OP, payload_of, time_of
from coordinator.raft.journal import Journal
from tests.sim.linearizability import Operation, find_violation

if TYPE_CHECKING:
    from tests.sim.raft_disk import Disk
    from tests.sim.raft_master import Master
    from tests.sim.raft_world import World


Added = tuple[int, int, int | None, bytes]
"""(index, term, term of the entry before where the log has it, command)."""


class Violation(AssertionError):
    """Something that must hold does not."""


class WatchedJournal(Journal):
    """The real journal; says which entries a sync has made durable."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._new: list[tuple[int, int]] = []
        self.durable: list[tuple[int, int]] = []
        """(index, term) of what was synced since the checks looked last."""
        self.added: list[Added] = []
        """What was added since the checks looked last."""
        super().__init__(*arguments, **options)

    def add(self, command: bytes, idx: int, term: int) -> None:
        super().add(command, idx, term)
        self._new.append((idx, term))
        self.added.append((idx, term, self.term_at(idx - 1), command))

    def sync(self) -> None:
        super().sync()
        self.durable += self._new
        self._new.clear()


class Checks:
    """`look` after each call, `started` after each start, `finish` once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.leader_of_term: dict[int, str] = {}
        self.committed: dict[int, tuple[int, bytes]] = {}
        """(term, entry) of every index that some master called committed."""
        self._committed_in: dict[int, int] = {}
        """In which term a leader committed the index; leaders of later terms must have the entry."""
        self._last_committed = 0
        self._entry_of: dict[tuple[int, int], tuple[int | None, bytes]] = {}
        """(term of the entry before, command) of every (index, term) that ever stood in a log."""
        self._seen_commit: dict[str, int] = {}
        self._durable_term: dict[Disk, dict[int, int]] = {}

    def look(self, master: Master) -> None:
        """What holds at every moment."""
        consensus = master.consensus
        if consensus is None:
            return
        self._durable_term.setdefault(master.disk, {}).update(master.journal.durable)
        master.journal.durable.clear()
        self._match_logs(master, master.journal.added)
        master.journal.added.clear()
        if consensus.commit_index != self._seen_commit[master.id]:
            self._commit_moved(master, consensus.commit_index, consensus.term)
        if consensus.is_raft_leader:
            self._leads(master, consensus.term)

    def _match_logs(self, master: Master, entries: list[Added]) -> None:
        """Log matching (Raft, figure 3), entry by entry: by induction the whole logs before it are equal too."""
        for index, term, term_before, command in entries:
            known_before, known = self._entry_of.get((index, term), (term_before, command))
            # A log that begins with a snapshot's two entries does not say what was before them.
            known_before = term_before if known_before is None else known_before
            if known != command or term_before not in (None, known_before):
                raise Violation(f"{master.id} has another entry {index} of term {term}, or another log before it")
            self._entry_of[index, term] = known_before, known

    def _commit_moved(self, master: Master, commit: int, term: int) -> None:
        before = self._seen_commit[master.id]
        if commit < before:
            raise Violation(f"{master.id} took its commit index back from {before} to {commit}")
        self._seen_commit[master.id] = commit
        for index in range(before + 1, commit + 1):
            found = _entry(master, index)
            if found is None:
                continue
            known = self.committed.setdefault(index, found)
            self._committed_in.setdefault(index, term)
            if known != found:
                raise Violation(f"{master.id} committed {_show(found)} at {index}, another one {_show(known)}")
        self._last_committed = max(self._last_committed, commit)

    def _leads(self, master: Master, term: int) -> None:
        if term not in self.leader_of_term:
            self._world.note(f"{master.id} leads in term {term}")
            self.leader_of_term[term] = master.id
            for index in range(self._seen_commit[master.id] + 1, self._last_committed + 1):
                known = self.committed.get(index)
                if known and self._committed_in[index] < term and _entry(master, index) != known:
                    raise Violation(f"{master.id} leads in term {term} without the committed entry {index}")
        if self.leader_of_term[term] != master.id:
            raise Violation(f"{master.id} leads in term {term}, and so did {self.leader_of_term[term]}")
        others = [other for other in self._world.masters.values() if other.consensus and other.consensus.is_raft_leader]
        holders = [other.id for other in others if not other.is_busy and _holds_lease(other)] if others[1:] else []
        if len(holders) > 1:
            raise Violation(f"{' and '.join(holders)} hold the lease at the same time")

    def started(self, master: Master) -> None:
        """What was durable is there, as far as it is committed."""
        consensus = master.consensus
        assert consensus is not None
        self._seen_commit[master.id] = consensus.commit_index
        journal = master.journal
        held = [(index, term, journal.term_at(index - 1), command) for command, index, term in list(journal)]
        self._match_logs(master, held)
        durable = self._durable_term.setdefault(master.disk, {})
        for index in [index for index in durable if index <= consensus.commit_index]:
            del durable[index]
        for index, term in durable.items():
            known = self.committed.get(index)
            if known is not None and known[0] == term and _entry(master, index) != known:
                raise Violation(f"{master.id} lost entry {index} of term {term}, durable and committed, by a restart")

    def state_of_log(self) -> tuple[State, Counter[str]]:
        """What the committed entries give, and how often each request id was applied."""
        state, applied = State(), Counter[str]()
        # Entry 1 is the one with which every log begins.
        for index in range(2, self._last_committed + 1):
            if index not in self.committed:
                raise Violation(f"nobody has seen the committed entry {index}")
            entry = self.committed[index][1]
            if entry == NO_OP:
                continue
            transition = apply_bytes(state, payload_of(entry), index, time_of(entry))
            if transition.records:
                applied[command_pb2.Command.FromString(payload_of(entry)).request_id] += 1
            state = transition.state
        return state, applied

    def finish(self, acknowledged: dict[str, int], denied: set[str], history: list[Operation], initial: float) -> None:
        """What must hold at the end, when all masters have applied everything."""
        expected, applied = self.state_of_log()
        validate(expected)
        encoded = encode_snapshot(expected)
        for master in self._world.masters.values():
            assert master.consensus is not None
            if encode_snapshot(master.consensus.state) != encoded:
                raise Violation(f"the state of {master.id} is not what the committed entries give")
        for request_id, index in acknowledged.items():
            kept = expected.results.get(request_id)
            if kept is None or kept.index != index:
                found = kept and kept.index
                raise Violation(f"{request_id} was acknowledged at {index}, and the log has it at {found}")
        for request_id, count in applied.items():
            if request_id and count > 1:
                raise Violation(f"{request_id} was applied {count} times")
            if request_id in denied:
                raise Violation(f"{request_id} was applied, though its client heard that it never would be")
        violation = find_violation(_without_unseen(history), initial)
        if violation is not None:
            lines = "\n".join(f"    {operation}" for operation in violation)
            raise Violation(f"the history of {violation[0].key} is not linearizable:\n{lines}")


def _entry(master: Master, index: int) -> tuple[int, bytes] | None:
    journal = master.journal
    position = index - journal[0][1]
    if not 0 <= position < len(journal):
        return None
    command, _, term = journal[position]
    return term, command


def _show(entry: tuple[int, bytes]) -> str:
    return f"an entry of term {entry[0]} with {len(entry[1])} bytes"


def _holds_lease(master: Master) -> bool:
    outer, master.world.running = master.world.running, master
    try:
        return master.consensus is not None and master.consensus.has_lease
    finally:
        master.world.running = outer


def _without_unseen(history: list[Operation]) -> list[Operation]:
    """Without writes that never answered and that nobody read: "never happened" explains them, whatever else is."""
    read = {(operation.key, operation.value) for operation in history if not operation.is_write}
    return [
        operation
        for operation in history
        if operation.returned != float("inf") or (operation.key, operation.value) in read
    ]
