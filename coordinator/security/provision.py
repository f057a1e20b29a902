"""Certificates for a whole cluster that is set up by a tool: makes what is missing, keeps what is good.

Only for tools that run where the authority's key may lie: the quickstart, test clusters, and node-join beside them.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from coordinator.config import ClusterConfig
from coordinator.model.errors import ConfigError
from coordinator.security.certificates import (
    Identity,
    Role,
    authority_files,
    create_authority,
    describe,
    issue,
    leaf_files,
)

OPERATOR = "admin"
"""Id of the operator's certificate that a tool makes."""


def ensure(directory: Path, cluster: str, daemons: Iterable[tuple[Role, str]]) -> None:
    """Sees to it that a directory has an authority and a good certificate for each of these.

    What ends soon is issued again. Raises ConfigError where the authority is missing its key, or is another cluster's.
    """
    now = datetime.datetime.now(datetime.UTC)
    if not authority_files(directory)[0].exists():
        create_authority(directory, cluster, now)
    for role, identifier in daemons:
        identity = Identity(cluster, role, identifier)
        if not is_good(directory, identity, now):
            issue(directory, identity, now)


def ensure_cluster(directory: Path, config: ClusterConfig, workers: Iterable[str] = ()) -> None:
    """The same for a configuration's masters and workers, further workers, and one operator."""
    daemons = [(Role.MASTER, master.id) for master in config.masters]
    worker_ids = dict.fromkeys([*(worker.id for worker in config.workers), *workers])
    daemons += [(Role.WORKER, worker_id) for worker_id in worker_ids]
    ensure(directory, config.name, [*daemons, (Role.OPERATOR, OPERATOR)])


def is_good(directory: Path, identity: Identity, now: datetime.datetime) -> bool:
    """True when the directory has this identity's certificate, with its key, and it does not end soon."""
    files = leaf_files(directory, identity.role, identity.id)
    if not (files.authority.exists() and files.key.exists()):
        return False
    try:
        info = describe(files.certificate)
    except ConfigError:
        return False
    return info.identity == identity and not info.ends_soon(now)
