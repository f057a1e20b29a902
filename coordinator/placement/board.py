"""The planner's working picture: who holds what once the moves that run and those planned so far have ended.

Every step of a plan reads and changes the board, so later steps see what earlier ones decided and a plan
never overshoots. A shard that has a move, running or planned, is busy: nothing more is planned for it.

Who counts for the fair shares: workers that may receive, and lost ones whose place is still held. The lower
end of the band counts both, so that a worker that is away for a moment makes nobody look too empty; the
upper end counts only those that may receive, so that what was lost finds room.

Invariant: `load` and `primaries` are the counts that `holders` and `primary` give, at any time between two
calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import NEVER_MS, Move, MoveKind, Node, NodeState, Shard, WallMs
from coordinator.placement.plan import PlannedMove, Refusals
from coordinator.placement.ring import Ring, RingMember, shard_position
from coordinator.placement.shares import Band, band_around, fair_shares

LOW, FAIR, OPEN, FULL = range(4)
"""Levels of a worker: below its band; below its fair share; below the top of its band; at the top or above."""
POOL_SMALL = 8
"""So few candidates are compared by distance; more of them are soon met on a walk along the ring."""

RingOf = Callable[[tuple[RingMember, ...]], Ring]
"""Gives the ring of a membership, from a cache."""


@dataclass(frozen=True, slots=True)
class _Times:
    now_ms: WallMs
    hold_ms: int
    dwell_ms: int


def is_drained(node: Node) -> bool:
    """True while an operator wants the worker to be empty."""
    return node.drain_requested or node.state is NodeState.DRAINING


def member_of(node: Node) -> RingMember:
    """The worker as the ring sees it."""
    return RingMember(node.id, node.zone, node.weight)


class Board:
    """See the module. `shard_count` is how many shards the fair shares are for; by default those that are assigned."""

    def __init__(
        self, state: State, settings: PlacementSettings, now_ms: WallMs, ring_of: RingOf, shard_count: int | None = None
    ) -> None:
        self.state = state
        self.settings = settings
        self.replicas = state.settings.replicas
        self.refusals = Refusals()
        self.planned: list[PlannedMove] = []
        self.wake_ms: WallMs | None = None
        self._times = _Times(now_ms, round(settings.hold_s * 1_000), round(settings.dwell_s * 1_000))
        self.nodes = dict(sorted(state.nodes.items()))
        self.shards = [shard for _, shard in sorted(state.shards.items()) if shard.in_sync]
        self._holders: dict[int, tuple[str, ...]] = {}
        self._primary: dict[int, str] = {}
        self.busy: set[int] = set()
        self.crowded: frozenset[str] = frozenset()
        """Workers to whom balance gives nothing, for want of memory or because they are avoided."""
        self.avoided: frozenset[str] = frozenset()
        """Workers that took nothing of their last copy: they get no other one for a while."""
        self.receiving = {
            node.id: member_of(node) for node in self.nodes.values() if node.may_receive and not is_drained(node)
        }
        self.domains = {node.id: member_of(node).domain for node in self.nodes.values()}
        self._serving = {node.id for node in self.nodes.values() if node.is_serving}
        self._ring_of = ring_of
        self._ring: Ring | None = None
        self._count_loads()
        self._set_bands(len(self.shards) if shard_count is None else shard_count)
        self.has_zones = len({member.domain for member in self.receiving.values()}) < len(self.receiving)

    @property
    def ring(self) -> Ring:
        """The ring of the workers that may receive; made when it is first needed."""
        if self._ring is None:
            self._ring = self._ring_of(tuple(self.receiving.values()))
        return self._ring

    def _count_loads(self) -> None:
        replicas: Counter[str] = Counter()
        primaries: Counter[str] = Counter()
        absent: set[str] = set()
        for shard in self.shards:
            for name in shard.in_sync:
                replicas[name] += 1
            primaries[shard.primary] += 1
            if shard.absent:
                absent.update(shard.absent)
        self.absent = absent
        self.load_before, self.primaries_before = Counter(replicas), Counter(primaries)
        self.load, self.primaries = replicas, primaries
        for _, move in sorted(self.state.moves.items()):
            shard_of_move = self.state.shards.get(move.shard_id)
            if shard_of_move is not None and shard_of_move.in_sync and not move.has_ended:
                self._apply_running(shard_of_move, move)

    def _apply_running(self, shard: Shard, move: Move) -> None:
        """The effect that a running move will have had in the end."""
        self.busy.update(move.shard_ids)
        if move.kind.is_reshape:
            return
        self._change(shard, move.source if move.kind is not MoveKind.TRANSFER else "", move.target, move.source)

    def _change(self, shard: Shard, leaving: str, coming: str, ceding: str) -> None:
        holders = self.holders(shard)
        after = tuple(sorted({name for name in holders if name != leaving} | ({coming} if coming else set())))
        primary = self.primary(shard)
        if coming and primary == ceding:
            self.primaries[primary] -= 1
            self.primaries[coming] += 1
            self._primary[shard.id] = coming
        self._holders[shard.id] = after
        for name in set(holders) ^ set(after):
            self.load[name] += 1 if name in after else -1

    def _set_bands(self, shard_count: int) -> None:
        bound = self.settings.load_bound
        now = fair_shares(tuple(self.receiving.values()), shard_count, self.replicas)
        held = {node.id: member_of(node) for node in self.nodes.values() if self._is_held(node)}
        expected = now
        if held:
            everybody = sorted({**self.receiving, **held}.items())
            expected = fair_shares([member for _, member in everybody], shard_count, self.replicas)
        self.bands: dict[str, Band] = {}
        for name in self.receiving:
            upper, lower = band_around(now[name], bound), band_around(expected[name], bound)
            # With a place held, the lower end and the goal come from the share that it will leave to the others.
            self.bands[name] = upper if upper == lower else Band(lower.fair, lower.low, upper.middle, upper.high)
        self.fair_now = now
        copies = min(self.replicas, len(self.receiving)) or 1
        self.primary_bands = {name: band_around(share / copies, bound) for name, share in now.items()}
        self.level: dict[str, int] = {}
        self._pools: tuple[set[str], ...] = (set(), set(), set(), set())
        self._pool_domains: tuple[Counter[str], ...] = (Counter(), Counter(), Counter(), Counter())
        for name in self.receiving:
            self._enter_level(name)

    def _is_held(self, node: Node) -> bool:
        """True for a lost worker whose place is still kept."""
        if node.may_receive or is_drained(node):
            return False
        if node.state is NodeState.JOINING and node.id not in self.absent:
            return False
        return self.hold_ends_ms(node) is not None

    def hold_ends_ms(self, node: Node | None) -> WallMs | None:
        """Until when a lost worker's place is kept; None when it is not, or no longer. Sets the wake time."""
        if node is None or node.may_receive or is_drained(node) or node.state is NodeState.LEFT:
            return None
        since_ms = node.suspect_since_ms if node.is_suspect else node.state_since_ms
        ends_ms = WallMs(since_ms + self._times.hold_ms)
        if self._times.now_ms >= ends_ms:
            return None
        self._wake_at(ends_ms)
        return ends_ms

    def is_dwelling(self, shard: Shard) -> bool:
        """True while a shard that was moved must stay. Sets the wake time."""
        if shard.moved_ms == NEVER_MS:
            return False
        ends_ms = WallMs(shard.moved_ms + self._times.dwell_ms)
        if self._times.now_ms >= ends_ms:
            return False
        self._wake_at(ends_ms)
        return True

    def was_lately(self, at_ms: WallMs) -> bool:
        """True when `at_ms` is less than a dwell time ago."""
        return self._times.now_ms - at_ms < self._times.dwell_ms

    def _wake_at(self, at_ms: WallMs) -> None:
        self.wake_ms = at_ms if self.wake_ms is None else min(self.wake_ms, at_ms)

    def holders(self, shard: Shard) -> tuple[str, ...]:
        """Workers that will hold the shard, sorted."""
        return self._holders.get(shard.id, shard.in_sync)

    def primary(self, shard: Shard) -> str:
        """The worker that will be primary."""
        return self._primary.get(shard.id, shard.primary)

    def is_serving(self, name: str) -> bool:
        """True when the worker can send what it holds."""
        return name in self._serving

    def free_shards(self) -> Iterator[Shard]:
        """Shards that may get a move: they have none, are formed and not in quarantine. By id."""
        busy = self.busy
        return (shard for shard in self.shards if shard.id not in busy and shard.may_change)

    def changing(self) -> set[str]:
        """Workers that hold, or will hold, a shard with a move."""
        shards = self.state.shards
        busy = ((shards[shard_id].in_sync, self._holders.get(shard_id, ())) for shard_id in self.busy)
        return {name for before, after in busy for name in (*before, *after)}

    def domain(self, name: str) -> str:
        """Failure domain of a worker, also of one that is forgotten."""
        return self.domains.get(name) or f"\0{name}"

    def relative_load(self, name: str, extra: int = 0) -> float:
        """Load over fair share, for comparison between workers that may receive."""
        return (self.load[name] + extra) / max(self.fair_now[name], 1e-9)

    # Levels

    def _enter_level(self, name: str) -> None:
        band, load = self.bands[name], self.load[name]
        level = LOW if load < band.low else FAIR if load < band.middle else OPEN if load < band.high else FULL
        self.level[name] = level
        self._pools[level].add(name)
        self._pool_domains[level][self.receiving[name].domain] += 1

    def add_load(self, name: str, change: int) -> None:
        """Counts copies that come or go."""
        self.load[name] += change
        self._refresh_level(name)

    def _refresh_level(self, name: str) -> None:
        level = self.level.get(name)
        if level is None:
            return
        self._pools[level].discard(name)
        domains, domain = self._pool_domains[level], self.receiving[name].domain
        domains[domain] -= 1
        if not domains[domain]:
            del domains[domain]
        self._enter_level(name)

    # Choosing

    def choose(
        self, lo: int, holders: tuple[str, ...], *, spread_only: bool = False, overflow: bool = False
    ) -> str | None:
        """The worker for one more copy: the emptiest level first, within a level the ring's preference.

        Failure domains that `holders` leave free come first; with `spread_only` nothing else comes.
        `overflow` allows a full worker in the end, the least loaded one: a copy in the wrong place is
        better than none. Never one that is avoided.
        """
        position = shard_position(lo)
        taken = {self.domain(name) for name in holders}
        holders = (*holders, *self.avoided)
        for level in (LOW, FAIR, OPEN):
            name = self._nearest(position, level, holders, taken)
            if name is not None:
                return name
        if spread_only:
            return None
        for level in (LOW, FAIR, OPEN):
            name = self._nearest(position, level, holders, set())
            if name is not None:
                return name
        others = [name for name in self.receiving if name not in holders]
        if not overflow or not others:
            return None
        return min(others, key=lambda name: (self.domain(name) in taken, self.relative_load(name, 1), name))

    def _nearest(self, position: int, level: int, holders: tuple[str, ...], taken: set[str]) -> str | None:
        pool = self._pools[level]
        if taken:
            if not any(domain not in taken for domain in self._pool_domains[level]):
                return None
        elif len(pool) <= len(holders) and pool.issubset(holders):
            return None
        domains, levels, ring = self.domains, self.level, self.ring
        if len(pool) <= POOL_SMALL:
            near = [name for name in pool if name not in holders and domains[name] not in taken]
            return min(near, key=lambda name: (ring.distance(position, name), name), default=None)
        found = ring.first(
            position, lambda name: levels[name] == level and name not in holders and domains[name] not in taken
        )
        return None if found is None else found[1]

    def add(self, shard: Shard, source: str, target: str, kind: MoveKind, reason: str) -> None:
        """Plans a move and applies its effect."""
        is_copied = kind not in (MoveKind.TRANSFER, MoveKind.SURPLUS)
        self.planned.append(
            PlannedMove(
                shard_id=shard.id,
                source=source,
                target=target,
                kind=kind,
                reason=reason,
                expected_epoch=shard.epoch,
                key_share=shard.key_share,
                sender=(source or shard.primary) if is_copied else "",
            )
        )
        self.busy.add(shard.id)
        self._change(shard, source if kind is not MoveKind.TRANSFER else "", target, source)
        for name in (source, target):
            self._refresh_level(name)
