"""A worker as the masters have agreed on it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from coordinator.model.clock import NEVER_MS, WallMs


class NodeState(enum.Enum):
    """Where a worker stands; the value is the number in types.proto."""

    JOINING = 1
    ACTIVE = 2
    DRAINING = 3
    DOWN = 4
    LEFT = 5


@dataclass(frozen=True, slots=True)
class Node:
    """One worker. Fields as in `Node` of types.proto."""

    id: str
    zone: str = ""
    weight: float = 1.0
    grpc_address: str = ""
    http_address: str = ""
    version: str = ""
    incarnation: str = ""
    state: NodeState = NodeState.JOINING
    drain_requested: bool = False
    suspect_since_ms: WallMs = NEVER_MS
    state_since_ms: WallMs = NEVER_MS
    registered_ms: WallMs = NEVER_MS
    labels: tuple[tuple[str, str], ...] = ()
    """Sorted pairs of name and value."""
    configured_weight: float = 1.0
    """What the worker's own configuration said last: `weight` follows it when it changes, or an operator's word."""

    @property
    def is_suspect(self) -> bool:
        """True while the masters do not hear it."""
        return self.suspect_since_ms != NEVER_MS

    @property
    def may_receive(self) -> bool:
        """True when new shards and jobs may be placed on it."""
        return self.state is NodeState.ACTIVE and not self.is_suspect

    @property
    def is_serving(self) -> bool:
        """True when it can answer for what it holds: admitted, and heard."""
        return self.state in (NodeState.ACTIVE, NodeState.DRAINING) and not self.is_suspect

    def has_labels(self, required: tuple[tuple[str, str], ...]) -> bool:
        """True when it has every one of these labels."""
        return set(required) <= set(self.labels)
