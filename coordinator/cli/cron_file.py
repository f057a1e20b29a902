"""Job definitions in a file: TOML, YAML or JSON, in the form that cluster.toml has and `cron show -o yaml` prints.

A file has a list `jobs`, also below `cron` as in cluster.toml, or is itself a list of jobs, or one job. What a job
leaves out has the default of CronJobSpec. Every fault is found and named before anything is sent.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import tomllib
from pathlib import Path
from typing import Any

import yaml

from coordinator.model import CatchUpPolicy, CronJobSpec, OverlapPolicy, RetryPolicy
from coordinator.model.errors import ConfigError

_ENUMS: dict[str, type[enum.Enum]] = {"overlap": OverlapPolicy, "catch_up": CatchUpPolicy, "retry": RetryPolicy}
_KNOWN = {field.name: field for field in dataclasses.fields(CronJobSpec)}


def load_jobs(path: Path) -> list[CronJobSpec]:
    """The jobs of a file. Raises ConfigError with one line per fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    try:
        match path.suffix.lower():
            case ".toml":
                data: object = tomllib.loads(text)
            case ".json":
                data = json.loads(text)
            case _:
                data = yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from None
    return jobs_of(data, str(path))


def jobs_of(data: object, source: str) -> list[CronJobSpec]:
    """The jobs in what a file holds; `source` names it in errors. Raises ConfigError."""
    entries = _entries(data)
    if entries is None:
        raise ConfigError([f"{source}: has no jobs; write a list `jobs`, each with `id`, `schedule` and `command`"])
    jobs: list[CronJobSpec] = []
    problems: list[str] = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            problems.append(f"{source}: job {number} is {entry!r}; a job is a table with `id` and `schedule`")
            continue
        where = f"{source}: job {entry.get('id') or number}"
        found = _problems(entry)
        problems += [f"{where}: {problem}" for problem in found]
        if not found:
            jobs.append(_job(entry))
    seen: set[str] = set()
    for job in jobs:
        if job.id in seen:
            problems.append(f"{source}: job {job.id} is there twice; each job has an id of its own")
        seen.add(job.id)
    if problems:
        raise ConfigError(problems)
    return jobs


def _entries(data: object) -> list[Any] | None:
    if isinstance(data, list):
        return data
    if not isinstance(data, dict):
        return None
    for place in (data.get("jobs"), data.get("cron")):
        if place is not None:
            return _entries(place)
    # What `cron show -o yaml` prints has the definition below job.spec.
    for name in ("job", "spec"):
        if isinstance(data.get(name), dict):
            return _entries(data[name])
    return [data] if "id" in data else None


def _problems(entry: dict[str, Any]) -> list[str]:
    problems = [f"`{name}` is unknown; a job has {', '.join(_KNOWN)}" for name in entry if name not in _KNOWN]
    problems += [f"`{name}` is missing" for name in ("id", "schedule") if not entry.get(name)]
    if bool(entry.get("command")) == bool(entry.get("python")):
        problems.append("has to have one of `command` (program and arguments) and `python` (package.module:function)")
    for name, value in entry.items():
        if name in _KNOWN and (wanted := _wrong(name, value)):
            problems.append(f"`{name}` is {value!r}; it has to be {wanted}")
    return problems


def _wrong(name: str, value: object) -> str:
    """What the value has to be, when it is not that; else nothing."""
    default = _KNOWN[name].default
    if name in _ENUMS:
        words = [member.name.lower() for member in _ENUMS[name]]
        return "" if value in words else "one of " + ", ".join(words)
    if name == "command":
        good = isinstance(value, list) and all(isinstance(part, str) for part in value)
        return "" if good else 'a list of texts, like ["backup", "--full"]'
    if name == "environment":
        good = isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
        return "" if good else "a table of texts"
    if isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        return "" if good else "a number of seconds, at least 0"
    if isinstance(default, int):
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return "" if good else "a whole number, at least 0"
    return "" if isinstance(value, str) else "a text"


def _job(entry: dict[str, Any]) -> CronJobSpec:
    values = dict(entry)
    for name, kind in _ENUMS.items():
        if name in values:
            values[name] = kind[str(values[name]).upper()]
    for name, value in values.items():
        if isinstance(_KNOWN[name].default, float):
            values[name] = float(value)
    values["command"] = tuple(values.get("command", ()))
    values["environment"] = tuple(sorted(values.get("environment", {}).items()))
    return CronJobSpec(**values)
