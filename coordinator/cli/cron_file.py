"""Job definitions in a file: TOML, YAML or JSON, in the form that cluster.toml has and `cron show -o yaml` prints.

A file has a list `jobs`, also below `cron` as in cluster.toml, or is itself a list of jobs, or one job. What
`cron show -o yaml` and `cron list -o yaml` print can be applied too. The keys and the rules are those of cluster.toml:
the same code reads both. Every fault is found and named, with its line in TOML and else with its path, before anything
is sent.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import yaml

from coordinator.config import CronSettings
from coordinator.configuration.findings import Findings
from coordinator.configuration.job_rules import check_job_list
from coordinator.configuration.parse import parse_settings
from coordinator.configuration.toml_lines import key_lines
from coordinator.model import CronJobSpec
from coordinator.model.errors import ConfigError

FORM = "write a list called `jobs`, each with `id`, `schedule`, and `command` or `python`"


def load_jobs(path: Path) -> list[CronJobSpec]:
    """The jobs of a file. Raises ConfigError with one line per fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    try:
        match path.suffix.lower():
            case ".toml":
                return jobs_of(tomllib.loads(text), str(path), toml=text)
            case ".json":
                return jobs_of(json.loads(text), str(path))
            case _:
                return jobs_of(yaml.safe_load(text), str(path))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from None


def jobs_of(data: object, source: str, toml: str | None = None) -> list[CronJobSpec]:
    """The jobs in what a file holds. Raises ConfigError.

    `source` names the file in errors; `toml` is its text where it is TOML, for the lines.
    """
    path, entries = _find(data, source)
    if not isinstance(entries, list):
        raise ConfigError([f"{source}: has no jobs; {FORM}"])
    # Only of TOML is it known which line a value is in; elsewhere the path of the value has to do.
    findings = Findings(source, key_lines(toml)) if toml is not None else Findings()
    table = {"jobs": [_with_keys_of_file(entry) for entry in entries]}
    jobs: tuple[CronJobSpec, ...] = parse_settings(findings, table, CronSettings, path).jobs
    check_job_list(findings, (*path, "jobs"), jobs)
    problems = findings.problems()
    if problems:
        raise ConfigError(problems if toml is not None else [f"{source}: {problem}" for problem in problems])
    return list(jobs)


def _find(data: object, source: str) -> tuple[tuple[str, ...], object]:
    """Where the list of jobs is, and the list. Raises ConfigError for keys beside it, which would mean nothing."""
    if isinstance(data, list):
        return (), data
    if not isinstance(data, dict):
        return (), None
    if "jobs" in data:
        # `cron_paused` is in what `cron list -o yaml` prints.
        if strange := sorted({str(key) for key in data} - {"jobs", "cron_paused"}):
            advice = "beside `jobs` there is nothing, set it in each job"
            raise ConfigError([f"{source}: unknown key {strange[0]}; {advice}"])
        return (), data["jobs"]
    if isinstance(data.get("cron"), dict):
        return ("cron",), data["cron"].get("jobs")
    return (), [data] if data.keys() & {"id", "job", "spec"} else None


def _with_keys_of_file(entry: Any) -> Any:
    """A definition as the API names its fields, with the keys of the file; of a job that was shown, its definition."""
    for key in ("job", "spec"):
        if isinstance(entry, dict) and isinstance(entry.get(key), dict):
            entry = entry[key]
    if isinstance(entry, dict) and isinstance(entry.get("priority_class"), int):
        entry = {key: value for key, value in entry.items() if key != "priority_class"} | {
            "priority": f"p{entry['priority_class']}"
        }
    return entry
