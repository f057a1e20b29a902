"""The store that a shard begins with: what is there, or a new one where that may be made. In a thread, for it blocks.

A store that is missing, or damaged, is made anew only for a replica that is joining, for a shard that was never formed,
or from the whole stores of the shards that this one was cut or joined from (order rule 3 of shards.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.errors import Damaged
from worker_agent.shard_interface import ReplicaRole, ShardView
from worker_agent.store import ShardStore, StoreSettings, create_store, delete_store, open_store
from worker_agent.store_cut import merge_stores, split_store

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundStore:
    """A store, open."""

    store: ShardStore
    is_new: bool
    """Where no file was, no replica of this shard gave a lease. (A parent's primary had stopped before it was cut.)"""


def find_store(
    path: Path, view: ShardView, parents: Sequence[Path], settings: StoreSettings
) -> FoundStore | None:
    """The store, or None where there is none and none may be made. Raises Damaged, CoordinatorError, OSError."""
    place = (path, view.shard_id, view.lo, view.hi)
    may_begin = view.role is ReplicaRole.JOINING
    if path.exists():
        try:
            return FoundStore(open_store(*place, settings), is_new=False)
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
        return FoundStore(open_store(*place, settings), is_new=True)
    if may_begin or not view.is_formed:
        return FoundStore(create_store(*place, settings), is_new=True)
    return None
