"""tools/quickstart with real processes: the check, a start and a second start, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.lib.daemons import running_with
from tools.lib.quickstart_check import POINTS
from tools.lib.quickstart_directory import (
    MARKER_NAME,
    Ports,
    QuickstartError,
    cluster_config,
    found,
    prepare,
    with_workers,
)

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = [sys.executable, "-B", str(ROOT / "tools" / "lib" / "bootstrap.py"), "--here", "quickstart"]
CLUSTERCTL = str(Path(sys.executable).with_name("clusterctl"))


def run_quickstart(*arguments: str, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
    """Runs a quickstart that ends by itself."""
    return subprocess.run([*QUICKSTART, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


class Running:
    """A quickstart that stays, on free ports that its directory names."""

    def __init__(self, directory: Path, log: Path, *arguments: str) -> None:
        self.directory = directory
        self.log = log
        with open(log, "ab") as output:
            command = [*QUICKSTART, "--dir", str(directory), *arguments]
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def wait_for(self, text: str, timeout_s: float = 60) -> str:
        """What it printed, once that has `text`."""
        give_up_at_s = time.monotonic() + timeout_s
        while True:
            said = self.log.read_text()
            if text in said:
                return said
            assert self.process.poll() is None, f"it ended: {said}"
            assert time.monotonic() < give_up_at_s, f"no {text!r} in: {said}"
            time.sleep(0.1)

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs clusterctl against it."""
        command = [CLUSTERCTL, "--config", str(self.directory / "cluster.toml"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def json(self, *arguments: str) -> object:
        """What clusterctl answers for scripts."""
        done = self.ctl("-o", "json", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Asks it to stop and waits; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """The directory of a quickstart with two workers on free ports, as an earlier start would have left it."""
    directory = tmp_path / "quickstart"
    prepare(directory, cluster_config(Ports.free(2)))
    return directory


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A quickstart that runs, for the tests at the end of this file: nothing else is started beside it."""
    directory = tmp_path_factory.mktemp("running") / "quickstart"
    prepare(directory, cluster_config(Ports.free(2)))
    quickstart = Running(directory, directory.with_name("output.log"))
    try:
        quickstart.wait_for("Ctrl-C stops everything")
        yield quickstart
    finally:
        quickstart.end()
        assert list(running_with(directory / "cluster.toml")) == []


@pytest.mark.timeout(300)
def test_check_proves_every_point(tmp_path: Path) -> None:
    """Shows that the check proves all points on real processes, exits with 0, and leaves nothing running."""
    directory = tmp_path / "check"
    done = run_quickstart("--check", "--dir", str(directory), timeout_s=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^proved +\((\w)\)", done.stdout, re.MULTILINE) == [point.letter for point in POINTS]
    assert list(running_with(directory / "cluster.toml")) == []
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_second_start_finds_its_state(prepared: Path, tmp_path: Path) -> None:
    """Shows that a clean stop leaves nothing behind, and that the next start has the cluster of the first."""
    first = Running(prepared, tmp_path / "first.log")
    try:
        first.wait_for("Ctrl-C stops everything")
        before = first.json("status")
        assert first.ctl("nodes", "set-weight", "w1", "2").returncode == 0
    finally:
        assert first.end(signal.SIGINT) == 0
    assert "stopped" in first.log.read_text()
    second = Running(prepared, tmp_path / "second.log")
    try:
        said = second.wait_for("Ctrl-C stops everything")
        assert "with the state of an earlier start" in said
        after = second.json("status")
        nodes = second.json("nodes", "list")
    finally:
        assert second.end() == 0
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert isinstance(nodes, dict)
    assert before["cluster_id"] == after["cluster_id"]
    assert {view["node"]["id"]: view["node"]["weight"] for view in nodes["nodes"]} == {"w1": 2, "w2": 1}


def test_port_in_use_is_one_clear_line(prepared: Path) -> None:
    """Shows that an occupied port is named before anything is started."""
    config = found(prepared)
    assert config is not None
    address = config.masters[1].peer_address
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        listener.listen()
        done = run_quickstart("--dir", str(prepared))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"port in use: {address} (peer port of m2)" in done.stderr
    assert done.stderr.count("\n") == 1


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    """Shows one line each for a directory of somebody else, a half-written one, and one that cannot be made."""
    foreign, half, file = tmp_path / "foreign", tmp_path / "half", tmp_path / "file"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    prepare(half, cluster_config(Ports.free(1)))
    (half / MARKER_NAME).write_text('{"quickstart": 1, "complete": false}')
    file.write_text("")
    for directory, expected in ((foreign, "not a quickstart's"), (half, "half written"), (file, "not a directory")):
        done = run_quickstart("--dir", str(directory))
        assert (done.returncode, done.stdout) == (1, "")
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1
    assert (foreign / "letter.txt").read_text() == "dear"


def test_wrong_usage_is_two(tmp_path: Path) -> None:
    """Shows that numbers of workers that make no sense are wrong usage."""
    for arguments in (["--workers", "0"], ["--workers", "many"], ["--check", "--consul"], ["--nosuch"]):
        assert run_quickstart(*arguments, "--dir", str(tmp_path / "x")).returncode == 2
    assert not (tmp_path / "x").exists()


def test_configuration_is_found_again(tmp_path: Path) -> None:
    """Shows that what is written is read as the same, and that more workers can be added to it."""
    config = cluster_config(Ports.fixed(2))
    prepare(tmp_path / "new", config)
    again = found(tmp_path / "new")
    assert again == config
    assert again is not None
    assert [worker.grpc_address for worker in with_workers(again, 3).workers][-1] == "127.0.0.1:7303"
    assert found(tmp_path / "nothing") is None
    (tmp_path / "new" / "cluster.toml").unlink()
    with pytest.raises(QuickstartError, match="half written"):
        found(tmp_path / "new")


def test_clusterctl_against_a_running_cluster(running: Running, tmp_path: Path) -> None:
    """Shows the commands of clusterctl on a real cluster: tables of 100 columns, JSON for scripts, exit statuses."""
    (tmp_path / "jobs.yaml").write_text(
        f'jobs:\n- id: hello\n  schedule: "0 0 1 1 *"\n  command: ["{sys.executable}", "-c", "print(6 * 7)"]\n'
    )
    for arguments in (
        "status",
        "masters list",
        "nodes list",
        "nodes show w1",
        "shards list",
        "shards list --node w1",
        "shards show 1",
        "shards locate alice bob",
        "moves list --all",
        "rebalance",
        "rebalance --dry-run",
        f"cron apply {tmp_path}/jobs.yaml --dry-run",
        f"cron apply {tmp_path}/jobs.yaml",
        "cron list",
        "cron show hello",
        "cron pause hello",
        "cron resume hello",
        "cron trigger hello",
        "cron history hello",
        "events --latest 5",
    ):
        done = running.ctl(*arguments.split())
        assert (done.returncode, done.stderr) == (0, ""), arguments
        if str(tmp_path) not in done.stdout and sys.executable not in done.stdout:
            assert [line for line in done.stdout.splitlines() if len(line) > 100] == [], arguments
    status = running.json("status")
    assert isinstance(status, dict)
    assert (status["shards"], status["nodes_by_state"], len(status["masters"])) == (256, {"active": 2}, 3)
    give_up_at_s = time.monotonic() + 20
    while True:
        history = running.json("cron", "history", "hello")
        assert isinstance(history, dict)
        if [launch["state"] for launch in history["launches"]] == ["succeeded"]:
            break
        assert time.monotonic() < give_up_at_s, history
    assert history["launches"][0]["output"] == "42\n"
    assert running.ctl("cron", "delete", "hello").returncode == 0
    split = running.json("shards", "split", "1")
    assert isinstance(split, dict)
    merged = running.ctl("shards", "merge", str(split["lower_shard_id"]), str(split["upper_shard_id"]))
    assert merged.returncode == 0, merged.stderr
    unsafe = running.ctl("nodes", "drain", "w1")
    assert unsafe.returncode == 1, "two workers cannot keep two replicas without one of them"
    assert "w1" in unsafe.stderr
    assert running.ctl("nodes", "show", "w9").returncode == 1
    assert running.ctl("rebalance", "--pause").returncode == 0
    assert running.ctl("rebalance", "--resume", "--wait").returncode == 0


def test_completion_asks_the_cluster(running: Running) -> None:
    """Shows that the names of workers and jobs are completed from the cluster."""
    config = running.directory / "cluster.toml"
    for words, wanted in (("nodes show ", {"w1", "w2"}), ("cron show loop_0", {f"loop_0{n}" for n in range(1, 10)})):
        line = f"clusterctl --config {config} {words}"
        environment = os.environ | {
            "_CLUSTERCTL_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
        }
        done = subprocess.run([CLUSTERCTL], env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert {answer.split(",")[1] for answer in done.stdout.splitlines()} == wanted


def test_second_quickstart_on_a_running_directory_is_refused(running: Running) -> None:
    """Shows that a directory in use is named in one line with the processes, and that the first goes on."""
    done = run_quickstart("--dir", str(running.directory))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    processes = {name: process for process, name in running_with(running.directory / "cluster.toml")}
    assert f"m1 (process {processes['m1']})" in done.stderr
    assert running.ctl("status").returncode == 0
