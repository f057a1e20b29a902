"""A migration of one replica of one shard: a resumable state machine in the replicated state.

    kind                      phases
    REPAIR (no source)        COPYING -> DONE
    DRAIN, ZONE, BALANCE      COPYING -> [CEDING, when the source is primary] -> REMOVING -> DONE
    TRANSFER (role only)      CEDING -> DONE
    SURPLUS (no target)       REMOVING -> DONE
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

    @property
    def has_ended(self) -> bool:
        """True when nothing more will happen."""
        return self.phase in (MovePhase.DONE, MovePhase.ABORTED)
