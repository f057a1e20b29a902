"""Fixtures of the tests that need a real server beside the daemons."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.lib.consul_agent import ConsulAgent
from tools.lib.consul_binary import ConsulInstallError, install_consul
from tools.lib.run_tests import SERVERS_REQUIRED


@pytest.fixture(scope="session")
def consul_binary() -> Path:
    """A real Consul. Where none can be had, `tools/test` fails; only a pytest started by hand leaves the tests out."""
    try:
        return install_consul()
    except ConsulInstallError as error:
        if os.environ.get(SERVERS_REQUIRED):
            pytest.fail(f"no Consul: {error}", pytrace=False)
        pytest.skip(f"no Consul: {error}")


@pytest.fixture
def agent(tmp_path: Path, consul_binary: Path) -> Iterator[ConsulAgent]:
    """A running agent of the test's own."""
    with ConsulAgent(tmp_path / "consul", binary=consul_binary) as running:
        yield running
