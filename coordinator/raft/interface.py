"""What RaftNode takes and tells: the machine that it replicates, and how it stands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from coordinator.machine.machine import apply_bytes
from coordinator.machine.masters import admission
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.machine.state import State, Transition
from coordinator.model import AdmittedMaster
from coordinator.raft.consensus import Apply

log = logging.getLogger(__name__)

def _cluster_id(state: State) -> str:
    return state.cluster_id


def _admitted(state: State) -> Mapping[str, AdmittedMaster]:
    return state.masters


@dataclass(frozen=True, slots=True)
class Machine:
    """The state machine that is replicated; tests bring their own. Of `State` this package reads only `index`."""

    apply: Apply = apply_bytes
    encode: Callable[[State], bytes] = encode_snapshot
    decode: Callable[[bytes], State] = decode_snapshot
    cluster_id: Callable[[State], str] = _cluster_id
    """The cluster's identity in a state; empty before there is one."""
    admitted: Callable[[State], Mapping[str, AdmittedMaster]] = _admitted
    """The masters whose disk was replaced, by id."""
    admission: Callable[[bytes], tuple[str, str] | None] = admission
    """Master and disk of a serialized admission; None for any other command."""


@dataclass(frozen=True, slots=True)
class RaftStatus:
    """How one master stands in the consensus."""

    role: str
    """"follower", "candidate", "leader", "learner" or "stopped"."""
    leader_id: str | None
    term: int
    commit_index: int
    applied_index: int
    log_entries: int
    log_bytes: int
    connected_peers: tuple[str, ...]
    """Ids, sorted."""


@dataclass(frozen=True, slots=True)
class PeerStanding:
    """Another master, as this one sees it over their connection."""

    disk_id: str
    """Random name of its data directory."""
    is_learner: bool
    """True while that disk does not vote."""
    is_founder: bool
    """True when it is the disk that this master saw, empty, when its own was founded, in the life of this process."""
    matched_index: int
    """At the leader: index up to which its log is known to be the leader's."""


@dataclass(slots=True)
class Listeners:
    """Who is called back for what was applied, and for who leads."""

    transition: list[Callable[[Transition], None]] = field(default_factory=list)
    leadership: list[Callable[[bool, int], None]] = field(default_factory=list)

    def applied(self, transition: Transition) -> None:
        """Tells of a transition."""
        _call(self.transition, transition)

    def led(self, is_leader: bool, term: int) -> None:
        """Tells that this master leads now, or no longer."""
        _call(self.leadership, is_leader, term)


def _call(listeners: list[Callable[..., None]], *arguments: object) -> None:
    for listener in listeners:
        try:
            listener(*arguments)
        except Exception:
            log.exception("a listener of the consensus failed")
