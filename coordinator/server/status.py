"""The cluster at a glance: counts, and one sentence for each thing that is wrong. Pure.

A sentence names the thing, says what follows from it where that is not plain, and what would help. Whoever reads it at
three in the morning should not need a second command to know where to look.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coordinator.api.v1 import cluster_pb2
from coordinator.control.figures import DamagedCopy
from coordinator.control.replicas import LostCopy
from coordinator.machine.state import State
from coordinator.model import Node, NodeState, Shard, WallMs
from coordinator.model.clock import offset_words
from coordinator.raft.clocks import ADVICE

NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the answering master knows beside the replicated state."""

    masters: Sequence[cluster_pb2.Master]
    now_ms: WallMs
    uses_discovery: bool = False
    """True where Consul has to report a worker healthy before it is admitted."""
    healthy: frozenset[str] | None = None
    """Workers that Consul holds for healthy; None when it cannot be asked."""
    connected: frozenset[str] | None = None
    """Workers with a session at the leader; None when this master does not lead."""
    refusals: Sequence[str] = field(default_factory=tuple)
    """What the planner would like to do and cannot."""
    lost_copies: Sequence[LostCopy] = field(default_factory=tuple)
    """Shards whose last copy is lost."""
    damaged_copies: Sequence[DamagedCopy] = field(default_factory=tuple)
    """Shards whose last copy is damaged, and served but for that."""
    unwritable: Mapping[str, int] = field(default_factory=dict)
    """Workers that say that stores of theirs take no writes, and of how many shards."""


def is_short(shard: Shard, state: State) -> bool:
    """True when the shard has fewer in-sync replicas than the settings ask for."""
    return len(shard.in_sync) < state.settings.replicas


def is_unavailable(shard: Shard, state: State) -> bool:
    """True when the worker that should answer for the shard does not."""
    node = state.nodes.get(shard.primary)
    return node is None or not node.is_serving


def fill_status(response: cluster_pb2.GetStatusResponse, state: State, around: Surroundings) -> None:
    """Fills in everything that follows from the state and the surroundings."""
    shards = list(state.shards.values())
    response.cluster_id = state.cluster_id
    response.index = state.index
    response.time_unix_ms = state.time_ms
    response.masters.extend(around.masters)
    for node in state.nodes.values():
        response.nodes_by_state[node.state.name.lower()] += 1
    response.shards = len(shards)
    response.shards_short_of_replicas = sum(is_short(shard, state) for shard in shards)
    response.shards_unavailable = sum(is_unavailable(shard, state) or not shard.is_formed for shard in shards)
    response.moves = len(state.moves)
    response.jobs = len(state.jobs)
    response.jobs_without_owner = sum(not job.owner for job in state.jobs.values())
    response.launches_in_progress = sum(count for at, count in state.launch_counts.items() if not at.has_ended)
    response.problems.extend(problems(state, around))


def problems(state: State, around: Surroundings) -> list[str]:
    """What is wrong, the worst first; empty when nothing is."""
    if not state.cluster_id:
        return [*_master_problems(around.masters), "the cluster has not been made yet; its first leader will do that"]
    return [
        *_master_problems(around.masters),
        *_lost_problems(around.lost_copies),
        *_damage_problems(around.damaged_copies),
        *_shard_problems(state),
        *_node_problems(state, around),
        *_job_problems(state),
        *_discovery_problems(around),
        *around.refusals,
        *_pauses(state),
    ]


