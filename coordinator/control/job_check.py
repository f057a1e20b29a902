"""What is wrong with a job's definition, field by field, before it is proposed. Pure.

The state machine refuses what it can see without a calendar; this looks at everything, and names every fault at once.
"""

from __future__ import annotations

import math
import re

from coordinator.control.schedule import check_schedule
from coordinator.machine.nodes import check_name
from coordinator.model import CronJobSpec
from coordinator.model.errors import Refused

_PYTHON = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def check_job(spec: CronJobSpec) -> list[str]:
    """One line per fault, each with job, field, value and what would be right; empty when there is none."""
    problems = []
    try:
        check_name("id", spec.id)
    except Refused as refusal:
        problems.append(str(refusal))
    schedule_problem = check_schedule(spec.schedule, spec.time_zone)
    if schedule_problem is not None:
        problems.append(schedule_problem)
    problems += _check_what_runs(spec)
    for name, value, low, high in (
        ("priority_class", spec.priority_class, 0, 6),
        ("catch_up_limit", spec.catch_up_limit, 1, 1_000),
        ("attempts_max", spec.attempts_max, 1, 100),
    ):
        if not low <= value <= high:
            problems.append(f"{name} = {value}: use {low} to {high}")
    for name, seconds, least in (
        ("timeout_s", spec.timeout_s, 0.001),
        ("catch_up_window_s", spec.catch_up_window_s, 1.0),
        ("start_deadline_s", spec.start_deadline_s, 1.0),
    ):
        if not (math.isfinite(seconds) and least <= seconds <= 366 * 86_400):
            problems.append(f"{name} = {seconds:g}: use {least:g} to {366 * 86_400} seconds")
    return [f"job {spec.id!r}: {problem}" for problem in problems]


def _check_what_runs(spec: CronJobSpec) -> list[str]:
    problems = []
    if bool(spec.command) == bool(spec.python):
        given = "both are given" if spec.command else "neither is given"
        problems.append(f"command and python: {given}; give exactly one")
    if spec.command and not spec.command[0]:
        problems.append("command = ['', ...]: the first item is the program and must not be empty")
    if any("\0" in argument for argument in spec.command):
        problems.append("command: no argument may contain a NUL character")
    if spec.python and _PYTHON.fullmatch(spec.python) is None:
        problems.append(f"python = {spec.python!r}: use the form 'package.module:function'")
    for name, value in spec.environment:
        if not name or "=" in name or "\0" in name + value:
            problems.append(f"environment: {name!r} cannot be a variable; use a name without '=' and NUL")
    return problems
