"""Jobs, their next times, and their launches, for people. Pure but for the clock of ages."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, tzinfo

from coordinator.api.v1 import cron_pb2, types_pb2
from coordinator.cli.session import now_unix_ms
from coordinator.cli.table import Column, facts, paragraph, table
from coordinator.cli.words import NOTHING, age, ahead, duration, local_time, names, size, word
from coordinator.control.clock_changes import DAY_S, clock_note, next_clock_note
from coordinator.control.schedule import Schedule, compile_schedule, zone_of
from coordinator.machine.codec import job_spec_from_proto
from coordinator.model import WallMs
from coordinator.model.errors import InvalidRequest

COLUMNS = (
    Column("JOB"),
    Column("SCHEDULE"),
    Column("CLASS"),
    Column("OWNER"),
    Column("BACKUPS", wrap=True),
    Column("NEXT", right=True),
    Column("NOW", wrap=True),
    Column("LAST", wrap=True),
    Column("LATE", right=True),
)
LAUNCH_COLUMNS = (
    Column("JOB"),
    Column("SCHEDULED AT"),
    Column("TRY", right=True),
    Column("WORKER"),
    Column("STATE"),
    Column("LATE", right=True),
    Column("TOOK", right=True),
    Column("WHY", wrap=True),
)
NOTE_DAYS = 366
"""How far ahead `cron show` looks for a change of clocks."""
_STATES = types_pb2.LaunchState.DESCRIPTOR
OPEN = (
    types_pb2.LAUNCH_STATE_WAITING,
    types_pb2.LAUNCH_STATE_COMMITTED,
    types_pb2.LAUNCH_STATE_RUNNING,
)
"""States of launches that have not ended."""

# Jobs


def last_text(view: cron_pb2.CronJobView, now_ms: int) -> str:
    """How the last run ended and how long ago it was due; before the first one has, how the latest launch stands."""
    if not view.HasField("latest"):
        return NOTHING
    last = view.last_ended if view.HasField("last_ended") else view.latest
    return f"{word(_STATES, last.state)} {age(due_ms(last), now_ms)} ago"


def now_text(view: cron_pb2.CronJobView, now_ms: int) -> str:
    """How many of its launches run and wait, and what waits for a worker: "2 run, 1 waits"."""
    parts = [(view.running, "run"), (view.waiting, "wait")]
    said = [f"{count} {verb}{'s' if count == 1 else ''}" for count, verb in parts if count]
    if view.HasField("starved_since_unix_ms"):
        said.append(f"no worker for {age(view.starved_since_unix_ms, now_ms)}: {view.starved_reason}")
    return ", ".join(said) or NOTHING


def late_text(view: cron_pb2.CronJobView) -> str:
    """How late the latest launch was that has started; "-" while none has."""
    return duration(view.lateness_ms / 1_000) if view.HasField("lateness_ms") else NOTHING


def next_text(view: cron_pb2.CronJobView, now_ms: int, cron_paused: bool = False) -> str:
    """When it is due next."""
    if view.job.paused or cron_paused:
        return "paused"
    return ahead(view.next_unix_ms[0], now_ms) if view.next_unix_ms else NOTHING


def jobs_text(answer: cron_pb2.ListJobsResponse) -> str:
    """Jobs for people."""
    now_ms = now_unix_ms()
    rows = [
        [
            view.job.spec.id,
            view.job.spec.schedule,
            f"P{view.job.spec.priority_class}",
            view.job.owner or NOTHING,
            names(view.job.backups),
            next_text(view, now_ms, answer.cron_paused),
            now_text(view, now_ms),
            last_text(view, now_ms),
            late_text(view),
        ]
        for view in answer.jobs
    ]
    said = table(COLUMNS, rows) if rows else "no job; `clusterctl cron apply FILE` creates some"
    if answer.cron_paused:
        said = f"all schedules are paused; `clusterctl cron resume --all` resumes them\n\n{said}"
    return said


def job_text(view: cron_pb2.CronJobView, cron_paused: bool = False) -> str:
    """One job for people: what it is, without what it leaves out, then its next times."""
    job, spec = view.job, view.job.spec
    paused = "yes" if job.paused else "no"
    if cron_paused:
        paused += "; all schedules are, until `clusterctl cron resume --all`"
    given = [
        ("description", spec.description),
        *_run_facts(spec),
        ("only on workers with", _pairs(spec.required_labels)),
    ]
    described = facts(
        [
            ("job", f"{spec.id} (P{spec.priority_class}, from {job.source or 'unknown'})"),
            ("schedule", f"{spec.schedule} ({spec.time_zone})"),
            *[(name, value) for name, value in given if value],
            ("owner", job.owner or NOTHING),
            ("backups", names(job.backups)),
            ("paused", paused),
            ("now", now_text(view, now_unix_ms())),
            ("last", _last(view)),
            *_policy_facts(spec),
            ("changed", local_time(job.updated_unix_ms)),
        ]
    )
    return f"{described}\n\n{next_times_text(view, cron_paused)}"


def _last(view: cron_pb2.CronJobView) -> str:
    now_ms = now_unix_ms()
    said = last_text(view, now_ms)
    if view.HasField("last_ended") and view.latest != view.last_ended:
        said += f"; the latest launch: {word(_STATES, view.latest.state)} {age(due_ms(view.latest), now_ms)} ago"
    return f"{said}; the last to start did so {late_text(view)} late" if view.HasField("lateness_ms") else said


def _run_facts(spec: types_pb2.CronJobSpec) -> list[tuple[str, str]]:
    limits = [
        ("memory", spec.memory_bytes_max and size(spec.memory_bytes_max)),
        ("processor", spec.processor_s_max and duration(spec.processor_s_max)),
        ("open files", spec.open_files_max and str(spec.open_files_max)),
    ]
    return [
        ("runs", shlex.join(spec.command) if spec.command else spec.python or NOTHING),
        ("environment", _pairs(spec.environment)),
        ("working directory", spec.working_directory),
        ("user", spec.user),
        ("limits", ", ".join(f"{what} {limit}" for what, limit in limits if limit)),
        ("time limit", duration(spec.timeout_s)),
    ]


def _policy_facts(spec: types_pb2.CronJobSpec) -> list[tuple[str, str]]:
    overlap = word(types_pb2.OverlapPolicy.DESCRIPTOR, spec.overlap)
    if spec.overlap == types_pb2.OVERLAP_POLICY_ALLOW:
        overlap += f", at most {spec.overlap_limit} at once"
    elif spec.overlap == types_pb2.OVERLAP_POLICY_QUEUE:
        overlap += f", at most {spec.overlap_limit} wait"
    catch_up = word(types_pb2.CatchUpPolicy.DESCRIPTOR, spec.catch_up)
    if spec.catch_up == types_pb2.CATCH_UP_POLICY_ALL:
        catch_up += f", back to {duration(spec.catch_up_window_s)}, at most {spec.catch_up_limit}"
    retry = word(types_pb2.RetryPolicy.DESCRIPTOR, spec.retry)
    if spec.retry != types_pb2.RETRY_POLICY_NEVER:
        retry += f", {spec.attempts_max} attempts in all, {duration(spec.retry_backoff_s)} apart at first, doubling"
        retry += f" up to {duration(spec.retry_backoff_s_max)}"
    jitter = "none"
    if spec.jitter_s:
        jitter_s = job_spec_from_proto(spec).jitter_ms / 1_000
        jitter = f"starts {duration(jitter_s)} after each scheduled time (of up to {duration(spec.jitter_s)})"
    return [
        ("jitter", jitter),
        ("when it still runs", overlap),
        ("when it was missed", f"{catch_up}; may start {duration(spec.start_deadline_s)} late"),
        ("retry", retry),
    ]


def _pairs(pairs: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(pairs.items()))


# Next times


def next_times_text(view: cron_pb2.CronJobView, cron_paused: bool = False) -> str:
    """The next times in the job's zone and in UTC, with what changes of clocks do to them."""
    if not view.next_unix_ms:
        return "no next time" + (" while it is paused" if view.job.paused or cron_paused else "")
    spec, now_ms = view.job.spec, now_unix_ms()
    schedule, zone = _schedule(spec)
    columns = [Column("NEXT, UTC")]
    rows = [[_day_and_time(at, UTC)] for at in view.next_unix_ms]
    if zone is not None and spec.time_zone != "UTC":
        columns.insert(0, Column(f"NEXT, {spec.time_zone}"))
        rows = [[_day_and_time(at, zone), *row] for at, row in zip(view.next_unix_ms, rows, strict=True)]
    columns.append(Column("IN", right=True))
    notes = [clock_note(schedule, WallMs(at)) if schedule else "" for at in view.next_unix_ms]
    for at, row in zip(view.next_unix_ms, rows, strict=True):
        row.append(ahead(at, now_ms).removeprefix("in "))
    if any(notes):
        columns.append(Column("NOTE", wrap=True))
        for row, note in zip(rows, notes, strict=True):
            row.append(note)
    said = table(columns, rows)
    last = WallMs(view.next_unix_ms[-1])
    later = next_clock_note(schedule, last, WallMs(last + NOTE_DAYS * DAY_S * 1_000)) if schedule else None
    if later is not None and not any(notes):
        said += "\n\n" + paragraph(f"{_day_and_time(later[0], zone)}: {later[1]}", "later, ")
    return said


