"""Tables of a TOML file to settings: types and names of keys, taken from the settings classes themselves.

What cannot be used is noted in the findings and replaced by the default, so that the rest can still be checked.
Ranges and rules between options are not looked at here (rules.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from coordinator.config import (
    ClusterConfig,
    CronSettings,
    DiscoverySettings,
    LoggingSettings,
    MasterSettings,
    MoveSettings,
    PlacementSettings,
    RaftSettings,
    SecuritySettings,
    SessionSettings,
    WorkerSettings,
)
from coordinator.configuration.findings import Findings, dotted, or_list
from coordinator.configuration.limits import PRIORITY_NAMES, key_of
from coordinator.configuration.toml_lines import Path
from coordinator.model import CronJobSpec

Table = Mapping[str, Any]

SECTIONS: dict[str, type] = {
    "raft": RaftSettings,
    "discovery": DiscoverySettings,
    "security": SecuritySettings,
    "session": SessionSettings,
    "placement": PlacementSettings,
    "moves": MoveSettings,
    "cron": CronSettings,
    "logging": LoggingSettings,
    "worker": WorkerSettings,
}
"""Sections that hold one settings class each; `cluster`, `masters` and `workers` are read by hand."""
CLUSTER_KEYS = ("name", "data_directory")
NAMED_BY_TABLE: dict[type, str] = {MasterSettings: "id", WorkerSettings: "id"}
"""Fields that are the name of the table, not a key inside it."""

_UNUSABLE = object()


def parse_cluster(findings: Findings, document: Table) -> ClusterConfig:
    """The configuration that the document describes; faults go to `findings`."""
    known = ("cluster", "masters", *SECTIONS, "workers")
    _refuse_unknown(findings, document, (), known)
    values: dict[str, Any] = {
        name: parse_settings(findings, _table(findings, document, (name,)), kind, (name,))
        for name, kind in SECTIONS.items()
    }
    cluster = _table(findings, document, ("cluster",))
    _refuse_unknown(findings, cluster, ("cluster",), CLUSTER_KEYS)
    for key in CLUSTER_KEYS:
        if key in cluster:
            value = parse_value(findings, ("cluster", key), str, cluster[key])
            if value is not _UNUSABLE:
                values[key] = value
    values["masters"] = _parse_named(findings, document, "masters", MasterSettings)
    values["workers"] = _parse_named(findings, document, "workers", WorkerSettings, values["worker"])
    return ClusterConfig(**values)


def parse_settings(findings: Findings, table: Table, kind: type[Any], path: Path, base: Any = None) -> Any:
    """One settings object from one table; what the table leaves out comes from `base`, else from the defaults."""
    hints = _hints(kind)
    fields = {key_of(name): name for name in hints if name != NAMED_BY_TABLE.get(kind)}
    _refuse_unknown(findings, table, path, tuple(fields))
    values: dict[str, Any] = {}
    for key, name in fields.items():
        place = (*path, key)
        if dataclasses.is_dataclass(hints[name]):
            values[name] = parse_settings(findings, _table(findings, table, place), hints[name], place)
        elif hints[name] == tuple[CronJobSpec, ...]:
            values[name] = _parse_jobs(findings, table.get(key, []), place)
        elif key in table:
            value = parse_value(findings, place, hints[name], table[key])
            if value is not _UNUSABLE:
                inherited = getattr(base, name) if name == "labels" and base is not None else ()
                values[name] = tuple(sorted({**dict(inherited), **dict(value)}.items())) if inherited else value
    if base is not None:
        return dataclasses.replace(base, **values)
    for name in _required(kind):
        if name not in values:
            if key_of(name) not in table:
                findings.refuse((*path, key_of(name)), f"{dotted(path)} has no {key_of(name)}; add it")
            values[name] = ""
    if kind is MasterSettings:
        values["id"] = path[-1]
    return kind(**values)


def parse_value(findings: Findings, path: Path, hint: Any, value: Any) -> Any:
    """The value as the field wants it; a marker, after a note in `findings`, when its type is another."""
    if path[-1] == "priority":
        return _one_of(findings, path, PRIORITY_NAMES, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _one_of(findings, path, {member.name.lower(): member for member in hint}, value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    if get_origin(hint) is tuple:
        element = get_args(hint)[0]
        if element is str and isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        if element == tuple[str, str] and isinstance(value, dict):
            if all(isinstance(part, str) for part in value.values()):
                return tuple(sorted(value.items()))
    findings.refuse(path, f"{findings.named(path, value)} is {_kind_of(value)}; use {_WANTED[hint]}")
    return _UNUSABLE


_WANTED: dict[Any, str] = {
    str: 'text in quotes, for example "name"',
    int: "a whole number",
    float: "a number, for example 1.5",
    bool: "true or false",
    tuple[str, ...]: 'an array of texts, for example ["program", "argument"]',
    tuple[tuple[str, str], ...]: 'a table of texts, for example { name = "value" }',
}


def _parse_named(findings: Findings, document: Table, section: str, kind: type, base: Any = None) -> tuple[Any, ...]:
    """Tables of tables: `[masters.m1]`, `[workers.w1]`; sorted by id. What a worker leaves out comes from `base`."""
    parsed = []
    for name in _table(findings, document, (section,)):
        path: Path = (section, name)
        table = _table(findings, document[section], path)
        if not findings.is_sound(path):
            continue
        inherited = dataclasses.replace(base, id=name) if base is not None else None
        parsed.append(parse_settings(findings, table, kind, path, inherited))
    return tuple(sorted(parsed, key=lambda settings: settings.id))


def _parse_jobs(findings: Findings, elements: Any, path: Path) -> tuple[CronJobSpec, ...]:
    """The elements of `[[cron.jobs]]`, in their order."""
    if not isinstance(elements, list) or not all(isinstance(element, dict) for element in elements):
        findings.refuse(path, f"{dotted(path)} is not an array of tables; write [[{dotted(path)}]] before each job")
        return ()
    return tuple(
        parse_settings(findings, element, CronJobSpec, (*path, index)) for index, element in enumerate(elements)
    )


def _table(findings: Findings, parent: Table, path: Path) -> Table:
    """The table at the last name of `path` in `parent`; empty when it is left out or is something else."""
    value = parent.get(str(path[-1]), {})
    if isinstance(value, dict):
        return value
    findings.refuse(path, f"{findings.named(path, value)} is {_kind_of(value)}; make it a table: [{dotted(path)}]")
    return {}


def _refuse_unknown(findings: Findings, table: Table, path: Path, known: tuple[str, ...]) -> None:
    for key in table:
        if key in known:
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        place = (*path, key)
        inside = f"[{dotted(path)}]" if path else "the file"
        advice = f"did you mean {close[0]}?" if close else f"{inside} may have {', '.join(known)}"
        what = "section" if not path else "key"
        findings.refuse(place, f"unknown {what} {dotted(place)}; {advice}")


def _one_of(findings: Findings, path: Path, choices: Mapping[str, Any], value: Any) -> Any:
    if isinstance(value, str) and value in choices:
        return choices[value]
    findings.refuse(path, f"{findings.named(path, value)} is not known; use {or_list(list(choices))}")
    return _UNUSABLE


def _kind_of(value: object) -> str:
    match value:
        case bool():
            return "a yes or no"
        case str():
            return "text"
        case int():
            return "a whole number"
        case float():
            return "a number with a fraction" if math.isfinite(value) else "not a finite number"
        case list():
            return "an array with elements of another type" if value else "an array"
        case dict():
            return "a table with values of another type" if value else "a table"
        case _:
            return "a date or time"


def _hints(kind: type) -> dict[str, Any]:
    """Names and types of a settings class, in their order."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _required(kind: type) -> tuple[str, ...]:
    """Fields that have no default and are not the table's name."""
    return tuple(
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name != NAMED_BY_TABLE.get(kind)
    )
