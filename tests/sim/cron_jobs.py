"""The fifteen loops of cluster.toml for one slice of the year, and what a seed makes of their policies."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from coordinator import config_file
from coordinator.config import ClusterConfig, CronSettings, SessionSettings
from coordinator.machine.codec import job_spec_from_proto, job_spec_to_proto
from coordinator.model import CatchUpPolicy, CronJobSpec, OverlapPolicy, RetryPolicy

YEAR_FROM_MS = 1_772_323_200_000
"""2026-03-01T00:00:00Z: the changes of clocks lie well within the year that begins here."""
YEAR_MS = 365 * 86_400_000
SLICES = 200
SLICE_S = YEAR_MS / 1_000 / SLICES
"""43.8 hours."""
NIGHTLY = (
    ("nightly_berlin", "30 2 * * *", "Europe/Berlin"),
    ("nightly_havana", "15 0 * * *", "America/Havana"),
)
"""Beside the loops: set times that a change of clocks skips and repeats."""
ZONES = {"loop_11": "Europe/Berlin", "loop_12": "Australia/Lord_Howe", "loop_13": "America/Havana"}
EDITS = ("*/5 * * * *", "*/7 * * * *", "*/10 * * * *", "3,33 * * * *", "0 */2 * * *", "*/90 */4 * * * *")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which policies the seeds draw from."""

    overlaps: tuple[OverlapPolicy, ...] = (OverlapPolicy.SKIP, OverlapPolicy.ALLOW)
    retries: tuple[RetryPolicy, ...] = (RetryPolicy.NEVER, RetryPolicy.ON_LOST)
    catch_ups: tuple[CatchUpPolicy, ...] = tuple(CatchUpPolicy)
    has_jitter: bool = False


CHOICE = Choice(tuple(OverlapPolicy), tuple(RetryPolicy), has_jitter=True)


@lru_cache(maxsize=1)
def load_config() -> ClusterConfig:
    """The repository's configuration, with a heartbeat that can be paid: every 3 s instead of twice a second."""
    config = config_file.load(Path(__file__).parents[2] / "cluster.toml")
    return replace(config, session=SessionSettings(heartbeat_s=3.0, suspect_s=6.0), cron=replace(config.cron, jobs=()))


@lru_cache(maxsize=1)
def load_loops() -> tuple[CronJobSpec, ...]:
    """The loops as they stand in cluster.toml, through the contract and back."""
    config = config_file.load(Path(__file__).parents[2] / "cluster.toml")
    return tuple(job_spec_from_proto(job_spec_to_proto(spec)) for spec in config.cron.jobs)


def jobs_of(seed: int, rng: random.Random) -> list[CronJobSpec]:
    """One seed in four plays the loops as they are; the others change half of their policies, each job by itself."""
    loops = [replace(spec, time_zone=ZONES.get(spec.id, "UTC")) for spec in load_loops()]
    first = loops[-1]
    nightly = [replace(first, id=name, schedule=schedule, time_zone=zone) for name, schedule, zone in NIGHTLY]
    specs = [*loops, *nightly]
    if not CHOICE.has_jitter:
        specs = [replace(spec, jitter_s=0.0) for spec in specs]
    if seed % 4 == 0:
        return specs
    return [draw_policies(spec, rng) if rng.random() < 0.5 else spec for spec in specs]


def draw_policies(spec: CronJobSpec, rng: random.Random) -> CronJobSpec:
    """The same job with other policies."""
    return replace(
        spec,
        overlap=rng.choice(CHOICE.overlaps),
        overlap_limit=rng.choice((1, 2, 10)),
        retry=rng.choice(CHOICE.retries),
        attempts_max=rng.choice((2, 3, 5)),
        retry_backoff_s=rng.choice((1.0, 30.0)),
        catch_up=rng.choice(CHOICE.catch_ups),
        catch_up_limit=rng.choice((1, 3, 10)),
        catch_up_window_s=rng.choice((600.0, 3_600.0, 7_200.0)),
        start_deadline_s=rng.choice((10.0, 60.0)),
        jitter_s=rng.choice((0.0, 20.0)) if CHOICE.has_jitter else 0.0,
        timeout_s=rng.choice((60.0, 300.0, 900.0)),
    )


def cron_settings() -> CronSettings:
    """As in cluster.toml."""
    return load_config().cron
