"""Moves that mend: too many copies, too few, copies on workers that are to be emptied, copies that share a
zone.

None of them leaves a shard with fewer in-sync copies than before: a copy goes only after its replacement is
in sync (the move's phases see to that), and a surplus copy only while enough serving ones remain. So a
drain without a target is refused, not done by halves.
"""

from __future__ import annotations

from collections import Counter

from coordinator.model import MoveKind, Node, NodeState, Shard
from coordinator.placement.board import Board, is_drained
from coordinator.placement.ring import shard_position

WORKERS_NAMED_MAX = 4


def drop_surplus(board: Board, *, paused: bool) -> None:
    """Removes copies beyond the wanted number; while paused only those on workers that are to be emptied.

    Planned before everything else although it starts last: a copy that goes anyway must not be repaired,
    moved or balanced.
    """
    for shard in board.free_shards():
        if len(shard.in_sync) <= board.replicas:
            continue
        serving = [name for name in shard.in_sync if board.is_serving(name)]
        if len(serving) <= board.replicas:
            continue
        drained = [name for name in serving if is_drained(board.nodes[name])]
        if paused and not drained:
            continue
        reason = f"{len(serving)} copies, {board.replicas} wanted"
        victims = [name for name in serving if name != shard.primary]
        if shard.primary in drained and not [name for name in victims if name in drained]:
            heirs = [name for name in victims if name in board.receiving]
            if heirs:
                heir = min(heirs, key=lambda name: (board.primaries[name] / max(board.fair_now[name], 1e-9), name))
                board.add(shard, shard.primary, heir, MoveKind.TRANSFER, f"{shard.primary} is draining; {reason}")
                continue
        if paused:
            victims = [name for name in victims if name in drained]
        if victims:
            board.add(shard, _worst(board, shard, victims), "", MoveKind.SURPLUS, reason)


def _worst(board: Board, shard: Shard, victims: list[str]) -> str:
    """The copy to drop: on a worker that may not receive, else one that shares a zone, else the ring's last choice."""
    crowd = Counter(board.domain(name) for name in board.holders(shard))
    position = shard_position(shard.lo)

    def badness(name: str) -> tuple[bool, bool, int, str]:
        if name not in board.receiving:
            return True, False, 0, name
        return False, crowd[board.domain(name)] > 1, board.ring.distance(position, name), name

    return max(victims, key=badness)


def repair(board: Board) -> None:
    """Adds a copy to each shard that has too few, those with the fewest first."""
    for shard in board.shards:
        if shard.quarantine and len(shard.in_sync) < board.replicas:
            _refuse_quarantined(board, shard, "gets|get no further copy")
    waiting = []
    for shard in board.free_shards():
        if len(shard.in_sync) < board.replicas:
            waiting.append(shard)
        elif not board.is_serving(shard.primary):
            _refuse_silent_primary(board, shard, "has|have nobody to answer")
    for shard in sorted(waiting, key=lambda shard: (len(shard.in_sync), shard.id)):
        _repair_one(board, shard)


def _repair_one(board: Board, shard: Shard) -> None:
    missing = board.replicas - len(shard.in_sync)
    what = f"needs|need {missing} more {'copy' if missing == 1 else 'copies'}"
    if _refuse_silent_primary(board, shard, what):
        return
    back = _back(board, shard)
    if back:
        taken = {board.domain(name) for name in shard.in_sync}
        target = min(back, key=lambda name: (board.domain(name) in taken, name))
        reason = f"{len(shard.in_sync)} of {board.replicas} copies; {target} is back"
        board.add(shard, "", target, MoveKind.REPAIR, reason)
        return
    held = [name for name in shard.absent if board.hold_ends_ms(board.nodes.get(name)) is not None]
    if len(shard.in_sync) > 1 and len(held) >= missing:
        hold = f"{board.settings.hold_s:g} s"
        board.refusals.shard(shard.id, what, f"waiting for {', '.join(held)} to come back, for at most {hold}")
        return
    found = board.choose(shard.lo, shard.in_sync, overflow=True)
    if found is None:
        board.refusals.shard(shard.id, what, f"no worker can receive {_why_nobody(board, shard.in_sync)}")
        return
    board.add(shard, "", found, MoveKind.REPAIR, f"{len(shard.in_sync)} of {board.replicas} copies")


