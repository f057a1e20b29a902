"""`tools/node-join`: starts a worker on this machine and waits until it carries its share of a running cluster.

Safe to repeat: what is done already is left as it is, what an earlier try left half done is finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.cli.progress import Progress, wait_until
from coordinator.cli.words import duration, percent
from coordinator.client import ClusterClient
from coordinator.config import ClusterConfig, WorkerSettings
from coordinator.config_file import is_loopback, render, validate, worker_settings
from coordinator.model.errors import ConfigError, CoordinatorError, IndefiniteError
from coordinator.security.certificates import Identity, Role, authority_files, issue, leaf_files
from coordinator.security.credentials import PLAINTEXT
from coordinator.security.provision import is_good
from tools.lib.daemons import DaemonError
from tools.lib.node_place import (
    NodeError,
    Place,
    add_client_options,
    ask_consul,
    client_of,
    cluster_config,
    default_directory,
    named_certificates,
)
from tools.lib.quickstart_directory import write_whole

PROGRAM = "tools/node-join"
IN_SERVICE = (types_pb2.NODE_STATE_ACTIVE, types_pb2.NODE_STATE_DRAINING)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Writes a worker's configuration, checks that the cluster answers, starts the worker in the "
        "background, and waits until it carries its share. Safe to repeat.",
        epilog="example: tools/node-join --config cluster.toml --id w4 --grpc-address 10.0.0.14:7301",
    )
    made.add_argument("--id", required=True, help="name of the worker, unique in the cluster")
    made.add_argument("--config", type=Path, help="the cluster's cluster.toml (else $CLUSTER_CONFIG, ./cluster.toml)")
    made.add_argument("--dir", type=Path, help="the worker's files (default ~/.local/state/coordinator/workers/ID)")
    made.add_argument("--zone", help="failure domain; copies of a shard prefer different ones")
    made.add_argument("--weight", type=float, help="share of the load relative to the others; 1 is usual")
    made.add_argument("--grpc-address", metavar="HOST:PORT", help="where others reach it (default: here, any port)")
    made.add_argument("--http-address", metavar="HOST:PORT", help="where health and metrics are")
    add_client_options(made)
    made.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for its share (default 600)")
    made.add_argument("--dry-run", action="store_true", help="change nothing; say what would be done")
    return made


def main(arguments: list[str]) -> int:
    """Entry of `tools/node-join`: 0 when the worker carries its share."""
    options = parser().parse_args(arguments)
    try:
        return join(options)
    except ConfigError as error:
        for problem in error.problems:
            print(f"{PROGRAM}: {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; run it again to go on", file=sys.stderr)
        return 130
    except (NodeError, DaemonError, CoordinatorError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{PROGRAM}: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def join(options: argparse.Namespace) -> int:
    """Does it. Raises NodeError and CoordinatorError."""
    place = Place(options.id, (options.dir or default_directory(options.id)).expanduser().absolute())
    cluster, source = cluster_config(options.config, place.config)
    config = worker_config(cluster, options)
    worker = worker_settings(config, options.id)
    with client_of(cluster, options, place) as client:
        leader = reachable(cluster, client)
        view = view_of(client, options.id)
        process = place.process(source)
        if view is not None and view.connected and process is None:
            raise NodeError(
                f"worker {options.id} runs already, at {view.node.grpc_address}, and was not started here; "
                "use another --id"
            )
        if options.dry_run:
            return explain(client, place, worker, leader, process is not None)
        print(f"{cluster.name}: {leader} leads; worker {options.id} in {place.directory}")
        if process is None:
            certify(place, cluster, options)
            prepare(place, config)
            place.start()
            print(f"started worker-agent; it logs to {place.log}")
        else:
            print(f"its agent runs already (process {process.pid})")
        return wait_for_share(client, place, options.timeout, source)


def worker_config(cluster: ClusterConfig, options: argparse.Namespace) -> ClusterConfig:
    """The cluster's configuration with this worker as the options describe it. Raises ConfigError, NodeError."""
    wanted = {
        "zone": options.zone,
        "weight": options.weight,
        "grpc_address": options.grpc_address,
        "http_address": options.http_address,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    worker = dataclasses.replace(worker_settings(cluster, options.id), **given)
    others = tuple(other for other in cluster.workers if other.id != options.id)
    config = dataclasses.replace(
        cluster,
        data_directory="data",
        security=dataclasses.replace(cluster.security, directory="certificates"),
        workers=tuple(sorted((*others, worker), key=lambda one: one.id)),
    )
    validate(config)
    if is_loopback(worker.grpc_address) and not all(is_loopback(master.grpc_address) for master in cluster.masters):
        raise NodeError(
            f"the masters are on other machines, which cannot reach this worker at {worker.grpc_address}; "
            "say where they can with --grpc-address HOST:PORT"
        )
    return config


def reachable(cluster: ClusterConfig, client: ClusterClient) -> str:
    """The leader's id, once it is sure that the right cluster answers. Raises NodeError, CoordinatorError."""
    if cluster.discovery.backend == "consul":
        ask_consul(cluster.discovery.consul, "/v1/status/leader")
    status = client.get_status()
    if status.cluster_name != cluster.name:
        raise NodeError(
            f"the masters belong to cluster {status.cluster_name!r}, the configuration is of {cluster.name!r}; "
            "use the configuration of the cluster that is meant"
        )
    return status.leader_id


def view_of(client: ClusterClient, worker_id: str) -> cluster_pb2.NodeView | None:
    """What the masters know of the worker; None for nothing."""
    return next((view for view in client.list_nodes().nodes if view.node.id == worker_id), None)


def explain(client: ClusterClient, place: Place, worker: WorkerSettings, leader: str, runs: bool) -> int:
    """Says what would be done."""
    others = [
        view.node for view in client.list_nodes().nodes if view.node.state in IN_SERVICE and view.node.id != worker.id
    ]
    total = worker.weight + sum(node.weight for node in others if not node.drain_requested)
    print(f"the cluster answers; {leader} leads {len(others)} other workers")
    if runs:
        print(f"the agent of {worker.id} runs already; it would be left as it is")
    else:
        what = f"zone {worker.zone or '-'}, weight {worker.weight:g}, gRPC {worker.grpc_address}"
        print(f"would write {place.config} ({what})")
        share = percent(worker.weight / total)
        print(f"would start worker-agent --id {worker.id}; it would get about {share} of the load")
    print("dry run: nothing was changed")
    return 0


def certify(place: Place, cluster: ClusterConfig, options: argparse.Namespace) -> None:
    """Sees to the worker's certificate: keeps a good one, else issues one where the authority's key is at hand.

    Raises NodeError, with the file that is needed, where it is not.
    """
    if cluster.security.mode == PLAINTEXT:
        return
    source = (named_certificates(options) or Path(cluster.security.directory)).expanduser().absolute()
    identity, now = Identity(cluster.name, Role.WORKER, place.worker_id), datetime.datetime.now(datetime.UTC)
    if not is_good(place.certificates, identity, now):
        certificate = leaf_files(place.certificates, Role.WORKER, place.worker_id).certificate
        key = authority_files(source)[1]
        if not key.is_file():
            raise NodeError(
                f"{certificate} is needed, with its key and authority.crt, and cannot be made without {key}; bring "
                f"what `clusterctl certs issue --role worker --id {place.worker_id} --to DIR` writes where that key is"
            )
        issue(source, identity, now, to=place.certificates)
        print(f"issued {certificate}")
    if source.resolve() != place.certificates.resolve():
        write_whole(place.operator_file, json.dumps({"certificate_directory": str(source)}) + "\n")


def prepare(place: Place, config: ClusterConfig) -> None:
    """Writes the worker's configuration, unless it is there and the same."""
    place.directory.mkdir(parents=True, exist_ok=True)
    text = f"# Written by tools/node-join for worker {place.worker_id}.\n\n{render(config)}"
    if not place.config.is_file() or place.config.read_text(encoding="utf-8") != text:
        write_whole(place.config, text)


def wait_for_share(client: ClusterClient, place: Place, timeout_s: float, source: Path) -> int:
    """Waits until the worker is in and nothing is on its way to it, nor planned."""
    paused = False

    def left() -> str | None:
        nonlocal paused
        if place.process(source) is None:
            raise NodeError(f"the agent ended: {place.last_words() or 'it said nothing'} ({place.log})")
        try:
            view = view_of(client, place.worker_id)
            if view is None or view.node.state not in IN_SERVICE or not view.connected:
                return f"{place.worker_id} is not in yet"
            if view.node.drain_requested:
                # Whoever joins a worker wants it to carry something: an earlier, unfinished leave is over.
                client.undrain_node(place.worker_id)
                return f"{place.worker_id} was being drained; that is taken back"
            plan = client.plan_rebalance()
            coming = sum(move.target == place.worker_id for move in client.list_moves().moves)
            planned = sum(move.target == place.worker_id for move in plan.moves)
        except IndefiniteError as error:
            return f"no answer yet: {error}"
        paused = plan.paused
        if coming or (planned and not paused):
            return f"{place.worker_id} holds {view.replicas} shards, {coming} are coming, {planned} more are planned"
        return None

    with Progress() as progress:
        if not wait_until(left, timeout_s, progress):
            raise NodeError(f"{left()}, after {duration(timeout_s)}; it goes on, run this again to see")
        took_s = progress.elapsed_s
    view = view_of(client, place.worker_id)
    assert view is not None, "a worker that carries its share is listed"
    print(
        f"{place.worker_id} carries its share after {duration(took_s)}: {view.replicas} shards, "
        f"{view.primaries} as primary ({percent(view.key_share)} of the keys), {view.jobs} jobs"
    )
    if paused:
        print("rebalancing is paused; shards move to it after `clusterctl rebalance --resume`")
    return 0
