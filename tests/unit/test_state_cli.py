"""clusterctl state against a played cluster: values in and out whole, refusals in one line, exit statuses."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path

import pytest

from coordinator.cli import main as cli_main
from coordinator.cli.state import value_text
from tests.played_cluster import cluster, one_shard

CONFIG = """\
[masters.m1]
grpc_address = "{}"
peer_address = "127.0.0.1:1"
http_address = "127.0.0.1:2"
[security]
mode = "plaintext"
"""


class Terminal:
    """Runs clusterctl against one master."""

    def __init__(self, config: Path, capture: pytest.CaptureFixture[bytes]) -> None:
        self._config = config
        self._capture = capture

    async def run(self, *arguments: str) -> tuple[int, bytes]:
        """Exit status, and what was printed on both streams."""
        words = ["--config", str(self._config), "--timeout", "2", "state", *arguments]
        status = await asyncio.to_thread(cli_main.run, words)
        printed = self._capture.readouterr()
        return status, printed.out + printed.err

    async def run_json(self, *arguments: str) -> object:
        status, printed = await self.run(*arguments, "-o", "json")
        assert status == 0, printed
        return json.loads(printed)


async def test_the_whole_tour(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put, get, scan, describe and delete, for people and for scripts, with values of every kind."""
    async with cluster(one_shard()) as c:
        config = tmp_path / "cluster.toml"
        config.write_text(CONFIG.format(c.master.address))
        terminal = Terminal(config, capsysbinary)
        assert await terminal.run("put", "ann", "name", "Änn") == (0, b"stored 4 bytes as version 1\n")
        photo = tmp_path / "photo"
        photo.write_bytes(b"\xff\x00\r\n")
        assert await terminal.run("put", "ann", "photo", "--file", str(photo)) == (0, b"stored 4 bytes as version 2\n")
        assert await terminal.run_json("put", "ann", "empty", "") == {"key": "empty", "version": 3}
        assert await terminal.run("get", "ann", "photo", "--raw") == (0, b"\xff\x00\r\n")
        assert await terminal.run_json("get", "ann", "name") == {"key": "name", "version": 1, "value": "Änn"}
        status, printed = await terminal.run("scan", "ann")
        assert (status, printed.decode().splitlines()) == (
            0,
            [
                "KEY    VERSION  BYTES  VALUE",
                "empty        3      0  (empty)",
                "name         1      4  Änn",
                "photo        2      4  (binary) ff 00 0d 0a",
            ],
        )
        found = await terminal.run_json("scan", "ann", "--from", "name", "--limit", "2", "--stale")
        assert found == {
            "user": "ann",
            "entries": [
                {"key": "name", "version": 1, "value": "Änn"},
                {"key": "photo", "version": 2, "value_base64": "/wANCg=="},
            ],
            "age_s": 0.0,
        }
        monkeypatch.setattr("coordinator.cli.state.PAGE_ITEMS_MAX", 2)
        whole = await terminal.run_json("scan", "ann")
        assert isinstance(whole, dict)
        assert [entry["key"] for entry in whole["entries"]] == ["empty", "name", "photo"]
        status, printed = await terminal.run("get", "ann", "name", "--stale")
        assert printed.decode().splitlines()[1:] == ["name        1      4  Änn", "at most 0.0 s old"]
        assert await terminal.run("scan", "bob") == (0, b"no key\n")
        status, printed = await terminal.run("describe", "ann")
        assert b"keys   3 of 10000\nsize   22 B of 64 MiB" in printed
        deleted = await terminal.run("delete", "ann", "photo", "--expected-version", "2")
        assert deleted == (0, b"removed, as version 4\n")


async def test_what_is_refused_is_told_in_one_line(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conflict, a key that is not there, a faulty user: one line each and exit status 1; wrong usage is 2."""
    async with cluster(one_shard()) as c:
        config = tmp_path / "cluster.toml"
        config.write_text(CONFIG.format(c.master.address))
        terminal = Terminal(config, capsysbinary)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from\xff a pipe\n")))
        assert await terminal.run("put", "ann", "seen", "-") == (0, b"stored 13 bytes as version 1\n")
        assert await terminal.run("get", "ann", "seen", "--raw") == (0, b"from\xff a pipe\n")
        for arguments, expected_status, expected in (
            (("put", "ann", "seen", "x", "--expected-version", "0"), 1, b"key 'seen' has version 1, and the write"),
            (("get", "ann", "name"), 1, b"user ann has no key 'name'; `clusterctl state scan ann` lists"),
            (("get", "", "name"), 1, b"a user has 1 to 512 bytes of UTF-8, this one has 0"),
            (("put", "ann", "name"), 2, b"name the value: as VALUE, as - for standard input, or with --file"),
            (("put", "ann", "name", "x", "--file", "y"), 2, b"one of them"),
            (("put", "ann", "name", "--file", str(tmp_path / "none")), 2, b"cannot be read: No such file"),
        ):
            status, printed = await terminal.run(*arguments)
            assert status == expected_status, arguments
            assert expected in printed
            assert status == 2 or printed.count(b"\n") == 1
        await c.workers[0].stop()
        status, printed = await terminal.run("get", "ann", "seen")
        assert status == 1
        assert b"accepts no connection, and the shard has no other primary yet" in printed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"plain", "plain"),
        (b"", "(empty)"),
        (b"a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        (b"\xfe" * 20, "(binary) " + " ".join(["fe"] * 16) + " ..."),
        ("é".encode() * 201, "é" * 200 + " ..."),
    ],
)
def test_values_for_people_stay_on_one_line(value: bytes, text: str) -> None:
    """Nothing of a value can move the cursor or colour the terminal, and long ones are cut."""
    assert value_text(value) == text
