"""Replicas as their workers report them: forms shards that are new, takes out replicas that fail.

    a shard that is not formed, or has parents   every in-sync replica has made its store          FormShards
    any shard                                    its primary names an in-sync replica as lagging   DropReplica
    any shard                                    an in-sync replica says that it is lost           DropReplica

Only words on the shard's present epoch count (reports.py), and the machine compares that epoch once more. What is ready
to be formed is gathered for a moment and goes into one command, so the 256 shards of a new cluster need few. The last
replica that serves is never taken out: its shard waits, and is shown (`lost_copies`).

A replica that was taken out keeps its place (`absent`); when its worker lives the planner's repair brings it back at
once, and it catches up from where its log ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coordinator.api.v1 import command_pb2
from coordinator.control.interface import Action, Applied, Event, ProposalEnded, ReplicasReported, Step, Tokens
from coordinator.control.proposals import Proposals
from coordinator.control.reports import LOST, Reports
from coordinator.control.timers import earliest
from coordinator.machine.state import NodeChanged, ShardChanged, State
from coordinator.model import Monotonic, Shard, WallMs

GATHER_S = 0.02
"""Reports that come together are formed together."""
FORM_PAUSE_S = 0.2
"""Least time between two FormShards: making 256 stores takes a worker seconds; a command for each would be waste."""
FORMED_PER_COMMAND = 5_000
"""At 15 bytes each 75 kB, far below the limit of a command."""
FORM = "form"
"""Subject of the FormShards on its way; drops have the shard's id."""


@dataclass(frozen=True, slots=True)
class LostCopy:
    """The last replica of a shard is lost: only its worker can say whether it comes back."""

    shard_id: int
    node_id: str
    reason: str


