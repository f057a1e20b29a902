"""Commands about the cluster as a whole: its first cut, and its settings. Shard ids are never reused."""

from __future__ import annotations

from coordinator.api.v1 import command_pb2
from coordinator.machine.codec import settings_from_proto, settings_to_proto
from coordinator.machine.draft import Draft
from coordinator.machine.launches import drop_waiting
from coordinator.machine.passed import ALL_PAUSED, pass_over
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
    if not settings.launches_kept_s >= 60:
        raise Refused(
            RefusalReason.INVALID, f"launches_kept_s = {settings.launches_kept_s} is out of range; use at least 60"
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
    """Replaces the settings; when cron goes on, what was due meanwhile is never launched."""
    settings = settings_from_proto(command.settings)
    _check_settings(settings)
    before = draft.settings
    if settings == before:
        return
    draft.put_settings(settings)
    if settings.cron_paused and not before.cron_paused:
        for job_id in sorted(draft.jobs):
            drop_waiting(draft, job_id, ALL_PAUSED)
    if before.cron_paused and not settings.cron_paused:
        for job in sorted(draft.jobs.values(), key=lambda job: job.id):
            if not job.paused:  # Else its own resume does it, with the reason that holds until then.
                draft.put_job(pass_over(draft, job, ALL_PAUSED))
    old, new = settings_to_proto(before), settings_to_proto(settings)
    changed = [
        f"{field.name} is {getattr(new, field.name)}, was {getattr(old, field.name)}"
        for field in new.DESCRIPTOR.fields
        if getattr(new, field.name) != getattr(old, field.name)
    ]
    draft.record("settings", "cluster", "; ".join(changed))
