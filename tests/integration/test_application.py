"""The application that worker_agent/README.md shows, on real workers: it is run as it stands there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.client import StateClient
from coordinator.config import ClusterConfig
from tools.lib.local_cluster import LocalCluster, wait_until

README = Path(__file__).resolve().parents[2] / "worker_agent" / "README.md"
USER = "ann"


def with_application(config: ClusterConfig) -> ClusterConfig:
    """Few shards, and the example on every worker."""
    return replace(
        config,
        placement=replace(config.placement, shards=8),
        worker=replace(config.worker, application="counting:Counting"),
        workers=tuple(replace(worker, application="counting:Counting") for worker in config.workers),
    )


@pytest.mark.timeout(120)
def test_an_agent_goes_on_where_its_state_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent's count survives kill -9 of its worker, and goes on from there on the worker that takes over."""
    [code] = [block for block in README.read_text().split("```python\n")[1:] if block.startswith('"""counting.py')]
    (tmp_path / "counting.py").write_text(code.partition("```")[0])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with LocalCluster(tmp_path / "cluster", workers=3, change=with_application) as cluster:
        cluster.start()
        cluster.wait_ready()
        addresses = [master.grpc_address for master in cluster.config.masters]
        with StateClient(addresses, credentials=cluster.credentials()) as state:

            def seen() -> tuple[int, str]:
                found = state.get_many(USER, ["count", "worker"])
                return (int(found["count"].value), found["worker"].value.decode()) if found else (0, "")

            state.put(USER, "name", b"Ann")  # From now on she is one of its shard's users.
            wait_until(lambda: seen()[0] >= 5, 20, "the agent counts")
            count, killed = seen()
            cluster.kill(killed)
            wait_until(lambda: seen()[1] not in ("", killed), 20, "the agent counts elsewhere")
            after, worker = seen()
            assert after > count
            wait_until(lambda: seen()[0] >= after + 3, 20, "it goes on there")
        assert cluster.stop([worker]) == []
        words = cluster.process(worker).log.read_text()
        assert "of the application" not in words, "no handler failed or hung"
