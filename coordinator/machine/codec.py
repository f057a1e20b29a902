"""Between the vocabulary (coordinator/model) and the contract (proto): one pair of functions for each thing.

Used by snapshots and by the API alike, so that both say the same. `x_from_proto(x_to_proto(v)) == v` for every v.
"""

from __future__ import annotations

from coordinator.api.v1 import types_pb2
from coordinator.model import (
    HASH_SPACE,
    CatchUpPolicy,
    ClusterSettings,
    CronJob,
    CronJobSpec,
    Launch,
    LaunchAttempt,
    LaunchState,
    LaunchTrigger,
    LogRecord,
    LostPrimary,
    Move,
    MoveKind,
    MovePhase,
    Node,
    NodeState,
    OverlapPolicy,
    PassedTimes,
    RetryPolicy,
    Shard,
    WallMs,
)

_DEFAULT_SPEC = CronJobSpec(id="", schedule="")


def node_to_proto(node: Node) -> types_pb2.Node:
    """The worker's record as a message."""
    return types_pb2.Node(
        id=node.id,
        zone=node.zone,
        weight=node.weight,
        grpc_address=node.grpc_address,
        http_address=node.http_address,
        version=node.version,
        incarnation=node.incarnation,
        state=types_pb2.NodeState.ValueType(node.state.value),
        drain_requested=node.drain_requested,
        suspect_since_unix_ms=node.suspect_since_ms,
        state_since_unix_ms=node.state_since_ms,
        labels=dict(node.labels),
        registered_unix_ms=node.registered_ms,
        configured_weight=node.configured_weight,
    )


def node_from_proto(message: types_pb2.Node) -> Node:
    """The worker's record from a message; an unspecified state becomes JOINING."""
    return Node(
        id=message.id,
        zone=message.zone,
        weight=message.weight,
        grpc_address=message.grpc_address,
        http_address=message.http_address,
        version=message.version,
        incarnation=message.incarnation,
        state=NodeState(message.state) if message.state else NodeState.JOINING,
        drain_requested=message.drain_requested,
        suspect_since_ms=WallMs(message.suspect_since_unix_ms),
        state_since_ms=WallMs(message.state_since_unix_ms),
        registered_ms=WallMs(message.registered_unix_ms),
        labels=tuple(sorted(message.labels.items())),
        configured_weight=message.configured_weight,
    )


def shard_to_proto(shard: Shard) -> types_pb2.Shard:
    """The shard as a message; the end of the hash space becomes 0."""
    return types_pb2.Shard(
        id=shard.id,
        lo=shard.lo,
        hi=shard.hi % HASH_SPACE,
        epoch=shard.epoch,
        primary=shard.primary,
        in_sync=shard.in_sync,
        joining=shard.joining,
        absent=shard.absent,
        generation=shard.generation,
        moved_unix_ms=shard.moved_ms,
        formed=shard.is_formed,
        parents=shard.parents,
        lost_primaries=[
            types_pb2.LostPrimary(node_id=lost.node_id, at_unix_ms=lost.at_ms) for lost in shard.lost_primaries
        ],
        quarantine=shard.quarantine,
    )


def shard_from_proto(message: types_pb2.Shard) -> Shard:
    """The shard from a message."""
    return Shard(
        id=message.id,
        lo=message.lo,
        hi=message.hi or HASH_SPACE,
        epoch=message.epoch,
        primary=message.primary,
        in_sync=tuple(message.in_sync),
        joining=tuple(message.joining),
        absent=tuple(message.absent),
        generation=message.generation,
        moved_ms=WallMs(message.moved_unix_ms),
        is_formed=message.formed,
        parents=tuple(message.parents),
        lost_primaries=tuple(LostPrimary(lost.node_id, WallMs(lost.at_unix_ms)) for lost in message.lost_primaries),
        quarantine=message.quarantine,
    )


def move_to_proto(move: Move) -> types_pb2.Move:
    """The move as a message."""
    return types_pb2.Move(
        id=move.id,
        shard_id=move.shard_id,
        source=move.source,
        target=move.target,
        kind=types_pb2.MoveKind.ValueType(move.kind.value),
        phase=types_pb2.MovePhase.ValueType(move.phase.value),
        reason=move.reason,
        cause=move.cause,
        started_unix_ms=move.started_ms,
        phase_since_unix_ms=move.phase_since_ms,
        outcome=move.outcome,
        at=move.at,
        other_shard_id=move.other_shard_id,
        created_shard_ids=move.created_shard_ids,
    )


