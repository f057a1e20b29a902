"""clusterctl shards: the ranges of the key space, who holds them, and which holds a user."""

from __future__ import annotations

from collections.abc import Iterable

import click

from coordinator.api.v1 import cluster_pb2, session_pb2, types_pb2
from coordinator.cli.completion import NODE, IntegerType
from coordinator.cli.session import Group, Session, now_unix_ms, pass_session
from coordinator.cli.structure import to_plain
from coordinator.cli.table import Column, facts, table
from coordinator.cli.words import NOTHING, age, hash_text, local_time, names, percent, range_text, share, size
from coordinator.model.errors import RefusalReason, Refused

COLUMNS = (
    Column("SHARD", right=True),
    Column("FROM"),
    Column("KEYS", right=True),
    Column("USERS", right=True),
    Column("SIZE", right=True),
    Column("EPOCH", right=True),
    Column("PRIMARY"),
    Column("IN SYNC", wrap=True),
    Column("JOINING", wrap=True),
    Column("ABSENT", wrap=True),
)
LOCATION_COLUMNS = (
    Column("USER"),
    Column("HASH"),
    Column("SHARD", right=True),
    Column("PRIMARY"),
    Column("ADDRESS"),
    Column("IN SYNC", wrap=True),
)


class HashValue(IntegerType):
    """A key hash: a whole number, or hexadecimal with 0x before it."""

    name = "hash"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> int:
        try:
            number = int(str(value), 0)
        except ValueError:
            number = -1
        if not 0 < number < 1 << 64:
            self.fail(f"{value!r} is no key hash: a number above 0 and below 2^64, or hexadecimal like 0x80000000")
        return number


def shards_table(
    shards: Iterable[types_pb2.Shard], figures: Iterable[session_pb2.ShardFigure] = ()
) -> str:
    """Shards for people."""
    of_shard = {figure.shard_id: figure for figure in figures}
    rows = [
        [
            str(shard.id),
            hash_text(shard.lo),
            percent(share(shard.lo, shard.hi)),
            str(of_shard[shard.id].users) if shard.id in of_shard else NOTHING,
            size(of_shard[shard.id].bytes) if shard.id in of_shard else NOTHING,
            str(shard.epoch),
            shard.primary or NOTHING,
            names(shard.in_sync),
            names(shard.joining),
            names(shard.absent),
        ]
        for shard in shards
    ]
    return table(COLUMNS, rows) if rows else "no shard"


def shard_text(shard: types_pb2.Shard, figure: session_pb2.ShardFigure | None = None) -> str:
    """One shard for people."""
    lost = [f"{lost.node_id} {age(lost.at_unix_ms, now_unix_ms())} ago" for lost in shard.lost_primaries]
    moved = f"{local_time(shard.moved_unix_ms)} ({age(shard.moved_unix_ms, now_unix_ms())} ago)"
    return facts(
        [
            ("shard", str(shard.id)),
            ("range", f"{range_text(shard.lo, shard.hi)} ({percent(share(shard.lo, shard.hi))} of the key space)"),
            ("users", str(figure.users) if figure is not None else "not known"),
            ("size", size(figure.bytes) if figure is not None else "not known"),
            ("epoch", str(shard.epoch)),
            ("generation", str(shard.generation)),
            ("primary", shard.primary or NOTHING),
            ("in sync", names(shard.in_sync)),
            ("joining", names(shard.joining)),
            ("absent", names(shard.absent)),
            ("last moved", moved if shard.moved_unix_ms else "never"),
            ("served", "yes" if shard.formed else "not before every replica has made its store"),
            ("lost primaries", names(lost)),
            ("quarantine", shard.quarantine or "no"),
            ("damage", (figure.damage if figure is not None else "") or "none is known"),
        ]
    )


def locations_table(locations: Iterable[cluster_pb2.LocateKeysResponse.Location]) -> str:
    """Where users live, for people."""
    rows = [
        [
            location.key,
            hash_text(location.key_hash),
            str(location.shard_id),
            location.primary or NOTHING,
            location.primary_address or NOTHING,
            names(location.in_sync),
        ]
        for location in locations
    ]
    return table(LOCATION_COLUMNS, rows)


