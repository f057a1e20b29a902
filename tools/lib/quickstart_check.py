"""`tools/quickstart --check`: a real cluster on free ports, and the proof that it does its main job, point by point.

Each point is one function that does something to the cluster and returns what it saw; `CheckFailed` says what was not
as promised. They build on each other: the cluster in which a master and a worker were killed is the one that grows and
shrinks. The waiting times of the configuration are shortened, so that the whole takes about a minute; the end of the
output says to what.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.cli.table import paragraph
from coordinator.config import ClusterConfig, PlacementSettings, SessionSettings
from coordinator.model.errors import CoordinatorError
from tools.lib import quickstart_check_cron as cron
from tools.lib import quickstart_check_shards as shards
from tools.lib.daemons import DaemonError
from tools.lib.quickstart_cluster import QuickstartCluster
from tools.lib.quickstart_directory import Ports, QuickstartError, cluster_config, prepare
from tools.lib.quickstart_stage import CheckFailed, Stage

WORKERS = ("w1", "w2", "w3")
NEWCOMER = "w4"
SHORTENED = PlacementSettings(hold_s=2.0, dwell_s=0.0, moves_max=64, moves_in_max=32, moves_out_max=32)
SESSION = SessionSettings(heartbeat_s=0.25, session_lease_s=4.0, suspect_s=1.0)


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to prove."""

    letter: str
    promise: str
    prove: Callable[[Stage], str]


POINTS = (
    Point("a", "a leader is elected", shards.leader_is_elected),
    Point("b", "every shard is owned by two workers", shards.every_shard_has_two_owners),
    Point("c", "every word is located, evenly", shards.every_word_is_located),
    Point("d", "all fifteen loops are owned, with backups", cron.loops_are_owned),
    Point("e", "a job due every second runs once a second", cron.job_runs_every_second),
    Point("f", "kill -9 of the leader: no launch lost or doubled", cron.leader_is_killed),
    Point("g", "kill -9 of a worker: others take over", shards.worker_is_killed),
    Point("h", "a fourth worker gets its share", shards.worker_joins),
    Point("i", "a worker leaves, no shard below two replicas", shards.worker_leaves),
)


@dataclass(slots=True)
class Report:
    """What was proved."""

    rows: list[tuple[str, str, bool, float, str]] = field(default_factory=list)
    """Letter, promise, whether it holds, seconds, and what was seen."""

    @property
    def passed(self) -> bool:
        """True when every point holds."""
        return len(self.rows) == len(POINTS) and all(holds for _, _, holds, _, _ in self.rows)


def check_config() -> ClusterConfig:
    """The configuration of the check: free ports, short waits, more moves at once, one worker more than is started."""
    config = cluster_config(Ports.free(len(WORKERS) + 1))
    return dataclasses.replace(config, placement=SHORTENED, session=SESSION)


def settings_text() -> str:
    """What is not as in the reference configuration, for the reader of the table."""
    placement, session = PlacementSettings(), SessionSettings()
    changed = [
        f"{name} {getattr(used, name):g} (else {getattr(usual, name):g})"
        for used, usual in ((SHORTENED, placement), (SESSION, session))
        for name in (entry.name for entry in dataclasses.fields(used))
        if getattr(used, name) != getattr(usual, name)
    ]
    return "shortened for the check: " + ", ".join(changed)


def run_check(directory: Path | None, say: Callable[[str], None]) -> bool:
    """Runs every point, prints the table, and leaves nothing running; True when all holds."""
    with tempfile.TemporaryDirectory(prefix="coordinator-check-") as scratch:
        place = directory if directory is not None else Path(scratch)
        config = check_config()
        prepare(place, config)
        begun_s = time.monotonic()
        with QuickstartCluster(place, config) as cluster:
            report = prove(Stage(cluster, place, WORKERS, NEWCOMER), say)
            stop_s = time.monotonic()
            killed = cluster.stop()
        ended_s = time.monotonic()
        say("")
        say(paragraph(settings_text()))
        say(f"stopped in {ended_s - stop_s:.1f} s" + (f"; had to kill {', '.join(killed)}" if killed else ", cleanly"))
        proved = sum(1 for row in report.rows if row[2])
        say(f"{proved} of {len(POINTS)} points proved in {ended_s - begun_s:.0f} s")
        if not report.passed and directory is None:
            say("run it again with --dir DIR to keep the logs")
        return report.passed and not killed


def prove(stage: Stage, say: Callable[[str], None]) -> Report:
    """Proves the points in order, saying each as it ends; the first that fails ends it, for the others build on it."""
    report = Report()
    for point in POINTS:
        begun_s = time.monotonic()
        try:
            seen, holds = point.prove(stage), True
        except (CheckFailed, QuickstartError, DaemonError, CoordinatorError) as error:
            seen, holds = str(error), False
        died = [] if holds else stage.cluster.died()
        took_s = time.monotonic() - begun_s
        report.rows.append((point.letter, point.promise, holds, took_s, seen))
        say(f"{'proved' if holds else 'FAILED':<7} ({point.letter}) {point.promise:<80} {took_s:5.1f} s")
        for line in [*seen.splitlines(), *died]:
            say(paragraph(line, " " * 12))
        if not holds:
            break
    return report
