"""Rules of cron jobs, from cluster.toml, from files of jobs, and through the API."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.config import ClusterConfig
from coordinator.configuration.fields import PYTHON_PATTERN, check_fields, check_id
from coordinator.configuration.findings import Findings, dotted, show
from coordinator.configuration.toml_lines import Path
from coordinator.control.schedule import schedule_fault, zone_fault
from coordinator.model import CronJobSpec


def check_job_spec(spec: CronJobSpec) -> list[str]:
    """What is wrong with a job, one line per fault, each naming the field; empty when it can be used."""
    findings = Findings()
    _check_job(findings, (), spec)
    return findings.problems()


def check_jobs(findings: Findings, config: ClusterConfig) -> None:
    """The jobs of the configuration; faults go to `findings`."""
    check_job_list(findings, ("cron", "jobs"), config.cron.jobs)


def check_job_list(findings: Findings, path: Path, jobs: Sequence[CronJobSpec]) -> None:
    """Jobs that stand together at `path`; faults go to `findings`."""
    seen: dict[str, Path] = {}
    for index, job in enumerate(jobs):
        base: Path = (*path, index)
        _check_job(findings, base, job)
        place = (*base, "id")
        if findings.is_sound(place):
            first = seen.setdefault(job.id, place)
            if first != place:
                findings.refuse(
                    place, f"{findings.named(place, job.id)} is already {findings.named_at(first, job.id)}; use another"
                )


def _check_job(findings: Findings, base: Path, job: CronJobSpec) -> None:
    """One job. Faults name the fields by their keys."""
    check_fields(findings, base, job)
    place: Path = (*base, "id")
    if findings.is_sound(place) and (advice := check_id(job.id)):
        findings.refuse(place, f"{findings.named(place, job.id)} is not a name; {advice}")
    place = (*base, "schedule")
    if findings.is_sound(place) and (fault := schedule_fault(job.schedule)):
        findings.refuse(place, f"{findings.named(place, job.schedule)} {fault}")
    place = (*base, "time_zone")
    if findings.is_sound(place) and (fault := zone_fault(job.time_zone)):
        findings.refuse(place, f"{findings.named(place, job.time_zone)} {fault}")
    command, python, environment = (*base, "command"), (*base, "python"), (*base, "environment")
    if findings.is_sound(command, python):
        if bool(job.command) == bool(job.python):
            fault = "both command and python" if job.command else "neither command nor python"
            where = f"{dotted(base)}: " if base else ""
            findings.refuse(python, f"{where}the job {show(job.id)} has {fault}; give it exactly one of them", command)
        elif job.command and not (job.command[0] and "\0" not in "".join(job.command)):
            findings.refuse(command, f"{findings.named(command, job.command)} names no program; put it first")
        elif job.python and not PYTHON_PATTERN.fullmatch(job.python):
            findings.refuse(
                python, f'{findings.named(python, job.python)} is not a callable; use "package.module:function"'
            )
    longest, first = (*base, "retry_backoff_s_max"), (*base, "retry_backoff_s")
    if findings.is_sound(longest, first) and job.retry_backoff_s_max < job.retry_backoff_s:
        findings.refuse(
            longest,
            f"{findings.named(longest, job.retry_backoff_s_max)} is below {findings.named(first, job.retry_backoff_s)};"
            " use at least that",
            first,
        )
    labels = (*base, "required_labels")
    if findings.is_sound(labels) and any(not name for name, _ in job.required_labels):
        findings.refuse(labels, f"{dotted(labels)} has a label without a name; name it as the workers do")
    for name in ("working_directory", "user"):
        if findings.is_sound((*base, name)) and "\0" in (value := getattr(job, name)):
            findings.refuse((*base, name), f"{findings.named((*base, name), value)} has a NUL; leave it out")
    if findings.is_sound(environment):
        for name, value in job.environment:
            if not name or "=" in name or "\0" in name + value:
                findings.refuse(
                    environment, f"{dotted((*environment, name))} cannot be a variable; use a name without = and NUL"
                )