@click.group(cls=Group)
def shards() -> None:
    """See the shards, find the shard of a user, split, merge and release them."""


@shards.command("list")
@click.option("--node", type=NODE, default="", help="Only shards that this worker holds or receives.")
@pass_session
def list_shards(session: Session, node: str) -> None:
    """List the shards by range: how much is in them, who is primary, in sync, joining, and whose place is kept.

    \b
    Examples:
      clusterctl shards list
      clusterctl shards list --node w1
      clusterctl shards list -o json | jq '[.shards[] | select((.in_sync | length) < 2)] | length'
    """
    answer = session.client().list_shards(node_id=node, with_figures=True)
    session.show(answer, lambda: shards_table(answer.shards, answer.figures))


@shards.command("show")
@click.argument("shard", type=click.IntRange(min=0))
@pass_session
def show_shard(session: Session, shard: int) -> None:
    """Show one shard: where it is, how much is in it, whether it is in quarantine, or its last copy damaged.

    \b
    Example:
      clusterctl shards show 17
    """
    answer = session.client().list_shards(shard_ids=[shard], with_figures=True)
    found = next((item for item in answer.shards if item.id == shard), None)
    if found is None:
        raise Refused(RefusalReason.NOT_FOUND, f"no shard has the id {shard}; a split or a merge gives new ids")
    figure = next(iter(answer.figures), None)
    plain = {**to_plain(found), "figure": to_plain(figure) if figure is not None else None}
    session.show(plain, lambda: shard_text(found, figure))


@shards.command("locate")
@click.argument("users", nargs=-1, required=True, metavar="USER...")
@pass_session
def locate(session: Session, users: tuple[str, ...]) -> None:
    """Find where users live: the shard, and the worker that answers for it.

    \b
    Examples:
      clusterctl shards locate alice
      clusterctl shards locate alice bob -o json | jq -r '.locations[].primary_address'
    """
    answer = session.client().locate_keys(list(users))
    session.show(answer, lambda: locations_table(answer.locations))


@shards.command("split")
@click.argument("shard", type=click.IntRange(min=0))
@click.option("--at", type=HashValue(), default=None, help="First key hash of the upper half, else the median.")
@pass_session
def split(session: Session, shard: int, at: int | None) -> None:
    """Cut a shard in two, and wait until it is. Both halves stay where they are and have new ids.

    Without --at each half gets as many users as the other, or half of the range of an empty shard.

    \b
    Examples:
      clusterctl shards split 17
      clusterctl shards split 17 --at 0x10c0000000000000
    """
    answer = session.client().split_shard(shard, at=at or 0)
    session.show(
        answer, lambda: f"shard {shard} is now shard {answer.lower_shard_id} and shard {answer.upper_shard_id}"
    )


@shards.command("merge")
@click.argument("lower", type=click.IntRange(min=0))
@click.argument("upper", type=click.IntRange(min=0))
@pass_session
def merge(session: Session, lower: int, upper: int) -> None:
    """Join two neighbours that the same workers hold into one shard with a new id, and wait until they are.

    LOWER is the one whose range ends where the range of UPPER begins.

    \b
    Example:
      clusterctl shards merge 17 18
    """
    answer = session.client().merge_shards(lower, upper)
    session.show(answer, lambda: f"shards {lower} and {upper} are now shard {answer.shard_id}")


@shards.command("release")
@click.argument("shard", type=click.IntRange(min=0))
@pass_session
def release(session: Session, shard: int) -> None:
    """End the quarantine of a shard: it may move again, and goes to a worker that can serve it.

    A shard is put there when several workers were lost one after the other while they were its primary. Find out why
    first: `clusterctl shards show` and `clusterctl events` say which, and when.

    \b
    Example:
      clusterctl shards release 17
    """
    answer = session.client().release_shard(shard)
    session.show(answer, lambda: f"shard {shard} is released from quarantine")
