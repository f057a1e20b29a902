"""Garbage on every port of a running cluster: nothing crashes, the leader stays, memory is bounded, the log names who.

The bytes are drawn from one seed. Requests are drawn field by field from the descriptors of every method of the three
services, so that a method that is added is tested too; and each method also gets bytes that are no message at all.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from coordinator.api.v1 import cluster_pb2, cron_pb2, peer_pb2, session_pb2
from coordinator.client.channels import MESSAGE_BYTES_MAX, channel_options
from coordinator.config import ClusterConfig
from coordinator.raft.frames import FRAME_BYTES_MAX
from coordinator.raft.link import HELLO_S_MAX
from coordinator.raft.transport import STRANGERS_MAX
from coordinator.security.certificates import Role, leaf_files
from coordinator.security.credentials import load, open_channel
from coordinator.security.provision import ensure
from tests.peer_port import hello
from tools.lib.local_cluster import LocalCluster, wait_until

GROWTH_BYTES_MAX = 96 << 20
"""What a master's memory may grow by; one frame of a known peer and its parsed form are 32 MiB."""
REQUESTS_PER_METHOD = 8
RPC_S = 2.0
METHODS: list[MethodDescriptor] = [
    method
    for file in (cluster_pb2, cron_pb2, session_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    # An empty one moves the leadership, as it should; the fixture below would take that for harm.
    if method.name != "TransferLeadership"
]


def with_patience(config: ClusterConfig) -> ClusterConfig:
    """A machine that is busy with other tests is no reason for an election here."""
    raft = replace(config.raft, election_timeout_s_min=1.0, election_timeout_s_max=2.0)
    return replace(config, raft=raft)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three masters that have elected a leader; at the end all of them still run, and have met no bug."""
    directory = tmp_path_factory.mktemp("hostile")
    with LocalCluster(directory, masters=3, workers=0, change=with_patience) as running:
        running.start()
        running.wait_leader()
        yield running
        running.raise_if_dead()
        assert all(running.process(master_id).process_id for master_id in running.master_ids)
        for master_id in running.master_ids:
            said = running.process(master_id).log.read_text()
            assert " bug " not in said, [line for line in said.splitlines() if " bug " in line]
            assert "Traceback" not in said, said[said.index("Traceback") :][:2_000]


@pytest.fixture(autouse=True)
def unharmed(cluster: LocalCluster) -> Iterator[None]:
    """After each test the same master leads in the same term, it takes a change, and no memory was eaten."""
    before = cluster.client().get_status()
    memory = {master_id: resident_bytes(cluster, master_id) for master_id in cluster.master_ids}
    yield
    after = cluster.client().get_status()
    assert (after.leader_id, after.term) == (before.leader_id, before.term)
    cluster.client().change_settings(rebalance_paused=True)
    for master_id, bytes_before in memory.items():
        assert resident_bytes(cluster, master_id) - bytes_before < GROWTH_BYTES_MAX, master_id


def resident_bytes(cluster: LocalCluster, master_id: str) -> int:
    """Memory of a master's process."""
    return int(psutil.Process(cluster.process(master_id).process_id).memory_info().rss)


def place(address: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = address.rpartition(":")
    return host, int(port)


def peer_place(cluster: LocalCluster) -> tuple[str, int]:
    """The peer port of the leader."""
    leader = cluster.wait_leader()
    return place(next(one.peer_address for one in cluster.config.masters if one.id == leader))


def is_closed(connection: socket.socket, within_s: float) -> bool:
    """True when the other side closes in time, whatever it says before."""
    connection.settimeout(within_s)
    try:
        while connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def leaders_log(cluster: LocalCluster) -> str:
    """What the leader has said."""
    return cluster.process(cluster.wait_leader()).log.read_text()


def follower(cluster: LocalCluster) -> str:
    """A master that does not lead."""
    leader = cluster.wait_leader()
    return next(one for one in cluster.master_ids if one != leader)


@contextmanager
def as_master(cluster: LocalCluster, id: str, leader: str) -> Iterator[ssl.SSLSocket]:
    """A connection that the leader takes for another master's: it shows its certificate, and says a right hello."""
    files = leaf_files(cluster.certificates, Role.MASTER, id)
    context = ssl.create_default_context(cafile=str(files.authority))
    context.check_hostname = False
    context.load_cert_chain(files.certificate, files.key)
    with socket.create_connection(peer_place(cluster)) as plain, context.wrap_socket(plain) as connection:
        connection.settimeout(HELLO_S_MAX)
        connection.sendall(hello(id, leader, cluster.config.name))
        assert leader.encode() in connection.recv(65_536), "it is answered"
        yield connection


def test_garbage_on_the_peer_port_is_cut_off_and_named(cluster: LocalCluster) -> None:
    """Random bytes, a huge length, a hello of another cluster: closed at once, each with the caller's address."""
    rng = random.Random(1)
    stray = hello(follower(cluster), cluster.wait_leader(), "another cluster")
    openings = [rng.randbytes(rng.randint(5, 4_000)) for _ in range(30)]
    openings += [
        b"\xff" * 8,
        (FRAME_BYTES_MAX).to_bytes(4, "big") + bytes(100),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500),
        stray,
        stray[:-3] + b"\xff\xff\xff",
    ]
    names = []
    for opening in openings:
        with socket.create_connection(peer_place(cluster)) as connection:
            names.append("{}:{}".format(*connection.getsockname()))
            connection.sendall(opening)
            assert is_closed(connection, HELLO_S_MAX + 1.0), opening[:40]
    wait_until(lambda: names[-1] in leaders_log(cluster), 5.0, "the last one is named")
    said = leaders_log(cluster)
    assert [name for name in names if name not in said] == []


def test_rubbish_from_a_master_that_is_known_is_cut_off_and_named(cluster: LocalCluster) -> None:
    """Behind a good certificate and a right hello: random bytes, a cut frame, a huge one, another hello.

    The real one is down meanwhile, as its connection would take the place of this one. What whole frames of known kinds
    can do is in property/test_raft_hostile.py.
    """
    rng, id, leader = random.Random(3), follower(cluster), cluster.wait_leader()
    entry = peer_pb2.LogEntry(command=b"x" * 99)
    body = peer_pb2.PeerFrame(append_entries=peer_pb2.AppendEntries(entries=[entry])).SerializeToString()
    rubbish = [framed(rng.randbytes(rng.randint(8, 4_000))) for _ in range(20)]
    rubbish += [framed(body[:-20]), b"\xff" * 8, hello(id, leader, cluster.config.name)]
    cluster.kill(id)
    try:
        for data in rubbish:
            with as_master(cluster, id, leader) as connection:
                name = "{}:{}".format(*connection.getsockname())
                connection.sendall(data)
                assert is_closed(connection, HELLO_S_MAX), data[:40]
            named = f"cut the connection to master {id} at {name}"
            wait_until(lambda named=named: named in leaders_log(cluster), 5.0, named)  # type: ignore[misc]
    finally:
        cluster.start([id])
        cluster.wait_back(id)


def framed(body: bytes) -> bytes:
    """A frame whose length is right."""
    return len(body).to_bytes(4, "big") + body


def test_a_slow_stranger_has_as_long_as_a_silent_one(cluster: LocalCluster) -> None:
    """One byte every 100 ms of a good length does not keep the connection: the hello's time counts from its start."""
    began_s = time.monotonic()
    with socket.create_connection(peer_place(cluster)) as connection:
        name = "{}:{}".format(*connection.getsockname())
        for byte in (1_000).to_bytes(4, "big") + bytes(1_000):
            connection.sendall(bytes([byte]))
            if is_closed(connection, 0.1):
                break
    assert time.monotonic() - began_s < HELLO_S_MAX + 1.0
    wait_until(lambda: name in leaders_log(cluster), 5.0, "it is named")


def test_thousands_of_connections_leave_room_for_masters(cluster: LocalCluster) -> None:
    """Of 2,000 strangers at once a master keeps 64, and its peers stay connected."""
    where = peer_place(cluster)
    process = psutil.Process(cluster.process(cluster.wait_leader()).process_id)
    held: list[socket.socket] = []
    try:
        for _ in range(2_000):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(where)
            held.append(connection)
        wait_until(
            lambda: sum(one.laddr[1] == where[1] for one in process.net_connections() if one.raddr) < STRANGERS_MAX + 5,
            10.0,
            "the others are closed",
        )
        leader = cluster.wait_leader()
        figures = next(one for one in cluster.client().list_masters().masters if one.id == leader)
        assert len(figures.connected_peers) == 2
    finally:
        for connection in held:
            connection.close()


async def test_garbage_on_the_grpc_port(cluster: LocalCluster) -> None:
    """No HTTP/2, a preface with garbage behind it, frames of random types: other callers notice nothing."""
    rng = random.Random(2)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    frame = bytes([0, 0, 64, rng.randrange(10), 0xFF, 0, 0, 0, 1])
    openings = [rng.randbytes(500), preface + rng.randbytes(2_000), preface + bytes(9) + frame + rng.randbytes(64)]
    openings += [preface + bytes([0xFF, 0xFF, 0xFF, kind, 0, 0, 0, 0, 1]) + rng.randbytes(200) for kind in range(10)]
    for address in (one.grpc_address for one in cluster.config.masters):
        for opening in openings:
            _, writer = await asyncio.open_connection(*place(address))
            writer.write(opening)
            await writer.drain()
            writer.close()
        silent = [await asyncio.open_connection(*place(address)) for _ in range(200)]
        async with asyncio.timeout(5.0):
            await asyncio.to_thread(cluster.client([cluster.config.masters[0].id]).get_status)
        for _, writer in silent:
            writer.close()


def fill(message: Message, rng: random.Random, depth: int = 0) -> None:
    """Sets random fields to random values: absurd ones, names that exist, and nested messages."""
    fields: Any = message.DESCRIPTOR.fields
    for field in fields:
        if rng.random() < 0.3 or (field.message_type is not None and depth > 3):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        value: Any = getattr(message, field.name)
        is_repeated = hasattr(value, "extend")
        if field.message_type is not None:
            for _ in range(rng.randint(1, 3) if is_repeated else 1):
                fill(value.add() if is_repeated else value, rng, depth + 1)
        elif is_repeated:
            value.extend(scalar(field, rng) for _ in range(rng.randint(1, 5)))
        else:
            setattr(message, field.name, scalar(field, rng))


def scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    """A value of a field's type."""
    numbers = [0, 1, 7, rng.getrandbits(16), (1 << 31) - 1]
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.randint(0, 2_000))
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(["", "m1", "w1", "loop_01", "\x00", "é" * 300, "x" * 20_000, "../x", "%s{}\n\x1b[31m"])
        case FieldDescriptor.CPPTYPE_INT64:
            return rng.choice([*numbers, -1, (1 << 63) - 1, -(1 << 63)])
        case FieldDescriptor.CPPTYPE_UINT64:
            return rng.choice([*numbers, (1 << 63), (1 << 64) - 1])
        case FieldDescriptor.CPPTYPE_UINT32:
            return rng.choice([*numbers, (1 << 32) - 1])
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice([*numbers, -1])
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case _:
            return rng.choice([0.0, -1.0, 1e308, float("inf"), float("nan"), 0.5])


