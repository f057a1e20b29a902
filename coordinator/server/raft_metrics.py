"""What a master tells Prometheus about its part in the consensus. Names, without the prefix `coordinator_`:

    last_index                  gauge      last entry of this master's log
    commit_lag                  gauge      entries of the log that this master does not know to be committed
    apply_lag                   gauge      committed entries that are not applied yet
    has_lease                   gauge      1 while this leader is certain that nobody else leads
    elections_total             counter    elections that this master held
    pre_votes_total             counter    times that it asked beforehand whether it would win one
    journal_sync_seconds        histogram  syncs of the journal: the disk's share of every commit
    proposals_in_flight         gauge      commands of this master's callers that wait; proposals_max at most
    peer_messages_total         counter    messages to and from masters, by `direction` (sent, received) and `type`
    peer_queued_bytes           gauge      bytes that a `peer` has not read; 2 MiB hold appends back, 64 MiB cut it off
    peer_lag                    gauge      at the leader: entries that a `peer` is not known to have
    clock_offset_seconds        gauge      this master's wall clock minus the median of the masters'; ahead is positive
    peer_clock_offset_seconds   gauge      a `peer`'s wall clock minus this master's
    peer_clock_uncertainty_seconds  gauge  how far the truth may be from that: half a round trip
    refuses_to_lead             gauge      1 while its wall clock is more than clock_offset_max_s off
    snapshot_index              gauge      log index that the newest snapshot on disk includes; 0 for none
    snapshot_bytes              gauge      its size
    snapshot_age_seconds        gauge      age of the newest log entry in it

Beside them in metrics.py: term, is_leader, has_leader, leader_changes_total, commit_index, applied_index, log_entries,
log_bytes, connected_peers. Worth an alert: no has_lease anywhere for 10 s; commit_lag at the leader that grows for a
minute; journal_sync_seconds above 0.1 at the 99th percentile; peer_lag of one peer above snapshot_entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from coordinator.raft.clocks import ClockFigures
from coordinator.raft.figures import RaftFigures
from coordinator.raft.node import RaftNode

PREFIX = "coordinator_"


class RaftMetrics(Collector):
    """The figures of one master's consensus, read when Prometheus asks; none while it does not run."""

    def __init__(self, raft: RaftNode, wall_s: Callable[[], float] = time.time) -> None:
        self._raft = raft
        self._wall_s = wall_s

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the registry would collect once just to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All of them, as of now."""
        figures = self._raft.figures()
        if figures is None:
            return
        yield _gauge("last_index", "Last entry of the log.", figures.last_index)
        lag = max(0, figures.last_index - figures.commit_index)
        yield _gauge("commit_lag", "Entries of the log that are not known to be committed.", lag)
        lag = figures.commit_index - figures.applied_index
        yield _gauge("apply_lag", "Committed entries that are not applied yet.", lag)
        yield _gauge("has_lease", "1 while this leader is certain that nobody else leads.", figures.has_lease)
        yield CounterMetricFamily(f"{PREFIX}elections", "Elections that this master held.", value=figures.elections)
        yield CounterMetricFamily(f"{PREFIX}pre_votes", "Times that it asked beforehand.", value=figures.pre_votes)
        yield HistogramMetricFamily(
            f"{PREFIX}journal_sync_seconds",
            "Duration of the journal's syncs.",
            buckets=figures.syncs.buckets(),
            sum_value=figures.syncs.sum_s,
        )
        yield _gauge("proposals_in_flight", "Commands that wait for their outcome.", figures.proposals)
        yield from self._peers(figures)
        yield from self._clocks(figures.clocks)
        yield from self._snapshot(figures)

    @staticmethod
    def _peers(figures: RaftFigures) -> Iterable[Metric]:
        messages = CounterMetricFamily(
            f"{PREFIX}peer_messages", "Messages to and from other masters.", labels=("direction", "type")
        )
        for direction, counts in (("sent", figures.traffic.sent), ("received", figures.traffic.received)):
            for kind, count in sorted(counts.items()):
                messages.add_metric((direction, kind), count)
        yield messages
        queued = GaugeMetricFamily(f"{PREFIX}peer_queued_bytes", "What waits for a peer to read it.", labels=("peer",))
        for peer, size in figures.queued_bytes.items():
            queued.add_metric((peer,), size)
        yield queued
        lag = GaugeMetricFamily(f"{PREFIX}peer_lag", "Entries that a peer is not known to have.", labels=("peer",))
        for peer, entries in figures.behind.items():
            lag.add_metric((peer,), entries)
        yield lag

    @staticmethod
    def _clocks(clocks: ClockFigures) -> Iterable[Metric]:
        verdict = clocks.verdict
        yield _gauge("clock_offset_seconds", "Own wall clock minus the median of the masters'.", verdict.offset_s)
        yield _gauge("refuses_to_lead", "1 while the wall clock is too far off to lead.", verdict.refuses)
        offset = GaugeMetricFamily(
            f"{PREFIX}peer_clock_offset_seconds", "A peer's wall clock minus this master's.", labels=("peer",)
        )
        uncertainty = GaugeMetricFamily(
            f"{PREFIX}peer_clock_uncertainty_seconds", "How far the truth may be from that.", labels=("peer",)
        )
        for peer, interval in clocks.offsets.items():
            offset.add_metric((peer,), interval.middle_s)
            uncertainty.add_metric((peer,), interval.uncertainty_s)
        yield offset
        yield uncertainty

    def _snapshot(self, figures: RaftFigures) -> Iterable[Metric]:
        snapshot = figures.snapshot
        yield _gauge("snapshot_index", "Log index that the newest snapshot on disk includes.", snapshot.index)
        yield _gauge("snapshot_bytes", "Size of the newest snapshot on disk.", snapshot.size_bytes)
        if snapshot.index:
            age_s = max(0.0, self._wall_s() - snapshot.state_unix_s)
            yield _gauge("snapshot_age_seconds", "Age of the newest log entry in the newest snapshot on disk.", age_s)


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}{name}", help_text, value=value)
