"""The peer port under mutual TLS: two transports in one process, on asyncio's loop and on uvloop's."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from pysyncobj.node import Node

from coordinator.raft import transport as transport_module
from coordinator.raft.address import PeerAddress
from coordinator.raft.frames import Message
from coordinator.raft.link import SEND_BYTES_MAX
from coordinator.raft.transport import CONGESTED_BYTES, PeerTransport
from coordinator.security.certificates import CertificateFiles, Identity, Role, create_authority, issue
from coordinator.security.credentials import Credentials
from tools.lib.ports import free_ports

NOW = datetime.datetime.now(datetime.UTC)
WAIT_S = 10.0
CLUSTER = "fleet"
BIG = 3 << 20


def loops() -> list[Any]:
    """Every kind of event loop that a daemon may run on here."""
    found: list[Any] = [pytest.param(asyncio.new_event_loop, id="asyncio")]
    with contextlib.suppress(ImportError):
        import uvloop

        found.append(pytest.param(uvloop.new_event_loop, id="uvloop"))
    return found


def party(directory: Path, identifier: str, role: Role = Role.MASTER, **changes: Any) -> Credentials:
    """Credentials of the authority in a directory, which is made when it is not there."""
    if not directory.exists():
        create_authority(directory, CLUSTER, NOW - datetime.timedelta(days=30))
    identity = Identity(CLUSTER, role, identifier)
    return Credentials(identity, issue(directory, identity, changes.pop("now", NOW), **changes))


class Pair:
    """Master m2, which dials, and master m1."""

    def __init__(self, first: Credentials | None, second: Credentials | None) -> None:
        ports = free_ports(2)
        one, two = (PeerAddress(f"m{number}", "127.0.0.1", port) for number, port in enumerate(ports, 1))
        self.first = PeerTransport(one, (two,), CLUSTER, 5.0, credentials=first)
        self.second = PeerTransport(two, (one,), CLUSTER, 5.0, credentials=second)
        self.port = one.port
        self.received: list[Message] = []
        self.changed = asyncio.Event()
        for transport in (self.first, self.second):
            transport.setOnMessageReceivedCallback(self._on_message)
            transport.setOnNodeConnectedCallback(self._on_node)
            transport.setOnNodeDisconnectedCallback(self._on_node)

    def _on_message(self, node: Node, message: Message) -> None:
        self.received.append(message)
        self.changed.set()

    def _on_node(self, node: Node) -> None:
        self.changed.set()

    @property
    def is_connected(self) -> bool:
        """True when both have the other's hello."""
        return self.first.connected_ids == ("m2",) and self.second.connected_ids == ("m1",)

    async def until(self, so: Callable[[], bool]) -> None:
        """Waits for it."""
        async with asyncio.timeout(WAIT_S):
            while not so():
                self.changed.clear()
                await self.changed.wait()


@contextlib.asynccontextmanager
async def running(first: Credentials | None, second: Credentials | None) -> AsyncIterator[Pair]:
    """Both transports, open."""
    pair = Pair(first, second)
    try:
        for transport in (pair.first, pair.second):
            await transport.bind()
            await transport.open()
        yield pair
    finally:
        await pair.first.close()
        await pair.second.close()


class Said(logging.Handler):
    """Waits for a line in the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._came = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._came.set()

    async def wait_for(self, *words: str) -> str:
        """The first line with all the words; fails with what was said instead."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    for line in self.lines:
                        if all(word in line for word in words):
                            return line
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            raise AssertionError(f"nobody said {words}, only {self.lines}") from None


def append(size: int) -> Message:
    """A message with one entry of that size."""
    places = {"term": 1, "commit_index": 0, "prevLogIdx": 1, "prevLogTerm": 1, "sent_at_us": 0}
    return {"type": "append_entries", **places, "entries": [(b"\0" * size, 2, 1)]}


