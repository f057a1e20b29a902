"""The points of the check that are about shards: owned, even, taken over, grown, shrunk."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterable

from coordinator.api.v1 import types_pb2
from coordinator.model import key_hash
from coordinator.model.errors import CoordinatorError
from tools.lib.quickstart_cluster import QuickstartCluster
from tools.lib.quickstart_stage import Place, Stage, peak_to_average

HELD = Counter[str]
IN_SYNC = re.compile(r" is in sync \(move (\d+)\)")
"""How the story tells that a move's new copy has everything (coordinator/machine/moves.py)."""


def leader_is_elected(stage: Stage) -> str:
    """(a) Three masters agree on one leader."""
    begun_s = time.monotonic()
    cluster = stage.cluster
    cluster.refuse_if_occupied([*stage.workers, stage.newcomer])
    cluster.start(stage.workers)
    cluster.wait("leader", lambda: bool(cluster.leader()))
    took_s = time.monotonic() - begun_s
    cluster.wait(
        "answer of all masters", lambda: all(master.leader_id for master in cluster.client.list_masters().masters)
    )
    masters = cluster.client.list_masters().masters
    stage.require(len({(master.leader_id, master.term) for master in masters}) == 1, f"masters disagree: {masters}")
    return f"{cluster.leader()} leads 3 masters in term {masters[0].term}, {took_s:.1f} s after their start"


def every_shard_has_two_owners(stage: Stage) -> str:
    """(b) Each shard has a primary and a second worker in sync, and the ranges cover the key space once."""
    cluster = stage.cluster
    took_s = cluster.wait(
        "shards with two owners each", lambda: cluster.active() >= set(stage.workers) and cluster.is_whole()
    )
    shards = cluster.shards()
    for shard in shards:
        good = shard.primary in shard.in_sync and len(set(shard.in_sync)) == 2
        stage.require(
            good, f"shard {shard.id} has primary {shard.primary!r} and in-sync replicas {list(shard.in_sync)}"
        )
    ends = [shard.hi for shard in shards[:-1]]
    stage.require(
        [shard.lo for shard in shards] == [0, *ends] and shards[-1].hi == 0, "the ranges do not cover the key space"
    )
    primaries = Counter(shard.primary for shard in shards)
    return f"{len(shards)} shards, 2 workers each, {took_s:.1f} s after the leader; primaries: {listed(primaries)}"


def every_word_is_located(stage: Stage) -> str:
    """(c) Every word has a place, the right one, and the load is even."""
    begun_s = time.monotonic()
    stage.places = stage.locate_all()
    took_s = time.monotonic() - begun_s
    words, places = stage.words, stage.places
    stage.require(len(places) == len(words), f"{len(words) - len(places)} of {len(words)} words have no place")
    by_id = {shard.id: shard for shard in stage.cluster.shards()}
    for word, place in places.items():
        shard = by_id[place.shard_id]
        right = place.key_hash == key_hash(word) and shard.lo <= place.key_hash < (shard.hi or 1 << 64)
        stage.require(right, f"{word!r} (hash {place.key_hash:016x}) was sent to shard {shard.id}")
        stage.require(place.primary == shard.primary and len(place.in_sync) == 2, f"{word!r} is at {place}")
    primaries, copies = loads(places.values())
    return (
        f"{len(words):,} words in {took_s:.1f} s ({len(words) / took_s:,.0f}/s, gRPC); primaries: {listed(primaries)}\n"
        f"peak to average {peak_to_average(copies, stage.workers):.3f} by copies, "
        f"{peak_to_average(primaries, stage.workers):.3f} by primaries"
    )


