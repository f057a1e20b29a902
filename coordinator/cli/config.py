"""clusterctl config: whether a configuration can be used."""

from __future__ import annotations

from pathlib import Path

import click

from coordinator.cli.session import Group, Session, pass_session
from coordinator.cli.table import paragraph
from coordinator.config import ClusterConfig
from coordinator.config_file import load
from coordinator.model.errors import ConfigError


def summary(path: Path, config: ClusterConfig) -> str:
    """What a good configuration says, in a few words."""
    masters = ", ".join(f"{master.id} at {master.grpc_address}" for master in config.masters)
    return (
        f"{path}: good; cluster {config.name!r}, masters {masters or 'none'}, "
        f"{config.placement.shards} shards with {config.placement.replicas} replicas, "
        f"{len(config.cron.jobs)} cron jobs, {config.discovery.backend} discovery"
    )


@click.group(cls=Group)
def config() -> None:
    """Check a configuration before it is used."""


@config.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@pass_session
def check(session: Session, file: Path) -> int:
    """Check a cluster.toml: unknown names, wrong types, values that contradict each other.

    Says for each fault the line, the value, and what would be right. Asks no cluster.

    \b
    Example:
      clusterctl config check cluster.toml
    """
    try:
        found, problems = load(file), []
    except ConfigError as error:
        found, problems = None, list(error.problems)
    except OSError as error:
        found, problems = None, [f"{file}: {error.strerror or error}"]

    def text() -> str:
        if found is not None:
            return paragraph(summary(file, found))
        return "\n".join(f"error: {problem}" for problem in problems)

    session.show({"file": str(file), "good": found is not None, "problems": list(problems)}, text)
    return 0 if found is not None else 1
