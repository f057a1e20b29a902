"""What one party shows and what it demands of others: the one object that servers, channels and peers are made with.

Where a function takes `Credentials | None`, None is plain text, which only `mode = "plaintext"` of cluster.toml gives a
daemon, with a warning. A client without credentials cannot talk to a cluster under TLS, nor the other way round: there
is no falling back.

Files are read when the party starts. A certificate that was issued again counts from the next start.
"""

from __future__ import annotations

import datetime
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc import aio

from coordinator.config import ClusterConfig
from coordinator.model.errors import ConfigError
from coordinator.security import tls
from coordinator.security.certificates import (
    CertificateFiles,
    Identity,
    Role,
    describe,
    id_dns_name,
    leaf_files,
)

PLAINTEXT = "plaintext"
PEOPLE = (Role.OPERATOR, Role.READER, Role.SERVICE)
"""Roles whose certificates clients use, in the order in which they are looked for."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate with its key, and the authority that others must have theirs from."""

    identity: Identity
    files: CertificateFiles

    def server_context(self) -> ssl.SSLContext:
        """For the peer port."""
        return tls.server_context(self.files)

    def client_context(self) -> ssl.SSLContext:
        """For dialling peers."""
        return tls.client_context(self.files)

    def peer_name(self, peer_id: str) -> str:
        """The name that the certificate of the daemon with this id and our role must carry."""
        return id_dns_name(self.peer(peer_id))

    def peer(self, peer_id: str) -> Identity:
        """Who the daemon with this id and our role is."""
        return Identity(self.identity.cluster, self.identity.role, peer_id)


def open_channel(
    address: str, options: Sequence[tuple[str, Any]], credentials: Credentials | None, role: Role = Role.MASTER
) -> aio.Channel:
    """A channel to a daemon of that role, which must show a certificate of that role and cluster."""
    if credentials is None:
        return aio.insecure_channel(address, options=options)
    named = [*options, *tls.channel_options(credentials.identity.cluster, role)]
    return aio.secure_channel(address, tls.channel_credentials(credentials.files), options=named)


def add_port(server: aio.Server, address: str, credentials: Credentials | None) -> int:
    """Takes a port for a gRPC server; 0 when that cannot be had. Under TLS it asks every caller for a certificate."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, tls.server_credentials(credentials.files))
    except RuntimeError:
        return 0


def load(files: CertificateFiles, cluster: str = "", role: Role | None = None, identifier: str = "") -> Credentials:
    """The credentials in these files, checked. Raises ConfigError when they are not what is needed, in one line each.

    What is left empty may be anything.
    """
    info = describe(files.certificate)
    if info.identity is None:
        raise ConfigError([f"{files.certificate}: names no role; make it with `clusterctl certs issue`"])
    found = info.identity
    wanted = Identity(cluster or found.cluster, role or found.role, identifier or found.id)
    if found != wanted:
        raise ConfigError([f"{files.certificate}: is of {found.uri}, but that of {wanted.uri} is needed; issue that"])
    now = datetime.datetime.now(datetime.UTC)
    again = f"`clusterctl certs issue --role {found.role.value} --id {found.id}`"
    if info.valid_until <= now:
        ended = f"{info.valid_until:%Y-%m-%d %H:%M} UTC"
        raise ConfigError([f"{files.certificate}: its time was over on {ended}; issue it again with {again}"])
    if info.valid_from > now:
        begins = f"{info.valid_from:%Y-%m-%d %H:%M} UTC"
        raise ConfigError([f"{files.certificate}: it begins only on {begins}; set this machine's clock right"])
    if info.ends_soon(now):
        days = (info.valid_until - now).days
        _log.warning("%s ends in %d days; issue it again with %s", files.certificate, days, again)
    # Made only for their checks: readable, in PEM form, the key the certificate's own.
    tls.client_context(files)
    return Credentials(found, files)


def of_daemon(config: ClusterConfig, role: Role, daemon_id: str) -> Credentials | None:
    """What a daemon of this configuration uses; None for plain text, with a warning. Raises ConfigError."""
    if config.security.mode == PLAINTEXT:
        _log.warning(
            'security.mode is "plaintext": anybody who can connect may read, change and command the whole cluster; '
            'use "mtls" for all but experiments'
        )
        return None
    return load(leaf_files(Path(config.security.directory), role, daemon_id), config.name, role, daemon_id)


def of_person(directory: Path, name: str = "", cluster: str = "") -> Credentials:
    """What a client uses: the operator's certificate in a directory, else a reader's, else a service's.

    `name` picks one where there are several: the id, or role-id. Raises ConfigError with one line that says what is
    missing.
    """
    found = [path for role in PEOPLE for path in sorted(directory.glob(f"{role.value}-*.crt"))]
    make = "make one with `clusterctl certs issue --role operator --id NAME`"
    if not found:
        raise ConfigError([f"{directory}: no operator-*.crt there to show to the cluster; {make}"])
    if name:
        chosen = [path for path in found if name in (path.stem, path.stem.partition("-")[2])]
    else:
        best = found[0].name.partition("-")[0]
        chosen = [path for path in found if path.name.partition("-")[0] == best]
    names = ", ".join(path.stem for path in (chosen or found))
    if not chosen:
        raise ConfigError([f"{directory}: no certificate of {name!r} there, only {names}; {make}"])
    if len(chosen) > 1:
        raise ConfigError([f"{directory}: there are {names}; say which one with --as NAME"])
    role, _, identifier = chosen[0].stem.partition("-")
    return load(leaf_files(directory, Role(role), identifier), cluster)


def of_client(config: ClusterConfig, name: str = "", directory: Path | None = None) -> Credentials | None:
    """What a client of this configuration uses, from its directory or another; None for plain text."""
    if config.security.mode == PLAINTEXT:
        return None
    return of_person(directory or Path(config.security.directory), name, config.name)
