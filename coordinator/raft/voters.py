"""Whose votes and acknowledgements count: which disk may speak for which master. Passive.

A majority is always one of all masters in the configuration, so nothing here changes what a majority is; what changes
is which disk speaks for a master. A disk that was lost has forgotten what it voted and what it acknowledged, so the
empty one in its place must not speak until nothing that was forgotten can matter any more.

Rules:

1. A disk has a random name and begins as a **learner**: it takes in the log, and answers; but it neither votes nor
   stands for election, and its acknowledgements count for nothing, nor for the leader's lease.
2. **Founding.** A learner whose own log is empty votes once it is connected with *all* other masters and none of them
   has any history either (a term, or an entry). If this disk had ever spoken, somebody would have history: whoever it
   voted for had the term on disk before, and so had whoever it acknowledged. So a majority of empty disks never
   elects while one master with history may be somewhere. One that was there, but saw another too late (somebody has
   history by then), is admitted by the leader (rule 3, server/founders.py).
3. **Replacing.** The command AdmitMaster names the new disk of a master. Its entry takes the old disk's word away as
   soon as it stands in a log, committed or not: this master counts no vote and no acknowledgement of the old disk from
   then on, and does so again should the entry be overwritten; the old disk itself falls silent (thesis 4.2.2). It gives
   the new disk its word only when that disk itself has applied the entry, so knows it to be committed; for the term in
   which it learned that it gives no vote.

Why rule 3 is safe, with 2f + 1 masters: the entry, of term T, is committed by f + 1 disks, neither the old nor the new
one among them. An entry that the old disk had acknowledged, and that was committed, is on f others; each f + 1 of the
other 2f have one of those among them, so no master is elected without it, and the new disk has the log up to its
admission, so has it too. A candidate that holds a forgotten vote of the old disk in a term after T lacks the admission
(who has it counts no such vote), and needs f - 1 votes more from 2f - 1 others, of which f + 1 hold the admission in
their log and so refuse it, or voted for it before they took the admission in; but those could not take it in any more,
as T was over for them. (Raft thesis 4.1 has the same argument for changing one server at a time: taking the old disk's
word away and giving it to the new one are two changes, the second only after the first is committed.)

At most one admission is on its way at a time, or so many words could be taken away that nothing is ever committed
again. A single master cannot be replaced this way, nor can a majority: restore a backup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coordinator.machine.state import State
from coordinator.model import AdmittedMaster
from coordinator.raft.entry import is_command, payload_of
from coordinator.raft.journal import Journal

_NO_LIMIT = 1 << 62


def _nobody(state: State) -> Mapping[str, AdmittedMaster]:
    return {}


def _none(payload: bytes) -> tuple[str, str] | None:
    return None


@dataclass(frozen=True, slots=True)
class Membership:
    """A master's own disk, and where a machine's states and commands speak of disks."""

    disk_id: str = ""
    is_voter: bool = True
    admitted: Callable[[State], Mapping[str, AdmittedMaster]] = _nobody
    """The masters whose disk was replaced, by id, as a state has them."""
    admission: Callable[[bytes], tuple[str, str] | None] = _none
    """Master and disk of a serialized admission; None for any other command."""


@dataclass(frozen=True, slots=True)
class _Admission:
    """An admission that stands in the log and is not applied yet."""

    index: int
    master_id: str
    disk_id: str


class Voters:
    """What one master knows of whose word counts. `disk_of(id)` names the disk that a connected peer said it has."""

    def __init__(
        self, self_id: str, membership: Membership, journal: Journal, disk_of: Callable[[str], str]
    ) -> None:
        self.is_voter = membership.is_voter
        """True when this master's own disk was founded or admitted."""
        self._self_id = self_id
        self._membership = membership
        self._journal = journal
        self._disk_of = disk_of
        self._state = State()
        self._applied_index = 0
        self._in_log: list[_Admission] = []
        self._scanned_index = 0
        self._scanned_cuts = journal.cuts

    def applied(self, state: State, index: int) -> None:
        """The state includes the log up to `index` now."""
        self._state, self._applied_index = state, index

    def disk_for(self, master_id: str) -> str:
        """The disk that speaks for a master by this one's log; empty for the one that it was founded with."""
        self._scan()
        for admission in reversed(self._in_log):
            if admission.master_id == master_id:
                return admission.disk_id
        return self.disk_in_state(master_id)

    def disk_in_state(self, master_id: str) -> str:
        """The same by what this master knows to be committed."""
        admitted = self._membership.admitted(self._state).get(master_id)
        return admitted.disk_id if admitted is not None else ""

    def may_speak(self, peer_id: str) -> bool:
        """True when a connected peer's disk is the one that speaks for it. A learner is silent by itself (rule 1)."""
        wanted = self.disk_for(peer_id)
        return not wanted or wanted == self._disk_of(peer_id)

    @property
    def speaks(self) -> bool:
        """True when this master's own disk may vote, stand and acknowledge."""
        return self.is_voter and self.disk_for(self._self_id) in ("", self._membership.disk_id)

    @property
    def is_admitted(self) -> bool:
        """True when this master's disk is the one that its own state, committed as it is, names."""
        return self.disk_in_state(self._self_id) == self._membership.disk_id

    @property
    def replaced_by(self) -> str:
        """The disk that took the place of this master's by its own committed state; empty while none has."""
        named = self.disk_in_state(self._self_id)
        return named if named != self._membership.disk_id else ""

    @property
    def has_admission_on_its_way(self) -> bool:
        """True while an admission stands in the log that is not applied."""
        self._scan()
        return bool(self._in_log)

    def admission(self, entry: bytes) -> tuple[str, str] | None:
        """Master and disk of a log entry that is an admission."""
        return self._membership.admission(payload_of(entry)) if is_command(entry, _NO_LIMIT) else None

    def _scan(self) -> None:
        """Looks at what the log got since the last time; after a cut, at everything that is not applied."""
        journal = self._journal
        if self._scanned_cuts != journal.cuts:
            self._scanned_cuts, self._scanned_index = journal.cuts, 0
            self._in_log.clear()
        if self._in_log and self._in_log[0].index <= self._applied_index:
            self._in_log = [one for one in self._in_log if one.index > self._applied_index]
        first = max(self._scanned_index, self._applied_index, journal[0][1] - 1) + 1
        self._scanned_index = journal[-1][1]
        if first > self._scanned_index:
            return
        for command, index, _ in journal[first - journal[0][1] :]:
            found = self.admission(command)
            if found is not None:
                self._in_log.append(_Admission(index, *found))
