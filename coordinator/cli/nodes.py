"""clusterctl nodes: the workers, and taking them out of service and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import click

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.cli.completion import NODE
from coordinator.cli.moves import planned_moves_table
from coordinator.cli.progress import Progress, wait_until
from coordinator.cli.session import Group, Session, now_unix_ms, pass_session
from coordinator.cli.table import Column, facts, paragraph, table
from coordinator.cli.words import NOTHING, age, duration, local_time, percent, size, word
from coordinator.client import ClusterClient
from coordinator.model.errors import RefusalReason, Refused

COLUMNS = (
    Column("NODE"),
    Column("STATE"),
    Column("ZONE"),
    Column("WEIGHT", right=True),
    Column("PRIMARY", right=True),
    Column("REPLICAS", right=True),
    Column("JOINING", right=True),
    Column("JOBS", right=True),
    Column("KEYS", right=True),
    Column("CPU", right=True),
    Column("MEMORY", right=True),
    Column("HEARD", right=True),
)


def state_text(node: types_pb2.Node) -> str:
    """The worker's state, with what else decides about it."""
    state = word(types_pb2.NodeState.DESCRIPTOR, node.state)
    if node.suspect_since_unix_ms and node.state in (types_pb2.NODE_STATE_ACTIVE, types_pb2.NODE_STATE_DRAINING):
        return f"{state}, suspect"
    return f"{state}, draining" if node.drain_requested and state not in ("draining", "left") else state


def heard_text(view: cluster_pb2.NodeView) -> str:
    """How long ago the leader heard it."""
    return NOTHING if view.heartbeat_age_ms < 0 or not view.connected else duration(view.heartbeat_age_ms / 1_000)


def nodes_table(views: Iterable[cluster_pb2.NodeView]) -> str:
    """The workers for people."""
    rows = [
        [
            view.node.id,
            state_text(view.node),
            view.node.zone or NOTHING,
            f"{view.node.weight:g}",
            str(view.primaries),
            str(view.replicas),
            str(view.joining),
            str(view.jobs),
            percent(view.key_share),
            f"{view.metrics.cpu_percent:.0f}%" if view.connected else NOTHING,
            f"{view.metrics.memory_percent:.0f}%" if view.connected else NOTHING,
            heard_text(view),
        ]
        for view in views
    ]
    return table(COLUMNS, rows)


def node_text(view: cluster_pb2.NodeView) -> str:
    """One worker for people."""
    node, metrics, now_ms = view.node, view.metrics, now_unix_ms()
    pairs = [
        ("worker", node.id),
        ("state", f"{state_text(node)}, for {age(node.state_since_unix_ms, now_ms)}"),
        ("zone", node.zone or NOTHING),
        ("weight", f"{node.weight:g}"),
        ("gRPC", node.grpc_address or NOTHING),
        ("HTTP", node.http_address or NOTHING),
        ("version", node.version or NOTHING),
        ("labels", ", ".join(f"{name}={node.labels[name]}" for name in sorted(node.labels)) or NOTHING),
        ("registered", local_time(node.registered_unix_ms)),
        ("process", f"{node.incarnation or NOTHING}, {'connected' if view.connected else 'not connected'}"),
        ("last heard", f"{heard_text(view)} ago" if heard_text(view) != NOTHING else NOTHING),
        ("carries", f"{view.primaries} primaries, {view.replicas} replicas, {view.joining} joining, {view.jobs} jobs"),
        ("key space", f"{percent(view.key_share)} as primary"),
    ]
    if view.connected:
        received, sent = size(metrics.network_received_bytes_per_s), size(metrics.network_sent_bytes_per_s)
        pairs += [
            (
                "machine",
                f"processor {metrics.cpu_percent:.0f}%, memory {metrics.memory_percent:.0f}%, "
                f"disk {metrics.disk_percent:.0f}%, network {received}/s in, {sent}/s out",
            ),
            (
                "process load",
                f"{size(metrics.resident_memory_bytes)} resident, {metrics.open_streams} streams, "
                f"{metrics.running_launches} launches running",
            ),
        ]
    return facts(pairs)


def ask_node(client: ClusterClient, node_id: str) -> cluster_pb2.NodeView:
    """One worker. Raises Refused when there is none of this name."""
    for view in client.list_nodes(node_id=node_id).nodes:
        if view.node.id == node_id:
            return view
    raise Refused(RefusalReason.NOT_FOUND, f"no worker is called {node_id!r}; `clusterctl nodes list` names them")


def moves_in_short(moves: Sequence[cluster_pb2.PlannedMove]) -> str:
    """How many moves there are, and to whom: "5 moves (2 at once): 3 to w2, 2 to w3"."""
    targets = Counter(move.target or "nowhere" for move in moves)
    if not targets:
        return "nothing would move"
    now = sum(move.within_budget for move in moves)
    listed = ", ".join(f"{targets[target]} to {target}" for target in sorted(targets))
    return f"{targets.total()} moves ({now} at once): {listed}"


