"""clusterctl cron: jobs, their owners, and their launches. What people read is made in cron_text.py."""

from __future__ import annotations

import click

from coordinator.api.v1 import cron_pb2
from coordinator.cli.completion import JOB
from coordinator.cli.cron_apply import apply
from coordinator.cli.cron_logs import logs
from coordinator.cli.cron_text import OPEN, job_text, jobs_text, launches_table
from coordinator.cli.moment import MOMENT
from coordinator.cli.session import Group, Session, pass_session
from coordinator.cli.words import NOTHING, local_time
from coordinator.model.errors import RefusalReason, Refused

LATEST_DEFAULT = 20
LAUNCHES_MAX = 10_000
"""As many as a master tells at once; more than are kept of one job, as a rule."""


@click.group(cls=Group)
def cron() -> None:
    """See and change cron jobs, launch one now, and see what became of launches."""


@cron.command("list")
@pass_session
def list_jobs(session: Session) -> None:
    """List the jobs: schedule, priority class, owner, backups, next launch, what runs and waits, last run.

    LATE is how long after it was due the latest launch started that has started.

    \b
    Examples:
      clusterctl cron list
      clusterctl cron list -o json | jq -r '.jobs[] | select(.job.owner == "") | .job.spec.id'
    """
    answer = session.client().list_jobs()
    session.show(answer, lambda: jobs_text(answer))


@cron.command("show")
@click.argument("job", type=JOB)
@click.option("--next", "next_count", type=click.IntRange(1, 100), default=10, show_default=True, help="Times to tell.")
@pass_session
def show_job(session: Session, job: str, next_count: int) -> None:
    """Show one job: its definition, who owns it, and its next times in its zone and in UTC.

    Times to which a change of clocks does something say so.

    \b
    Examples:
      clusterctl cron show loop_01
      clusterctl cron show loop_01 -o yaml > loop_01.yaml    to edit it, and `cron apply` it
    """
    answer = session.client().list_jobs(job_id=job, next=next_count)
    view = next((item for item in answer.jobs if item.job.spec.id == job), None)
    if view is None:
        raise Refused(RefusalReason.NOT_FOUND, f"no job is called {job!r}; `clusterctl cron list` names them")
    session.show(view, lambda: job_text(view, answer.cron_paused))


cron.add_command(apply)
cron.add_command(logs)


@cron.command("delete")
@click.argument("job", type=JOB)
@pass_session
def delete(session: Session, job: str) -> None:
    """Forget a job and its history. A run that goes on is not stopped.

    A job of cluster.toml comes back with the next leader; take it out of the file of every master.

    \b
    Example:
      clusterctl cron delete nightly_report
    """
    answer = session.client().delete_job(job)
    session.show(answer, lambda: f"{job} is forgotten")


def _set_paused(session: Session, job: str, all_jobs: bool, paused: bool) -> None:
    """Pauses or resumes a job, or all schedules."""
    if bool(job) == all_jobs:
        raise click.UsageError("name a job, or use --all for all schedules at once")
    if all_jobs:
        answer = session.client().change_settings(cron_paused=paused)
        said = "all schedules are paused" if paused else "all schedules go on, but those of jobs paused by themselves"
        session.show(answer, lambda: said)
        return
    changed = session.client().set_job_paused(job, paused)
    session.show(changed, lambda: f"{job} is paused" if paused else f"{job} is launched by its schedule again")


@cron.command("pause")
@click.argument("job", type=JOB, default="")
@click.option("--all", "all_jobs", is_flag=True, help="All jobs at once, also those to come.")
@pass_session
def pause(session: Session, job: str, all_jobs: bool) -> None:
    """Stop launching a job, or all, by schedule, until `cron resume`. What runs goes on.

    Launches that wait for their first attempt are cancelled; `cron trigger` and retries work as ever. The times
    that pass are in the history once the job goes on, as skipped.

    \b
    Examples:
      clusterctl cron pause loop_01
      clusterctl cron pause --all
    """
    _set_paused(session, job, all_jobs, True)


