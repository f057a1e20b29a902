"""Settings to the text of a cluster.toml, for tools that write one; `config_file.load` reads the same settings back."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Collection

from coordinator.config import ClusterConfig
from coordinator.configuration.findings import dotted
from coordinator.configuration.limits import PRIORITY_NAMES, key_of
from coordinator.configuration.parse import CLUSTER_KEYS, SECTIONS
from coordinator.configuration.toml_lines import Path
from coordinator.model import CronJobSpec

HIDDEN_FIELDS = ("id",)
"""Of masters and workers: the name of the table says it."""
TABLE_FIELDS = ("labels", "environment", "required_labels")
"""Pairs of name and value, which the file holds as a table."""
_JOB_FIELDS = tuple(field.name for field in dataclasses.fields(CronJobSpec))
PRIORITY_OF_CLASS = {number: name for name, number in reversed(PRIORITY_NAMES.items())}
"""The word where there is one, since those come first."""


def render_cluster(config: ClusterConfig, *, complete: bool = False) -> str:
    """TOML text of the configuration: what differs from the defaults, or with `complete` every option."""
    defaults = ClusterConfig()
    blocks = [_block(("cluster",), [(key, getattr(config, key)) for key in CLUSTER_KEYS])]
    blocks += [_block(("masters", master.id), _options(master, None)) for master in config.masters]
    for section in SECTIONS:
        like = None if complete else getattr(defaults, section)
        blocks += _section((section,), getattr(config, section), like)
    for job in config.cron.jobs:
        like = None if complete else CronJobSpec(id="", schedule="")
        blocks.append("[[cron.jobs]]\n" + _lines(_options(job, like)))
    for worker in config.workers:
        # What is left out comes from [worker], so only the difference to that may be left out.
        blocks.append(_block(("workers", worker.id), _options(worker, None if complete else config.worker)))
    return "\n".join(blocks)


def changed_options(before: CronJobSpec, after: CronJobSpec) -> list[tuple[str, str, str]]:
    """What differs between two definitions: key, value before and after; empty where one does not have it."""
    names = [name for name in _JOB_FIELDS if getattr(before, name) != getattr(after, name)]
    old, new = _job_options(before, names), _job_options(after, names)
    order = [key_of(name) for name in names]
    keys = sorted({*old, *new}, key=lambda key: (order.index(key.partition(".")[0]), key))
    return [(key, old.get(key, ""), new.get(key, "")) for key in keys if old.get(key) != new.get(key)]


def _job_options(job: CronJobSpec, names: Collection[str]) -> dict[str, str]:
    """Options of a job, keys and values as a file has them; of tables each pair by itself: `environment.NAME`."""
    described: dict[str, str] = {}
    for key, value in _options(job, None, names):
        if isinstance(value, dict):
            described |= {dotted((key, name)): _value(text) for name, text in value.items()}
        else:
            described[key] = _value(value)
    return described


def describe_defaults() -> dict[str, object]:
    """Every option that has a default, by its dotted key; a job's as `cron.jobs.KEY`, a worker's as `worker.KEY`."""
    described: dict[str, object] = {}
    config = ClusterConfig()
    for key in CLUSTER_KEYS:
        described[f"cluster.{key}"] = getattr(config, key)
    pending: list[tuple[Path, object]] = [((section,), getattr(config, section)) for section in SECTIONS]
    pending.append((("cron", "jobs"), CronJobSpec(id="", schedule="")))
    while pending:
        path, settings = pending.pop(0)
        for name, value in _fields(settings):
            if dataclasses.is_dataclass(value):
                pending.append(((*path, name), value))
            elif not (isinstance(settings, CronJobSpec) and name in ("id", "schedule")):
                described[dotted((*path, key_of(name)))] = value
    return described


def _fields(settings: object) -> list[tuple[str, object]]:
    """Names and values of the fields that stand in the file as keys or tables of their own."""
    is_named_by_table = not isinstance(settings, CronJobSpec)
    return [
        (field.name, getattr(settings, field.name))
        for field in dataclasses.fields(settings)  # type: ignore[arg-type]
        if not (is_named_by_table and field.name in HIDDEN_FIELDS) and field.name != "jobs"
    ]


def _options(
    settings: object, like: object | None, names: Collection[str] | None = None
) -> list[tuple[str, object]]:
    """Keys and values, without those that `like` has too; of the fields with these names, when they are given."""
    options: list[tuple[str, object]] = []
    fields = _fields(settings) if names is None else [(name, getattr(settings, name)) for name in names]
    for name, value in fields:
        if dataclasses.is_dataclass(value) or (like is not None and value == getattr(like, name)):
            continue
        if isinstance(settings, CronJobSpec) and name in ("command", "python") and not value:
            continue
        if name == "priority_class" and isinstance(value, int):
            options.append((key_of(name), PRIORITY_OF_CLASS[value]))
        elif name in TABLE_FIELDS and isinstance(value, tuple):
            options.append((name, dict(value)))
        else:
            options.append((key_of(name), value))
    return options


def _section(path: Path, settings: object, like: object | None) -> list[str]:
    """The table of one settings object and those of the objects inside it; none where there is nothing to say."""
    options = _options(settings, like)
    blocks = [_block(path, options)] if options else []
    for name, value in _fields(settings):
        if dataclasses.is_dataclass(value):
            blocks += _section((*path, name), value, None if like is None else getattr(like, name))
    return blocks


def _block(path: Path, options: list[tuple[str, object]]) -> str:
    return f"[{dotted(path)}]\n" + _lines(options)


def _lines(options: list[tuple[str, object]]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in options)


def _value(value: object) -> str:
    """A value as TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case enum.Enum():
            return _text(value.name.lower())
        case str():
            return _text(value)
        case int() | float():
            return repr(value)
        case dict():
            pairs = ", ".join(f"{_text(name)} = {_text(text)}" for name, text in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case tuple():
            return "[" + ", ".join(_text(element) for element in value) + "]"
        case _:
            raise AssertionError(f"no settings field holds a {type(value).__name__}")


def _text(text: str) -> str:
    # JSON's escapes are TOML's, but JSON lets the delete character stand, and TOML does not.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
