"""The working directory of a quickstart: what is in it, whether it is ours, and the configuration that it holds.

quickstart.json   says that the directory is a quickstart's, and, once `complete`, that all of it was written
cluster.toml      the configuration of every daemon; read again, never overwritten without need, at the next start
certificates/     the cluster's own authority, and the certificates of masters, workers and operator
data/ID/          what each daemon keeps
logs/ID.log       what each daemon says
consul/           Consul's data, with --consul
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.cli.session import quickstart_config
from coordinator.config import ClusterConfig, ConsulSettings, DiscoverySettings, MasterSettings, WorkerSettings
from coordinator.config_file import load, render

MARKER_NAME = "quickstart.json"
CONFIG_NAME = "cluster.toml"
CERTIFICATES_NAME = "certificates"
MASTER_COUNT = 3
HOST = "127.0.0.1"
GRPC_PORT, PEER_PORT, HTTP_PORT = 7101, 7151, 7201
"""First ports of the masters; the second master has the next one, and so on (DESIGN.md section 11)."""
WORKER_GRPC_PORT, WORKER_HTTP_PORT = 7301, 7401
WORKERS_MAX = 50
"""Further workers would reach into the ports of others."""
REFERENCE = Path(__file__).resolve().parents[2] / CONFIG_NAME


class QuickstartError(Exception):
    """The quickstart cannot go on; one line for people: what, and what to do."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Where everything listens."""

    masters: tuple[tuple[int, int, int], ...]
    """gRPC, peer and HTTP port of each master."""
    workers: tuple[tuple[int, int], ...]
    """gRPC and HTTP port of each worker."""

    @classmethod
    def fixed(cls, worker_count: int) -> Ports:
        """The ports that people can remember."""
        return cls(
            tuple((GRPC_PORT + index, PEER_PORT + index, HTTP_PORT + index) for index in range(MASTER_COUNT)),
            tuple((WORKER_GRPC_PORT + index, WORKER_HTTP_PORT + index) for index in range(worker_count)),
        )

    @classmethod
    def free(cls, worker_count: int) -> Ports:
        """Ports that nobody uses at the moment, so that a check disturbs nothing."""
        count = 3 * MASTER_COUNT + 2 * worker_count
        sockets = [socket.socket() for _ in range(count)]
        try:
            for listener in sockets:
                listener.bind((HOST, 0))
            numbers = iter([int(listener.getsockname()[1]) for listener in sockets])
        finally:
            for listener in sockets:
                listener.close()
        return cls(
            tuple((next(numbers), next(numbers), next(numbers)) for _ in range(MASTER_COUNT)),
            tuple((next(numbers), next(numbers)) for _ in range(worker_count)),
        )


def default_directory() -> Path:
    """Where a quickstart keeps its files unless it is told otherwise."""
    return quickstart_config().parent


def cluster_config(ports: Ports, base: ClusterConfig | None = None) -> ClusterConfig:
    """A configuration with these daemons; the rest, the cron jobs among it, from `base` or from the reference."""
    base = base if base is not None else load(REFERENCE)
    masters = tuple(
        MasterSettings(f"m{number}", f"{HOST}:{grpc}", f"{HOST}:{peer}", f"{HOST}:{http}")
        for number, (grpc, peer, http) in enumerate(ports.masters, 1)
    )
    workers = tuple(
        dataclasses.replace(base.worker, id=f"w{number}", grpc_address=f"{HOST}:{grpc}", http_address=f"{HOST}:{http}")
        for number, (grpc, http) in enumerate(ports.workers, 1)
    )
    # The file lies in the working directory, so the folder can be moved as a whole.
    security = dataclasses.replace(base.security, directory=CERTIFICATES_NAME)
    return dataclasses.replace(
        base, name="quickstart", data_directory="data", security=security, masters=masters, workers=workers
    )


def with_discovery(config: ClusterConfig, consul_address: str | None) -> ClusterConfig:
    """The configuration with Consul at this address, or with embedded discovery."""
    if consul_address is None:
        return dataclasses.replace(config, discovery=DiscoverySettings())
    consul = dataclasses.replace(config.discovery.consul, address=consul_address)
    return dataclasses.replace(config, discovery=DiscoverySettings("consul", consul))


