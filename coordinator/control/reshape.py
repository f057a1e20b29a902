"""Cuts shards that have too many users, joins neighbours that have few. By the figures of their primaries.

    more than `users_max` users                             SplitShard at the median of the users that are there
    two neighbours with fewer than `merge_below_users`      MergeShards; where other workers hold them, the upper one is
    together, for `merge_after_s`                           first moved to those of the lower one

- Hysteresis: what a cut makes has half of `users_max` each, together more than `merge_below_users`, which is at most
  half of it (configuration/rules.py); and a pair must stay small for long.
- The number of shards never falls below that which the cluster was cut into.
- At most `reshapes_max` at once: each stops a shard for some milliseconds. One that was rolled back is left alone for a
  while, longer each time.
- A pause of rebalancing, a quarantine, a missing replica or any move of the shard lets it be.
"""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.config import PlacementSettings
from coordinator.control.figures import Figures
from coordinator.control.interface import Action, Applied, Event, FiguresReported, ProposalEnded, Step, Tokens
from coordinator.control.proposals import Proposals
from coordinator.control.timers import earliest
from coordinator.machine.state import JobChanged, LaunchChanged, MoveChanged, ShardChanged, State
from coordinator.model import Monotonic, MoveKind, MovePhase, Shard, WallMs

REST_S = 60.0
"""How long a shard rests after a cut or join of it was rolled back; doubles each time."""
REST_S_MAX = 3600.0
CHECK_S = 5.0
"""How often what waits for its turn is looked at, if nothing happens before."""
ALIGN_REASON = "to be joined with shard"