def _master_problems(masters: Sequence[cluster_pb2.Master]) -> list[str]:
    unreachable = [master for master in masters if master.role == "unreachable"]
    found = [f"master {master.id} at {master.grpc_address} is unreachable: {master.problem}" for master in unreachable]
    if unreachable:
        spare = len(masters) - len(unreachable) - (len(masters) // 2 + 1)
        if spare < 0:
            found.append(
                f"only {len(masters) - len(unreachable)} of {len(masters)} masters answer; "
                f"nothing can be changed before {len(masters) // 2 + 1} do"
            )
        elif spare == 0:
            found.append("no further master may be lost; start the missing ones again")
    return [*found, *(sentence for master in masters if (sentence := clock_problem(master)))]


def clock_problem(master: cluster_pb2.Master) -> str:
    """What is wrong with a master's wall clock; empty when nothing is."""
    if not master.clock_is_off and not master.refuses_to_lead:
        return ""
    what = f"the wall clock of master {master.id} is {offset_words(master.clock_offset_ms / 1_000)} the other masters'"
    if not master.refuses_to_lead:
        follows = ", and schedules go by it" if master.role == "leader" else ", and schedules would go by it if it led"
    else:
        follows = ", so it hands the leadership on" if master.role == "leader" else ", so it refuses to lead"
    return f"{what}{follows}: {ADVICE}"


def _lost_problems(lost_copies: Sequence[LostCopy]) -> list[str]:
    found = []
    for lost in lost_copies[:NAMES_SHOWN]:
        reason = f" ({lost.reason})" if lost.reason else ""
        found.append(
            f"the last copy of shard {lost.shard_id}, on {lost.node_id}, is damaged or gone{reason}; nothing is done "
            "about it: bring its files back, or a worker that held the shard before"
        )
    if len(lost_copies) > NAMES_SHOWN:
        found.append(f"the last copies of {len(lost_copies) - NAMES_SHOWN} more shards are damaged or gone")
    return found


def _damage_problems(damaged_copies: Sequence[DamagedCopy]) -> list[str]:
    found = [
        f"the last copy of shard {copy.shard_id}, on {copy.node_id}, is damaged ({copy.damage}); all but that is "
        "served: start a worker that held the shard before, or write the key again or delete it"
        for copy in damaged_copies[:NAMES_SHOWN]
    ]
    if len(damaged_copies) > NAMES_SHOWN:
        found.append(f"the last copies of {len(damaged_copies) - NAMES_SHOWN} more shards are damaged")
    return found


def _shard_problems(state: State) -> list[str]:
    shards = sorted(state.shards.values(), key=lambda shard: shard.id)
    never_assigned = [shard for shard in shards if not shard.in_sync]
    quarantined = [shard for shard in shards if shard.quarantine]
    unformed = [shard for shard in shards if shard.in_sync and not shard.is_formed and not is_unavailable(shard, state)]
    unavailable = [
        shard for shard in shards if shard.in_sync and not shard.quarantine and is_unavailable(shard, state)
    ]
    short = [shard for shard in shards if shard.in_sync and is_short(shard, state)]
    found = []
    if never_assigned:
        found.append(
            f"no worker holds {_count(never_assigned, 'shard')} yet: {_ids(never_assigned)}; "
            "they are assigned soon after workers are admitted"
        )
    if unformed:
        makers = sorted({name for shard in unformed for name in shard.in_sync})
        found.append(
            f"{_count(unformed, 'shard')} cannot answer yet: {_ids(unformed)}; "
            f"{_some(makers)} {'is' if len(makers) == 1 else 'are'} making the first stores"
        )
    for shard in quarantined[:NAMES_SHOWN]:
        silent = ", and cannot answer" if is_unavailable(shard, state) else ""
        found.append(
            f"shard {shard.id} is in quarantine{silent}: {shard.quarantine}; when the reason is found, "
            f"`clusterctl shards release {shard.id}` ends that"
        )
    if len(quarantined) > NAMES_SHOWN:
        more = quarantined[NAMES_SHOWN:]
        found.append(f"{_count(more, 'more shard')} in quarantine: {_ids(more)}")
    if unavailable:
        primaries = sorted({shard.primary for shard in unavailable})
        found.append(
            f"{_count(unavailable, 'shard')} cannot answer: {_ids(unavailable)}; "
            f"no other worker has a whole copy, so start {_some(primaries)} again"
        )
    if short:
        wanted = state.settings.replicas
        able = sum(node.may_receive for node in state.nodes.values())
        why = f"; that takes {wanted} workers, and only {able} can receive" if able < wanted else ""
        have = "has" if len(short) == 1 else "have"
        found.append(f"{_count(short, 'shard')} {have} fewer than {wanted} in-sync replicas: {_ids(short)}{why}")
    return found


def _node_problems(state: State, around: Surroundings) -> list[str]:
    found = []
    for node in sorted(state.nodes.values(), key=lambda node: node.id):
        sentence = _node_problem(node, around)
        if sentence:
            found.append(sentence)
    if not any(node.state in (NodeState.ACTIVE, NodeState.DRAINING) for node in state.nodes.values()):
        found.append("no worker is admitted; start some with `worker-agent --config cluster.toml --id w1`")
    return found


def _node_problem(node: Node, around: Surroundings) -> str:
    since_s = max(0, around.now_ms - node.state_since_ms) / 1_000
    if node.is_suspect:
        silent_s = max(0, around.now_ms - node.suspect_since_ms) / 1_000
        return f"worker {node.id} is suspect: it has not been heard for {_duration(silent_s)}"
    if node.is_serving and (count := around.unwritable.get(node.id, 0)):
        return (
            f"worker {node.id} takes no writes for {count} shard{'' if count == 1 else 's'}: look whether its disk is "
            "full; its reads go on, and workers that can write take over from it"
        )
    match node.state:
        case NodeState.DOWN:
            return (
                f"worker {node.id} is down since {_duration(since_s)}; "
                f"start it again, or forget it with `clusterctl nodes remove {node.id}`"
            )
        case NodeState.JOINING if around.uses_discovery and around.healthy is None:
            return f"worker {node.id} waits to be admitted: Consul cannot be asked whether it is healthy"
        case NodeState.JOINING if around.uses_discovery and node.id not in (around.healthy or ()):
            return (
                f"worker {node.id} waits to be admitted: Consul has not reported it healthy; "
                f"check that Consul reaches http://{node.http_address}/health"
            )
        case NodeState.JOINING if around.connected is not None and node.id not in around.connected:
            return f"worker {node.id} registered and went away again {_duration(since_s)} ago, before it was admitted"
        case NodeState.JOINING:
            return f"worker {node.id} waits to be admitted since {_duration(since_s)}"
        case _:
            return ""


def _discovery_problems(around: Surroundings) -> list[str]:
    if not around.uses_discovery or around.healthy is not None:
        return []
    return ["Consul does not answer, or has only just come back: nothing moves for that, but no worker is admitted"]


def _job_problems(state: State) -> list[str]:
    orphans = sorted(job.id for job in state.jobs.values() if not job.owner)
    if not orphans:
        return []
    return [f"{len(orphans)} cron {'job has' if len(orphans) == 1 else 'jobs have'} no owner: {_some(orphans)}"]


def _pauses(state: State) -> list[str]:
    found = []
    if state.settings.rebalance_paused:
        found.append("rebalancing is paused: only repairs are made; `clusterctl rebalance --resume` ends that")
    if state.settings.cron_paused:
        found.append("all cron schedules are paused: nothing is launched by its schedule")
    return found


def _count(shards: Sequence[Shard], noun: str) -> str:
    return f"{len(shards)} {noun}{'' if len(shards) == 1 else 's'}"


def _ids(shards: Iterable[Shard]) -> str:
    return _some([str(shard.id) for shard in shards])


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.0f} h"