def deep(message: bytes, times: int) -> bytes:
    """A field 1 in a field 1 in a field 1, and so on."""
    for _ in range(times):
        length = len(message)
        size = b""
        while length > 0x7F:
            size += bytes([length & 0x7F | 0x80])
            length >>= 7
        message = b"\x0a" + size + bytes([length]) + message
    return message


def open_as_caller(cluster: LocalCluster, address: str, method: MethodDescriptor) -> aio.Channel:
    """A channel with a certificate whose role may make this call: what a known caller may send is to be shown here."""
    credentials = cluster.credentials()
    if method.containing_service.name == "SessionService":
        ensure(cluster.certificates, cluster.config.name, [(Role.WORKER, "w1")])
        credentials = load(leaf_files(cluster.certificates, Role.WORKER, "w1"))
    return open_channel(address, channel_options(), credentials)


async def ask(channel: aio.Channel, method: MethodDescriptor, body: bytes) -> grpc.StatusCode:
    """Sends bytes as a request, whatever they are, and reads the answers to their end."""
    path = f"/{method.containing_service.full_name}/{method.name}"

    async def bodies() -> Any:
        yield body

    try:
        match method.client_streaming, method.server_streaming:
            case False, False:
                call: Any = channel.unary_unary(path)
                await call(body, timeout=RPC_S)
            case False, True:
                call = channel.unary_stream(path)
                async for _ in call(body, timeout=RPC_S / 4):
                    pass
            case _:
                async for _ in channel.stream_stream(path)(bodies(), timeout=RPC_S / 4):
                    pass
    except aio.AioRpcError as failure:
        return failure.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name.removeprefix("coordinator.api.v1."))
