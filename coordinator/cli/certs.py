"""clusterctl certs: the cluster's authority and its certificates. Works on files, without a cluster."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import click

from coordinator.cli.session import Group, Session, pass_session
from coordinator.cli.structure import Plain
from coordinator.cli.table import Column, paragraph, table
from coordinator.cli.words import NOTHING
from coordinator.config_file import load
from coordinator.model.errors import ConfigError
from coordinator.security.certificates import (
    AUTHORITY_NAME,
    LEAF_DAYS,
    CertificateInfo,
    Identity,
    Role,
    authority_cluster,
    authority_files,
    create_authority,
    describe,
    issue,
)

DIRECTORY_NAME = "certificates"
DAYS_MAX = 3_650
SHOWN_FINGERPRINT = 16
COLUMNS = (
    Column("ROLE"),
    Column("ID"),
    Column("CLUSTER"),
    Column("FROM"),
    Column("UNTIL"),
    Column("DAYS", right=True),
    Column("SHA-256"),
    Column("FILE"),
)


def _directory(session: Session, named: Path | None) -> Path:
    """The directory of certificates: named, else as clients find it, else ./certificates."""
    if named is not None:
        return named
    if (found := session.found_certificates()) is not None:
        return found
    path = session.found_config()
    return Path(load(path).security.directory) if path is not None else Path(DIRECTORY_NAME)


_directory_option = click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the authority is; else the configuration's [security] directory, else ./certificates.",
)


@click.group(cls=Group)
def certs() -> None:
    """Make and look at certificates: who may talk to the cluster, and as what.

    A certificate names a role and an id. Masters and workers have one each, by their id in the configuration; an
    operator may see and change everything, a reader may look, a service may look and trigger jobs.

    \b
    A new cluster, on the machine that keeps the authority:
      clusterctl certs init
      clusterctl certs issue --role master --id m1        and so on for every master and worker
      clusterctl certs issue --role operator --id ann
    Each machine then gets authority.crt and its own .crt and .key, never authority.key.
    """


@certs.command()
@_directory_option
@click.option("--name", metavar="CLUSTER", help="Name of the cluster; else the configuration's.")
@pass_session
def init(session: Session, directory: Path | None, name: str | None) -> None:
    """Make the authority of a new cluster: authority.crt, and authority.key, which signs certificates.

    Whoever has authority.key can make itself an operator: keep it where no daemon runs, and back it up. Refuses when
    there is an authority already.

    \b
    Examples:
      clusterctl certs init
      clusterctl certs init --directory ~/fleet-certificates --name fleet
    """
    place, cluster = _directory(session, directory), name or _cluster_name(session)
    certificate = create_authority(place, cluster, _now())
    key = authority_files(place)[1]
    session.show(
        {"cluster": cluster, "certificate": str(certificate), "key": str(key)},
        lambda: f"made the authority of cluster {cluster!r}: {certificate}; keep {key} secret, and a copy of it",
    )


@certs.command("issue")
@_directory_option
@click.option("--role", required=True, type=click.Choice([role.value for role in Role]), help="What the holder is.")
@click.option("--id", "identifier", required=True, help="Who: a master's or worker's id, or the name of a person.")
@click.option(
    "--days", type=click.IntRange(1, DAYS_MAX), default=LEAF_DAYS, show_default=True, help="How long it is valid."
)
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the three files that its holder needs to this directory instead.",
)
@pass_session
def issue_command(
    session: Session, directory: Path | None, role: str, identifier: str, days: int, to: Path | None
) -> None:
    """Issue a certificate with its key, signed by the authority of the directory.

    Issued again for the same role and id, it replaces the old file; the old certificate stays valid until its end. A
    daemon reads its certificate when it starts.

    \b
    Examples:
      clusterctl certs issue --role worker --id w4 --to w4-certificates
      clusterctl certs issue --role operator --id ann --days 90
    """
    place = _directory(session, directory)
    identity = Identity(authority_cluster(place), Role(role), identifier)
    files = issue(place, identity, _now(), days, to)
    info = describe(files.certificate)
    session.show(
        {
            "uri": identity.uri,
            "certificate": str(files.certificate),
            "key": str(files.key),
            "authority": str(files.authority),
            "valid_until": _iso(info.valid_until),
        },
        lambda: "\n".join(
            [
                f"issued {identity.uri}, valid until {info.valid_until:%Y-%m-%d}; its holder needs",
                *(f"  {path}" for path in (files.certificate, files.key, files.authority)),
            ]
        ),
    )


@certs.command()
@_directory_option
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@pass_session
def show(session: Session, directory: Path | None, files: tuple[Path, ...]) -> None:
    """Show certificates: whose they are, from when until when, and their fingerprints. All of the directory by default.

    Warns of those that end within 30 days. With -o json fingerprints are whole.

    \b
    Examples:
      clusterctl certs show
      clusterctl certs show certificates/master-m1.crt -o json
    """
    place = _directory(session, directory)
    paths = list(files) or sorted(place.glob("*.crt"))
    if not paths:
        raise ConfigError([f"{place}: no certificate there; make an authority with `clusterctl certs init`"])
    found = [(path, describe(path)) for path in paths]
    now = _now()
    session.show({"certificates": [_plain(path, info, now) for path, info in found]}, lambda: certs_text(found, now))


def certs_text(found: Sequence[tuple[Path, CertificateInfo]], now: datetime.datetime) -> str:
    """Certificates for people; what needs something done comes below the table."""
    rows = [
        [
            _role(info) or NOTHING,
            info.identity.id if info.identity else NOTHING,
            info.cluster or NOTHING,
            f"{info.valid_from:%Y-%m-%d}",
            f"{info.valid_until:%Y-%m-%d}",
            str(_days_left(info, now)),
            info.fingerprint_sha256[:SHOWN_FINGERPRINT],
            path.name,
        ]
        for path, info in found
    ]
    return "\n".join([table(COLUMNS, rows), *(paragraph(line) for line in _warnings(found, now))])


def _warnings(found: Sequence[tuple[Path, CertificateInfo]], now: datetime.datetime) -> list[str]:
    lines = []
    for path, info in found:
        if not info.ends_soon(now):
            continue
        when = f"ends in {_days_left(info, now)} days" if info.valid_until > now else "has ended"
        advice = "make another authority, and all certificates anew"
        if info.identity is not None:
            advice = f"`clusterctl certs issue --role {info.identity.role.value} --id {info.identity.id}` makes another"
        lines.append(f"warning: {path.name} {when}; {advice}")
    return lines


def _plain(path: Path, info: CertificateInfo, now: datetime.datetime) -> Plain:
    return {
        "file": str(path),
        "uri": info.identity.uri if info.identity else "",
        "cluster": info.cluster,
        "role": _role(info),
        "id": info.identity.id if info.identity else "",
        "subject": info.subject,
        "issuer": info.issuer,
        "valid_from": _iso(info.valid_from),
        "valid_until": _iso(info.valid_until),
        "days_left": _days_left(info, now),
        "ends_soon": info.ends_soon(now),
        "fingerprint_sha256": info.fingerprint_sha256,
    }


def _role(info: CertificateInfo) -> str:
    return info.identity.role.value if info.identity else AUTHORITY_NAME if info.is_authority else ""


def _days_left(info: CertificateInfo, now: datetime.datetime) -> int:
    """Whole days until the end; negative afterwards."""
    return (info.valid_until - now).days


def _cluster_name(session: Session) -> str:
    path = session.found_config()
    if path is None:
        raise ConfigError(["no configuration was found that names the cluster; use --name CLUSTER or --config FILE"])
    return load(path).name


def _iso(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
