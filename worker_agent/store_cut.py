"""Cutting one store into two and joining two into one, here on this worker's disk.

The leader has the shards sealed first: nothing comes after what every replica has in its log, so each replica makes the
same children out of its own files, and no row crosses the network. A child begins with an empty log where its parent
ended, the later one of two, so that versions never go back; tombstones stay behind.

A child is built under a name that counts for nothing, synced, and renamed: it is there whole or not at all. A child
that is there already was made by an earlier call that a crash cut short, and stays as it is. The parents' files stay
too; whoever asked deletes them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from pathlib import Path

from worker_agent.store import DEFAULT_SETTINGS, ShardStore, StoreSettings, new_meta
from worker_agent.store_codec import add_digests, to_stored
from worker_agent.store_database import Meta, close_made, make_database, told, write_meta
from worker_agent.store_files import beside, damaged, publish
from worker_agent.store_interface import Digest
from worker_agent.store_scan import sum_users

Child = tuple[Path, int, int, int]
"""Path, shard id, lo, hi."""

_COPIES = (
    "INSERT INTO entries SELECT * FROM parent.entries WHERE hash BETWEEN ? AND ? AND value IS NOT NULL"
    " ORDER BY hash, user, key",
    "INSERT INTO users SELECT * FROM parent.users WHERE hash BETWEEN ? AND ? ORDER BY hash, user",
    "INSERT INTO requests SELECT * FROM parent.requests WHERE hash BETWEEN ? AND ? ORDER BY hash, user, request_id",
)


def split_store(parent_path: Path, children: Sequence[Child], settings: StoreSettings = DEFAULT_SETTINGS) -> None:
    """Makes children whose ranges, in order, are the parent's.

    Raises what opening the parent raises, ValueError for other ranges or an unfinished copy, StoreFull, OSError. The
    parent must not be open.
    """
    _make([parent_path], children, settings)


def merge_stores(parent_paths: Sequence[Path], child: Child, settings: StoreSettings = DEFAULT_SETTINGS) -> None:
    """Makes one child of parents whose ranges, in order, are the child's. Raises as `split_store` does."""
    _make(parent_paths, [child], settings)


def _make(parent_paths: Sequence[Path], children: Sequence[Child], settings: StoreSettings) -> None:
    missing = [child for child in children if not child[0].exists()]
    if not missing:
        return
    with ExitStack() as opened:
        parents: list[ShardStore] = []
        for path in parent_paths:
            parents.append(ShardStore(path, settings))
            opened.callback(parents[-1].close)
        _check_ranges([(parent.lo, parent.hi) for parent in parents], [child[2:] for child in children])
        for parent in parents:
            if not parent.position().is_complete:
                raise ValueError(f"{parent.path} is an unfinished copy; nothing can be made of it")
            # All that is in a sealed log was committed; a power cut may have taken the last of it out of the tables.
            parent.apply(parent.position().last, keeps_tombstones=False)
        built = [_build(child, parents) for child in missing]
        if len(missing) == len(children) and _total(built) != _total([parent.digest() for parent in parents]):
            raise damaged(parents[0].path, "the rows of what was made of it do not add up to its digest")
        for path, *_ in missing:
            with told(path):
                publish(beside(path, "new"), path)


def _check_ranges(parents: Sequence[tuple[int, int]], children: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError unless both are the same range, each without gap and overlap."""
    for ranges in (parents, children):
        if any(lower[1] != upper[0] for lower, upper in pairwise(ranges)):
            raise ValueError(f"the ranges {ranges} do not join")
    if (parents[0][0], parents[-1][1]) != (children[0][0], children[-1][1]):
        raise ValueError(f"the ranges {children} are not those of the parents, {parents}")


def _total(digests: Sequence[Digest]) -> tuple[int, int]:
    return reduce(add_digests, (digest.value for digest in digests), 0), sum(digest.rows for digest in digests)


def _build(child: Child, parents: Sequence[ShardStore]) -> Digest:
    """One child under its new name, whole but not published."""
    path, shard_id, lo, hi = child
    positions = [parent.position() for parent in parents]
    applied, applied_epoch = max((position.last, position.last_epoch) for position in positions)
    meta = replace(
        new_meta(shard_id, lo, hi), applied=applied, applied_epoch=applied_epoch,
        epoch_seen=max(position.epoch_seen for position in positions),
        newest_ms=max(parent.newest_ms for parent in parents),
    )  # fmt: skip
    new_path = beside(path, "new")
    with told(path):
        connection = make_database(new_path, meta)
        try:
            for parent in parents:
                with told(parent.path):
                    _copy(connection, parent.path, meta)
            users, rows, size_bytes, digest = sum_users(connection)
            requests = connection.execute("SELECT count(*) FROM requests").fetchone()[0]
            if connection.execute("SELECT count(*) FROM entries").fetchone()[0] != rows:
                raise damaged(parents[0].path, "its users have other numbers of rows than it counted")
            meta = replace(
                meta, users=users, rows=rows, bytes=size_bytes, digest=to_stored(digest), requests=requests
            )
            write_meta(connection, meta)
            close_made(connection)
        except BaseException:
            connection.close()
            raise
    return Digest(applied, digest, rows)


def _copy(connection: sqlite3.Connection, parent_path: Path, meta: Meta) -> None:
    connection.execute("ATTACH ? AS parent", (f"{parent_path.absolute().as_uri()}?mode=ro",))
    connection.execute("BEGIN")
    for statement in _COPIES:
        connection.execute(statement, (meta.lo, meta.through))
    connection.execute("COMMIT")
    connection.execute("DETACH parent")
