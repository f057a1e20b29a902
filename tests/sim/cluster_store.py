"""Cutting and joining the simulated stores, as worker_agent/store_cut.py does it with files."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.model import key_hash
from tests.model_store import merge_models
from tests.sim.replica_store import REGISTER, Content, ModelBacked, SimStore


def user_of(request_id: str) -> str:
    """The user whose register a request wrote; what SimStore keeps of requests does not say it otherwise."""
    return request_id.rpartition("@")[2]


def cut(parents: Sequence[SimStore | ModelBacked], lo: int, hi: int) -> SimStore | ModelBacked:
    """The store of a child with this range, of the sealed stores of its parents."""
    models = [parent for parent in parents if isinstance(parent, ModelBacked)]
    if models:
        assert len(models) == len(parents)
        child = ModelBacked(log_records_kept=models[0]._settings.log_records_kept)
        child._state = child._durable = merge_models(models, (1, lo, hi)).disk()
        return child
    return _cut([parent for parent in parents if isinstance(parent, SimStore)], lo, hi)


def _cut(parents: Sequence[SimStore], lo: int, hi: int) -> SimStore:
    for parent in parents:
        assert parent.now.is_complete, "an unfinished copy cannot be cut"
        parent.apply(parent.position().last, keeps_tombstones=False)
    places = [parent.position() for parent in parents]
    last, last_epoch = max((place.last, place.last_epoch) for place in places)
    rows = {
        row: value
        for parent in parents
        for row, value in parent.now.rows.items()
        if value[0] is not None and lo <= key_hash(row[1] if row[0] == REGISTER else user_of(row[1])) < hi
    }
    child = SimStore(log_records_kept=parents[0].log_records_kept)
    child.now = Content(
        epoch_seen=max(place.epoch_seen for place in places),
        base=last,
        base_epoch=last_epoch,
        applied=last,
        applied_epoch=last_epoch,
        rows=rows,
    )
    child._sync()
    return child