@pytest.mark.parametrize("new_loop", loops())
def test_frames_pass_whole_and_in_order(tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Shows that small and large messages of one turn arrive whole, in order, both ways, on both kinds of loop."""

    async def scene() -> None:
        first, second = party(tmp_path / "ca", "m1"), party(tmp_path / "ca", "m2")
        async with running(first, second) as pair:
            await pair.until(lambda: pair.is_connected)
            sizes = [10, BIG, 20, 0, BIG, 30]
            for sender, node in ((pair.first, "m2"), (pair.second, "m1")):
                pair.received.clear()
                for size in sizes:
                    assert sender.send(sender.nodes[node], append(size))
                await pair.until(lambda: len(pair.received) == len(sizes))
                assert [len(message["entries"][0][0]) for message in pair.received] == sizes

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scene())


@pytest.mark.parametrize("new_loop", loops())
def test_one_turn_is_one_write(tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Shows that the messages of one turn go into TLS as one write, so that they share records and packets."""

    async def scene() -> None:
        async with running(party(tmp_path / "ca", "m1"), party(tmp_path / "ca", "m2")) as pair:
            await pair.until(lambda: pair.is_connected)
            link = pair.second._links["m1"]
            inner: Any = link.transport
            writes: list[int] = []

            class Counting:
                def __getattr__(self, name: str) -> Any:
                    return getattr(inner, name)

                def write(self, data: bytes) -> None:
                    writes.append(len(data))
                    inner.write(data)

            link.transport = Counting()  # type: ignore[assignment]
            for _ in range(50):
                pair.second.send(pair.second.nodes["m1"], append(100))
            await pair.until(lambda: len(pair.received) == 50)
            assert len(writes) == 1

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scene())


REFUSALS: list[Any] = [
    pytest.param(
        lambda place: party(place, "m1"),
        lambda place: party(place, "m9"),
        ("m1: cut", "calls itself 'm2'", "certificate is of coordinator://fleet/master/m9"),
        id="dialler-with-another-masters-certificate",
    ),
    pytest.param(
        lambda place: party(place, "m9"),
        lambda place: party(place, "m2"),
        ("m2: no connection to master m1", "not accepted", "m1.master.fleet.coordinator"),
        id="answerer-with-another-masters-certificate",
    ),
    pytest.param(
        lambda place: party(place, "m1"),
        lambda place: Credentials(Identity(CLUSTER, Role.MASTER, "m2"), party(place, "m2", Role.WORKER).files),
        ("m1: cut", "certificate is of coordinator://fleet/worker/m2"),
        id="worker-as-master",
    ),
    pytest.param(
        lambda place: party(place, "m1"),
        lambda place: party(place.with_name("foreign"), "m2"),
        ("m2: no connection to master m1", "not accepted"),
        id="foreign-authority",
    ),
    pytest.param(
        lambda place: party(place, "m1"),
        lambda place: mixed(place, party(place.with_name("foreign"), "m2")),
        ("m1: cut the connection to 127.0.0.1:", "its certificate is not accepted"),
        id="foreign-certificate-of-one-who-trusts-us",
    ),
    pytest.param(
        lambda place: party(place, "m1"),
        lambda place: party(place, "m2", now=NOW - datetime.timedelta(days=10), days=5),
        ("m1: cut the connection to 127.0.0.1:", "certificate has expired"),
        id="expired",
    ),
    pytest.param(
        lambda place: party(place, "m1"),
        lambda place: None,
        ("m1: cut the connection to 127.0.0.1:", "it speaks plain text"),
        id="plain-text-dialler",
    ),
    pytest.param(
        lambda place: None,
        lambda place: party(place, "m2"),
        ("m1: cut the connection to master 127.0.0.1:", "a frame of"),
        id="plain-text-answerer",
    ),
]


def mixed(place: Path, foreign: Credentials) -> Credentials:
    """A foreign certificate whose holder accepts ours, so that the refusal has to be ours."""
    ours = party(place, "m1").files.authority
    return Credentials(foreign.identity, CertificateFiles(ours, foreign.files.certificate, foreign.files.key))


