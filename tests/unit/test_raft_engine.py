"""The seam to PySyncObj: its private names are where engine.py expects them, and nowhere else in our code."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import socket
from pathlib import Path

import pysyncobj.syncobj
import pytest

import coordinator.raft
from coordinator.raft import engine

PACKAGE = Path(inspect.getfile(coordinator.raft)).parent
PRIVATE = re.compile(r"_SyncObj(__\w+)")


def test_version_is_the_one_that_was_read() -> None:
    """Another version must be read again before it is trusted."""
    assert importlib.metadata.version("pysyncobj") == "0.3.17"


@pytest.mark.parametrize("name", sorted(set(PRIVATE.findall(inspect.getsource(engine)))))
def test_private_name_exists(name: str) -> None:
    """Each private name that engine.py overrides or reads stands in PySyncObj's source."""
    assert re.search(rf"\bself\.{name}\b", inspect.getsource(pysyncobj.syncobj))


def test_addresses_can_still_be_read() -> None:
    """PySyncObj replaces two functions of `socket` for the whole process with ones that only work on Windows."""
    assert socket.inet_ntop(socket.AF_INET, socket.inet_pton(socket.AF_INET, "127.0.0.1")) == "127.0.0.1"


def test_only_the_engine_knows_private_names() -> None:
    """Whoever raises the version has one file to compare."""
    users = {path.name for path in PACKAGE.glob("*.py") if PRIVATE.search(path.read_text(encoding="utf-8"))}
    assert users == {"engine.py"}


def test_nothing_of_ours_unpickles() -> None:
    """What comes from a disk or a peer is never handed to pickle."""
    assert not [path.name for path in PACKAGE.glob("*.py") if re.search(r"\bpickle\.|import pickle", path.read_text())]