def move_from_proto(message: types_pb2.Move) -> Move:
    """The move from a message."""
    return Move(
        id=message.id,
        shard_id=message.shard_id,
        source=message.source,
        target=message.target,
        kind=MoveKind(message.kind),
        phase=MovePhase(message.phase),
        reason=message.reason,
        cause=message.cause,
        started_ms=WallMs(message.started_unix_ms),
        phase_since_ms=WallMs(message.phase_since_unix_ms),
        outcome=message.outcome,
        at=message.at,
        other_shard_id=message.other_shard_id,
        created_shard_ids=tuple(message.created_shard_ids),
    )


def job_spec_to_proto(spec: CronJobSpec) -> types_pb2.CronJobSpec:
    """The definition as a message."""
    return types_pb2.CronJobSpec(
        id=spec.id,
        schedule=spec.schedule,
        time_zone=spec.time_zone,
        priority_class=spec.priority_class,
        command=spec.command,
        python=spec.python,
        environment=dict(spec.environment),
        timeout_s=spec.timeout_s,
        working_directory=spec.working_directory,
        user=spec.user,
        memory_bytes_max=spec.memory_bytes_max,
        processor_s_max=spec.processor_s_max,
        open_files_max=spec.open_files_max,
        required_labels=dict(spec.required_labels),
        jitter_s=spec.jitter_s,
        overlap=types_pb2.OverlapPolicy.ValueType(spec.overlap.value),
        overlap_limit=spec.overlap_limit,
        catch_up=types_pb2.CatchUpPolicy.ValueType(spec.catch_up.value),
        catch_up_window_s=spec.catch_up_window_s,
        catch_up_limit=spec.catch_up_limit,
        start_deadline_s=spec.start_deadline_s,
        retry=types_pb2.RetryPolicy.ValueType(spec.retry.value),
        attempts_max=spec.attempts_max,
        retry_backoff_s=spec.retry_backoff_s,
        retry_backoff_s_max=spec.retry_backoff_s_max,
        description=spec.description,
    )


def job_spec_from_proto(message: types_pb2.CronJobSpec) -> CronJobSpec:
    """The definition from a message; what is left out (zero, empty, unspecified) takes the default of CronJobSpec."""
    return CronJobSpec(
        id=message.id,
        schedule=message.schedule,
        time_zone=message.time_zone or _DEFAULT_SPEC.time_zone,
        priority_class=message.priority_class,
        command=tuple(message.command),
        python=message.python,
        environment=tuple(sorted(message.environment.items())),
        timeout_s=message.timeout_s or _DEFAULT_SPEC.timeout_s,
        working_directory=message.working_directory,
        user=message.user,
        memory_bytes_max=message.memory_bytes_max,
        processor_s_max=message.processor_s_max,
        open_files_max=message.open_files_max,
        required_labels=tuple(sorted(message.required_labels.items())),
        jitter_s=message.jitter_s,
        overlap=OverlapPolicy(message.overlap) if message.overlap else _DEFAULT_SPEC.overlap,
        overlap_limit=message.overlap_limit or _DEFAULT_SPEC.overlap_limit,
        catch_up=CatchUpPolicy(message.catch_up) if message.catch_up else _DEFAULT_SPEC.catch_up,
        catch_up_window_s=message.catch_up_window_s or _DEFAULT_SPEC.catch_up_window_s,
        catch_up_limit=message.catch_up_limit or _DEFAULT_SPEC.catch_up_limit,
        start_deadline_s=message.start_deadline_s or _DEFAULT_SPEC.start_deadline_s,
        retry=RetryPolicy(message.retry) if message.retry else _DEFAULT_SPEC.retry,
        attempts_max=message.attempts_max or _DEFAULT_SPEC.attempts_max,
        retry_backoff_s=message.retry_backoff_s or _DEFAULT_SPEC.retry_backoff_s,
        retry_backoff_s_max=message.retry_backoff_s_max or _DEFAULT_SPEC.retry_backoff_s_max,
        description=message.description,
    )


def job_to_proto(job: CronJob) -> types_pb2.CronJob:
    """The job as a message."""
    return types_pb2.CronJob(
        spec=job_spec_to_proto(job.spec),
        owner=job.owner,
        backups=job.backups,
        paused=job.paused,
        source=job.source,
        decided_until_unix_ms=job.decided_until_ms,
        created_unix_ms=job.created_ms,
        updated_unix_ms=job.updated_ms,
        generation=job.generation,
        passed=[
            types_pb2.PassedTimes(
                until_unix_ms=past.until_ms, schedule=past.schedule, time_zone=past.time_zone, reason=past.reason
            )
            for past in job.passed
        ],
    )


