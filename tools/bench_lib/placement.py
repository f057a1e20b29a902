"""Placement beside a ring library and plain rendezvous hashing: balance, keys that move, time to plan,
lookups.

Everybody places two copies of every shard on equal workers. One worker joins, and one leaves, from the same
start.

- `peak_to_average`: copies of the fullest worker over the mean.
- `moved_over_ideal`: copies that change their worker over those that must: the newcomer's fair share, or
  what the leaver held.
- `plan_s`: from nothing to the whole placement ("initial"), and for ours each plan that follows.
- `locate_per_s`: keys per second; ours through the shard map in batches, the peers straight from key to
  worker.

Times are CPU time of the one core that this uses, so that other work on the machine does not count.

Plain rendezvous hashing needs workers times shards hashes, 65 million in the largest case. Where that is
more than RENDEZVOUS_HASHES_MAX it places a sample of the shards, evenly taken, and only the keys that move
are reported: the balance and the time of a sample are not those of the whole.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import ModuleType

from immutables import Map
from xxhash import xxh3_64_intdigest

from coordinator.config import PlacementSettings
from coordinator.machine.state import State
from coordinator.model import HASH_SPACE, MoveKind, Node, NodeState, Shard, WallMs
from coordinator.placement import Plan, Planner, Ring, RingMember, ShardMap
from tools.bench_lib.result import OURS, Emit, Params

CASES = ((10, 256), (10, 4_096), (100, 1_600), (100, 16_384), (1_000, 16_384), (1_000, 65_536))
REPLICAS = 2
NOW_MS = WallMs(1_700_000_000_000)
SETTINGS = PlacementSettings()
LOCATE_KEYS = 200_000
LOCATE_ROUNDS = 9
RENDEZVOUS_HASHES_MAX = 4_000_000
PLANS_MAX = 10

Placement = dict[int, tuple[str, ...]]
"""Workers by shard."""


def run(emit: Emit) -> None:
    """Measures every case, the largest last."""
    for workers, shards in CASES:
        params: Params = {"workers": workers, "shards": shards}
        _ours(emit, workers, shards, params)
        _peers(emit, workers, shards, params)
    for shards in (256, 65_536):
        _locate(emit, shards)
    _locate_workers(emit)


# Ours


def _cluster(workers: int, shards: int) -> State:
    nodes = {f"w{number}": Node(f"w{number}", state=NodeState.ACTIVE) for number in range(workers)}
    ranges = [(number * HASH_SPACE // shards, (number + 1) * HASH_SPACE // shards) for number in range(shards)]
    made = {number: Shard(number, lo, hi) for number, (lo, hi) in enumerate(ranges, 1)}
    return State(nodes=Map(nodes), shards=Map(made), time_ms=NOW_MS)


def _ours(emit: Emit, workers: int, shards: int, params: Params) -> None:
    begun_s = time.process_time()
    Ring(RingMember(f"bench{workers}-{number}") for number in range(workers))
    emit(OURS, "ring_build_s", time.process_time() - begun_s, "s", {"workers": workers})
    planner = Planner(SETTINGS)
    state = _cluster(workers, shards)
    begun_s = time.process_time()
    first = planner.assign_initial(state)
    emit(OURS, "plan_s", time.process_time() - begun_s, "s", {**params, "step": "initial"})
    state = replace(
        state,
        shards=state.shards.update(
            {
                shard_id: replace(
                    state.shards[shard_id], epoch=1, primary=names[0], in_sync=tuple(sorted(names)), is_formed=True
                )
                for shard_id, names in first
            }
        ),
    )
    _emit_balance(emit, OURS, params, _placement(state), workers)
    roles = Counter(shard.primary for shard in state.shards.values())
    emit(OURS, "primaries_peak_to_average", max(roles.values()) * workers / shards, "ratio", params)
    _emit_plan(emit, planner, state, params, "steady")
    joined = replace(state, nodes=state.nodes.set("new", Node("new", state=NodeState.ACTIVE)))
    _emit_plan(emit, planner, joined, params, "join")
    _emit_moved(emit, OURS, params, "join", _placement(state), _settled(planner, joined), workers)
    leaving = replace(state.nodes["w1"], state=NodeState.DRAINING, drain_requested=True)
    left = replace(state, nodes=state.nodes.set("w1", leaving))
    _emit_plan(emit, planner, left, params, "leave")
    _emit_moved(emit, OURS, params, "leave", _placement(state), _settled(planner, left), workers)


def _emit_plan(emit: Emit, planner: Planner, state: State, params: Params, step: str) -> None:
    begun_s = time.process_time()
    planner.plan(state, NOW_MS)
    emit(OURS, "plan_s", time.process_time() - begun_s, "s", {**params, "step": step})


def _placement(state: State) -> Placement:
    return {shard.id: shard.in_sync for shard in state.shards.values()}


def _settled(planner: Planner, state: State) -> Placement:
    """The placement once whole plans have been carried out until nothing is left to move."""
    for _ in range(PLANS_MAX):
        plan = planner.plan(state, NOW_MS)
        if not plan.moves:
            return _placement(state)
        state = _carried_out(state, plan)
    raise RuntimeError(f"still {len(plan.moves)} moves after {PLANS_MAX} whole plans")


def _carried_out(state: State, plan: Plan) -> State:
    shards = {}
    for move in plan.moves:
        shard = state.shards[move.shard_id]
        leaving = "" if move.kind is MoveKind.TRANSFER else move.source
        names = {name for name in (*shard.in_sync, move.target) if name and name != leaving}
        primary = move.target if move.source == shard.primary else shard.primary
        shards[shard.id] = replace(shard, in_sync=tuple(sorted(names)), primary=primary)
    return replace(state, shards=state.shards.update(shards))


# Peers


def _peers(emit: Emit, workers: int, shards: int, params: Params) -> None:
    names = [f"w{number}" for number in range(workers)]
    joined, left = [*names, "new"], [name for name in names if name != "w1"]
    peers: list[tuple[str, Callable[[Sequence[str], Iterable[int]], Placement]]] = [("rendezvous", rendezvous)]
    if uhashring_module() is not None:
        peers.append(("uhashring", uhashring))
    for system, place in peers:
        ids: Sequence[int] = range(1, shards + 1)
        is_sampled = system == "rendezvous" and workers * shards > RENDEZVOUS_HASHES_MAX
        if is_sampled:
            ids = ids[:: -(-workers * shards // RENDEZVOUS_HASHES_MAX)]
        begun_s = time.process_time()
        before = place(names, ids)
        if not is_sampled:
            emit(system, "plan_s", time.process_time() - begun_s, "s", {**params, "step": "initial"})
            _emit_balance(emit, system, params, before, workers)
        _emit_moved(emit, system, params, "join", before, place(joined, ids), workers)
        # Those that must move, and every eighth of the others: to see whether any of them moves without need.
        watched = {shard_id: held for shard_id, held in before.items() if "w1" in held or shard_id % 8 == 0}
        _emit_moved(emit, system, params, "leave", watched, place(left, list(watched)), workers)


def rendezvous(names: Sequence[str], shard_ids: Iterable[int]) -> Placement:
    """Highest random weight (Thaler and Ravishankar 1998): the two workers whose hash with the shard is highest."""
    encoded = [name.encode() + b"#" for name in names]
    placed: Placement = {}
    for shard_id in shard_ids:
        suffix = b"%d" % shard_id
        scores = [xxh3_64_intdigest(name + suffix) for name in encoded]
        first = scores.index(max(scores))
        scores[first] = -1
        placed[shard_id] = (names[first], names[scores.index(max(scores))])
    return placed


def uhashring(names: Sequence[str], shard_ids: Iterable[int]) -> Placement:
    """The ring library as its documentation shows it; the second copy on the next distinct worker."""
    module = uhashring_module()
    assert module is not None
    ring = module.HashRing(nodes=list(names))
    return {
        shard_id: tuple(node["nodename"] for node in ring.range(str(shard_id), size=REPLICAS)) for shard_id in shard_ids
    }


def uhashring_module() -> ModuleType | None:
    """The library, or None with a line on standard error."""
    try:
        import uhashring as module
    except ImportError:
        print("tools/bench: uhashring is not installed, it is left out (pip install uhashring)", file=sys.stderr)
        return None
    return module  # type: ignore[no-any-return,unused-ignore]


# What is measured of all


def _emit_balance(emit: Emit, system: str, params: Params, placement: Placement, workers: int) -> None:
    loads = Counter(name for names in placement.values() for name in names)
    emit(system, "peak_to_average", max(loads.values()) * workers / sum(loads.values()), "ratio", params)


def _emit_moved(
    emit: Emit, system: str, params: Params, step: str, before: Placement, after: Placement, workers: int
) -> None:
    """Copies on workers that did not have them, over those that had to go there."""
    moved = sum(len(set(after[shard_id]) - set(names)) for shard_id, names in before.items())
    if step == "join":
        ideal = len(before) * REPLICAS / (workers + 1)
    else:
        ideal = sum("w1" in names for names in before.values())
    emit(system, "moved_over_ideal", moved / ideal, "ratio", {**params, "step": step})


def _locate(emit: Emit, shards: int) -> None:
    keys = [f"user-{number}" for number in range(LOCATE_KEYS)]
    state = _cluster(1, shards)
    located = ShardMap(state.shards.values())
    params: Params = {"shards": shards, "batch": LOCATE_KEYS}
    _emit_rate(emit, OURS, params, lambda: located.locate_many(keys), len(keys))
    single = keys[:20_000]
    _emit_rate(
        emit, OURS, {"shards": shards, "batch": 1}, lambda: [located.locate_key(key) for key in single], len(single)
    )


def _locate_workers(emit: Emit) -> None:
    """From keys to the worker that answers for them, among a hundred: what a client asks."""
    names = [f"w{number}" for number in range(100)]
    keys = [f"user-{number}" for number in range(20_000)]
    params: Params = {"workers": 100, "what": "keys to workers"}
    shards = [replace(shard, primary=names[shard.id % 100]) for shard in _cluster(1, 1_600).shards.values()]
    located = ShardMap(shards)
    _emit_rate(emit, OURS, params, lambda: [shard.primary for shard in located.locate_many(keys)], len(keys))
    module = uhashring_module()
    if module is not None:
        ring = module.HashRing(nodes=names)
        _emit_rate(emit, "uhashring", params, lambda: [ring.get_node(key) for key in keys], len(keys))
    encoded = [name.encode() + b"#" for name in names]

    def highest(key: str) -> str:
        suffix = key.encode()
        scores = [xxh3_64_intdigest(name + suffix) for name in encoded]
        return names[scores.index(max(scores))]

    few = keys[:1_000]
    _emit_rate(emit, "rendezvous", params, lambda: [highest(key) for key in few], len(few))


def _emit_rate(emit: Emit, system: str, params: Params, work: Callable[[], object], count: int) -> None:
    rates = []
    for _ in range(LOCATE_ROUNDS):
        begun_s = time.process_time()
        work()
        rates.append(count / (time.process_time() - begun_s))
    emit(system, "locate_per_s", statistics.median(rates), "1/s", params, rates)