class ReplicaControl:
    """The replicas controller of one leader."""

    def __init__(self, state: State, reports: Reports, tokens: Tokens, now: Monotonic, command_bytes_max: int) -> None:
        self._state = state
        self._reports = reports
        self._proposals = Proposals("replicas", tokens)
        self._forming = {shard.id for shard in state.shards.values() if _is_forming(shard)}
        self._formed_max = max(1, min(FORMED_PER_COMMAND, command_bytes_max // 64))
        self._ready: dict[int, int] = {}
        """Epochs of the shards that may be formed, by id."""
        self._form_due: Monotonic | None = None
        self._formed_at = Monotonic(float("-inf"))
        self._failing: set[int] = set()
        """Shards of which a replica was reported to fail, at the present epoch when it was last looked at."""

    def lost_copies(self) -> tuple[LostCopy, ...]:
        """Shards whose last replica is lost, by id."""
        found = []
        for shard_id in sorted(self._failing):
            shard = self._state.shards[shard_id]
            said = self._reports.of(shard.primary, shard)
            if said is not None and said.progress == LOST:
                found.append(LostCopy(shard_id, shard.primary, said.reason))
        return tuple(found)

    # Controller

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        match event:
            case Applied():
                concerned = self._take_changes(now, event)
            case ReplicasReported():
                concerned = self._take_reports(now, event)
            case ProposalEnded():
                ended = self._proposals.end(now, event)
                concerned = {int(ended.subject)} if ended is not None and ended.subject != FORM else set()
            case _:
                concerned = set()
        return self._step(now, concerned)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        return self._step(now, set(self._failing))

    def _take_changes(self, now: Monotonic, event: Applied) -> set[int]:
        """Shards with a failing replica of which something else may follow now."""
        self._state = event.state
        concerned: set[int] = set()
        for change in event.changes:
            if isinstance(change, ShardChanged):
                self._take_shard(now, change)
                concerned |= {change.after.id} & self._failing if change.after is not None else set()
            elif isinstance(change, NodeChanged):
                concerned |= self._failing
        return concerned

    def _take_shard(self, now: Monotonic, change: ShardChanged) -> None:
        shard = change.after or change.before
        if shard is None:
            return
        if change.after is not None and _is_forming(change.after):
            self._forming.add(shard.id)
            self._note_ready(now, change.after)
        else:
            self._forming.discard(shard.id)
            self._ready.pop(shard.id, None)
        if change.after is None:
            self._failing.discard(shard.id)
            self._proposals.forget(str(shard.id))

    def _take_reports(self, now: Monotonic, event: ReplicasReported) -> set[int]:
        """Shards of which a replica fails by these reports."""
        concerned: set[int] = set()
        for report in event.reports:
            shard = self._state.shards.get(report.shard_id)
            if shard is None:
                continue
            if shard.id in self._forming:
                self._note_ready(now, shard)
            if report.lagging or report.progress == LOST:
                self._failing.add(shard.id)
            if shard.id in self._failing:
                concerned.add(shard.id)
        return concerned

    def _note_ready(self, now: Monotonic, shard: Shard) -> None:
        said = [self._reports.of(name, shard) for name in shard.in_sync]
        if not all(word is not None and word.has_store for word in said):
            self._ready.pop(shard.id, None)
            return
        self._ready[shard.id] = shard.epoch
        if self._form_due is None:
            self._form_due = Monotonic(max(now + GATHER_S, self._formed_at + FORM_PAUSE_S))

    # Decisions

    def _step(self, now: Monotonic, concerned: set[int]) -> Step:
        actions: list[Action] = list(self._form(now))
        for shard_id in sorted(concerned):
            actions += self._look(now, shard_id)
        wakes = [self._form_due if self._form_due is not None and self._form_due > now else None]
        if self._failing or self._ready:
            wakes.append(self._proposals.next_free(now))
        return Step(tuple(actions), earliest(*wakes))

    def _form(self, now: Monotonic) -> Iterator[Action]:
        """Forms what is ready, when it is time."""
        if not self._ready:
            self._form_due = None
            return
        if self._form_due is None:
            self._form_due = now
        if now < self._form_due or not self._proposals.is_free(now, self._state.index, FORM):
            return
        self._formed_at = now
        self._form_due = Monotonic(now + FORM_PAUSE_S)
        first = sorted(self._ready.items())[: self._formed_max]
        formed = [command_pb2.FormShards.Formed(shard_id=shard_id, epoch=epoch) for shard_id, epoch in first]
        command = command_pb2.Command(form_shards=command_pb2.FormShards(shards=formed))
        yield from self._proposals.propose(now, self._state.index, FORM, command)

    def _look(self, now: Monotonic, shard_id: int) -> Iterator[Action]:
        """Takes a replica out that fails. Harmless at any time."""
        shard = self._state.shards.get(shard_id)
        failing = self._first_failing(shard) if shard is not None else None
        if shard is None or failing is None:
            self._failing.discard(shard_id)
            return
        node_id, reason = failing
        nodes = self._state.nodes
        is_needed = not any(name != node_id and nodes[name].is_serving for name in shard.in_sync)
        if is_needed or (shard.quarantine and node_id == shard.primary):
            return
        drop = command_pb2.DropReplica(
            shard_id=shard.id,
            expected_epoch=shard.epoch,
            node_id=node_id,
            reason=reason,
            heir=self._reports.best_heir(self._state, shard, node_id),
        )
        command = command_pb2.Command(drop_replica=drop)
        yield from self._proposals.propose(now, self._state.index, str(shard.id), command)

    def _first_failing(self, shard: Shard) -> tuple[str, str] | None:
        """A replica to be taken out, and why: lost ones before those that lag."""
        for node_id in shard.in_sync:
            said = self._reports.of(node_id, shard)
            if said is not None and said.progress == LOST:
                return node_id, f"its copy is lost: {said.reason}" if said.reason else "its copy is lost"
        said = self._reports.of(shard.primary, shard)
        if said is not None:
            for node_id in said.lagging:
                if node_id in shard.in_sync and node_id != shard.primary:
                    return node_id, said.reason or f"it does not follow {shard.primary}"
        return None


def _is_forming(shard: Shard) -> bool:
    """True while the shard's replicas still have to say that they made their stores."""
    return bool(shard.in_sync) and (not shard.is_formed or bool(shard.parents))
