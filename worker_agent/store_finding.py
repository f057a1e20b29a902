"""The store that a replica begins with: what is on disk, or a new one where the replica may have one, else none.

It is order rule 3 of shards.py: a store that is missing or damaged is made anew only for a replica that is joining, or
for a shard that was never formed; and the children of a cut or a join are made of their parents' files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from coordinator.model.errors import Damaged
from worker_agent.shard_interface import ReplicaRole, ShardView
from worker_agent.store import ShardStore, StoreSettings, create_store, delete_store, open_store
from worker_agent.store_cut import merge_stores, split_store

_log = logging.getLogger(__name__)


def find_store(
    view: ShardView, path: Path, parents: Sequence[Path], settings: StoreSettings
) -> tuple[ShardStore | None, bool]:
    """The open store, None where none may be made; and whether no file was there. To be called in a thread.

    Where no file was, no replica of this shard gave a lease. (A parent's primary had stopped before it was cut.) Raises
    Damaged, StoreFull, OSError.
    """
    place = (path, view.shard_id, view.lo, view.hi)
    may_begin = view.role is ReplicaRole.JOINING
    if path.exists():
        try:
            return open_store(*place, settings), False
        except Damaged as error:
            if not may_begin:
                raise
            _log.warning("shard %d is copied anew: %s", view.shard_id, error)
            delete_store(path)
    if not may_begin and parents and all(parent.exists() for parent in parents):
        if len(parents) == 1:
            split_store(parents[0], [place], settings)
        else:
            merge_stores(parents, place, settings)
        return open_store(*place, settings), True
    if may_begin or not view.is_formed:
        return create_store(*place, settings), True
    return None, False