class ReshapeControl:
    """The controller of one leader for the sizes of shards."""

    def __init__(self, state: State, settings: PlacementSettings, figures: Figures, tokens: Tokens) -> None:
        self._state = state
        self._settings = settings
        self._figures = figures
        self._proposals = Proposals("reshape", tokens)
        self._by_lo = {shard.lo: shard.id for shard in state.shards.values()}
        self._by_hi = {shard.hi: shard.id for shard in state.shards.values()}
        self._large: set[int] = set()
        self._small_since: dict[tuple[int, int], Monotonic] = {}
        """Neighbours that could be one shard, and since when."""
        self._rests: dict[int, tuple[Monotonic, float]] = {}
        """Until when a shard is left alone, and how long that was, by id."""
        self._wake_at: Monotonic | None = None

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        concerns_it = False
        match event:
            case Applied():
                self._state = event.state
                # Launches change the state hundreds of times a second, and a look at all pairs takes a while.
                concerns_it = any(not isinstance(change, LaunchChanged | JobChanged) for change in event.changes)
                for change in event.changes:
                    if isinstance(change, ShardChanged):
                        self._take_shard(change)
                    elif isinstance(change, MoveChanged):
                        self._take_move(now, change)
            case FiguresReported():
                concerns_it = True
                for figure in event.figures:
                    self._take_figure(now, figure.shard_id)
            case ProposalEnded():
                concerns_it = self._proposals.end(now, event) is not None
            case _:
                pass
        return self._step(now) if concerns_it else Step((), self._wake_at)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        return self._step(now)

    def _take_shard(self, change: ShardChanged) -> None:
        before, after = change.before, change.after
        if after is not None and before is None:
            self._by_lo[after.lo], self._by_hi[after.hi] = after.id, after.id
        elif before is not None and after is None:
            for ends, at in ((self._by_lo, before.lo), (self._by_hi, before.hi)):
                if ends.get(at) == before.id:
                    del ends[at]
            self._large.discard(before.id)
            self._rests.pop(before.id, None)
            for pair in [pair for pair in self._small_since if before.id in pair]:
                del self._small_since[pair]

    def _take_move(self, now: Monotonic, change: MoveChanged) -> None:
        move = change.after
        was_ours = move.kind.is_reshape or move.reason.startswith(ALIGN_REASON)
        if was_ours and move.phase is MovePhase.ABORTED:
            for shard_id in move.shard_ids:
                _, rested_s = self._rests.get(shard_id, (now, REST_S / 2))
                rest_s = min(2 * rested_s, REST_S_MAX)
                self._rests[shard_id] = (Monotonic(now + rest_s), rest_s)

    def _take_figure(self, now: Monotonic, shard_id: int) -> None:
        shard = self._state.shards.get(shard_id)
        if shard is None:
            return
        users = self._users(shard)
        if users is not None and users > self._settings.users_max:
            self._large.add(shard_id)
        else:
            self._large.discard(shard_id)
        for lower_id, upper_id in ((self._by_hi.get(shard.lo), shard_id), (shard_id, self._by_lo.get(shard.hi))):
            if lower_id is None or upper_id is None:
                continue
            together = [self._users(self._state.shards[member]) for member in (lower_id, upper_id)]
            known = [users for users in together if users is not None]
            if len(known) == 2 and sum(known) < self._settings.merge_below_users:
                self._small_since.setdefault((lower_id, upper_id), now)
            else:
                self._small_since.pop((lower_id, upper_id), None)

    def _users(self, shard: Shard) -> int | None:
        """How many there are; None when that is not known, or nothing can be made of the shard because of damage."""
        figure = self._figures.of(shard)
        return figure.users if figure is not None and not figure.damage else None

    # Decisions

    def _step(self, now: Monotonic) -> Step:
        self._wake_at = None
        if not self._large and not self._small_since:
            return Step()
        actions: list[Action] = []
        if not self._state.settings.rebalance_paused:
            actions += self._cut(now)
            actions += self._join(now)
        ripe = [Monotonic(since + self._settings.merge_after_s) for since in self._small_since.values()]
        later = [at for at in ripe if at > now]
        waits = bool(self._large) or len(later) < len(ripe)
        self._wake_at = earliest(*later, Monotonic(now + CHECK_S) if waits else None)
        return Step(tuple(actions), self._wake_at)

    def _room(self) -> int:
        """How many more cuts and joins may start."""
        running = sum(
            move.kind.is_reshape or move.reason.startswith(ALIGN_REASON) for move in self._state.moves.values()
        )
        return self._settings.reshapes_max - running - len(self._proposals)

    def _may_start(self, now: Monotonic, shard: Shard) -> bool:
        node = self._state.nodes[shard.primary] if shard.primary else None
        is_whole = len(shard.in_sync) >= self._state.settings.replicas and not shard.absent
        return (
            node is not None
            and node.is_serving
            and is_whole
            and shard.may_change
            and not shard.parents
            and shard.id not in self._state.move_of_shard
            and now >= self._rests.get(shard.id, (now, 0.0))[0]
        )

    def _cut(self, now: Monotonic) -> Iterator[Action]:
        """Cuts the largest first."""
        for shard_id in sorted(self._large, key=lambda shard_id: (-self._size(shard_id), shard_id)):
            if self._room() <= 0:
                return
            shard = self._state.shards[shard_id]
            figure = self._figures.of(shard)
            if figure is None or not shard.lo < figure.median_hash < shard.hi or not self._may_start(now, shard):
                continue
            split = command_pb2.SplitShard(
                shard_id=shard_id,
                at=figure.median_hash,
                expected_epoch=shard.epoch,
                reason=f"{figure.users} users, at most {self._settings.users_max} are wanted",
            )
            command = command_pb2.Command(split_shard=split)
            yield from self._proposals.propose(now, self._state.index, str(shard_id), command)

    def _size(self, shard_id: int) -> int:
        return self._users(self._state.shards[shard_id]) or 0

    def _join(self, now: Monotonic) -> Iterator[Action]:
        """Joins what has been small for long enough, the longest first."""
        spare = len(self._state.shards) - self._settings.shards
        for (lower_id, upper_id), since in sorted(self._small_since.items(), key=lambda item: (item[1], item[0])):
            if now < since + self._settings.merge_after_s or spare <= 0 or self._room() <= 0:
                return
            lower, upper = self._state.shards[lower_id], self._state.shards[upper_id]
            if not self._may_start(now, lower) or not self._may_start(now, upper):
                continue
            users = self._size(lower_id) + self._size(upper_id)
            if lower.in_sync == upper.in_sync:
                merge = command_pb2.MergeShards(
                    lower_shard_id=lower_id,
                    upper_shard_id=upper_id,
                    reason=f"{users} users together for {self._settings.merge_after_s:g} s",
                )
                command: command_pb2.Command | None = command_pb2.Command(merge_shards=merge)
                spare -= 1
            else:
                command = self._align(lower, upper)
            if command is not None:
                yield from self._proposals.propose(now, self._state.index, str(upper_id), command)

    def _align(self, lower: Shard, upper: Shard) -> command_pb2.Command | None:
        """Moves one replica of the upper shard to where the lower one is."""
        coming = [name for name in lower.in_sync if name not in upper.in_sync]
        leaving = [name for name in upper.in_sync if name not in lower.in_sync]
        is_free = len(self._state.moves) < self._settings.moves_max
        if not coming or not leaving or not is_free or not self._state.nodes[coming[0]].may_receive:
            return None
        start = command_pb2.StartMove(
            shard_id=upper.id,
            source=leaving[0],
            target=coming[0],
            kind=types_pb2.MoveKind.ValueType(MoveKind.BALANCE.value),
            reason=f"{ALIGN_REASON} {lower.id}",
            expected_epoch=upper.epoch,
        )
        return command_pb2.Command(start_move=start)