def _refuse_silent_primary(board: Board, shard: Shard, what: str, node_id: str = "") -> bool:
    """A copy can only come from a primary that answers."""
    if board.is_serving(shard.primary):
        return False
    primary = board.nodes.get(shard.primary)
    state = "unknown" if primary is None else describe(primary)
    board.refusals.shard(
        shard.id, what, f"the only copy to read from is on {shard.primary}, which is {state}", node_id or shard.primary
    )
    return True


def _why_nobody(board: Board, holders: tuple[str, ...]) -> str:
    others = [node for node in board.nodes.values() if node.id not in holders and node.state is not NodeState.LEFT]
    if not others:
        return "it, because there is no other worker" if len(holders) <= 1 else "it, because every worker has one"
    named = [f"{node.id} {_standing(board, node)}" for node in others[:WORKERS_NAMED_MAX]]
    more = f" and {len(others) - len(named)} more workers are not available" if len(others) > len(named) else ""
    return f"it ({', '.join(named)}{more})"


def _back(board: Board, shard: Shard) -> list[str]:
    """Workers whose place in the shard was kept, and that can take it again."""
    return [name for name in shard.absent if name in board.receiving and name not in board.avoided]


def _standing(board: Board, node: Node) -> str:
    return "took nothing of its last copy" if node.id in board.avoided else f"is {describe(node)}"


def describe(node: Node) -> str:
    """How a worker stands, in a word."""
    if node.is_suspect:
        return "suspect"
    return "draining" if node.drain_requested and node.state is NodeState.ACTIVE else node.state.name.lower()


def empty_drained(board: Board) -> None:
    """Moves copies away from workers that are to be emptied."""
    drained = {node.id for node in board.nodes.values() if is_drained(node)}
    if not drained:
        return
    for shard in board.shards:
        if shard.quarantine:
            for source in drained.intersection(shard.in_sync):
                _refuse_quarantined(board, shard, f"cannot leave {source}", source)
    for shard in board.free_shards():
        for source in shard.in_sync:
            if source in drained:
                _drain_one(board, shard, source)
                break


def _refuse_quarantined(board: Board, shard: Shard, what: str, node_id: str = "") -> None:
    why = "in quarantine; see `clusterctl shards show`, and `clusterctl shards release` ends it"
    board.refusals.shard(shard.id, what, why, node_id)


def _drain_one(board: Board, shard: Shard, source: str) -> None:
    what = f"cannot leave {source}"
    if _refuse_silent_primary(board, shard, what, source):
        return
    others = tuple(name for name in shard.in_sync if name != source)
    back = _back(board, shard)
    target = min(back) if back else None
    if target is None:
        target = _choose_beside(board, shard, source, others)
    if target is None:
        why = f"no worker can receive {_why_nobody(board, shard.in_sync)}"
        board.refusals.shard(shard.id, what, why, source)
        return
    board.add(shard, source, target, MoveKind.DRAIN, f"{source} is draining")


def _choose_beside(board: Board, shard: Shard, source: str, others: tuple[str, ...]) -> str | None:
    """A target whose zone may be that of the source, which leaves, but not one that another copy is in."""
    target = board.choose(shard.lo, others, spread_only=True)
    if target is not None and target != source:
        return target
    return board.choose(shard.lo, shard.in_sync, overflow=True)


def spread_zones(board: Board) -> None:
    """Moves copies that share a zone while another zone has room."""
    if not board.has_zones:
        return
    domain_of = board.domain
    free_domains = {member.domain for member in board.receiving.values()}
    for shard in board.free_shards():
        domains = [domain_of(name) for name in shard.in_sync]
        used = set(domains)
        if len(used) == len(domains) or not free_domains - used or not board.is_serving(shard.primary):
            continue
        source = _most_crowded(board, shard, domains)
        zone = board.domains[source]
        others = tuple(name for name in shard.in_sync if name != source)
        target = board.choose(shard.lo, (*others, source), spread_only=True)
        if target is None:
            why = "the workers of other zones are at their load bound"
            board.refusals.shard(shard.id, f"has|have two copies in zone {zone}", why)
            continue
        board.add(shard, source, target, MoveKind.ZONE, f"two copies in zone {zone}")


def _most_crowded(board: Board, shard: Shard, domains: list[str]) -> str:
    """The copy that moves: one of those that share a zone, not the primary, on the fullest worker."""
    crowd = Counter(domains)
    doubled = [name for name, domain in zip(shard.in_sync, domains, strict=True) if crowd[domain] > 1]

    def rank(name: str) -> tuple[bool, float, str]:
        load = board.relative_load(name) if name in board.receiving else 0.0
        return name == shard.primary, -load, name

    return min(doubled, key=rank)
