"""Relieves workers whose memory runs full: one copy at a time, to the worker with the most room.

A worker above `memory_percent_max` for `PATIENCE_S` gives a shard up, the largest that may move and keeps its zones
apart, to the worker that uses least: at least `ROOM_PERCENT` less, and itself below the limit by as much. Then it rests
for `REST_S`, so that the effect is seen before the next one. Where all use the same, as on one machine, nothing moves.

A worker whose disk takes no writes loses its primary roles to replicas that can write, and with each role the copy,
which could not follow either. It is not asked to cede: it could not note down that it was. With room it catches up.

Balance counts copies and would fill the worker up again: `crowded` tells it to whom it gives nothing. Repairs and
drains are not held up: a copy in a tight place is better than none.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.config import PlacementSettings
from coordinator.control.figures import Figures
from coordinator.control.interface import Action, Applied, Event, ProposalEnded, Step, Tokens
from coordinator.control.proposals import Proposals
from coordinator.machine.state import State
from coordinator.model import Monotonic, MoveKind, Node, Shard, WallMs

CHECK_S = 5.0
PATIENCE_S = 30.0
REST_S = 60.0
ROOM_PERCENT = 10.0

MetricsOf = Callable[[str], session_pb2.NodeMetrics | None]


class ReliefControl:
    """The controller of one leader for the workers' memory."""

    def __init__(
        self,
        state: State,
        settings: PlacementSettings,
        figures: Figures,
        metrics_of: MetricsOf,
        tokens: Tokens,
        now: Monotonic,
    ) -> None:
        self._state = state
        self._settings = settings
        self._figures = figures
        self._metrics_of = metrics_of
        self._proposals = Proposals("relief", tokens)
        self._full_since: dict[str, Monotonic] = {}
        self._crowded: frozenset[str] = frozenset()
        self._rests_until: dict[str, Monotonic] = {}
        self._check_at = Monotonic(now + CHECK_S)

    def crowded(self) -> frozenset[str]:
        """Workers above the limit, or that cannot write, to whom balance gives nothing."""
        return self._crowded

    def _unwritable(self) -> frozenset[str]:
        """Workers that serve and have said that stores of theirs take no writes."""
        serving = (node.id for node in self._state.nodes.values() if node.is_serving)
        said = ((name, self._metrics_of(name)) for name in serving)
        return frozenset(name for name, metrics in said if metrics is not None and metrics.unwritable_shards)

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        match event:
            case Applied():
                self._state = event.state
            case ProposalEnded():
                self._proposals.end(now, event)
            case _:
                pass
        return Step((), self._check_at)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        actions: list[Action] = []
        if now >= self._check_at:
            self._check_at = Monotonic(now + CHECK_S)
            used = self._memory_used()
            self._note_full(now, used)
            unwritable = self._unwritable()
            self._crowded = frozenset(self._full_since) | unwritable
            if not self._state.settings.rebalance_paused:
                for name, since in sorted(self._full_since.items()):
                    if now >= since + PATIENCE_S and now >= self._rests_until.get(name, now):
                        actions += self._relieve(now, name, used)
            actions += self._hand_over(now, unwritable)
        return Step(tuple(actions), self._check_at)

    def _hand_over(self, now: Monotonic, unwritable: frozenset[str]) -> list[Action]:
        """Takes the primary roles away from workers that cannot write."""
        state = self._state
        actions: list[Action] = []
        for shard in sorted(state.shards.values(), key=lambda shard: shard.id) if unwritable else ():
            others = [name for name in shard.in_sync if state.nodes[name].is_serving and name not in unwritable]
            if shard.primary in unwritable and others:
                drop = command_pb2.DropReplica(
                    shard_id=shard.id,
                    expected_epoch=shard.epoch,
                    node_id=shard.primary,
                    reason="unable to write to its disk",
                    heir=others[0],
                )
                command = command_pb2.Command(drop_replica=drop)
                actions += self._proposals.propose(now, state.index, f"shard {shard.id}", command)
        return actions

    def _memory_used(self) -> dict[str, float]:
        """Memory in use, in percent, of the workers that serve and have said so."""
        used: dict[str, float] = {}
        for node in self._state.nodes.values():
            metrics = self._metrics_of(node.id) if node.is_serving else None
            if metrics is not None and metrics.memory_percent > 0:
                used[node.id] = metrics.memory_percent
        return used

    def _note_full(self, now: Monotonic, used: dict[str, float]) -> None:
        full = {name for name, percent in used.items() if percent > self._settings.memory_percent_max}
        self._full_since = {name: self._full_since.get(name, now) for name in sorted(full)}

    def _relieve(self, now: Monotonic, name: str, used: dict[str, float]) -> tuple[Action, ...]:
        """Starts one move away from a worker, when there is somewhere to go and none is under way."""
        moves = self._state.moves.values()
        if len(moves) >= self._settings.moves_max or any(move.source == name for move in moves):
            return ()
        limit = min(used[name], self._settings.memory_percent_max) - ROOM_PERCENT
        roomy = [
            node
            for node in self._state.nodes.values()
            if node.may_receive and not node.drain_requested and used.get(node.id, 100.0) <= limit
        ]
        for node in sorted(roomy, key=lambda node: (used[node.id], node.id)):
            shard = self._shard_to_give(name, node)
            if shard is not None:
                self._rests_until[name] = Monotonic(now + REST_S)
                start = command_pb2.StartMove(
                    shard_id=shard.id,
                    source=name,
                    target=node.id,
                    kind=types_pb2.MoveKind.ValueType(MoveKind.BALANCE.value),
                    reason=f"{name} uses {used[name]:.0f} % of its memory, {node.id} {used[node.id]:.0f} %",
                    expected_epoch=shard.epoch,
                )
                command = command_pb2.Command(start_move=start)
                return self._proposals.propose(now, self._state.index, name, command)
        return ()

    def _shard_to_give(self, name: str, target: Node) -> Shard | None:
        """The largest shard of a worker that may go to another one."""
        nodes = self._state.nodes

        def fits(shard: Shard) -> bool:
            others = [nodes[other] for other in shard.in_sync if other != name]
            return (
                name in shard.in_sync
                and target.id not in shard.replicas
                and shard.may_change
                and shard.id not in self._state.move_of_shard
                and nodes[shard.primary].is_serving
                and not any(target.zone and other.zone == target.zone for other in others)
            )

        def size(shard: Shard) -> tuple[int, int]:
            figure = self._figures.of(shard)
            return figure.bytes if figure is not None else 0, -shard.id

        return max(filter(fits, self._state.shards.values()), key=size, default=None)