def worker_is_killed(stage: Stage) -> str:
    """(g) Shards and jobs of a killed worker move to the others; then it comes back."""
    cluster, client = stage.cluster, stage.cluster.client
    victim = next(view.job.owner for view in client.list_jobs(job_id="tick").jobs)
    had = [shard.id for shard in cluster.shards() if shard.primary == victim]
    jobs = [view.job.spec.id for view in client.list_jobs().jobs if view.job.owner == victim]
    begun_s = time.monotonic()
    cluster.workers[victim].kill()
    cluster.wait("new primaries", lambda: all(shard.primary not in ("", victim) for shard in cluster.shards()))
    primaries_s = time.monotonic() - begun_s
    cluster.wait(
        "new owners of its jobs", lambda: all(view.job.owner not in ("", victim) for view in client.list_jobs().jobs)
    )
    jobs_s = time.monotonic() - begun_s

    def copied() -> bool:
        return all(len(set(shard.in_sync) - {victim}) >= 2 for shard in cluster.shards())

    cluster.wait("new copies of its shards", copied)
    copies_s = time.monotonic() - begun_s
    owner = client.list_jobs(job_id="tick").jobs[0].job.owner
    since_ms = time.time_ns() // 1_000_000

    def ran() -> bool:
        launches = client.list_launches(job_id="tick", latest=10).launches
        good = (types_pb2.LAUNCH_STATE_SUCCEEDED,)
        return any(
            run.worker == owner and run.state in good and run.scheduled_at_unix_ms > since_ms for run in launches
        )

    cluster.wait(f"launch of the job on {owner}", ran)
    back_s, level_s = bring_back(stage, victim)
    return (
        f"{victim} killed: its {len(had)} primaries moved in {primaries_s:.1f} s, its {len(jobs)} jobs in "
        f"{jobs_s:.1f} s, second copies made in {copies_s:.1f} s\n"
        f"the job runs on {owner}; {victim} started: in after {back_s:.1f} s, its share back after {level_s:.1f} s"
    )


def bring_back(stage: Stage, victim: str) -> tuple[float, float]:
    """Starts a killed worker again; seconds until it is in, and until it has its share."""
    cluster = stage.cluster
    old = cluster.node(victim).incarnation
    begun_s = time.monotonic()
    cluster.start_worker(victim)
    back_s = cluster.wait(
        f"return of {victim}", lambda: cluster.node(victim).incarnation != old and victim in cluster.active()
    )
    cluster.wait("rest after its return", lambda: cluster.is_at_rest() and holds_something(cluster.shards(), victim))
    stage.require(cluster.is_whole(), "some shards are not held by two workers")
    return back_s, time.monotonic() - begun_s


def worker_joins(stage: Stage) -> str:
    """(h) A fourth worker receives its share, and little else moves."""
    cluster = stage.cluster
    before_shards = {shard.id: set(shard.in_sync) for shard in cluster.shards()}
    before = stage.locate_all()
    begun_s = time.monotonic()
    cluster.start_worker(stage.newcomer)
    everybody = (*stage.workers, stage.newcomer)
    cluster.wait("admission of the newcomer", lambda: stage.newcomer in cluster.active())
    cluster.wait(
        "share of the newcomer", lambda: cluster.is_at_rest() and holds_something(cluster.shards(), stage.newcomer)
    )
    took_s = time.monotonic() - begun_s
    after = stage.places = stage.locate_all()
    primaries, copies = loads(after.values())
    share = copies[stage.newcomer] / copies.total()
    moved_keys = sum(len(set(after[word].in_sync) - set(before[word].in_sync)) for word in after) / copies.total()
    shards = cluster.shards()
    moved_copies = sum(len(set(shard.in_sync) - before_shards[shard.id]) for shard in shards)
    changed = sum(after[word].primary != before[word].primary for word in after)
    ideal = 1 / len(everybody)
    peak = peak_to_average(copies, everybody)
    stage.require(
        0.85 * ideal <= share <= 1.15 * ideal, f"{stage.newcomer} got {share:.1%}, its fair share is {ideal:.1%}"
    )
    stage.require(moved_keys <= 1.15 * ideal, f"{moved_keys:.1%} of the copies moved, {ideal:.1%} had to")
    return (
        f"{stage.newcomer} has {share:.1%} of all copies (ideal {ideal:.1%}) after {took_s:.1f} s; "
        f"{moved_keys:.1%} of the copies moved (ideal {ideal:.1%}), {moved_keys / ideal:.2f} times the ideal\n"
        f"{moved_copies} of {2 * len(shards)} shard copies were made anew; {changed:,} of {len(after):,} words have "
        f"a new primary; peak to average {peak:.3f} by copies, {peak_to_average(primaries, everybody):.3f} by primaries"
    )


