"""The replicated state as one immutable value.

Every change makes a new `State` that shares all it can with the old one (the maps are hash array mapped tries, from the
library `immutables`), so a refused or failed command cannot leave half a change behind, and a snapshot can be written
from a state while the machine goes on.

Maps have no order that two masters agree on: whoever iterates sorts first. `launch_times`, `launch_counts` and
`move_of_shard` follow from the other fields and are kept because they are asked for often; they are not part of a
snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from immutables import Map

from coordinator.api.v1 import command_pb2
from coordinator.model import (
    NEVER_MS,
    AdmittedMaster,
    ClusterSettings,
    CronJob,
    Launch,
    LaunchState,
    LogRecord,
    Move,
    Node,
    Shard,
    WallMs,
)

LaunchKey = tuple[str, WallMs]
"""(job id, scheduled time): the identity of a launch."""


@dataclass(frozen=True, slots=True)
class RememberedResult:
    """What a request answered, so that a retry answers the same."""

    request_id: str
    index: int
    at_ms: WallMs
    result: command_pb2.CommandResult


@dataclass(frozen=True, slots=True)
class State:
    """Everything that the masters agree on, after the log entry at `index`."""

    cluster_id: str = ""
    index: int = 0
    time_ms: WallMs = NEVER_MS
    settings: ClusterSettings = field(default_factory=ClusterSettings)
    nodes: Map[str, Node] = field(default_factory=Map)
    shards: Map[int, Shard] = field(default_factory=Map)
    moves: Map[int, Move] = field(default_factory=Map)
    """Moves in progress, by id."""
    ended_moves: Map[int, Move] = field(default_factory=Map)
    """The latest moves that ended, by id; bounded."""
    jobs: Map[str, CronJob] = field(default_factory=Map)
    masters: Map[str, AdmittedMaster] = field(default_factory=Map)
    """Masters whose disk was replaced, by id."""
    launches: Map[LaunchKey, Launch] = field(default_factory=Map)
    """Launches that are kept, bounded per job; those in progress are always kept."""
    events: Map[int, LogRecord] = field(default_factory=Map)
    """The cluster's story by sequence; bounded, without gaps."""
    results: Map[str, RememberedResult] = field(default_factory=Map)
    """Remembered results by request id; bounded by count and age (machine.py)."""
    result_order: Map[int, str] = field(default_factory=Map)
    """Request ids by the order in which they were remembered, without gaps; the last is next_result_position - 1."""
    next_result_position: int = 1
    next_shard_id: int = 1
    next_move_id: int = 1
    next_event_sequence: int = 1
    move_of_shard: Map[int, int] = field(default_factory=Map)
    """Id of the move in progress, by shard id. Derived."""
    launch_times: Map[str, tuple[WallMs, ...]] = field(default_factory=Map)
    """Scheduled times of the launches that are kept, ascending, by job id. Derived."""
    launch_counts: Map[LaunchState, int] = field(default_factory=Map)
    """How many launches are kept, by state; none is no entry. Derived."""


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A worker's record was made (`before` is None), changed, or forgotten (`after` is None)."""

    before: Node | None
    after: Node | None


@dataclass(frozen=True, slots=True)
class ShardChanged:
    """A shard was made, changed, or ended."""

    before: Shard | None
    after: Shard | None


@dataclass(frozen=True, slots=True)
class MoveChanged:
    """A move started, went on, or ended (`after.has_ended`)."""

    before: Move | None
    after: Move


@dataclass(frozen=True, slots=True)
class JobChanged:
    """A job was made, changed, or forgotten."""

    before: CronJob | None
    after: CronJob | None


@dataclass(frozen=True, slots=True)
class LaunchChanged:
    """A launch was committed, went on, ended, or was recorded as not made."""

    before: Launch | None
    after: Launch


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    """The settings were replaced."""

    before: ClusterSettings
    after: ClusterSettings


Change = NodeChanged | ShardChanged | MoveChanged | JobChanged | LaunchChanged | SettingsChanged
"""What a command did to one thing."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What applying one log entry gave."""

    state: State
    result: command_pb2.CommandResult
    changes: tuple[Change, ...] = ()
    records: tuple[LogRecord, ...] = ()
    """The lines that it added to the story."""
