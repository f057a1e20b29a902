"""What workers last said of their replicas: soft state of one leader, shared by its controllers.

A report counts only for the epoch that the shard has now. Every change of a replica set makes a new epoch, and so does
every new process of a worker that held one; so what is late, or was said by a process that is gone, is worth nothing.
All is said again after each Welcome, so a new leader needs nothing from its predecessor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.api.v1 import command_pb2, session_pb2
from coordinator.config import MoveSettings
from coordinator.control.interface import Applied, Event, ReplicasReported, SessionOpened
from coordinator.machine.state import NodeChanged, ShardChanged, State
from coordinator.model import Shard

ACCEPTED = session_pb2.REPLICA_PROGRESS_ACCEPTED
CAUGHT_UP = session_pb2.REPLICA_PROGRESS_CAUGHT_UP
CEDED = session_pb2.REPLICA_PROGRESS_CEDED
LOST = session_pb2.REPLICA_PROGRESS_LOST


@dataclass(frozen=True, slots=True)
class Said:
    """A worker's latest report on one shard. Fields as in `ReplicaReport` of session.proto."""

    epoch: int
    progress: session_pb2.ReplicaProgress.ValueType
    caught_up: tuple[str, ...] = ()
    lagging: tuple[str, ...] = ()
    last_sequence: int = 0
    reason: str = ""

    @property
    def has_store(self) -> bool:
        """True when the worker has a store of the shard."""
        return self.progress in (ACCEPTED, CAUGHT_UP, CEDED)


class Reports:
    """The book of one leader. Whoever owns it shows it every event before anybody asks."""

    def __init__(self) -> None:
        self._said: dict[str, dict[int, Said]] = {}

    def take(self, event: Event) -> None:
        """Takes an event in; a report must be of the session that speaks for its worker."""
        match event:
            case ReplicasReported():
                of_node = self._said.setdefault(event.node_id, {})
                for report in event.reports:
                    known = of_node.get(report.shard_id)
                    if known is None or known.epoch <= report.epoch:
                        of_node[report.shard_id] = _said(report)
            case SessionOpened():
                # Every report comes again after the Welcome; what an earlier process said is worth nothing.
                self._said.pop(event.hello.node.id, None)
            case Applied():
                for change in event.changes:
                    if isinstance(change, NodeChanged) and change.after is None and change.before is not None:
                        self._said.pop(change.before.id, None)
                    elif isinstance(change, ShardChanged) and change.before is not None:
                        gone = set(change.before.replicas) - set(change.after.replicas if change.after else ())
                        for node_id in gone:
                            self._said.get(node_id, {}).pop(change.before.id, None)
            case _:
                pass

    def of(self, node_id: str, shard: Shard) -> Said | None:
        """What the worker says of the shard's present epoch; None when it has said nothing of it yet."""
        said = self._said.get(node_id, {}).get(shard.id)
        return said if said is not None and said.epoch == shard.epoch else None

    def has_said(self, node_id: str, shard: Shard, progress: session_pb2.ReplicaProgress.ValueType) -> bool:
        """True when that is the worker's latest word on the shard's present epoch."""
        said = self.of(node_id, shard)
        return said is not None and said.progress == progress

    def last_sequence(self, node_id: str, shard_id: int) -> int:
        """How far the worker's log reached when it last spoke of the shard, at whatever epoch; 0 when it never did."""
        said = self._said.get(node_id, {}).get(shard_id)
        return said.last_sequence if said is not None else 0

    def best_heir(self, state: State, shard: Shard, leaving: str) -> str:
        """Who should be primary after `leaving`: of the replicas that serve the one whose log reaches furthest.

        Empty when that is whom the machine takes by itself, the first by name.
        """
        names = [name for name in shard.in_sync if name != leaving and state.nodes[name].is_serving]
        if len(names) < 2:
            return ""
        best = max(names, key=lambda name: self.last_sequence(name, shard.id))
        return best if best != names[0] else ""


class LossWishes:
    """What the commands that take a worker out say of those who follow: `LossRules` of command.proto."""

    def __init__(self, reports: Reports, settings: MoveSettings, heirs_max: int) -> None:
        self._reports = reports
        self._settings = settings
        self._heirs_max = heirs_max

    def fill(
        self, command: command_pb2.Command, state: State, held: Iterable[int], node_id: str, *, is_fault: bool
    ) -> None:
        """Fills the rules in where the command has some. `held` are the shards that the worker holds."""
        operation = command.WhichOneof("operation")
        if operation not in ("register_node", "suspect_node", "expire_node"):
            return
        rules: command_pb2.LossRules = getattr(command, operation).loss
        for shard_id in sorted(held):
            shard = state.shards[shard_id]
            if shard.primary == node_id and len(rules.heirs) < self._heirs_max:
                heir = self._reports.best_heir(state, shard, node_id)
                if heir:
                    rules.heirs[shard_id] = heir
        if is_fault:  # Whoever says goodbye was not brought down by a shard.
            rules.quarantine_workers = self._settings.quarantine_workers
            rules.quarantine_window_ms = round(self._settings.quarantine_window_s * 1_000)


def _said(report: session_pb2.ReplicaReport) -> Said:
    return Said(
        epoch=report.epoch,
        progress=report.progress,
        caught_up=tuple(report.caught_up),
        lagging=tuple(report.lagging),
        last_sequence=report.last_sequence,
        reason=report.reason,
    )
