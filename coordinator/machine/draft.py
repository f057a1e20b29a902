"""One command's change in the making.

A handler reads and writes a `Draft`; when it returns, `finish` gives the new State, and when it raises `Refused` the
draft is thrown away and the old State stands. The draft keeps the derived maps true and the bounded ones bounded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import replace

from coordinator.machine.state import (
    Change,
    JobChanged,
    LaunchChanged,
    MoveChanged,
    NodeChanged,
    SettingsChanged,
    ShardChanged,
    State,
)
from coordinator.model import (
    ClusterSettings,
    CronJob,
    Launch,
    LogRecord,
    Move,
    Node,
    Shard,
    WallMs,
)
from coordinator.model.errors import RefusalReason, Refused

EVENTS_KEPT = 10_000
"""Lines of the story in the state; about 2 MiB."""
ENDED_MOVES_KEPT = 500


class Draft:
    """The state as one command is changing it, and what it changed."""

    def __init__(self, state: State, index: int, time_ms: WallMs, cause: str) -> None:
        self.index = index
        self.time_ms = time_ms
        self.cause = cause
        self.cluster_id = state.cluster_id
        self.settings = state.settings
        self.masters = state.masters
        self.nodes = state.nodes
        self.shards = state.shards
        self.moves = state.moves
        self.jobs = state.jobs
        self.launches = state.launches
        self.launch_times = state.launch_times
        self.results = state.results
        self.result_order = state.result_order
        self.next_result_position = state.next_result_position
        self._launch_counts = state.launch_counts
        self.move_of_shard = state.move_of_shard
        self.next_shard_id = state.next_shard_id
        self.next_move_id = state.next_move_id
        self.changes: list[Change] = []
        self.records: list[LogRecord] = []
        self.created_ids: list[int] = []
        self.started_move_id = 0
        self.scheduled_at_ms = 0
        self._ended_moves = state.ended_moves
        self._events = state.events
        self._next_event_sequence = state.next_event_sequence

    def finish(self) -> State:
        """The new state."""
        # Every field is named: it takes half the time of `replace`, for each command on each master.
        return State(
            cluster_id=self.cluster_id,
            index=self.index,
            time_ms=self.time_ms,
            settings=self.settings,
            nodes=self.nodes,
            shards=self.shards,
            moves=self.moves,
            ended_moves=self._ended_moves,
            jobs=self.jobs,
            masters=self.masters,
            launches=self.launches,
            events=self._events,
            results=self.results,
            result_order=self.result_order,
            next_result_position=self.next_result_position,
            next_shard_id=self.next_shard_id,
            next_move_id=self.next_move_id,
            next_event_sequence=self._next_event_sequence,
            move_of_shard=self.move_of_shard,
            launch_times=self.launch_times,
            launch_counts=self._launch_counts,
        )

    def record(self, kind: str, subject: str | int, message: str) -> None:
        """Adds a line to the story."""
        line = LogRecord(
            self._next_event_sequence, self.index, self.time_ms, kind, str(subject), message, self.cause
        )
        self.records.append(line)
        self._events = self._events.set(line.sequence, line)
        self._next_event_sequence += 1
        if len(self._events) > EVENTS_KEPT:
            self._events = self._events.delete(line.sequence - EVENTS_KEPT)

    def node(self, node_id: str) -> Node:
        """The worker, or a refusal."""
        node = self.nodes.get(node_id)
        if node is None:
            raise Refused(RefusalReason.NOT_FOUND, f"there is no worker {node_id!r}; see `clusterctl nodes list`")
        return node

    def put_node(self, node: Node) -> None:
        """Makes or replaces a worker's record; a new state is stamped with the time."""
        before = self.nodes.get(node.id)
        if before is None or before.state is not node.state:
            node = replace(node, state_since_ms=self.time_ms)
        if node != before:
            self.nodes = self.nodes.set(node.id, node)
            self.changes.append(NodeChanged(before, node))

    def drop_node(self, node: Node) -> None:
        """Forgets a worker."""
        self.nodes = self.nodes.delete(node.id)
        self.changes.append(NodeChanged(node, None))

    def shard(self, shard_id: int) -> Shard:
        """The shard, or a refusal."""
        shard = self.shards.get(shard_id)
        if shard is None:
            raise Refused(RefusalReason.NOT_FOUND, f"there is no shard {shard_id}; see `clusterctl shards list`")
        return shard

    def put_shard(self, shard: Shard) -> Shard:
        """Makes or replaces a shard; stamps its generation. Returns it as stored."""
        before = self.shards.get(shard.id)
        if shard == before:
            return shard
        shard = replace(shard, generation=self.index)
        self.shards = self.shards.set(shard.id, shard)
        self.changes.append(ShardChanged(before, shard))
        return shard

    def drop_shard(self, shard: Shard) -> None:
        """Ends a shard."""
        self.shards = self.shards.delete(shard.id)
        self.changes.append(ShardChanged(shard, None))

    def move(self, move_id: int) -> Move:
        """The move in progress, or a refusal."""
        move = self.moves.get(move_id)
        if move is None:
            known = move_id in self._ended_moves
            why = "has already ended" if known else "does not exist"
            reason = RefusalReason.PRECONDITION if known else RefusalReason.NOT_FOUND
            raise Refused(reason, f"move {move_id} {why}; see `clusterctl moves list --all`")
        return move

    def move_on(self, shard_id: int) -> Move | None:
        """The move in progress of a shard."""
        move_id = self.move_of_shard.get(shard_id)
        return None if move_id is None else self.moves[move_id]

    def put_move(self, move: Move) -> None:
        """Makes or replaces a move; stamps a new phase; files it under the ended ones when it has ended."""
        before = self.moves.get(move.id)
        if before is None or before.phase is not move.phase:
            move = replace(move, phase_since_ms=self.time_ms)
        if move == before:
            return
        if move.has_ended:
            if before is not None:
                self.moves = self.moves.delete(move.id)
                for shard_id in move.shard_ids:
                    self.move_of_shard = self.move_of_shard.delete(shard_id)
            self._ended_moves = self._ended_moves.set(move.id, move)
            if len(self._ended_moves) > ENDED_MOVES_KEPT:
                self._ended_moves = self._ended_moves.delete(min(self._ended_moves))
        else:
            self.moves = self.moves.set(move.id, move)
            for shard_id in move.shard_ids:
                self.move_of_shard = self.move_of_shard.set(shard_id, move.id)
        self.changes.append(MoveChanged(before, move))

    def job(self, job_id: str) -> CronJob:
        """The job, or a refusal."""
        job = self.jobs.get(job_id)
        if job is None:
            raise Refused(RefusalReason.NOT_FOUND, f"there is no cron job {job_id!r}; see `clusterctl cron list`")
        return job

    def put_job(self, job: CronJob) -> None:
        """Makes or replaces a job; stamps its generation."""
        before = self.jobs.get(job.id)
        if job == before:
            return
        job = replace(job, generation=self.index)
        self.jobs = self.jobs.set(job.id, job)
        self.changes.append(JobChanged(before, job))

    def drop_job(self, job: CronJob) -> None:
        """Forgets a job and its launches."""
        self.jobs = self.jobs.delete(job.id)
        with self.launches.mutate() as launches:
            for time_ms in self.launch_times.get(job.id, ()):
                self._count(launches.pop((job.id, time_ms)), -1)
            self.launches = launches.finish()
        if job.id in self.launch_times:
            self.launch_times = self.launch_times.delete(job.id)
        self.changes.append(JobChanged(job, None))

    def put_launch(self, launch: Launch) -> None:
        """Makes or replaces a launch; forgets the oldest ended ones beyond what the settings keep."""
        before = self.launches.get(launch.key)
        if launch == before:
            return
        self.launches = self.launches.set(launch.key, launch)
        self._count(launch, 1)
        if before is not None:
            self._count(before, -1)
        self.changes.append(LaunchChanged(before, launch))
        times = list(self.launch_times.get(launch.job_id, ()))
        if before is None:
            insort(times, launch.scheduled_at_ms)
        too_old_ms = self.time_ms - round(self.settings.launches_kept_s * 1_000)
        excess = max(len(times) - self.settings.launches_kept, bisect_left(times[:-1], too_old_ms), 0)
        for time_ms in times[:excess]:
            oldest = self.launches[(launch.job_id, time_ms)]
            if oldest.state.has_ended:
                self._count(oldest, -1)
                self.launches = self.launches.delete((launch.job_id, time_ms))
                del times[bisect_left(times, time_ms)]
        self.launch_times = self.launch_times.set(launch.job_id, tuple(times))

    def _count(self, launch: Launch, change: int) -> None:
        count = self._launch_counts.get(launch.state, 0) + change
        counts = self._launch_counts
        self._launch_counts = counts.set(launch.state, count) if count else counts.delete(launch.state)

    def put_settings(self, settings: ClusterSettings) -> None:
        """Replaces the settings."""
        if settings != self.settings:
            self.changes.append(SettingsChanged(self.settings, settings))
            self.settings = settings