@cron.command("resume")
@click.argument("job", type=JOB, default="")
@click.option("--all", "all_jobs", is_flag=True, help="Take `pause --all` back; jobs paused by themselves stay paused.")
@pass_session
def resume(session: Session, job: str, all_jobs: bool) -> None:
    """Launch a paused job, or all, by schedule again. What passed meanwhile is not made up for.

    It is in `cron history --missed`: the latest times one by one, those before them in one row that says how many.

    \b
    Examples:
      clusterctl cron resume loop_01
      clusterctl cron resume --all
    """
    _set_paused(session, job, all_jobs, False)


@cron.command("cancel")
@click.argument("job", type=JOB)
@click.option("--at", type=MOMENT, help="Only the launch scheduled at this time, as `cron history` shows it.")
@click.option("--reason", default="", help="Why, for the history.")
@pass_session
def cancel(session: Session, job: str, at: int | None, reason: str) -> None:
    """Stop the launches of a job that run, and drop those that wait. No further attempt follows.

    A run is asked to stop, and killed when it does not; `cron history` shows when it has ended.

    \b
    Examples:
      clusterctl cron cancel nightly_report
      clusterctl cron cancel loop_01 --at "2026-11-23 19:55:00+00:00" --reason "bad input"
    """
    client = session.client()
    if at is None:
        answer = client.cancel_launches(job, reason=reason)
    else:
        # People name seconds, as the history does; a launch by hand has milliseconds.
        kept = client.list_launches(job_id=job, latest=LAUNCHES_MAX, since_unix_ms=at // 1_000 * 1_000).launches
        exact = [one for one in kept if one.scheduled_at_unix_ms // 1_000 == at // 1_000]
        if not exact:
            raise Refused(
                RefusalReason.NOT_FOUND,
                f"{job} has no launch scheduled at {local_time(at)}; `clusterctl cron history {job}` names them",
            )
        answer = cron_pb2.CancelLaunchesResponse()
        for one in [one for one in exact if one.state in OPEN] or exact[:1]:
            told = client.cancel_launches(job, scheduled_at_unix_ms=one.scheduled_at_unix_ms, reason=reason)
            answer.launches.extend(told.launches)
    session.show(answer, lambda: f"told to stop, or dropped:\n{launches_table(answer.launches)}")


@cron.command("trigger")
@click.argument("job", type=JOB)
@pass_session
def trigger(session: Session, job: str) -> None:
    """Launch a job now, beside its schedule, on its owner.

    \b
    Example:
      clusterctl cron trigger loop_01 && clusterctl cron history loop_01
    """
    answer = session.client().trigger_job(job)
    at = answer.scheduled_at_unix_ms
    session.show(answer, lambda: f"{job} is launched, as of {local_time(at)}; see `clusterctl cron history {job}`")


@cron.command("history")
@click.argument("job", type=JOB, default="")
@click.option("--missed", is_flag=True, help="Only what did not run, and why.")
@click.option("--since", type=MOMENT, help="Only launches scheduled since then: a time, or how long ago, such as 2h.")
@click.option("--latest", "-n", type=click.IntRange(1, LAUNCHES_MAX), help="How many; 20, or all with --since.")
@click.option("--output-of-runs", is_flag=True, help="Also the last bytes that each run printed.")
@pass_session
def history(
    session: Session, job: str, missed: bool, since: int | None, latest: int | None, output_of_runs: bool
) -> None:
    """Show the latest launches of a job, or of all: where, how late, how long, how it ended.

    Every scheduled time is there: those that did not run say why; of a long outage or pause the earlier ones share
    a row, which says how many they are. Each attempt has a row, the latest first.

    \b
    Examples:
      clusterctl cron history loop_01
      clusterctl cron history --missed --since 1d
      clusterctl cron history loop_01 -n 1 --output-of-runs
    """
    latest = latest or (LATEST_DEFAULT if since is None else LAUNCHES_MAX)
    answer = session.client().list_launches(job_id=job, latest=latest, missed=missed, since_unix_ms=since or 0)

    def text() -> str:
        parts = [launches_table(answer.launches)]
        if output_of_runs:
            for launch in answer.launches:
                printed = launch.output.decode("utf-8", errors="replace").rstrip()
                parts.append(f"\n{launch.job_id} at {local_time(launch.scheduled_at_unix_ms)}:\n{printed or NOTHING}")
        return "\n".join(parts)

    session.show(answer, text)