@pytest.mark.parametrize("new_loop", loops())
@pytest.mark.parametrize(("first", "second", "words"), REFUSALS)
def test_who_is_not_the_peer_is_cut_off_and_named(
    tmp_path: Path,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    first: Callable[[Path], Credentials | None],
    second: Callable[[Path], Credentials | None],
    words: tuple[str, ...],
) -> None:
    """Shows for every kind of wrong certificate, and none, that no link comes about and the log says why."""

    async def scene() -> None:
        async with heard() as said, running(first(tmp_path / "ca"), second(tmp_path / "ca")) as pair:
            await said.wait_for(*words)
            assert not pair.first.connected_ids
            assert not pair.second.connected_ids

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scene())


@contextlib.asynccontextmanager
async def heard() -> AsyncIterator[Said]:
    """The transport's log, inside a loop."""
    log = logging.getLogger("coordinator.raft.transport")
    handler = Said()
    log.addHandler(handler)
    try:
        yield handler
    finally:
        log.removeHandler(handler)


@pytest.mark.parametrize("new_loop", loops())
def test_strangers_in_the_handshake_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Shows that connections that never shake hands are few, are cut in time, and keep no peer out for long."""
    monkeypatch.setattr(transport_module, "STRANGERS_MAX", 5)
    monkeypatch.setattr(transport_module, "HELLO_S_MAX", 0.3)

    async def scene() -> None:
        first, second = party(tmp_path / "ca", "m1"), party(tmp_path / "ca", "m2")
        pair = Pair(first, second)
        async with heard() as said:
            with contextlib.ExitStack() as stack:
                try:
                    await pair.first.bind()
                    await pair.first.open()
                    for _ in range(8):
                        await asyncio.sleep(0)
                        stack.enter_context(await connected(pair.port))
                    await said.wait_for("too many have not said who they are")
                    await said.wait_for("no TLS handshake within 0.3 s")
                    await pair.second.bind()
                    await pair.second.open()
                    await pair.until(lambda: pair.is_connected)
                finally:
                    await pair.first.close()
                    await pair.second.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scene())


async def connected(port: int) -> socket.socket:
    """A connection that says nothing."""
    silent = socket.socket()
    silent.setblocking(False)
    await asyncio.get_running_loop().sock_connect(silent, ("127.0.0.1", port))
    return silent


@pytest.mark.parametrize("new_loop", loops())
def test_what_a_peer_does_not_read_is_bounded(
    tmp_path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Shows that a peer that stopped reading holds appends back at 2 MiB, and is cut off and named beyond 64 MiB."""

    async def scene() -> None:
        said = Said()
        logging.getLogger("coordinator.raft.transport").addHandler(said)
        unsent: list[Message] = []
        async with running(party(tmp_path / "ca", "m1"), party(tmp_path / "ca", "m2")) as pair:
            await pair.until(lambda: pair.is_connected)
            sender, node = pair.second, pair.second.nodes["m1"]
            sender.on_unsent = lambda node, message: unsent.append(message)
            reader: Any = pair.first._links["m2"].transport
            reader.pause_reading()
            held: list[int] = []
            while sender.send(node, append(BIG)):
                await asyncio.sleep(0)
                held.append(sender.queued_bytes["m1"])
                assert sender.is_congested(node) is (held[-1] > CONGESTED_BYTES)
            # The one that goes beyond the bound is taken, the next one is not.
            assert SEND_BYTES_MAX < max(held) <= SEND_BYTES_MAX + 2 * BIG
            assert len(unsent) == 1
            assert "m1" in await said.wait_for("cut the connection", "bytes unread")
            await pair.until(lambda: pair.is_connected)
            assert sender.queued_bytes["m1"] < CONGESTED_BYTES
        logging.getLogger("coordinator.raft.transport").removeHandler(said)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scene())
