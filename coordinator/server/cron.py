"""CronService: jobs and launches, for people and programs. Any master answers; changes go through Raft.

Raises the exceptions of coordinator/model/errors.py; ErrorInterceptor makes statuses of them.
"""

from __future__ import annotations

import asyncio
import heapq
import uuid
from collections.abc import Iterator, Sequence
from typing import Protocol

from coordinator.api.v1 import cluster_pb2, command_pb2, cron_pb2, cron_pb2_grpc, types_pb2
from coordinator.config import ClusterConfig
from coordinator.config_file import changed_options, check_job_spec
from coordinator.control.job_workers import serving_workers, why_none_serves
from coordinator.control.schedule import compile_schedule, format_wall
from coordinator.machine.codec import job_spec_from_proto, job_to_proto, launch_to_proto
from coordinator.machine.state import State
from coordinator.model import Clock, CronJob, CronJobSpec, Launch, LaunchState, WallMs
from coordinator.model.errors import InvalidRequest, RefusalReason, Refused
from coordinator.server.context import Call

NEXT_MAX = 1_000
"""Most next times that one answer tells per job."""
LATEST_DEFAULT = 100
LATEST_MAX = 10_000
JOBS_MAX = 1_000
"""Most definitions in one ApplyJobs."""
JOBS_PER_TURN = 10
"""So many jobs are looked at before the event loop has its turn: with 200 launches each they take some 2 ms."""
LAUNCHES_PER_TURN = 200
_NEVER_RAN = (LaunchState.MISSED, LaunchState.SKIPPED, LaunchState.CANCELLED)
"""Of a launch that made no attempt, or only some that their workers declined."""
_ON_A_WORKER = (LaunchState.COMMITTED, LaunchState.RUNNING)


class Master(Protocol):
    """What this servicer asks of its master; MasterContext is one."""

    @property
    def clock(self) -> Clock:
        """For the next scheduled times."""
        ...

    @property
    def config(self) -> ClusterConfig:
        """Whose jobs are never pruned."""
        ...

    async def read(self, consistency: cluster_pb2.Consistency.ValueType, call: Call) -> State:
        """The state, as fresh as asked for."""
        ...

    async def submit(self, command: command_pb2.Command, request_id: str, call: Call) -> command_pb2.Applied:
        """Proposes a command under a request id and waits for it; raises Refused and what a proposal raises."""
        ...

    async def submit_all(
        self, requests: Sequence[tuple[command_pb2.Command, str]], call: Call
    ) -> list[command_pb2.Applied]:
        """Many commands with their request ids, in few log entries; raises the first refusal once all are through."""
        ...