def _schedule(spec: types_pb2.CronJobSpec) -> tuple[Schedule | None, tzinfo | None]:
    """None where this machine knows the schedule's form or its zone less well than the cluster."""
    try:
        return compile_schedule(spec.schedule, spec.time_zone), zone_of(spec.time_zone)
    except InvalidRequest:
        return None, None


def _day_and_time(at_unix_ms: int, zone: tzinfo | None) -> str:
    text = local_time(at_unix_ms, zone)
    return text.removesuffix("+00:00") if zone is UTC else text


# Launches


def due_ms(launch: types_pb2.Launch) -> int:
    """When it should have started: lateness counts from here."""
    return launch.due_unix_ms or launch.scheduled_at_unix_ms


def launches_table(launches: Iterable[types_pb2.Launch]) -> str:
    """Launches for people, an attempt a row, those that never ran with their reason."""
    rows = [row for launch in launches for row in _launch_rows(launch)]
    return table(LAUNCH_COLUMNS, rows) if rows else "no launch"


def _launch_rows(launch: types_pb2.Launch) -> Iterator[list[str]]:
    """The attempts of a launch, the latest first."""
    of_launch = [launch.job_id, local_time(launch.scheduled_at_unix_ms)]
    attempt = str(launch.attempt) if launch.worker else NOTHING
    yield [*of_launch, attempt, *_attempt_cells(launch, launch, "; ".join(_why(launch)))]
    for earlier in reversed(launch.earlier_attempts):
        yield [*of_launch, str(earlier.attempt), *_attempt_cells(launch, earlier, _failure(earlier))]


