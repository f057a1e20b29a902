"""The section "Keep state" of the client's README, run as it stands there against a real cluster."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.lib.local_cluster import LocalCluster

README = Path(__file__).resolve().parents[2] / "coordinator" / "client" / "README.md"
MASTERS = '["127.0.0.1:7101", "127.0.0.1:7102", "127.0.0.1:7103"]'
CLUSTERCTL = str(Path(sys.executable).with_name("clusterctl"))


def section() -> str:
    """The section's text."""
    return README.read_text().partition("## Keep state\n")[2].partition("\n## ")[0]


def block(language: str) -> str:
    """Its one block of that language."""
    [found] = re.findall(rf"```{language}\n(.*?)```", section(), re.DOTALL)
    return str(found)


def shape(text: str) -> list[str]:
    """Its words, without the numbers: versions depend on who else writes to the shard."""
    return re.sub(r"\d+", "N", text).split()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """A running cluster."""
    with LocalCluster(tmp_path, workers=2) as running:
        running.start()
        running.wait_ready()
        yield running


@pytest.mark.timeout(120)
def test_the_example_of_keeping_state_runs(cluster: LocalCluster) -> None:
    """The Python example prints what it promises, and then clusterctl shows what the README shows."""
    code = block("python")
    assert MASTERS in code
    here = cluster.directory / "example.py"
    here.write_text(code.replace(MASTERS, repr([master.grpc_address for master in cluster.config.masters])))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(here)], cwd=cluster.directory, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    keys, conflict, bern = done.stdout.splitlines()
    assert keys == "['history/1', 'history/2']"
    assert re.fullmatch(r"ann has a name already, of version \d+", conflict)
    assert bern == "200 users live in Bern"
    for command in block("console").split("$ clusterctl ")[1:]:
        line, _, shown = command.partition("\n")
        ran = subprocess.run(
            [CLUSTERCTL, "--config", str(cluster.config_path), *shlex.split(line)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ran.returncode, ran.stderr) == (0, ""), line
        assert shape(ran.stdout) == shape(shown), line + ran.stdout
