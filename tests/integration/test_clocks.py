"""Wall clocks that differ, with real masters: who is far off does not lead, and people are told."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.config import RaftSettings
from coordinator.model import SystemClock, WallMs
from coordinator.model.errors import Refused
from coordinator.raft import RaftNode
from tests.integration.test_raft_metrics import figures_of
from tests.raft_cluster import IDS, Cluster, until
from tests.raft_machine import MACHINE, command, times
from tools.lib.debian_package import Package, PackageError, install
from tools.lib.local_cluster import LocalCluster, wait_until
from tools.lib.run_tests import SERVERS_REQUIRED

FAKETIME = Package(
    "libfaketime",
    "faketime",
    "0.9.10",
    "bookworm",
    program="faketime",
    version_argument="--version",
    libraries=("libfaketime",),
)


AHEAD = r"is (9\.[89]\d*|10(\.[01])?) s ahead of"
"""Ten seconds, as far as half a round trip on a busy machine lets it be told."""


class SteppedClock(SystemClock):
    """The system's clocks, the wall clock with a step."""

    def __init__(self) -> None:
        self.step_s = 0.0

    def wall_ms(self) -> WallMs:
        return WallMs(super().wall_ms() + round(self.step_s * 1_000))


async def test_a_leader_whose_clock_steps_hands_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Over real sockets: within 2 s of a step by 10 s another master leads, and the log says why, once."""
    masters = Cluster(tmp_path, RaftSettings(), MACHINE)
    clocks = {id: SteppedClock() for id in IDS}
    masters.clocks.update(clocks)
    try:
        await masters.start()
        old = await masters.leader()
        await old.propose(command("before"))
        await until(lambda: all(_known(node) == 3 for node in masters.nodes.values()))
        clocks[old.self_id].step_s = 10.0
        await until(lambda: any(node.is_leader for node in masters.nodes.values() if node is not old), 2.0)
        new = await masters.leader()
        assert new is not old
        await new.propose(command("after"))
        assert max(times(new.state)) <= time.time() * 1_000
        await until(lambda: figures_of(old)["refuses_to_lead"] == 1)
        assert figures_of(old)["clock_offset_seconds"] == pytest.approx(10.0, abs=0.2)
        seen = figures_of(new)[f'peer_clock_offset_seconds{{peer="{old.self_id}"}}']
        assert seen == pytest.approx(10.0, abs=0.2)
        assert figures_of(new)["refuses_to_lead"] == 0
        with pytest.raises(Refused, match=f"the wall clock of master {old.self_id} {AHEAD}"):
            await new.transfer_leadership(old.self_id)
        # The log has it at the next look, which under load comes after the hand-over.
        await until(lambda: any("it refuses to lead" in line for line in caplog.messages))
        clocks[old.self_id].step_s = 0.0
        await until(lambda: any("agrees with the other masters' again" in line for line in caplog.messages))
        told = [line for line in caplog.messages if "it refuses to lead" in line]
        assert len(told) == 1
        assert re.match(f"{old.self_id}: its wall clock {AHEAD} the other masters'", told[0])
        await until(lambda: figures_of(new)[f'peer_clock_offset_seconds{{peer="{old.self_id}"}}'] < 1)
        await new.transfer_leadership(old.self_id)
    finally:
        await masters.stop()


def _known(node: RaftNode) -> int:
    figures = node.figures()
    return figures.clocks.verdict.known if figures is not None else 0


@pytest.fixture(scope="module")
def faketime() -> Path:
    """The library that shifts a process's wall clock and leaves its other clocks alone."""
    try:
        program = install(FAKETIME)
        root = program.parents[1]
        return next(path for path in sorted(root.glob("lib/**/faketime/libfaketime.so.1")))
    except (PackageError, StopIteration) as error:
        if os.environ.get(SERVERS_REQUIRED):
            pytest.fail(f"no libfaketime: {error}", pytrace=False)
        pytest.skip(f"no libfaketime: {error}")


@pytest.fixture
def shifted(tmp_path: Path, faketime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """Three masters, of which m3 lives 10 s ahead."""
    with LocalCluster(tmp_path, masters=3, workers=0) as cluster:
        with monkeypatch.context() as environment:
            environment.setenv("LD_PRELOAD", str(faketime))
            environment.setenv("FAKETIME", "+10s")
            environment.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            cluster.start(["m3"])
        cluster.start(["m1", "m2"])
        yield cluster


def test_a_master_whose_clock_is_wrong_never_leads(shifted: LocalCluster) -> None:
    """A real master that lives 10 s ahead is named by status and log, and is not elected, whoever is killed."""
    first = shifted.wait_leader()
    assert first != "m3"
    problem = f"the wall clock of master m3 {AHEAD} the other masters', so it refuses to lead: check the time"
    client = shifted.client()
    wait_until(lambda: [line for line in client.get_status().problems if re.match(problem, line)], 10.0, "m3 is named")
    found = {master.id: master for master in client.list_masters().masters}
    assert 9_500 < found["m3"].clock_offset_ms < 10_500
    assert (found["m3"].refuses_to_lead, found["m3"].clocks_known) == (True, 3)
    assert not found["m1"].clock_is_off
    with pytest.raises(Refused, match="wall clock of master m3"):
        client.transfer_leadership("m3")
    assert client.transfer_leadership("").leader_id == ({"m1", "m2"} - {first}).pop()
    shifted.kill(second := shifted.wait_leader())
    assert shifted.wait_leader(other_than=second) == first
    log = shifted.process("m3").log.read_text()
    assert log.count("it refuses to lead") == 1
    assert "m3: leads in term" not in log
