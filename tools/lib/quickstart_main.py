"""`tools/quickstart`: a whole cluster on this machine, until Ctrl-C; with `--check` the proof that it does its job."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType

from coordinator.model.errors import ConfigError, CoordinatorError
from tools.lib.consul_agent import ConsulAgent, ConsulAgentError
from tools.lib.consul_binary import ConsulInstallError
from tools.lib.daemons import DaemonError, program
from tools.lib.quickstart_check import run_check
from tools.lib.quickstart_cluster import QuickstartCluster
from tools.lib.quickstart_directory import (
    WORKERS_MAX,
    Ports,
    QuickstartError,
    cluster_config,
    default_directory,
    found,
    prepare,
    with_discovery,
    with_workers,
    write_config,
)
from tools.lib.quickstart_view import watch

CONSUL_PORTS = (8500, 8300, 8301)
"""HTTP, server and gossip port of Consul: its own defaults, so that its own tools find it."""
WORKERS_DEFAULT = 3


class StopRequested(BaseException):
    """Somebody wants the quickstart to end: Ctrl-C, or SIGTERM."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="tools/quickstart",
        description="Starts three masters and some workers on this machine, shows them, and stops them at Ctrl-C. "
        "The next start on the same directory finds its state again.",
        epilog="ports: masters gRPC 7101-7103, peers 7151-7153, HTTP 7201-7203; workers gRPC 7301.., HTTP 7401..; "
        "--check uses free ones",
    )
    made.add_argument("--workers", type=int, metavar="N", help=f"how many workers (default {WORKERS_DEFAULT})")
    made.add_argument("--consul", action="store_true", help="start a real Consul beside it and register there")
    made.add_argument("--dir", type=Path, metavar="DIR", help=f"working directory (default {default_directory()})")
    made.add_argument(
        "--check",
        action="store_true",
        help="on free ports and in a temporary directory (unless --dir): prove that the cluster does its job, "
        "point by point, stop it, and exit 0 or 1",
    )
    return made


def main(arguments: list[str]) -> int:
    """Entry of `tools/quickstart`."""
    made = parser()
    options = made.parse_args(arguments)
    if options.workers is not None and not 1 <= options.workers <= WORKERS_MAX:
        made.error(f"--workers {options.workers}: use 1 to {WORKERS_MAX}")
    if options.check and (options.consul or options.workers is not None):
        made.error("--check starts what it needs; it takes neither --consul nor --workers")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        if options.check:
            return 0 if run_check(_empty(options.dir), lambda line: print(line, flush=True)) else 1
        return run(options.dir or default_directory(), options.workers, options.consul)
    except StopRequested:
        return 130
    except ConfigError as error:
        for problem in error.problems:
            print(f"tools/quickstart: {problem}", file=sys.stderr)
    except (QuickstartError, DaemonError, ConsulAgentError, ConsulInstallError, CoordinatorError) as error:
        print(f"tools/quickstart: {error}", file=sys.stderr)
    return 1


def run(directory: Path, workers: int | None, use_consul: bool) -> int:
    """Starts the cluster, shows it, and stops it when it is asked to. Raises QuickstartError and its like."""
    directory = directory.expanduser().absolute()
    earlier = found(directory)
    count = workers if workers is not None else len(earlier.workers) if earlier is not None else WORKERS_DEFAULT
    consul = _consul(directory) if use_consul else None
    base = earlier if earlier is not None else cluster_config(Ports.fixed(count))
    config = with_workers(with_discovery(base, consul.address if consul else None), count)
    worker_ids = [f"w{number}" for number in range(1, count + 1)]
    with QuickstartCluster(directory, config, consul) as cluster:
        cluster.refuse_if_occupied(worker_ids)
        if earlier is None:
            prepare(directory, config)
        elif config != earlier:
            write_config(directory, config)
        try:
            again = "" if earlier is None else ", with the state of an earlier start"
            print(f"starting 3 masters and {count} workers in {directory}{again}", flush=True)
            cluster.start(worker_ids)
            cluster.wait_ready(worker_ids)
            print(summary(cluster, worker_ids), flush=True)
            watch(cluster)
        except StopRequested:
            # From here on nothing may interrupt: what is left behind would hold the ports.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            print("\nstopping", flush=True)
            killed = cluster.stop()
            if killed:
                print(f"tools/quickstart: had to kill {', '.join(killed)}; see {directory / 'logs'}", file=sys.stderr)
                return 1
            print(f"stopped; the next start on {directory} finds its state again", flush=True)
    return 0


def summary(cluster: QuickstartCluster, worker_ids: list[str]) -> str:
    """What runs, where, and what to try next."""
    config, leader = cluster.config, cluster.leader()
    lines = ["", f"The cluster runs; {leader} leads."]
    daemons = [("master", master.id, master.grpc_address, master.http_address) for master in config.masters]
    daemons += [
        ("worker", worker.id, worker.grpc_address, worker.http_address)
        for worker in config.workers
        if worker.id in worker_ids
    ]
    lines += [
        f"  {kind} {name:<4} gRPC {grpc_address}   health and metrics http://{http_address}/health, /metrics"
        for kind, name, grpc_address, http_address in daemons
    ]
    if cluster.consul is not None:
        lines.append(f"  Consul      {cluster.consul.ui_url}")
    # The configuration leads to the operator's certificate, so these work from anywhere.
    command = f"{shlex.quote(str(program('clusterctl')))} --config {shlex.quote(str(cluster.config_path))}"
    lines += [
        f"  files       {cluster.directory} (cluster.toml, certificates, data, logs)",
        "",
        "Try next, in another terminal:",
        f"  {command} status",
        f"  {command} shards locate alice bob",
        f"  {command} cron list",
        f"  {command} nodes drain w1 --dry-run",
        f"  {command} events --follow",
        "",
        "Ctrl-C stops everything.",
        "",
    ]
    return "\n".join(lines)


def _consul(directory: Path) -> ConsulAgent:
    http, server, serf = CONSUL_PORTS
    return ConsulAgent(directory / "consul", http_port=http, server_port=server, serf_port=serf)


def _empty(directory: Path | None) -> Path | None:
    """The directory for a check, which has to be new: it is about a cluster's first minutes."""
    if directory is None:
        return None
    directory = directory.expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise QuickstartError(f"{directory} is not empty; --check needs a new directory")
    return directory


def _stop(number: int, frame: FrameType | None) -> None:
    raise StopRequested
