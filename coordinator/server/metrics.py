"""What a master tells Prometheus, all with the prefix `coordinator_`. The consensus is raft_metrics.py's,
launches are cron_metrics.py's.

Figures that the state or Raft already has are read when Prometheus asks; only what happens between two questions is
counted as it happens. Each master has a registry of its own, so that several can run in one process (tests).
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from coordinator.machine.state import Transition
from coordinator.model import NodeState
from coordinator.raft.node import RaftNode
from coordinator.server.raft_metrics import RaftMetrics
from coordinator.server.sessions import SessionHub
from coordinator.server.status import is_short, is_unavailable

CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of the histogram of calls, in seconds: a commit on one machine is near the low end."""
STREAMS = frozenset({"Open", "Backup", "StreamEvents", "Watch", "ServerReflectionInfo"})
"""Methods that last as long as their caller wants; their duration says nothing."""


class MasterMetrics:
    """The figures of one master; `registry` is what /metrics shows."""

    def __init__(self, self_id: str, raft: RaftNode, hub: SessionHub) -> None:
        self.registry = CollectorRegistry()
        self._leader_changes = Counter(
            "coordinator_leader_changes", "Times that this master learned of another leader.", registry=self.registry
        )
        self._proposals = Counter(
            "coordinator_proposals",
            "Commands proposed by this master, by who wanted them and how that ended.",
            ("source", "outcome"),
            registry=self.registry,
        )
        self._applied = Counter(
            "coordinator_applied_commands",
            "Log entries applied by this master since it started, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self._calls = Counter(
            "coordinator_grpc_calls",
            "Calls answered, by method and status.",
            ("method", "status"),
            registry=self.registry,
        )
        self._call_seconds = Histogram(
            "coordinator_grpc_call_seconds",
            "Duration of calls in seconds; streams are left out.",
            ("method",),
            buckets=CALL_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Figures(raft, hub))
        self.registry.register(RaftMetrics(raft))
        ProcessCollector(registry=self.registry)
        raft.on_transition(self._on_transition)

    def count_call(self, method: str, status: str, seconds: float) -> None:
        """A call ended; `method` is "/package.Service/Method"."""
        name = method.rpartition(".")[2]
        self._calls.labels(name, status).inc()
        if name.rpartition("/")[2] not in STREAMS:
            self._call_seconds.labels(name).observe(seconds)

    def count_proposal(self, source: str, outcome: str) -> None:
        """A proposal ended: `source` "api" or "control", `outcome` "applied", "refused" or the exception's name."""
        self._proposals.labels(source, outcome).inc()

    def count_leader_change(self) -> None:
        """This master learned of another leader."""
        self._leader_changes.inc()

    def _on_transition(self, transition: Transition) -> None:
        self._applied.labels(transition.result.WhichOneof("outcome") or "installed").inc()


class _Figures(Collector):
    """Figures that are read when they are asked for."""

    def __init__(self, raft: RaftNode, hub: SessionHub) -> None:
        self._raft = raft
        self._hub = hub

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the registry would collect once just to learn the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All of them, as of now."""
        status = self._raft.status()
        yield _gauge("term", "Raft term.", status.term)
        yield _gauge("is_leader", "1 while this master leads.", self._raft.is_leader)
        yield _gauge("has_leader", "1 while this master knows a leader.", self._raft.leader_id is not None)
        yield _gauge("commit_index", "Index up to which entries are known to be committed.", status.commit_index)
        yield _gauge("applied_index", "Index up to which entries are applied.", status.applied_index)
        yield _gauge("log_entries", "Entries in the log.", status.log_entries)
        yield _gauge("log_bytes", "Bytes of the log on disk.", status.log_bytes)
        yield _gauge("connected_peers", "Other masters that this one is connected with.", len(status.connected_peers))
        yield _gauge("sessions", "Sessions of workers open at this master.", self._hub.count)
        yield from self._state_figures()

    def _state_figures(self) -> Iterable[Metric]:
        state = self._raft.state
        shards = list(state.shards.values())
        yield _gauge("shards", "Shards.", len(shards))
        short = sum(is_short(shard, state) for shard in shards)
        yield _gauge("shards_short_of_replicas", "Shards with too few in-sync replicas.", short)
        unavailable = sum(is_unavailable(shard, state) for shard in shards)
        yield _gauge("shards_unavailable", "Shards that nobody can answer for.", unavailable)
        yield _gauge("moves_in_progress", "Moves in progress.", len(state.moves))
        yield _gauge("jobs", "Cron jobs.", len(state.jobs))
        orphans = sum(not job.owner for job in state.jobs.values())
        yield _gauge("jobs_without_owner", "Cron jobs without an owner.", orphans)
        nodes = Tally(node.state for node in state.nodes.values())
        suspects = sum(node.is_suspect for node in state.nodes.values())
        by_state = GaugeMetricFamily("coordinator_nodes", "Workers by state.", labels=("state",))
        for node_state in NodeState:
            by_state.add_metric((node_state.name.lower(),), nodes[node_state])
        yield by_state
        yield _gauge("nodes_suspect", "Workers that are not heard at the moment.", suspects)
        events = CounterMetricFamily("coordinator_events", "Events in the cluster's story so far.")
        events.add_metric((), state.next_event_sequence - 1)
        yield events


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"coordinator_{name}", help_text, value=value)
