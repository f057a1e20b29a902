"""clusterctl backup and restore: the masters' state as a file, and a new cluster from such a file.

A backup is written to a temporary file beside its place, synced, read back, checked whole, and only then renamed: after
any crash the file is the old one or a sound new one. A restore works without any master: it writes the data directories
that new masters start from. It never writes into a directory that has anything in it, and all directories are looked at
before the first one is written.
"""

from __future__ import annotations

import datetime
import os
import secrets
from pathlib import Path

import click

from coordinator.api.v1 import cluster_pb2
from coordinator.cli.session import Command, Session, pass_session
from coordinator.cli.structure import Plain, to_plain
from coordinator.cli.table import facts, paragraph
from coordinator.cli.words import local_time, size
from coordinator.client import ClusterClient
from coordinator.config_file import load, master_settings
from coordinator.machine.backup import (
    NONCE_DIGITS,
    Backup,
    check_restored_id,
    decode_backup,
    restored_id,
    restored_state,
    restored_term,
)
from coordinator.model.errors import ConfigError, CoordinatorError, Damaged, IndefiniteError, InvalidRequest

FILE = click.Path(dir_okay=False, path_type=Path)


def read_backup(path: Path) -> Backup:
    """A backup from its file. Raises Damaged, InvalidRequest when there is none."""
    try:
        return decode_backup(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from None


def contents(backup: Backup, path: Path) -> list[tuple[str, str]]:
    """What a backup is of, for people."""
    header, state = backup.header, backup.state
    return [
        ("cluster", f"{header.cluster_name} ({header.cluster_id})"),
        ("index", f"{header.index} (term {header.term})"),
        ("taken", f"{local_time(header.taken_unix_ms)} by {header.master_id}, version {header.software_version}"),
        ("holds", f"{len(state.nodes)} workers, {len(state.shards)} shards, {len(state.jobs)} cron jobs"),
        ("file", f"{path}, {size(path.stat().st_size)}, sound"),
    ]


def write_backup(client: ClusterClient, path: Path) -> Backup:
    """Takes a backup into a file. Raises CoordinatorError; then the file is what it was."""
    from coordinator.raft.files import sync_directory

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            first: cluster_pb2.BackupResponse | None = None
            for part in client.backup():
                first = first or part
                file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        backup = read_backup(temporary)
        if first is None or (first.index, first.cluster_id) != (backup.header.index, backup.header.cluster_id):
            raise Damaged(f"{path}: not what the master announced; take the backup again")
        temporary.replace(path)
        sync_directory(path.parent)
    except IndefiniteError as error:
        # A backup changes nothing in the cluster, so there is nothing that may or may not have been done.
        raise CoordinatorError(f"{path} was not written: {error}") from None
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return backup


@click.command(cls=Command)
@click.argument("file", type=FILE)
@click.option("--verify", is_flag=True, help="Take none: check FILE whole, and say what it holds. Asks no cluster.")
@pass_session
def backup(session: Session, file: Path, verify: bool) -> None:
    """Write the state of the masters to FILE: workers, shards, moves, cron jobs, settings, story.

    The cluster goes on meanwhile; the backup shows everything that was acknowledged before it began. It is
    checked whole before it takes the name FILE, and replaces an older FILE only then. Any one master will do,
    as long as a majority runs. What users keep in the shards is on the workers, not in here.

    \b
    Examples:
      clusterctl backup state-$(date +%F).backup
      clusterctl backup --verify state-2025-11-23.backup
    """
    made = read_backup(file) if verify else write_backup(session.client(), file)
    plain = to_plain(made.header) | {"file": str(file), "bytes": file.stat().st_size}
    session.show(plain, lambda: facts(contents(made, file)))


@click.command(cls=Command)
@click.argument("file", type=FILE)
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Configuration of the new cluster.")
@click.option("--id", "master_ids", multiple=True, metavar="ID", help="Make this master's directory; may be repeated.")
@click.option("--all", "is_all", is_flag=True, help="Make the directories of all masters of the configuration.")
@click.option("--cluster-id", default="", metavar="ID", help="The id that restoring the first master printed.")
@click.option("--into", type=click.Path(path_type=Path), help="Instead of the configuration's data_directory.")
@click.option("--pause-cron", is_flag=True, help="Begin with all schedules paused.")
@pass_session
def restore(
    session: Session,
    file: Path,
    config_path: Path | None,
    master_ids: tuple[str, ...],
    is_all: bool,
    cluster_id: str,
    into: Path | None,
    pause_cron: bool,
) -> None:
    """Make a new cluster from a backup: writes the data directories that its masters start from.

    Stop the old masters first. Every master of the configuration needs its directory, all from the same FILE and
    with the same new cluster id. Make all of them at once (--all, with --into DIR to copy them to their machines
    afterwards), or one on each machine: the first prints the new id, the others are given it with --cluster-id.
    A directory that has anything in it is never written to.

    The cluster is a new one: masters and workers that belong to the old one are refused. Start each worker once
    with `worker-agent --accept-cluster ID`. Workers, shards and cron jobs are as they were when the backup
    was taken; launches after it are unknown, so catch-up may launch them again (--pause-cron to look first).

    \b
    Examples:
      clusterctl restore state.backup --config cluster.toml --all
      clusterctl restore state.backup --config cluster.toml --id m1
      clusterctl restore state.backup --config cluster.toml --id m2 --cluster-id ID
    """
    from coordinator.raft.restore import require_empty, write_master

    path = config_path or session.found_config()
    if path is None:
        raise ConfigError(["a restore needs the new cluster's configuration; name it with --config FILE"])
    config = load(path)
    if bool(master_ids) == is_all:
        raise click.UsageError("name the masters with --id ID, or use --all")
    chosen = [master.id for master in config.masters] if is_all else list(dict.fromkeys(master_ids))
    made = read_backup(file)
    if cluster_id:
        check_restored_id(made, cluster_id)
    new_id = cluster_id or restored_id(made, secrets.token_hex(NONCE_DIGITS // 2))
    directories = {
        master_settings(config, master_id).id: Path(into or config.data_directory) / master_id for master_id in chosen
    }
    state = restored_state(made, new_id, pause_cron=pause_cron)
    try:
        for directory in directories.values():
            require_empty(directory)
        for master_id, directory in directories.items():
            write_master(directory, f"{config.name}/{master_id}", state, restored_term(made))
    except OSError as error:
        raise CoordinatorError(f"{error.filename or directory} cannot be written: {error.strerror or error}") from None
    left = [master.id for master in config.masters if master.id not in directories]
    plain: dict[str, Plain] = {
        "cluster_id": new_id,
        "index": made.header.index,
        "directories": {master_id: str(directory) for master_id, directory in directories.items()},
        "masters_left": list(left),
    }
    session.show(plain, lambda: _told(made, file, path, new_id, directories, left))


def _told(
    backup: Backup, file: Path, config: Path, cluster_id: str, directories: dict[str, Path], left: list[str]
) -> str:
    """What was restored, and what to do next."""
    taken = datetime.datetime.fromtimestamp(backup.header.taken_unix_ms / 1_000, datetime.UTC)
    lines = [
        facts(
            [
                ("new cluster id", cluster_id),
                ("state of", f"{backup.header.cluster_name}, index {backup.header.index}, {taken:%F %T} UTC"),
                *((master_id, str(directory)) for master_id, directory in directories.items()),
            ]
        )
    ]
    if left:
        each = " ".join(f"--id {master_id}" for master_id in left)
        lines.append(paragraph("the same file for the other masters, on their machines:", "next: "))
        lines.append(f"  clusterctl restore {file} --config {config} {each} --cluster-id {cluster_id}")
    lines.append(paragraph("start all masters, then each worker once with", "then: " if left else "next: "))
    lines.append(f"  worker-agent --accept-cluster {cluster_id} --config {config} --id ID")
    return "\n".join(lines)
