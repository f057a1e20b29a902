"""What each option may be: the one place for ranges, units and choices.

A range is what the software is sure to work with, not what is wise; wise values are the defaults. A test holds that
every number of every settings class has its range here.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.config import (
    ConsulSettings,
    CronSettings,
    DiscoverySettings,
    LoggingSettings,
    MoveSettings,
    PlacementSettings,
    RaftSettings,
    SecuritySettings,
    SessionSettings,
    StateSettings,
    WorkerSettings,
)
from coordinator.model import CronJobSpec

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value, both allowed."""

    minimum: float
    maximum: float
    unit: str = ""
    """Plural, for a sentence; empty for a bare number."""


RANGES: dict[type, dict[str, Range]] = {
    RaftSettings: {
        # Below 50 ms an ordinary pause of the process starts an election.
        "election_timeout_s_min": Range(0.05, 60, "seconds"),
        "election_timeout_s_max": Range(0.05, 120, "seconds"),
        "append_period_s": Range(0.005, 20, "seconds"),
        "leader_fallback_s": Range(0.1, 600, "seconds"),
        # At most what one frame between masters holds beside its header: 16 MiB.
        "command_bytes_max": Range(1 << 10, 1 << 24, "bytes"),
        "proposals_max": Range(1, 1_000_000, "proposals"),
        "propose_timeout_s": Range(0.1, 600, "seconds"),
        "snapshot_entries": Range(100, 100_000_000, "entries"),
    },
    ConsulSettings: {
        # Consul checks no more often than once a second, whatever it is told.
        "check_interval_s": Range(1, 3600, "seconds"),
        "check_timeout_s": Range(0.05, 3600, "seconds"),
        # Consul raises anything below its own minimum of one minute without saying so.
        "deregister_critical_after_s": Range(60, 365 * DAY_S, "seconds"),
        # Consul itself caps a blocking query at ten minutes.
        "poll_wait_s": Range(1, 600, "seconds"),
    },
    SessionSettings: {
        "heartbeat_s": Range(0.01, 60, "seconds"),
        "session_lease_s": Range(0.1, 3600, "seconds"),
        "suspect_s": Range(0.02, 3600, "seconds"),
        "lease_margin": Range(1.25, 10),
    },
    PlacementSettings: {
        "shards": Range(1, 65_536, "shards"),
        "replicas": Range(1, 7, "replicas"),
        "tokens_per_weight": Range(1, 4096, "tokens"),
        "load_bound": Range(1.001, 10),
        "cron_backups": Range(0, 10, "backups"),
        "moves_max": Range(1, 10_000, "moves"),
        "moves_in_max": Range(1, 10_000, "moves"),
        "moves_out_max": Range(1, 10_000, "moves"),
        "round_key_share_max": Range(0.0001, 1),
        "hold_s": Range(0, 7 * DAY_S, "seconds"),
        "dwell_s": Range(0, 7 * DAY_S, "seconds"),
        "users_max": Range(2, 1_000_000_000, "users"),
        "merge_below_users": Range(0, 500_000_000, "users"),
        "merge_after_s": Range(0, 7 * DAY_S, "seconds"),
        "reshapes_max": Range(1, 100, "shards"),
        "memory_percent_max": Range(1, 100, "percent"),
    },
    MoveSettings: {
        "copy_deadline_s": Range(0.1, 7 * DAY_S, "seconds"),
        "copy_stall_s": Range(0.1, 7 * DAY_S, "seconds"),
        "cede_deadline_s": Range(0.05, 3600, "seconds"),
        "quarantine_workers": Range(0, 7, "workers"),
        "quarantine_window_s": Range(1, DAY_S, "seconds"),
    },
    StateSettings: {
        "replica_lease_s": Range(0.05, 600, "seconds"),
        "lagging_s": Range(0.05, 600, "seconds"),
        "opening_s": Range(0.05, 600, "seconds"),
        "min_in_sync": Range(1, 7, "replicas"),
        "user_keys_max": Range(1, 10_000_000, "keys"),
        "user_bytes_max": Range(1 << 10, 1 << 40, "bytes"),
        # A value travels in one message, of 16 MiB at most, beside others of its batch.
        "value_bytes_max": Range(1, 1 << 22, "bytes"),
        "remembered_s": Range(1, 30 * DAY_S, "seconds"),
        "log_records_kept": Range(1, 10_000_000, "records"),
        "forget_s": Range(0, 30 * DAY_S, "seconds"),
        "scrub_s": Range(0, 366 * DAY_S, "seconds"),
    },
    CronSettings: {
        "launches_kept": Range(1, 100_000, "launches"),
        "launches_kept_s": Range(60, 3660 * DAY_S, "seconds"),
        "catch_up_per_s": Range(0.01, 1000, "launches per second"),
        "order_timeout_s": Range(0.1, 3600, "seconds"),
    },
    CronJobSpec: {
        "priority_class": Range(0, 6),
        "timeout_s": Range(0.1, 30 * DAY_S, "seconds"),
        "catch_up_window_s": Range(0.1, 366 * DAY_S, "seconds"),
        "catch_up_limit": Range(1, 1000, "launches"),
        "start_deadline_s": Range(0.1, 30 * DAY_S, "seconds"),
        "attempts_max": Range(1, 100, "attempts"),
        "overlap_limit": Range(1, 1000, "launches"),
        "retry_backoff_s": Range(0.01, DAY_S, "seconds"),
        "retry_backoff_s_max": Range(0.01, DAY_S, "seconds"),
        "jitter_s": Range(0, DAY_S, "seconds"),
        "memory_bytes_max": Range(0, 1 << 44, "bytes"),
        "processor_s_max": Range(0, 30 * DAY_S, "seconds"),
        "open_files_max": Range(0, 1_048_576, "files"),
    },
    WorkerSettings: {
        # The ring takes weight x tokens_per_weight points; a thousandfold span is more than any fleet of machines has.
        "weight": Range(0.01, 1000),
        "launches_max": Range(1, 10_000, "launches"),
        "output_bytes_max": Range(0, 65_536, "bytes"),
        "run_output_bytes_max": Range(0, 1 << 30, "bytes"),
        "runs_output_bytes_max": Range(0, 1 << 40, "bytes"),
        "stop_grace_s": Range(0, 3600, "seconds"),
    },
}

CHOICES: dict[type, dict[str, tuple[str, ...]]] = {
    DiscoverySettings: {"backend": ("embedded", "consul")},
    ConsulSettings: {"scheme": ("http", "https")},
    SecuritySettings: {"mode": ("mtls", "plaintext")},
    LoggingSettings: {"level": ("debug", "info", "warning", "error"), "format": ("text", "json")},
}

PRIORITY_CLASSES = {"high": 3, "medium": 4, "low": 5}
"""The three words of the specification's section 5.3 as classes of its section 5.1: none is
worse than P5, the class that it gives to cron jobs."""
PRIORITY_NAMES = {**PRIORITY_CLASSES, **{f"p{number}": number for number in range(7)}}
"""What `priority` may be: a word, or the class itself."""

KEY_OF_FIELD = {"priority_class": "priority"}
"""Keys of the file that are not called as the field is."""


def key_of(field_name: str) -> str:
    """The key under which the file holds a field."""
    return KEY_OF_FIELD.get(field_name, field_name)