async def test_any_bytes_to_a_method_are_answered(cluster: LocalCluster, method: MethodDescriptor) -> None:
    """Random bytes, deep nesting, and random fields: a status of its own each, and never a bug in the log."""
    rng = random.Random(method.full_name)
    bodies = [b"", rng.randbytes(50), rng.randbytes(5_000), deep(b"", 500), b"\xff" * 100, os.urandom(20)]
    for _ in range(REQUESTS_PER_METHOD):
        request = GetMessageClass(method.input_type)()
        fill(request, rng)
        body = request.SerializeToString()
        changed = bytearray(body)
        for _ in range(min(3, len(changed))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        bodies += [body, bytes(changed)]
    address = rng.choice(cluster.config.masters).grpc_address
    async with open_as_caller(cluster, address, method) as channel:
        codes = await asyncio.gather(*(ask(channel, method, body) for body in bodies))
    assert not {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN} & set(codes)
    if not method.client_streaming:  # A follower sends a stream elsewhere before it reads anything.
        assert grpc.StatusCode.INVALID_ARGUMENT in codes


async def test_a_message_above_the_limit_is_refused(cluster: LocalCluster) -> None:
    """It is not read to its end: RESOURCE_EXHAUSTED, and the caller may go on with less."""
    address = cluster.config.masters[0].grpc_address
    options = [option for option in channel_options() if option[0] != "grpc.max_send_message_length"]
    method = next(method for method in METHODS if method.name == "LocateKeys")
    options += [("grpc.max_send_message_length", -1)]
    async with open_channel(address, options, cluster.credentials()) as channel:
        huge = cluster_pb2.LocateKeysRequest(keys=["x" * (MESSAGE_BYTES_MAX + 1)]).SerializeToString()
        assert await ask(channel, method, huge) is grpc.StatusCode.RESOURCE_EXHAUSTED
        small = cluster_pb2.LocateKeysRequest(keys=["x"]).SerializeToString()
        assert await ask(channel, method, small) is grpc.StatusCode.OK


