"""cluster.toml: from the file to typed, checked settings, and back.

`load` gathers every fault and reports each in one line: file, line, key, value, and what would be right. What the
file may hold follows from the classes in config.py; what the values may be is in configuration/limits.py and rules.py.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import tomllib

from coordinator.config import ClusterConfig, MasterSettings, WorkerSettings
from coordinator.configuration.addresses import check_address, is_loopback
from coordinator.configuration.fields import check_id
from coordinator.configuration.findings import Findings
from coordinator.configuration.job_rules import check_job_spec
from coordinator.configuration.parse import parse_cluster
from coordinator.configuration.render import changed_options, describe_defaults, render_cluster
from coordinator.configuration.rules import check_cluster
from coordinator.configuration.toml_lines import key_lines
from coordinator.model.errors import ConfigError

__all__ = [
    "changed_options",
    "check_address",
    "check_id",
    "check_job_spec",
    "describe_defaults",
    "is_loopback",
    "load",
    "master_settings",
    "parse",
    "render",
    "validate",
    "worker_settings",
]

TOKEN_VARIABLE = "CONSUL_HTTP_TOKEN"


def load(path: pathlib.Path) -> ClusterConfig:
    """The settings of a file. Raises ConfigError with one line per fault.

    A relative `data_directory` or `security.directory` is taken from the file's folder. The environment's
    CONSUL_HTTP_TOKEN comes before the file's token, as it does for Consul's own tools.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file; name one with --config"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    try:
        # An editor of Windows may have put a byte order mark in front.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ConfigError([f"{path}:{line}: is not UTF-8: found the byte {byte:#04x}; save it as UTF-8"]) from None
    config = parse(text, str(path))
    consul = config.discovery.consul
    token = os.environ.get(TOKEN_VARIABLE)
    if token:
        consul = dataclasses.replace(consul, token=token)
    folder = path.parent.resolve()
    return dataclasses.replace(
        config,
        data_directory=str(folder / config.data_directory),
        security=dataclasses.replace(config.security, directory=str(folder / config.security.directory)),
        discovery=dataclasses.replace(config.discovery, consul=consul),
    )


def parse(text: str, source: str) -> ClusterConfig:
    """The settings of a text; `source` names it in messages. Raises ConfigError with one line per fault."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Beside TOMLDecodeError: a number of thousands of digits, or brackets nested thousands deep.
        raise ConfigError([_syntax_problem(text, source, error)]) from None
    findings = Findings(source, key_lines(text))
    config = parse_cluster(findings, document)
    check_cluster(findings, config)
    if problems := findings.problems():
        raise ConfigError(problems)
    return config


def validate(config: ClusterConfig) -> None:
    """Holds a configuration that was built in code to the rules of one from a file. Raises ConfigError."""
    findings = Findings()
    check_cluster(findings, config)
    if problems := findings.problems():
        raise ConfigError(problems)


def render(config: ClusterConfig, *, complete: bool = False) -> str:
    """The text of a file that `load` reads as this configuration: what differs from the defaults, or every option.

    A token that the environment gave is left out: whoever may read it finds it there.
    """
    consul = config.discovery.consul
    if consul.token and consul.token == os.environ.get(TOKEN_VARIABLE):
        discovery = dataclasses.replace(config.discovery, consul=dataclasses.replace(consul, token=""))
        config = dataclasses.replace(config, discovery=discovery)
    return render_cluster(config, complete=complete)


def worker_settings(config: ClusterConfig, worker_id: str) -> WorkerSettings:
    """The settings of one worker: its own, or the defaults of [worker]. Raises ConfigError for an id that cannot be."""
    for worker in config.workers:
        if worker.id == worker_id:
            return worker
    if advice := check_id(worker_id):
        raise ConfigError([f"{worker_id!r} cannot be a worker's id; {advice}"])
    ids = [master.id for master in config.masters] + [worker.id for worker in config.workers]
    if taken := [other for other in ids if other.casefold() == worker_id.casefold()]:
        raise ConfigError([f"the id {worker_id} is taken by {taken[0]} of the configuration; use another"])
    return dataclasses.replace(config.worker, id=worker_id)


def master_settings(config: ClusterConfig, master_id: str) -> MasterSettings:
    """The settings of one master. Raises ConfigError for an id that the table does not have."""
    for master in config.masters:
        if master.id == master_id:
            return master
    known = ", ".join(master.id for master in config.masters)
    raise ConfigError([f"{master_id!r} is not a master of this configuration; use one of {known}"])


def _syntax_problem(text: str, source: str, error: Exception) -> str:
    """One line for a text that is not TOML."""
    message = str(error)
    place = re.search(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)", message)
    line = int(place[1]) if place and place[1] else max(1, len(text.splitlines()))
    column = f", column {place[2]}" if place and place[2] else ""
    reason = message.replace(place[0], "") if place else message
    return f"{source}:{line}: is not valid TOML{column}: {reason[:1].lower()}{reason[1:]}"
