"""A migration of one replica of one shard: a resumable state machine in the replicated state.

    kind                      phases
    REPAIR (no source)        COPYING -> DONE
    DRAIN, ZONE, BALANCE      COPYING -> [CEDING, when the source is primary] -> REMOVING -> DONE
    TRANSFER (role only)      CEDING -> DONE
    SURPLUS (no target)       REMOVING -> DONE
    SPLIT, MERGE (neither)    CEDING -> DONE
    any, before the cutover   -> ABORTED

DESIGN.md section 7. coordinator/machine/moves.py is the one place that makes these transitions.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from coordinator.model.clock import NEVER_MS, WallMs


class MoveKind(enum.Enum):
    """Why a move was started, the most urgent first; the value is the number in types.proto."""

    REPAIR = 1
    DRAIN = 2
    ZONE = 3
    BALANCE = 4
    TRANSFER = 5
    SURPLUS = 6
    SPLIT = 7
    MERGE = 8

    @property
    def is_reshape(self) -> bool:
        """True for those that change ranges where they are, and no replica set."""
        return self in (MoveKind.SPLIT, MoveKind.MERGE)


class MovePhase(enum.Enum):
    """What a move waits for; the value is the number in types.proto."""

    COPYING = 1
    CEDING = 2
    REMOVING = 3
    DONE = 4
    ABORTED = 5


@dataclass(frozen=True, slots=True)
class Move:
    """One move. Fields as in `Move` of types.proto."""

    id: int
    shard_id: int
    source: str
    target: str
    kind: MoveKind
    phase: MovePhase
    reason: str = ""
    cause: str = ""
    started_ms: WallMs = NEVER_MS
    phase_since_ms: WallMs = NEVER_MS
    outcome: str = ""
    at: int = 0
    """SPLIT: first key hash of the upper half."""
    other_shard_id: int = 0
    """MERGE: the upper neighbour."""
    created_shard_ids: tuple[int, ...] = ()
    """SPLIT and MERGE: the shards that it made, by range."""

    @property
    def shard_ids(self) -> tuple[int, ...]:
        """The shards that it holds on to, by range."""
        return (self.shard_id, self.other_shard_id) if self.other_shard_id else (self.shard_id,)

    @property
    def has_ended(self) -> bool:
        """True when nothing more will happen."""
        return self.phase in (MovePhase.DONE, MovePhase.ABORTED)
