"""Commands about the ranges themselves: the first cut, splits and merges. Shard ids are never reused."""

from __future__ import annotations

from dataclasses import replace

from coordinator.api.v1 import command_pb2
from coordinator.machine.codec import settings_from_proto, settings_to_proto
from coordinator.machine.draft import Draft
from coordinator.model import HASH_SPACE, ClusterSettings, Shard
from coordinator.model.errors import RefusalReason, Refused

SHARDS_MAX = 1 << 20
REPLICAS_MAX = 7


def _check_settings(settings: ClusterSettings) -> None:
    if not 1 <= settings.replicas <= REPLICAS_MAX:
        raise Refused(
            RefusalReason.INVALID, f"replicas = {settings.replicas} is out of range; use 1 to {REPLICAS_MAX}"
        )
    if not 1 <= settings.launches_kept <= 100_000:
        raise Refused(
            RefusalReason.INVALID, f"launches_kept = {settings.launches_kept} is out of range; use 1 to 100000"
        )


def bootstrap_cluster(draft: Draft, command: command_pb2.BootstrapCluster) -> None:
    """Gives the cluster its identity and cuts the hash space into equal ranges."""
    if draft.cluster_id:
        raise Refused(RefusalReason.ALREADY_EXISTS, f"the cluster exists already, its id is {draft.cluster_id}")
    if not command.cluster_id:
        raise Refused(RefusalReason.INVALID, "the new cluster has no id")
    if not 1 <= command.shards <= SHARDS_MAX:
        raise Refused(RefusalReason.INVALID, f"shards = {command.shards} is out of range; use 1 to {SHARDS_MAX}")
    settings = settings_from_proto(command.settings)
    _check_settings(settings)
    draft.cluster_id = command.cluster_id
    draft.put_settings(settings)
    for number in range(command.shards):
        draft.put_shard(
            Shard(
                id=draft.next_shard_id + number,
                lo=HASH_SPACE * number // command.shards,
                hi=HASH_SPACE * (number + 1) // command.shards,
            )
        )
    draft.next_shard_id += command.shards
    draft.record("cluster", command.cluster_id, f"made with {command.shards} shards of {settings.replicas} replicas")


def change_settings(draft: Draft, command: command_pb2.ChangeSettings) -> None:
    """Replaces the settings; when cron goes on, what was due meanwhile counts as decided."""
    settings = settings_from_proto(command.settings)
    _check_settings(settings)
    before = draft.settings
    if settings == before:
        return
    draft.put_settings(settings)
    if before.cron_paused and not settings.cron_paused:
        for job in sorted(draft.jobs.values(), key=lambda job: job.id):
            draft.put_job(replace(job, decided_until_ms=max(job.decided_until_ms, draft.time_ms)))
    old, new = settings_to_proto(before), settings_to_proto(settings)
    changed = [
        f"{field.name} is {getattr(new, field.name)}, was {getattr(old, field.name)}"
        for field in new.DESCRIPTOR.fields
        if getattr(new, field.name) != getattr(old, field.name)
    ]
    draft.record("settings", "cluster", "; ".join(changed))


def split_shard(draft: Draft, command: command_pb2.SplitShard) -> None:
    """Cuts a shard in two; both halves keep its replicas and get new ids."""
    shard = draft.shard(command.shard_id)
    if command.expected_epoch and command.expected_epoch != shard.epoch:
        raise Refused(
            RefusalReason.STALE,
            f"shard {shard.id} is at epoch {shard.epoch}, the command was decided at {command.expected_epoch}",
        )
    _require_still(draft, shard)
    at = command.at or (shard.lo + shard.hi) // 2
    if not shard.lo < at < shard.hi:
        raise Refused(
            RefusalReason.INVALID,
            f"shard {shard.id} cannot be cut at {at}; use more than {shard.lo} and less than {shard.hi}",
        )
    lower_id = draft.next_shard_id
    draft.next_shard_id += 2
    draft.drop_shard(shard)
    # Epoch 0 means "never assigned"; the halves of such a shard stay so.
    epoch = shard.epoch + 1 if shard.in_sync else 0
    draft.put_shard(replace(shard, id=lower_id, hi=at, epoch=epoch))
    draft.put_shard(replace(shard, id=lower_id + 1, lo=at, epoch=epoch))
    draft.created_ids += [lower_id, lower_id + 1]
    draft.record("shard", shard.id, f"is cut into {lower_id} and {lower_id + 1}")


def merge_shards(draft: Draft, command: command_pb2.MergeShards) -> None:
    """Joins two neighbours with the same replicas into a new shard."""
    lower, upper = draft.shard(command.lower_shard_id), draft.shard(command.upper_shard_id)
    if lower.hi != upper.lo:
        raise Refused(
            RefusalReason.PRECONDITION,
            f"shards {lower.id} and {upper.id} are no neighbours in this order; name the lower one first",
        )
    _require_still(draft, lower)
    _require_still(draft, upper)
    if (lower.primary, lower.in_sync) != (upper.primary, upper.in_sync):
        raise Refused(
            RefusalReason.PRECONDITION,
            f"shard {lower.id} is on {', '.join(lower.in_sync)} with primary {lower.primary}, shard {upper.id} on "
            f"{', '.join(upper.in_sync)} with primary {upper.primary}; only shards on the same workers can be joined",
        )
    joined = replace(
        lower,
        id=draft.next_shard_id,
        hi=upper.hi,
        epoch=max(lower.epoch, upper.epoch) + 1 if lower.in_sync else 0,
        absent=tuple(sorted({*lower.absent, *upper.absent})),
        moved_ms=max(lower.moved_ms, upper.moved_ms),
    )
    draft.next_shard_id += 1
    draft.drop_shard(lower)
    draft.drop_shard(upper)
    draft.put_shard(joined)
    draft.created_ids.append(joined.id)
    draft.record("shard", joined.id, f"is joined from {lower.id} and {upper.id}")


def _require_still(draft: Draft, shard: Shard) -> None:
    move = draft.move_on(shard.id)
    if move is not None:
        raise Refused(
            RefusalReason.PRECONDITION, f"shard {shard.id} is moving (move {move.id}); wait for it, or abort it"
        )
