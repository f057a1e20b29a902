"""Launches on a real cluster: the newest one wins, and clusterctl follows what a run prints."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import types_pb2
from coordinator.cli.words import local_time
from coordinator.config import ClusterConfig
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CronJobSpec, OverlapPolicy, RetryPolicy
from coordinator.model.errors import Refused
from tools.lib.local_cluster import LocalCluster, wait_until

CLUSTERCTL = str(Path(sys.executable).with_name("clusterctl"))
RUN = """
import os, signal, sys, time
sink = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def say(word):
    line = f"{word} {os.environ['LAUNCH_TOKEN']}\\n".encode()
    os.write(sink, line)
    os.write(1, line)
def end(*_):
    say("end")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
say("begin")
while True: time.sleep(1)
"""

LASTING = """
import os, sys, time
sink = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while True:
    os.write(sink, f"{os.environ['LAUNCH_ATTEMPT']} {os.environ['LAUNCH_WORKER']}\\n".encode())
    time.sleep(0.05)
"""


def few_shards(config: ClusterConfig) -> ClusterConfig:
    """Shards are not the subject here."""
    return replace(config, placement=replace(config.placement, shards=4))


def follow(cluster: LocalCluster, *arguments: str) -> subprocess.Popen[str]:
    """`clusterctl cron logs` beside the test."""
    command = [CLUSTERCTL, "--config", str(cluster.config_path), "cron", "logs", "tick", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(120)
def test_the_newest_launch_wins_and_its_output_is_followed(tmp_path: Path) -> None:
    """By cancel_previous each run is stopped for the next one, never two at once; clusterctl follows one to the end."""
    sink = tmp_path / "sink"
    spec = CronJobSpec(
        id="tick",
        schedule="*/5 * * * * *",
        command=(sys.executable, "-S", "-c", RUN, str(sink)),
        overlap=OverlapPolicy.CANCEL_PREVIOUS,
    )
    with LocalCluster(tmp_path / "cluster", workers=2, change=few_shards) as cluster:
        cluster.start()
        cluster.wait_ready()
        client = cluster.client()
        client.apply_jobs([job_spec_to_proto(spec)])
        wait_until(lambda: sink.exists() and sink.read_text(), 60, "the first run")
        with follow(cluster, "--follow") as following:
            assert following.stdout is not None
            word, token = following.stdout.readline().split()
            assert word == "begin"
            rest, errors = following.communicate(timeout=60)
        assert (rest, errors, following.returncode) == (f"end {token}\n", "", 0)
        wait_until(lambda: sink.read_text().count("end") >= 3, 60, "three runs that were stopped")
        client.set_job_paused("tick", True)
        with contextlib.suppress(Refused):  # The pause may come between two runs.
            client.cancel_launches("tick", reason="the test is over")

        def ended() -> list[types_pb2.Launch]:
            launches = list(client.list_launches(job_id="tick").launches)
            return launches if all(launch.finished_unix_ms for launch in launches) else []

        launches = wait_until(ended, 30, "the end of all launches")[::-1]
        lines = [line.split() for line in sink.read_text().splitlines()]
        assert [word for word, _ in lines] == ["begin", "end"] * (len(lines) // 2)  # Never two at once.
        assert [begin for begin, _ in zip(lines[::2], lines[1::2], strict=True)] == [
            ["begin", end[1]] for end in lines[1::2]
        ]
        ran = [launch for launch in launches if launch.started_unix_ms]
        assert {launch.state for launch in ran} == {types_pb2.LAUNCH_STATE_CANCELLED}
        # One that was stopped before its program could take the signal has written nothing.
        heard = [launch for launch in ran if launch.exit_status != -signal.SIGTERM]
        tokens = [f"tick/{launch.scheduled_at_unix_ms}/{launch.attempt}" for launch in heard]
        assert tokens == [token for word, token in lines if word == "begin"]
        at_ms = heard[0].scheduled_at_unix_ms
        with follow(cluster, "--at", local_time(at_ms)) as reading:
            printed, errors = reading.communicate(timeout=30)
        assert (printed, errors) == (f"begin {tokens[0]}\nend {tokens[0]}\n", "")
        # Where the worker is away, the last bytes that the masters keep are shown, and it is said so.
        cluster.stop([heard[0].worker])
        with follow(cluster, "--at", local_time(at_ms)) as reading:
            printed, errors = reading.communicate(timeout=30)
        assert printed == f"begin {tokens[0]}\nend {tokens[0]}\n"
        assert "here are the last" in errors


def short_lease(config: ClusterConfig) -> ClusterConfig:
    """A worker is given up within the test."""
    session = replace(config.session, heartbeat_s=0.3, suspect_s=0.9, session_lease_s=3.0)
    return replace(few_shards(config), session=session)


@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_a_killed_worker_leaves_no_run_beside_the_next_attempt(tmp_path: Path) -> None:
    """After kill -9 of a worker that stays away its run goes on for a while, and is gone when the next one begins."""
    sink = tmp_path / "sink"
    spec = CronJobSpec(
        id="tick",
        schedule="* * * * * *",
        command=(sys.executable, "-S", "-c", LASTING, str(sink)),
        overlap=OverlapPolicy.SKIP,
        retry=RetryPolicy.ON_LOST,
        retry_backoff_s=0.1,
    )
    with LocalCluster(tmp_path / "cluster", workers=2, change=short_lease) as cluster:
        cluster.start()
        cluster.wait_ready()
        cluster.client().apply_jobs([job_spec_to_proto(spec)])

        def running() -> list[types_pb2.Launch]:
            found = cluster.client().list_launches(job_id="tick").launches
            return [launch for launch in found if launch.state == types_pb2.LAUNCH_STATE_RUNNING]

        first = wait_until(running, 60, "the first attempt")[0]
        wait_until(sink.exists, 30, "what it does")
        cluster.kill(first.worker)
        lines_then = len(sink.read_text().splitlines())
        wait_until(lambda: any(line[0] == "2" for line in sink.read_text().splitlines()), 60, "the second attempt")
        cluster.client().set_job_paused("tick", True)
        # Long enough for a run that was left to show itself: it writes twenty lines a second.
        seen = len(sink.read_text().splitlines())
        wait_until(lambda: len(sink.read_text().splitlines()) > seen + 40, 30, "more of it")
        lines = sink.read_text().splitlines()
    before = [line for line in lines if line == f"1 {first.worker}"]
    assert lines[: len(before)] == before, "the first attempt wrote beside the second"
    assert len(before) > lines_then + 10, "the run was to go on while the lease held"