def job_from_proto(message: types_pb2.CronJob) -> CronJob:
    """The job from a message."""
    return CronJob(
        spec=job_spec_from_proto(message.spec),
        owner=message.owner,
        backups=tuple(message.backups),
        paused=message.paused,
        source=message.source,
        decided_until_ms=WallMs(message.decided_until_unix_ms),
        created_ms=WallMs(message.created_unix_ms),
        updated_ms=WallMs(message.updated_unix_ms),
        generation=message.generation,
        passed=tuple(
            PassedTimes(WallMs(past.until_unix_ms), past.schedule, past.time_zone, past.reason)
            for past in message.passed
        ),
    )


def launch_to_proto(launch: Launch) -> types_pb2.Launch:
    """The launch as a message."""
    return types_pb2.Launch(
        job_id=launch.job_id,
        scheduled_at_unix_ms=launch.scheduled_at_ms,
        attempt=launch.attempt,
        worker=launch.worker,
        state=types_pb2.LaunchState.ValueType(launch.state.value),
        trigger=types_pb2.LaunchTrigger.ValueType(launch.trigger.value),
        reason=launch.reason,
        committed_unix_ms=launch.committed_ms,
        started_unix_ms=launch.started_ms,
        finished_unix_ms=launch.finished_ms,
        exit_status=launch.exit_status,
        output=launch.output,
        cause=launch.cause,
        due_unix_ms=launch.due_ms,
        not_before_unix_ms=launch.not_before_ms,
        cancel_reason=launch.cancel_reason,
        earlier_attempts=map(_attempt_to_proto, launch.earlier_attempts),
    )


def launch_from_proto(message: types_pb2.Launch) -> Launch:
    """The launch from a message."""
    return Launch(
        job_id=message.job_id,
        scheduled_at_ms=WallMs(message.scheduled_at_unix_ms),
        attempt=message.attempt,
        worker=message.worker,
        state=LaunchState(message.state),
        trigger=LaunchTrigger(message.trigger),
        reason=message.reason,
        committed_ms=WallMs(message.committed_unix_ms),
        started_ms=WallMs(message.started_unix_ms),
        finished_ms=WallMs(message.finished_unix_ms),
        exit_status=message.exit_status,
        output=message.output,
        cause=message.cause,
        due_ms=WallMs(message.due_unix_ms),
        not_before_ms=WallMs(message.not_before_unix_ms),
        cancel_reason=message.cancel_reason,
        earlier_attempts=tuple(map(_attempt_from_proto, message.earlier_attempts)),
    )


def _attempt_to_proto(attempt: LaunchAttempt) -> types_pb2.LaunchAttempt:
    return types_pb2.LaunchAttempt(
        attempt=attempt.attempt,
        worker=attempt.worker,
        state=types_pb2.LaunchState.ValueType(attempt.state.value),
        reason=attempt.reason,
        started_unix_ms=attempt.started_ms,
        finished_unix_ms=attempt.finished_ms,
        exit_status=attempt.exit_status,
    )


def _attempt_from_proto(message: types_pb2.LaunchAttempt) -> LaunchAttempt:
    return LaunchAttempt(
        attempt=message.attempt,
        worker=message.worker,
        state=LaunchState(message.state),
        reason=message.reason,
        started_ms=WallMs(message.started_unix_ms),
        finished_ms=WallMs(message.finished_unix_ms),
        exit_status=message.exit_status,
    )


def settings_to_proto(settings: ClusterSettings) -> types_pb2.Settings:
    """The settings as a message."""
    return types_pb2.Settings(
        replicas=settings.replicas,
        rebalance_paused=settings.rebalance_paused,
        cron_paused=settings.cron_paused,
        launches_kept=settings.launches_kept,
        launches_kept_s=settings.launches_kept_s,
        copy_bytes_per_s=settings.copy_bytes_per_s,
    )


def settings_from_proto(message: types_pb2.Settings) -> ClusterSettings:
    """The settings from a message; a number that is left out takes its default."""
    default = ClusterSettings()
    return ClusterSettings(
        replicas=message.replicas or default.replicas,
        rebalance_paused=message.rebalance_paused,
        cron_paused=message.cron_paused,
        launches_kept=message.launches_kept or default.launches_kept,
        launches_kept_s=message.launches_kept_s or default.launches_kept_s,
        copy_bytes_per_s=message.copy_bytes_per_s,
    )


def event_to_proto(record: LogRecord) -> types_pb2.Event:
    """The line of the story as a message."""
    return types_pb2.Event(
        sequence=record.sequence,
        index=record.index,
        at_unix_ms=record.at_ms,
        kind=record.kind,
        subject=record.subject,
        message=record.message,
        cause=record.cause,
    )


def event_from_proto(message: types_pb2.Event) -> LogRecord:
    """The line of the story from a message."""
    return LogRecord(
        sequence=message.sequence,
        index=message.index,
        at_ms=WallMs(message.at_unix_ms),
        kind=message.kind,
        subject=message.subject,
        message=message.message,
        cause=message.cause,
    )