def left_on(client: ClusterClient, node_id: str) -> str | None:
    """What a worker that is being emptied still has, for people; None when it has nothing."""
    view = ask_node(client, node_id)
    if not (view.replicas or view.joining or view.jobs):
        return None
    return f"{node_id}: {view.replicas} shards and {view.jobs} jobs left, {view.primaries} as primary"


@click.group(cls=Group)
def nodes() -> None:
    """See the workers, empty them, take them back, change their weight, forget them."""


@nodes.command("list")
@pass_session
def list_nodes(session: Session) -> None:
    """List the workers: state, weight, what they carry, and how long ago the leader heard them.

    KEYS is the share of the key space that a worker answers for.

    \b
    Examples:
      clusterctl nodes list
      clusterctl nodes list -o json | jq -r '.nodes[] | select(.node.state == "active") | .node.id'
    """
    answer = session.client().list_nodes()
    session.show(answer, lambda: nodes_table(answer.nodes))


@nodes.command("show")
@click.argument("node", type=NODE)
@pass_session
def show_node(session: Session, node: str) -> None:
    """Show one worker with everything that is known of it.

    \b
    Example:
      clusterctl nodes show w1
    """
    view = ask_node(session.client(), node)
    session.show(view, lambda: node_text(view))


@nodes.command("drain")
@click.argument("node", type=NODE)
@click.option("--dry-run", is_flag=True, help="Change nothing; say whether it is safe, and which moves it would take.")
@click.option("--moves", "show_moves", is_flag=True, help="With --dry-run: list every move.")
@click.option("--wait", is_flag=True, help="Stay until the worker is empty, and show what is left.")
@click.option("--wait-timeout", type=float, default=3600.0, show_default=True, help="Seconds to wait with --wait.")
@pass_session
def drain(
    session: Session, node: str, dry_run: bool, show_moves: bool, wait: bool, wait_timeout: float
) -> int:
    """Empty a worker: its shards and jobs move to the others, then it can be stopped.

    Every shard keeps its replica count all the time. A drain lasts until `nodes undrain`, also across a
    restart of the worker. Exit status 1 when it is not safe.

    \b
    Examples:
      clusterctl nodes drain w1 --dry-run            is it safe to take w1 out of service?
      clusterctl nodes drain w1 --dry-run --moves    and what would go where?
      clusterctl nodes drain w1 --wait               empty it, and stay until it is
    """
    client = session.client()
    answer = client.drain_node(node, dry_run=dry_run)

    def text() -> str:
        lines = [paragraph(problem, "warning: ") for problem in answer.problems]
        if dry_run:
            what = f"{node} can be drained" if answer.safe else f"{node} cannot be drained now"
            lines.append(paragraph(f"{what}: {moves_in_short(answer.moves)}"))
            if show_moves and answer.moves:
                lines += ["", planned_moves_table(answer.moves)]
        elif not wait:
            lines.append(f"{node} is being drained; `clusterctl nodes show {node}` says what is left")
        return "\n".join(lines)

    session.show(answer, text)
    if wait and not dry_run:
        with Progress() as progress:
            if not wait_until(lambda: left_on(client, node), wait_timeout, progress):
                click.echo(f"error: {left_on(client, node)} after {duration(wait_timeout)}; it goes on", err=True)
                return 1
            session.say(f"{node} is empty, after {duration(progress.elapsed_s)}; it can be stopped")
    return 0 if answer.safe or not dry_run else 1


@nodes.command("undrain")
@click.argument("node", type=NODE)
@pass_session
def undrain(session: Session, node: str) -> None:
    """Take a drain back: the worker may receive shards and jobs again.

    \b
    Example:
      clusterctl nodes undrain w1
    """
    answer = session.client().undrain_node(node)
    session.show(answer, lambda: f"{node} may receive again")


@nodes.command("remove")
@click.argument("node", type=NODE)
@pass_session
def remove(session: Session, node: str) -> None:
    """Forget a worker that is down for good or has left.

    A worker that still lives is refused: drain it and stop it first (tools/node-leave does both).

    \b
    Example:
      clusterctl nodes remove w9
    """
    answer = session.client().remove_node(node)
    session.show(answer, lambda: f"{node} is forgotten")


@nodes.command("set-weight")
@click.argument("node", type=NODE)
@click.argument("weight", type=click.FloatRange(min=0, min_open=True))
@pass_session
def set_weight(session: Session, node: str, weight: float) -> None:
    """Change a worker's share of the load, relative to the others: 2 carries twice as much as 1.

    Shards move accordingly, within the budgets; `clusterctl rebalance --dry-run` shows which.

    \b
    Example:
      clusterctl nodes set-weight w1 2
    """
    answer = session.client().set_node_weight(node, weight)
    session.show(answer, lambda: f"{node} has weight {weight:g} now; `clusterctl rebalance` shows what follows")
