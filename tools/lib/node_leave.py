"""`tools/node-leave`: empties a worker, stops it, and waits until the masters and Consul agree that it is gone.

Safe to repeat: each step looks first whether it is done. A worker that would leave a shard below its replica count is
refused before anything is changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import psutil

from coordinator.api.v1 import types_pb2
from coordinator.cli.nodes import left_on
from coordinator.cli.progress import Progress, wait_until
from coordinator.cli.words import duration
from coordinator.client import ClusterClient
from coordinator.config import ClusterConfig
from coordinator.model.errors import ConfigError, CoordinatorError, IndefiniteError
from tools.lib.node_join import view_of
from tools.lib.node_place import (
    NodeError,
    Place,
    add_client_options,
    ask_consul,
    client_of,
    cluster_config,
    consul_has,
    default_directory,
)

PROGRAM = "tools/node-leave"
GONE_TIMEOUT_S = 60.0
"""How long masters and Consul may take to agree that a stopped worker is gone: some leases."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Moves everything away from a worker, stops it, and waits until the cluster agrees that it is "
        "gone. Refuses when a shard would fall below its replica count. Safe to repeat.",
        epilog="example: tools/node-leave --id w4",
    )
    made.add_argument("--id", required=True, help="name of the worker")
    made.add_argument("--config", type=Path, help="the cluster's cluster.toml (default: the one that node-join wrote)")
    made.add_argument("--dir", type=Path, help="the worker's files (default ~/.local/state/coordinator/workers/ID)")
    add_client_options(made)
    made.add_argument("--timeout", type=float, default=3600.0, help="seconds to wait until it is empty (default 3600)")
    made.add_argument(
        "--dry-run", action="store_true", help="change nothing; say whether it is safe and what would move"
    )
    return made


def main(arguments: list[str]) -> int:
    """Entry of `tools/node-leave`: 0 when the worker is gone."""
    options = parser().parse_args(arguments)
    try:
        return leave(options)
    except ConfigError as error:
        for problem in error.problems:
            print(f"{PROGRAM}: {problem}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the drain goes on, run it again to go on", file=sys.stderr)
        return 130
    except (NodeError, CoordinatorError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    return 1


def leave(options: argparse.Namespace) -> int:
    """Does it. Raises NodeError and CoordinatorError."""
    place = Place(options.id, (options.dir or default_directory(options.id)).expanduser().absolute())
    config, source = cluster_config(options.config, place.config)
    with client_of(config, options, place) as client:
        if config.discovery.backend == "consul":
            ask_consul(config.discovery.consul, "/v1/status/leader")
        view = view_of(client, options.id)
        process = place.process(source)
        if view is None or view.node.state == types_pb2.NODE_STATE_LEFT:
            return finish(client, config, place, process, options.dry_run, already=True)
        answer = client.drain_node(options.id, dry_run=True)
        if not answer.safe and not view.node.drain_requested:
            raise NodeError(f"{options.id} cannot leave now: {'; '.join(answer.problems)}")
        print(f"{options.id} holds {view.replicas} shards, {view.primaries} as primary, and {view.jobs} jobs")
        if view.connected and process is None:
            raise NodeError(
                f"the agent of {options.id} runs at {view.node.grpc_address}, not here; run this on that machine, or "
                f"name its files with --dir (`clusterctl nodes drain {options.id}` only empties it)"
            )
        if options.dry_run:
            print(f"it is safe: {len(answer.moves)} moves would empty it, then its agent would be stopped")
            print("dry run: nothing was changed")
            return 0
        client.drain_node(options.id)
        empty(client, options.id, options.timeout)
        return finish(client, config, place, process, dry_run=False, already=False)


def empty(client: ClusterClient, worker_id: str, timeout_s: float) -> None:
    """Waits until the worker holds nothing. Raises NodeError when that takes too long."""

    def left() -> str | None:
        try:
            return left_on(client, worker_id)
        except IndefiniteError as error:
            return f"no answer yet: {error}"

    with Progress() as progress:
        if not wait_until(left, timeout_s, progress):
            raise NodeError(f"{left()}, after {duration(timeout_s)}; the drain goes on, run this again")
        print(f"{worker_id} is empty, after {duration(progress.elapsed_s)}")


def finish(
    client: ClusterClient,
    config: ClusterConfig,
    place: Place,
    process: psutil.Process | None,
    dry_run: bool,
    already: bool,
) -> int:
    """Stops the agent of an empty worker and waits until everybody agrees that it is gone."""
    if dry_run:
        print(f"{place.worker_id} has left already" + ("; its agent would be stopped" if process is not None else ""))
        return 0
    if process is not None:
        clean = place.stop(process)
        print(f"stopped its agent (process {process.pid})" + ("" if clean else "; it had to be killed"))
    uses_consul = config.discovery.backend == "consul"

    def left() -> str | None:
        try:
            view = view_of(client, place.worker_id)
            state = types_pb2.NODE_STATE_LEFT if view is None else view.node.state
            if state == types_pb2.NODE_STATE_DOWN:
                # It could not say goodbye; it holds nothing, so it can be forgotten.
                client.remove_node(place.worker_id)
            if state != types_pb2.NODE_STATE_LEFT:
                return f"the masters still list {place.worker_id}"
        except IndefiniteError as error:
            return f"no answer yet: {error}"
        return f"Consul still lists {place.worker_id}" if uses_consul and consul_has(config, place.worker_id) else None

    with Progress() as progress:
        if not wait_until(left, GONE_TIMEOUT_S, progress):
            raise NodeError(f"{left()}, after {duration(GONE_TIMEOUT_S)}; run this again")
    who = "the masters and Consul agree" if uses_consul else "the masters agree"
    print(f"{place.worker_id} {'has left already' if already else 'has left'}; {who} that it is gone")
    return 0