def _attempt_cells(
    launch: types_pb2.Launch, attempt: types_pb2.Launch | types_pb2.LaunchAttempt, why: str
) -> list[str]:
    ran = attempt.started_unix_ms != 0
    late_ms = attempt.started_unix_ms - due_ms(launch)
    took_ms = attempt.finished_unix_ms - attempt.started_unix_ms
    return [
        attempt.worker or NOTHING,
        word(_STATES, attempt.state),
        duration(late_ms / 1_000) if ran else NOTHING,
        duration(took_ms / 1_000) if ran and attempt.finished_unix_ms else NOTHING,
        why or NOTHING,
    ]


def _why(launch: types_pb2.Launch) -> Iterator[str]:
    if launch.trigger == types_pb2.LAUNCH_TRIGGER_MANUAL:
        yield "by hand"
    # Between attempts, and until the next one ends, the reason is still that of the last, which has a row of its own.
    is_of_earlier = launch.state in OPEN and len(launch.earlier_attempts) > 0
    failure = "" if is_of_earlier else _failure(launch)
    if failure:
        yield failure
    if launch.state == types_pb2.LAUNCH_STATE_WAITING and launch.not_before_unix_ms:
        yield f"attempt {launch.attempt + 1} not before {local_time(launch.not_before_unix_ms)[11:]}"
    elif launch.state == types_pb2.LAUNCH_STATE_WAITING and is_of_earlier:
        yield f"attempt {launch.attempt + 1} waits"
    if launch.cancel_reason and launch.cancel_reason not in failure:
        yield f"told to stop: {launch.cancel_reason}"


def _failure(attempt: types_pb2.Launch | types_pb2.LaunchAttempt) -> str:
    exit_status = f"exit status {attempt.exit_status}"
    has_status = attempt.state == types_pb2.LAUNCH_STATE_FAILED and attempt.exit_status != 0
    status = [exit_status] if has_status and exit_status not in attempt.reason else []
    return "; ".join([*filter(None, [attempt.reason]), *status])
