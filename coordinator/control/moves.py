"""Drives every move in progress from phase to phase.

What a move waits for is soft state: the latest report of each worker on each shard (reports.py), which counts only for
the epoch that the shard has now. The machine compares that epoch again when the command is applied.

    phase     waits for                                                    command          at the deadline
    COPYING   the primary says that the target has caught up               PromoteReplica   AbortMove (copy_deadline_s)
              the primary says that the target gets no further             AbortMove
    CEDING    the source has ceded                                         CutOver          AbortMove (cede_deadline_s)
     (SPLIT, MERGE: the primaries have sealed)                             Reshape          AbortMove (the same)
    REMOVING  the new primary has taken note of its role (SURPLUS: none)   RemoveReplica    RemoveReplica (the same)

- It is the primary's word that promotes the target, never the target's own: the primary needs the target's disk for
  every acknowledgement from before it says so, and that set must grow before the command.
- A source that is not heard does not count as one that has ceded: it may still answer reads. SuspectNode gives its role
  away by the rules for a failure; until then the deadline rolls the move back.
- After the cutover a move only goes forward, so its deadline removes the source although the new primary is silent:
  what is decided is decided, and the source's copy would only grow old.
- A copy is given up when its target gets no further; for a while that is not chosen again (stalls.py).
- A copy whose reason has gone is rolled back: the source is no longer to be drained, or the target is to be drained.

Everything but the reports is in the replicated state. A new leader starts the deadlines anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from coordinator.api.v1 import command_pb2
from coordinator.config import MoveSettings
from coordinator.control.interface import (
    Action,
    Applied,
    Event,
    ProposalEnded,
    ReplicasReported,
    Step,
    Tokens,
)
from coordinator.control.proposals import Proposals
from coordinator.control.reports import ACCEPTED, CAUGHT_UP, CEDED, Reports, Said
from coordinator.control.stalls import Stalls
from coordinator.control.timers import Timers, earliest
from coordinator.machine.state import MoveChanged, NodeChanged, ShardChanged, State
from coordinator.model import Monotonic, Move, MoveKind, MovePhase, NodeState, Shard, WallMs


@dataclass(frozen=True, slots=True)
class _Seen:
    phase: MovePhase
    at: Monotonic
    """When this leader first saw the move in this phase."""


class MoveControl:
    """The moves controller of one leader."""

    def __init__(
        self,
        state: State,
        settings: MoveSettings,
        reports: Reports,
        tokens: Tokens,
        now: Monotonic,
        stalls: Stalls | None = None,
    ) -> None:
        self._state = state
        self._settings = settings
        self._reports = reports
        self._stalls = stalls if stalls is not None else Stalls()
        self._proposals = Proposals("moves", tokens)
        self._seen: dict[int, _Seen] = {}
        self._timers = Timers[str]()
        for move in state.moves.values():
            self._timers.set(str(move.id), now)

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        concerned: set[int] = set()
        match event:
            case Applied():
                concerned = self._take_changes(event)
            case ReplicasReported():
                concerned = self._take_reports(event)
            case ProposalEnded():
                ended = self._proposals.end(now, event)
                concerned = {int(ended.subject)} if ended is not None else set()
            case _:
                pass
        return self._step(now, concerned)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        return self._step(now, set())

    def _step(self, now: Monotonic, concerned: set[int]) -> Step:
        concerned |= {int(subject) for subject in self._timers.take_due(now)}
        actions: list[Action] = []
        for move_id in sorted(concerned):
            actions += self._look(now, move_id)
        return Step(tuple(actions), self._timers.next_wake())

    def _take_changes(self, event: Applied) -> set[int]:
        """Moves that the changes may push on."""
        self._state = event.state
        concerned: set[int] = set()
        for change in event.changes:
            match change:
                case MoveChanged():
                    concerned.add(change.after.id)
                case ShardChanged():
                    shard = change.after or change.before
                    move_id = event.state.move_of_shard.get(shard.id) if shard is not None else None
                    concerned |= {move_id} if move_id is not None else set()
                case NodeChanged():
                    self._note_node(change)
                    # Few moves run at once, and a worker changes seldom: a look at each is cheaper than a book of them.
                    concerned.update(event.state.moves)
                case _:
                    pass
        return concerned

    def _note_node(self, change: NodeChanged) -> None:
        before, after = change.before, change.after
        if before is not None and (after is None or after.incarnation != before.incarnation):
            self._stalls.forget(before.id)

    def _take_reports(self, event: ReplicasReported) -> set[int]:
        moves = (self._state.move_of_shard.get(report.shard_id) for report in event.reports)
        return {move_id for move_id in moves if move_id is not None}

    # Decisions

    def _look(self, now: Monotonic, move_id: int) -> list[Action]:
        """Decides what the move asks for now, and when to look again. Harmless at any time."""
        subject = str(move_id)
        move = self._state.moves.get(move_id)
        if move is None:
            self._seen.pop(move_id, None)
            self._timers.set(subject, None)
            self._proposals.forget(subject)
            return []
        seen = self._seen.get(move_id)
        if seen is None or seen.phase is not move.phase:
            seen = self._seen[move_id] = _Seen(move.phase, now)
        copying = move.phase is MovePhase.COPYING
        deadline_s = self._settings.copy_deadline_s if copying else self._settings.cede_deadline_s
        deadline = Monotonic(seen.at + deadline_s)
        shard = self._state.shards[move.shard_id]
        if copying and _has_stalled(move, self._reports.of(shard.primary, shard)):
            self._stalls.note(now, move.target)
        command = self._wanted(move, shard, now >= deadline)
        if command is None:
            self._timers.set(subject, deadline)
            return []
        actions: list[Action] = list(self._proposals.propose(now, self._state.index, subject, command))
        free_at = self._proposals.free_at(now, self._state.index, subject)
        self._timers.set(subject, earliest(free_at, deadline if deadline > now else None))
        return actions

    def _wanted(self, move: Move, shard: Shard, is_late: bool) -> command_pb2.Command | None:
        match move.phase:
            case MovePhase.COPYING:
                said = self._reports.of(shard.primary, shard)
                if said is not None and move.target in said.caught_up:
                    promote = command_pb2.PromoteReplica(move_id=move.id, expected_epoch=shard.epoch)
                    return command_pb2.Command(promote_replica=promote)
                if said is not None and _has_stalled(move, said):
                    return _abort(move, f"the copy was given up: {said.reason or 'its target gets no further'}")
                return self._abort_copy(move, is_late)
            case MovePhase.CEDING if move.kind.is_reshape:
                return self._reshape(move, is_late)
            case MovePhase.CEDING:
                if move.source != shard.primary or self._reports.has_said(move.source, shard, CEDED):
                    cut_over = command_pb2.CutOver(move_id=move.id, expected_epoch=shard.epoch)
                    return command_pb2.Command(cut_over=cut_over)
                if is_late:
                    return _abort(move, f"{move.source} did not cede within {self._settings.cede_deadline_s:g} s")
                return None
            case MovePhase.REMOVING:
                noted = (ACCEPTED, CAUGHT_UP)
                is_noted = any(self._reports.has_said(shard.primary, shard, said) for said in noted)
                if move.kind is MoveKind.SURPLUS or is_noted or is_late:
                    remove = command_pb2.RemoveReplica(move_id=move.id, expected_epoch=shard.epoch)
                    return command_pb2.Command(remove_replica=remove)
                return None
            case MovePhase.DONE | MovePhase.ABORTED:
                return None
            case _:
                assert_never(move.phase)

    def _reshape(self, move: Move, is_late: bool) -> command_pb2.Command | None:
        """Replaces the shards of a split or a merge once every one of their primaries has sealed its own."""
        shards = [self._state.shards[shard_id] for shard_id in move.shard_ids]
        open_still = [shard for shard in shards if not self._reports.has_said(shard.primary, shard, CEDED)]
        if not open_still:
            reshape = command_pb2.Reshape(move_id=move.id, expected_epochs=[shard.epoch for shard in shards])
            return command_pb2.Command(reshape=reshape)
        if not is_late:
            return None
        names = ", ".join(sorted({shard.primary for shard in open_still}))
        return _abort(move, f"{names} did not seal within {self._settings.cede_deadline_s:g} s")

    def _abort_copy(self, move: Move, is_late: bool) -> command_pb2.Command | None:
        """Rolls a copy back that takes too long, or whose reason has gone."""
        if is_late:
            return _abort(move, f"copying took longer than {self._settings.copy_deadline_s:g} s")
        target = self._state.nodes.get(move.target)
        if target is not None and target.drain_requested:
            return _abort(move, f"its target {move.target} is to be drained")
        source = self._state.nodes.get(move.source)
        if move.kind is MoveKind.DRAIN and source is not None and source.state is NodeState.ACTIVE:
            return _abort(move, f"the drain of {move.source} was taken back")
        return None


def _has_stalled(move: Move, said: Said | None) -> bool:
    """True when the primary has given the target up."""
    return said is not None and move.target in said.lagging


def _abort(move: Move, reason: str) -> command_pb2.Command:
    return command_pb2.Command(abort_move=command_pb2.AbortMove(move_id=move.id, reason=reason))
