"""What RaftNode takes and tells: the machine that it replicates, and how it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.machine.machine import apply_bytes
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.machine.state import State, Transition
from coordinator.raft.consensus import Apply


def _cluster_id(state: State) -> str:
    return state.cluster_id


@dataclass(frozen=True, slots=True)
class Machine:
    """The state machine that is replicated; tests bring their own. Of `State` this package reads only `index`."""

    apply: Apply = apply_bytes
    encode: Callable[[State], bytes] = encode_snapshot
    decode: Callable[[bytes], State] = decode_snapshot
    cluster_id: Callable[[State], str] = _cluster_id
    """The cluster's identity in a state; empty before there is one."""


@dataclass(frozen=True, slots=True)
class RaftStatus:
    """How one master stands in the consensus."""

    role: str
    """"follower", "candidate", "leader" or "stopped"."""
    leader_id: str | None
    term: int
    commit_index: int
    applied_index: int
    log_entries: int
    log_bytes: int
    connected_peers: tuple[str, ...]
    """Ids, sorted."""


@dataclass(slots=True)
class Listeners:
    """Who is called back for what was applied, and for who leads."""

    transition: list[Callable[[Transition], None]] = field(default_factory=list)
    leadership: list[Callable[[bool, int], None]] = field(default_factory=list)