def with_workers(config: ClusterConfig, count: int) -> ClusterConfig:
    """The configuration with at least w1 to w`count`; those that it has stay as they are."""
    known = {worker.id: worker for worker in config.workers}
    for index in range(count):
        known.setdefault(
            f"w{index + 1}",
            dataclasses.replace(
                config.worker,
                id=f"w{index + 1}",
                grpc_address=f"{HOST}:{WORKER_GRPC_PORT + index}",
                http_address=f"{HOST}:{WORKER_HTTP_PORT + index}",
            ),
        )
    return dataclasses.replace(config, workers=tuple(sorted(known.values(), key=lambda worker: worker.id)))


def prepare(directory: Path, config: ClusterConfig) -> Path:
    """Makes the working directory with this configuration; the path of its cluster.toml. Raises QuickstartError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / MARKER_NAME, json.dumps({"quickstart": 1, "complete": False}) + "\n")
        (directory / "data").mkdir(exist_ok=True)
        (directory / "logs").mkdir(exist_ok=True)
        write_config(directory, config)
        write_whole(directory / MARKER_NAME, json.dumps({"quickstart": 1, "complete": True}) + "\n")
    except OSError as error:
        raise QuickstartError(
            f"cannot write {error.filename or directory}: {error.strerror}; choose another place with --dir"
        ) from None
    return directory / CONFIG_NAME


def write_config(directory: Path, config: ClusterConfig) -> None:
    """Writes cluster.toml, whole or not at all."""
    head = (
        "# Written by tools/quickstart; the next start on this directory reads it again. What is not here has its\n"
        "# default: cluster.toml of the checkout has every option with its unit and a comment.\n\n"
    )
    write_whole(directory / CONFIG_NAME, head + render(config))


def found(directory: Path) -> ClusterConfig | None:
    """The configuration of an earlier start; None for a new directory. Raises QuickstartError, ConfigError."""
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise QuickstartError(f"{directory} is not a directory; choose another with --dir")
    marker = directory / MARKER_NAME
    if not marker.exists():
        if any(directory.iterdir()):
            raise QuickstartError(
                f"{directory} has files that are not a quickstart's (no {MARKER_NAME}); choose another with --dir"
            )
        return None
    try:
        complete = json.loads(marker.read_text())["complete"] is True
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete or not (directory / CONFIG_NAME).is_file():
        raise QuickstartError(f"{directory} was only half written by an earlier start; remove it and start again")
    config = load(directory / CONFIG_NAME)
    security = dataclasses.replace(config.security, directory=CERTIFICATES_NAME)
    return dataclasses.replace(config, data_directory="data", security=security)


def ports_in_use(addresses: Sequence[tuple[str, str]]) -> list[str]:
    """One line for each (what, host:port) that something already listens on."""
    taken = []
    for what, address in addresses:
        host, _, port = address.rpartition(":")
        with socket.socket() as listener:
            if os.name != "nt":
                # As the daemons do: a port that only waits for the end of old connections is free.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, int(port)))
            except OSError as error:
                taken.append(f"{address} ({what}): {error.strerror}")
    return taken


def listeners(config: ClusterConfig, worker_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Everything that will listen: what it is, and where."""
    wanted = [
        (f"{what} of {master.id}", address)
        for master in config.masters
        for what, address in (
            ("gRPC", master.grpc_address),
            ("peer port", master.peer_address),
            ("HTTP", master.http_address),
        )
    ]
    wanted += [
        (f"{what} of {worker.id}", address)
        for worker in config.workers
        if worker.id in worker_ids
        for what, address in (("gRPC", worker.grpc_address), ("HTTP", worker.http_address))
    ]
    return wanted


def worker_of(config: ClusterConfig, worker_id: str) -> WorkerSettings:
    """One of the configuration's workers."""
    return next(worker for worker in config.workers if worker.id == worker_id)


def consul_settings(address: str) -> ConsulSettings:
    """Consul on this machine."""
    return ConsulSettings(address=address)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file so that a reader finds the old text or the new one, also after a power cut."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(beside, path)
