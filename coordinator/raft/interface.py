"""What RaftNode takes and tells: the machine that it replicates, and how it stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from coordinator.machine.machine import apply_bytes
from coordinator.machine.masters import admission
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.machine.state import State, Transition
from coordinator.model import AdmittedMaster
from coordinator.raft.consensus import Apply

log = logging.getLogger(__name__)

REST_S = 0.002


def encode_gently(state: State) -> bytes:
    """The state's bytes, made in a thread beside the event loop, with a rest after every millisecond of work.

    uvloop takes the interpreter anew for every callback. A thread that computes lets go of it only when asked for 5 ms,
    or later on a busy machine, so a leader stood still for 0.2 to 0.5 s with hardly anything to compute itself.
    """
    return encode_snapshot(state, pause=lambda: time.sleep(REST_S))


def _cluster_id(state: State) -> str:
    return state.cluster_id


def _admitted(state: State) -> Mapping[str, AdmittedMaster]:
    return state.masters


@dataclass(frozen=True, slots=True)
class Machine:
    """The state machine that is replicated; tests bring their own. Of `State` this package reads only `index`."""

    apply: Apply = apply_bytes
    encode: Callable[[State], bytes] = encode_gently
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
