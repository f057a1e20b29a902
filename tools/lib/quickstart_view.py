"""What a quickstart shows while it runs: a view that refreshes on a terminal, lines of events elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from coordinator.api.v1 import types_pb2
from coordinator.cli.events import event_text
from coordinator.cli.nodes import nodes_table
from coordinator.cli.status import status_text
from coordinator.client import LINEARIZABLE, STALE, ClusterClient, Consistency
from coordinator.model.errors import CoordinatorError
from tools.lib.quickstart_cluster import QuickstartCluster

REFRESH_S = 1.0
EVENTS_SHOWN = 8


def watch(cluster: QuickstartCluster) -> None:
    """Shows the cluster until an exception ends it; never returns by itself."""
    # A short time limit: the view says that nobody answers rather than standing still.
    with cluster.new_client(timeout_s=2.0) as client:
        if sys.stdout.isatty():
            _watch_on_terminal(cluster, client)
        else:
            _watch_in_lines(cluster, client)


def _watch_on_terminal(cluster: QuickstartCluster, client: ClusterClient) -> None:
    with Live(Text("..."), console=Console(width=100), auto_refresh=False) as live:
        while True:
            live.update(Text(screen(cluster, client)), refresh=True)
            time.sleep(REFRESH_S)


def screen(cluster: QuickstartCluster, client: ClusterClient) -> str:
    """The whole view at this moment."""
    parts = [f"warning: {line}" for line in cluster.died()]
    try:
        parts += answers(client, LINEARIZABLE)
    except CoordinatorError as error:
        # Without a leader one master's word has to do, and is called that.
        parts.append(f"warning: {error}; what follows is what one master knows")
        try:
            parts += answers(client, STALE)
        except CoordinatorError as nobody:
            parts.append(f"no answer: {nobody}")
    return "\n".join(parts)


def answers(client: ClusterClient, consistency: Consistency) -> list[str]:
    """Status, workers and latest events."""
    return [
        status_text(client.get_status(consistency=consistency)),
        "",
        nodes_table(client.list_nodes(consistency=consistency).nodes),
        "",
        *(event_text(event) for event in client.stream_events(latest=EVENTS_SHOWN)),
    ]


def _watch_in_lines(cluster: QuickstartCluster, client: ClusterClient) -> None:
    said: set[str] = set()
    sequence = 0
    while True:
        for line in cluster.died():
            if line not in said:
                said.add(line)
                print(f"warning: {line}", flush=True)
        try:
            for event in news(client, sequence):
                sequence = event.sequence
                print(event_text(event), flush=True)
        except CoordinatorError as error:
            print(f"no answer: {error}", flush=True)
        time.sleep(REFRESH_S)


def news(client: ClusterClient, after_sequence: int) -> list[types_pb2.Event]:
    """The events after a sequence; the latest few when it is 0."""
    if after_sequence == 0:
        return list(client.stream_events(latest=EVENTS_SHOWN))
    return [
        event for event in client.stream_events(from_sequence=after_sequence + 1) if event.sequence > after_sequence
    ]
