"""What node-join and node-leave share: a worker's directory on this machine, its process, and Consul's view of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

from coordinator.cli.session import CERTIFICATES_VARIABLE, Session, state_directory
from coordinator.client import ClusterClient
from coordinator.config import ClusterConfig, ConsulSettings
from coordinator.config_file import load
from coordinator.model.errors import ConfigError
from coordinator.security.credentials import of_client
from tools.lib.daemons import STOP_TIMEOUT_S, program, running_with

CONSUL_TIMEOUT_S = 3.0


class NodeError(Exception):
    """Joining or leaving cannot go on; one line for people: what, and what to do."""


def default_directory(worker_id: str) -> Path:
    """Where a worker that was joined here keeps its files unless it is told otherwise."""
    return state_directory() / "workers" / worker_id


def add_client_options(made: argparse.ArgumentParser) -> None:
    """The options that say who asks the cluster, as clusterctl has them."""
    made.add_argument(
        "--certificate-directory",
        type=Path,
        help=f"your operator's certificate (else ${CERTIFICATES_VARIABLE}, else the configuration's directory)",
    )
    made.add_argument("--as", dest="identity_name", metavar="NAME", default="", help="whose, where there are several")


def named_certificates(options: argparse.Namespace) -> Path | None:
    """The directory that the options or the environment name."""
    return Session(certificate_directory=options.certificate_directory).found_certificates()


def client_of(config: ClusterConfig, options: argparse.Namespace, place: Place) -> ClusterClient:
    """A client that shows the operator's certificate: what the options name, else the configuration's directory, else
    where it was when the worker was joined. Raises ConfigError."""
    named = named_certificates(options)
    with contextlib.suppress(OSError, ValueError, KeyError):
        if named is None and Path(config.security.directory).resolve() == place.certificates.resolve():
            named = Path(json.loads(place.operator_file.read_text(encoding="utf-8"))["certificate_directory"])
    addresses = [master.grpc_address for master in config.masters]
    return ClusterClient(addresses, timeout_s=10.0, credentials=of_client(config, options.identity_name, named))


def cluster_config(path: Path | None, own: Path | None = None) -> tuple[ClusterConfig, Path]:
    """The cluster's configuration and its file: the one named, else the worker's own, else where clusterctl looks.

    Raises NodeError, ConfigError.
    """
    found = path or (own if own is not None and own.is_file() else None) or Session().found_config()
    if found is None:
        raise NodeError("no configuration of the cluster was found; name its cluster.toml with --config")
    config = load(found)
    if not config.masters:
        raise ConfigError([f"{found}: names no master; add a [masters.ID] table"])
    return config, found


@dataclass(frozen=True, slots=True)
class Place:
    """The directory of one worker on this machine."""

    worker_id: str
    directory: Path

    @property
    def config(self) -> Path:
        """The worker's configuration."""
        return self.directory / "cluster.toml"

    @property
    def certificates(self) -> Path:
        """The worker's certificate and key, and the authority's certificate."""
        return self.directory / "certificates"

    @property
    def operator_file(self) -> Path:
        """Where the operator's certificate was when the worker was joined; no secret."""
        return self.directory / "operator.json"

    @property
    def log(self) -> Path:
        """What the agent prints."""
        return self.directory / "worker.log"

    @property
    def process_file(self) -> Path:
        """Process id and start time of the agent; the time tells it from another process with the same number."""
        return self.directory / "worker.pid"

    def start(self) -> None:
        """Starts the agent so that it lives on when this tool and its terminal are gone. Raises DaemonError."""
        command = [str(program("worker-agent")), "--config", str(self.config), "--id", self.worker_id]
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "DETACHED_PROCESS", 0),
            )
        # The agent goes on without its parent, which therefore does not wait for it.
        process.returncode = 0
        with contextlib.suppress(psutil.Error):
            started_s = psutil.Process(process.pid).create_time()
            self.process_file.write_text(json.dumps({"pid": process.pid, "started_s": started_s}) + "\n")

    def process(self, cluster_config: Path | None = None) -> psutil.Process | None:
        """The running agent: the one that was started here, or one that runs with the cluster's own configuration."""
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            noted = json.loads(self.process_file.read_text())
            process = psutil.Process(noted["pid"])
            if abs(process.create_time() - noted["started_s"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        for config in (self.config, cluster_config):
            for process_id, daemon_id in running_with(config) if config is not None else ():
                if daemon_id == self.worker_id:
                    with contextlib.suppress(psutil.Error):
                        return psutil.Process(process_id)
        return None

    def stop(self, process: psutil.Process) -> bool:
        """Stops the agent cleanly, or kills it when it takes too long; True when it stopped by itself."""
        clean = True
        with contextlib.suppress(psutil.Error):
            process.terminate()
            give_up_at_s = time.monotonic() + STOP_TIMEOUT_S
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() > give_up_at_s:
                    process.kill()
                    clean = False
                time.sleep(0.05)
        self.process_file.unlink(missing_ok=True)
        return clean

    def last_words(self) -> str:
        """The last line of the agent's log; empty when it said nothing."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""


def ask_consul(settings: ConsulSettings, path: str) -> object:
    """What Consul answers to a GET. Raises NodeError when it does not answer."""
    url = f"{settings.scheme}://{settings.address}{path}"
    request = urllib.request.Request(url, headers={"X-Consul-Token": settings.token} if settings.token else {})
    # Consul is named by its address: a proxy of the environment has no business in between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=CONSUL_TIMEOUT_S) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NodeError(
            f"Consul at {settings.address} does not answer ({reason}); start it, or correct its address"
        ) from None


def consul_has(config: ClusterConfig, worker_id: str) -> bool:
    """True while Consul lists the worker. Raises NodeError."""
    consul = config.discovery.consul
    listed = ask_consul(consul, f"/v1/catalog/service/{consul.worker_service}")
    wanted = f"{config.name}-{worker_id}"
    return isinstance(listed, list) and any(
        isinstance(entry, dict) and entry.get("ServiceID") in (wanted, worker_id) for entry in listed
    )