def worker_leaves(stage: Stage) -> str:
    """(i) A worker is emptied and stopped, while every shard is watched all the time."""
    cluster, client, leaver = stage.cluster, stage.cluster.client, stage.workers[0]
    had = sum(leaver in shard.in_sync for shard in cluster.shards())
    safe = client.drain_node(leaver, dry_run=True)
    stage.require(safe.safe, f"the dry run says that it is not safe: {list(safe.problems)}")
    story_from = max((event.sequence for event in client.stream_events(latest=1)), default=0) + 1
    begun_s = time.monotonic()
    with Watch(cluster) as watch:
        client.drain_node(leaver)

        def emptied() -> bool:
            view = next(view for view in client.list_nodes(node_id=leaver).nodes)
            return not (view.replicas or view.joining or view.jobs)

        cluster.wait(f"end of the drain of {leaver}", emptied)
        drained_s = time.monotonic() - begun_s
        stage.require(cluster.workers[leaver].stop(), f"{leaver} did not stop cleanly")
        cluster.workers.pop(leaver)

        def left() -> bool:
            return client.list_nodes(node_id=leaver).nodes[0].node.state == types_pb2.NODE_STATE_LEFT

        left_s = cluster.wait("agreement that it left", left)
        cluster.wait("rest after it left", cluster.is_at_rest)
    stage.require(watch.looks > 10, f"the shards were looked at only {watch.looks} times")
    stage.require(not watch.faults, f"{len(watch.faults)} times a shard had too few replicas, first {watch.faults[:1]}")
    moves = copies_before_removals(stage, list(client.stream_events(from_sequence=story_from)))
    return (
        f"{leaver} gave {had} copies away in {drained_s:.1f} s and was gone {left_s:.1f} s after its stop\n"
        f"{watch.looks} looks at all shards: never fewer than 2 in sync; {moves} moves in the story, each with the new "
        f"copy in sync before the old one went"
    )


def copies_before_removals(stage: Stage, story: list[types_pb2.Event]) -> int:
    """How many moves ended, once it is sure that each had its new copy in sync before the old one was removed.

    Looks can miss a state that lasts for milliseconds; the story, made by the same log entries as the map, cannot.
    """
    in_sync: set[str] = set()
    surplus: set[str] = set()
    ended = 0
    for event in story:
        if event.kind == "shard":
            stage.require(not event.message.startswith("lost "), f"shard {event.subject}: {event.message}")
            if found := IN_SYNC.search(event.message):
                in_sync.add(found[1])
        elif event.kind == "move" and event.message.startswith("surplus"):
            # Takes away a copy beyond the replica count, so none has to come first.
            surplus.add(event.subject)
        elif event.kind == "move" and event.message.endswith("gave the shard up") and event.subject not in surplus:
            stage.require(event.subject in in_sync, f"move {event.subject} ended and its copy never was in sync")
            ended += 1
    stage.require(ended > 0, "the story has no move")
    return ended


class Watch:
    """Looks at every shard all the time, in a thread of its own with a connection of its own."""

    def __init__(self, cluster: QuickstartCluster) -> None:
        self.looks = 0
        self.faults: list[str] = []
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._cluster.new_client(timeout_s=10.0) as client:
            while not self._stop.wait(0.01):
                try:
                    answer = client.list_shards()
                except CoordinatorError as error:
                    self.faults.append(f"the shards could not be seen: {error}")
                    continue
                self.looks += 1
                for shard in answer.shards:
                    if len(set(shard.in_sync)) < 2 or shard.primary not in shard.in_sync:
                        self.faults.append(f"shard {shard.id} in epoch {shard.epoch}: {list(shard.in_sync)}")


def loads(places: Iterable[Place]) -> tuple[HELD, HELD]:
    """Keys per worker: as primary, and in all copies."""
    primaries, copies = HELD(), HELD()
    for place in places:
        primaries[place.primary] += 1
        copies.update(place.in_sync)
    return primaries, copies


def holds_something(shards: Iterable[types_pb2.Shard], worker_id: str) -> bool:
    """True when the worker has a copy of any shard."""
    return any(worker_id in shard.in_sync for shard in shards)


def listed(counts: HELD) -> str:
    """Counts by name: "w1 85, w2 86"."""
    return ", ".join(f"{name} {counts[name]:,}" for name in sorted(counts))