class CronService(cron_pb2_grpc.CronServiceServicer):
    """The servicer."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._applying = asyncio.Lock()

    async def ListJobs(self, request: cron_pb2.ListJobsRequest, context: Call) -> cron_pb2.ListJobsResponse:
        """The jobs, with what follows from their schedules."""
        if request.next > NEXT_MAX:
            raise InvalidRequest(f"next = {request.next}; at most {NEXT_MAX} times are told at once")
        state = await self._master.read(request.consistency, context)
        jobs = [_job(state, request.job_id)] if request.job_id else [state.jobs[id] for id in sorted(state.jobs)]
        wall_ms = self._master.clock.wall_ms()
        response = cron_pb2.ListJobsResponse(cron_paused=state.settings.cron_paused)
        for number, job in enumerate(jobs, start=1):
            response.jobs.append(_view(state, job, wall_ms, request.next or 1))
            if number % JOBS_PER_TURN == 0:
                await asyncio.sleep(0)
        return response

    async def ApplyJobs(self, request: cron_pb2.ApplyJobsRequest, context: Call) -> cron_pb2.ApplyJobsResponse:
        """Creates or replaces jobs, in few log entries. All are checked before the first is applied, each by itself."""
        # One request after the other: the event loop stands still for tens of milliseconds per thousand definitions,
        # and several such stretches in a row would be taken for a leader's death.
        async with self._applying:
            return await self._apply_jobs(request, context)

    async def _apply_jobs(self, request: cron_pb2.ApplyJobsRequest, context: Call) -> cron_pb2.ApplyJobsResponse:
        specs = _checked_specs(request)
        state = await self._master.read(cluster_pb2.CONSISTENCY_LINEARIZABLE, context)
        response = cron_pb2.ApplyJobsResponse()
        changed: list[CronJobSpec] = []
        for spec in specs:
            job = state.jobs.get(spec.id)
            if job is not None and job.spec == spec:
                response.unchanged.append(spec.id)
                continue
            (response.created if job is None else response.changed).append(spec.id)
            response.changes.extend(_changes(job.spec if job is not None else None, spec))
            changed.append(spec)
        if request.prune:
            stay = {spec.id for spec in specs} | {spec.id for spec in self._master.config.cron.jobs}
            response.deleted.extend(
                job_id for job_id in sorted(state.jobs) if state.jobs[job_id].source == "api" and job_id not in stay
            )
        if not request.dry_run:
            messages = {message.id: message for message in request.jobs}
            commands = {
                spec.id: command_pb2.Command(apply_job=command_pb2.ApplyJob(spec=messages[spec.id], source="api"))
                for spec in changed
            }
            for job_id in response.deleted:
                commands[job_id] = command_pb2.Command(delete_job=command_pb2.DeleteJob(job_id=job_id))
            request_id = request.request_id or uuid.uuid4().hex
            for command in commands.values():
                command.cause = request_id
            await self._master.submit_all(
                [(command, f"{request_id}/{job_id}") for job_id, command in commands.items()], context
            )
        return response

    async def DeleteJob(self, request: cron_pb2.DeleteJobRequest, context: Call) -> cron_pb2.DeleteJobResponse:
        """Forgets a job and its history; a run that goes on is not stopped."""
        command = command_pb2.Command(delete_job=command_pb2.DeleteJob(job_id=_required(request.job_id)))
        await self._master.submit(command, request.request_id, context)
        return cron_pb2.DeleteJobResponse()

    async def SetJobPaused(
        self, request: cron_pb2.SetJobPausedRequest, context: Call
    ) -> cron_pb2.SetJobPausedResponse:
        """Pauses or resumes a job; what was due during the pause is not launched, but recorded after it."""
        paused = command_pb2.SetJobPaused(job_id=_required(request.job_id), paused=request.paused)
        await self._master.submit(command_pb2.Command(set_job_paused=paused), request.request_id, context)
        return cron_pb2.SetJobPausedResponse()

    async def TriggerJob(self, request: cron_pb2.TriggerJobRequest, context: Call) -> cron_pb2.TriggerJobResponse:
        """Commits a launch for now, on the first of owner and backups that serves; also for a paused job."""
        state = await self._master.read(cluster_pb2.CONSISTENCY_LINEARIZABLE, context)
        job = _job(state, _required(request.job_id))
        workers = serving_workers(state, job)
        if not workers:
            raise Refused(
                RefusalReason.PRECONDITION, f"no worker can run job {job.id!r} now: {why_none_serves(state, job)}"
            )
        commit = command_pb2.CommitLaunch(
            job_id=job.id, worker=workers[0], trigger=types_pb2.LAUNCH_TRIGGER_MANUAL
        )
        applied = await self._master.submit(command_pb2.Command(commit_launch=commit), request.request_id, context)
        return cron_pb2.TriggerJobResponse(scheduled_at_unix_ms=applied.scheduled_at_unix_ms)

    async def CancelLaunches(
        self, request: cron_pb2.CancelLaunchesRequest, context: Call
    ) -> cron_pb2.CancelLaunchesResponse:
        """Tells launches to stop; those that wait are dropped. Answers with how they stand then."""
        state = await self._master.read(cluster_pb2.CONSISTENCY_LINEARIZABLE, context)
        job = _job(state, _required(request.job_id))
        times = [
            scheduled_at_ms
            for scheduled_at_ms in state.launch_times.get(job.id, ())
            if not state.launches[(job.id, scheduled_at_ms)].state.has_ended
            and request.scheduled_at_unix_ms in (0, scheduled_at_ms)
        ]
        if not times:
            which = f" at {format_wall(WallMs(request.scheduled_at_unix_ms))}" if request.scheduled_at_unix_ms else ""
            raise Refused(RefusalReason.PRECONDITION, f"job {job.id!r} has no launch{which} that runs or waits")
        request_id = request.request_id or uuid.uuid4().hex
        reason = request.reason or "cancelled by hand"
        # Named by their times: what a second try with the same id finds open is less than what the first one found.
        requests = [
            (_cancel(job.id, scheduled_at_ms, reason, request_id), f"{request_id}/{scheduled_at_ms}")
            for scheduled_at_ms in times
        ]
        try:
            await self._master.submit_all(requests, context)
        except Refused as error:
            if error.reason not in (RefusalReason.STALE, RefusalReason.NOT_FOUND):
                raise
            # One has ended by itself meanwhile; the others are told.
        state = await self._master.read(cluster_pb2.CONSISTENCY_LINEARIZABLE, context)
        launches = [state.launches.get((job.id, scheduled_at_ms)) for scheduled_at_ms in times]
        return cron_pb2.CancelLaunchesResponse(launches=[launch_to_proto(item) for item in launches if item])

    async def ListLaunches(
        self, request: cron_pb2.ListLaunchesRequest, context: Call
    ) -> cron_pb2.ListLaunchesResponse:
        """The launches that are kept, the latest scheduled time first."""
        if request.latest > LATEST_MAX:
            raise InvalidRequest(f"latest = {request.latest}; at most {LATEST_MAX} launches are told at once")
        state = await self._master.read(request.consistency, context)
        job_ids = [_job(state, request.job_id).id] if request.job_id else sorted(state.jobs)
        since_ms = request.since_unix_ms
        histories = [_history(state, job_id, since_ms) for job_id in job_ids]
        latest_first = heapq.merge(*histories, key=lambda launch: (-launch.scheduled_at_ms, launch.job_id))
        response = cron_pb2.ListLaunchesResponse()
        for number, launch in enumerate(latest_first, start=1):
            if len(response.launches) == (request.latest or LATEST_DEFAULT):
                break
            if not request.missed or _did_not_run(launch):
                response.launches.append(launch_to_proto(launch))
            if number % LAUNCHES_PER_TURN == 0:
                await asyncio.sleep(0)
        return response


def _cancel(job_id: str, scheduled_at_ms: WallMs, reason: str, cause: str) -> command_pb2.Command:
    cancel = command_pb2.CancelLaunch(job_id=job_id, scheduled_at_unix_ms=scheduled_at_ms, reason=reason)
    return command_pb2.Command(cause=cause, cancel_launch=cancel)


def _job(state: State, job_id: str) -> CronJob:
    job = state.jobs.get(job_id)
    if job is None:
        raise Refused(RefusalReason.NOT_FOUND, f"there is no cron job {job_id!r}; see `clusterctl cron list`")
    return job


def _required(job_id: str) -> str:
    if not job_id:
        raise InvalidRequest("job_id is empty; name a job, see `clusterctl cron list`")
    return job_id


def _checked_specs(request: cron_pb2.ApplyJobsRequest) -> list[CronJobSpec]:
    """The definitions. Raises InvalidRequest with every fault of all of them."""
    if len(request.jobs) > JOBS_MAX:
        raise InvalidRequest(f"the request has {len(request.jobs)} jobs; at most {JOBS_MAX} are applied at once")
    specs: list[CronJobSpec] = []
    problems: list[str] = []
    seen: set[str] = set()
    for message in request.jobs:
        if message.id in seen:
            problems.append(f"job {message.id!r}: it is defined twice in this request")
        seen.add(message.id)
        try:
            spec = job_spec_from_proto(message)
        except ValueError as error:
            problems.append(f"job {message.id!r}: {error}")
            continue
        problems += [f"job {spec.id!r}: {problem}" for problem in check_job_spec(spec)]
        specs.append(spec)
    if problems:
        raise InvalidRequest("; ".join(problems))
    return specs


def _changes(before: CronJobSpec | None, after: CronJobSpec) -> Iterator[cron_pb2.JobFieldChange]:
    """What differs, field by field; of a new job what it says beyond the defaults."""
    for field, old, new in changed_options(before or CronJobSpec(id=after.id, schedule=""), after):
        yield cron_pb2.JobFieldChange(
            job_id=after.id, field=field, before=old if before is not None else "", after=new
        )


def _view(state: State, job: CronJob, wall_ms: WallMs, count: int) -> cron_pb2.CronJobView:
    view = cron_pb2.CronJobView(job=job_to_proto(job))
    if not job.paused and not state.settings.cron_paused:
        schedule = compile_schedule(job.spec.schedule, job.spec.time_zone)
        # A time that has come and waits for its jitter has not been launched yet.
        moment = schedule.next_after(max(WallMs(wall_ms - job.spec.jitter_ms), job.closed_until_ms))
        while moment is not None and len(view.next_unix_ms) < count:
            view.next_unix_ms.append(moment)
            moment = schedule.next_after(moment)
    latest = next(_history(state, job.id), None)
    if latest is not None:
        view.latest.CopyFrom(launch_to_proto(latest))
    starved_ms = _starved_since(state, job, wall_ms)
    if starved_ms is not None:
        view.starved_since_unix_ms = starved_ms
        view.starved_reason = why_none_serves(state, job)
    lateness_ms: int | None = None
    for launch in _history(state, job.id):
        if not launch.state.has_ended:
            view.waiting += launch.state is LaunchState.WAITING
            view.running += launch.state in _ON_A_WORKER
        if lateness_ms is None and (lateness_ms := launch.lateness_ms) is not None:
            view.lateness_ms = lateness_ms
        if not view.HasField("last_ended") and launch.state.has_ended and launch.attempts_counted:
            view.last_ended.CopyFrom(launch_to_proto(launch))
    return view


def _starved_since(state: State, job: CronJob, wall_ms: WallMs) -> WallMs | None:
    """When the first scheduled time was due that waits for a worker; None while none does."""
    if job.paused or state.settings.cron_paused or serving_workers(state, job):
        return None
    schedule = compile_schedule(job.spec.schedule, job.spec.time_zone)
    moment = schedule.next_after(job.closed_until_ms)
    due_ms = None if moment is None else WallMs(moment + job.spec.jitter_ms)
    return due_ms if due_ms is not None and due_ms <= wall_ms else None


def _history(state: State, job_id: str, since_ms: int = 0) -> Iterator[Launch]:
    """A job's launches, the latest scheduled time first."""
    for scheduled_at_ms in reversed(state.launch_times.get(job_id, ())):
        if scheduled_at_ms < since_ms:
            return
        yield state.launches[(job_id, scheduled_at_ms)]


def _did_not_run(launch: Launch) -> bool:
    return launch.state in _NEVER_RAN and launch.attempts_counted == 0
