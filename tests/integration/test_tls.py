"""A real cluster under mutual TLS: who is refused at which port, what each role may call, and what stays secret."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.client.channels import channel_options
from coordinator.config import ClusterConfig, SecuritySettings
from coordinator.security import tls
from coordinator.security.authorization import ALLOWED, is_allowed
from coordinator.security.certificates import (
    CertificateFiles,
    Identity,
    Role,
    create_authority,
    issue,
    leaf_files,
    role_dns_name,
)
from coordinator.security.credentials import Credentials, open_channel
from coordinator.security.provision import ensure
from tests.peer_port import hello
from tools.lib.daemons import program
from tools.lib.local_cluster import LocalCluster, wait_until

NOW = datetime.datetime.now(datetime.UTC)
TIMEOUT_S = 10.0
HEALTH = "/grpc.health.v1.Health/Check"
OF_WORKERS = tuple(f"/coordinator.api.v1.{name}Service/" for name in ("Launch", "State", "Replication"))
STREAMS_IN = (
    "/coordinator.api.v1.ReplicationService/Open",
    "/coordinator.api.v1.SessionService/Open",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
STREAMS_OUT = (
    "/coordinator.api.v1.ClusterService/StreamEvents",
    "/coordinator.api.v1.LaunchService/ReadOutput",
    "/grpc.health.v1.Health/Watch",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three masters and two workers."""
    with LocalCluster(tmp_path_factory.mktemp("cluster"), masters=3, workers=2) as running:
        running.start()
        running.wait_ready(60.0)
        yield running


@pytest.fixture(scope="module")
def ports(cluster: LocalCluster) -> list[tuple[str, Role]]:
    """Every gRPC port of the cluster, with the role of who answers there."""
    workers = [view.node.grpc_address for view in cluster.client().list_nodes().nodes]
    masters = [master.grpc_address for master in cluster.config.masters]
    return [*((one, Role.MASTER) for one in masters), *((one, Role.WORKER) for one in workers)]


def certified(
    cluster: LocalCluster, directory: Path, role: Role, name: str, now: datetime.datetime = NOW, days: int = 5
) -> Credentials:
    """A new certificate of the cluster's authority."""
    identity = Identity(cluster.config.name, role, name)
    return Credentials(identity, issue(cluster.certificates, identity, now, days, directory))


def strangers(cluster: LocalCluster, directory: Path) -> dict[str, CertificateFiles | None]:
    """Certificates that nobody may take, of holders who would take ours: so it is the cluster that refuses."""
    identity = Identity(cluster.config.name, Role.MASTER, "m1")
    create_authority(directory / "foreign", cluster.config.name, NOW)
    foreign = issue(directory / "foreign", identity, NOW)
    ours = leaf_files(cluster.certificates, Role.MASTER, "m1").authority
    expired = certified(cluster, directory / "old", Role.MASTER, "m1", NOW - datetime.timedelta(days=3), 2)
    return {
        "none": None,
        "foreign": CertificateFiles(ours, foreign.certificate, foreign.key),
        "expired": expired.files,
    }


async def health_status(channel: Any) -> grpc.StatusCode:
    """How a health check ends: the one call that every role may make."""
    async with channel:
        try:
            await channel.unary_unary(HEALTH)(b"", timeout=TIMEOUT_S)
        except aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def test_every_grpc_port_refuses_strangers(
    cluster: LocalCluster, ports: list[tuple[str, Role]], tmp_path: Path
) -> None:
    """Shows for each port of masters and workers: plain text, no certificate, a foreign, an expired one get nothing."""
    ours = leaf_files(cluster.certificates, Role.MASTER, "m1").authority.read_bytes()
    refused = strangers(cluster, tmp_path)
    reader = certified(cluster, tmp_path, Role.READER, "bob")
    for address, role in ports:
        named = [*channel_options(), *tls.channel_options(cluster.config.name, role)]
        assert await health_status(open_channel(address, channel_options(), reader, role)) is grpc.StatusCode.OK
        plain = aio.insecure_channel(address, options=channel_options())
        assert await health_status(plain) is grpc.StatusCode.UNAVAILABLE, f"plain text at {address}"
        for what, files in refused.items():
            shown = tls.channel_credentials(files) if files else grpc.ssl_channel_credentials(ours)
            channel = aio.secure_channel(address, shown, options=named)
            assert await health_status(channel) is grpc.StatusCode.UNAVAILABLE, f"{what} at {address}"


def answer(cluster: LocalCluster, files: CertificateFiles | None, from_id: str, *, plain: bool = False) -> bytes:
    """What m1's peer port answers to a hello; nothing when it ends the connection."""
    m1 = cluster.config.masters[0]
    host, _, port = m1.peer_address.rpartition(":")
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
        if plain:
            connection.sendall(hello(from_id, "m1", cluster.config.name))
            said = b""
            try:
                while part := connection.recv(1 << 16):
                    said += part
            except ConnectionError:
                pass
            return said
        context = ssl.create_default_context(cafile=str(leaf_files(cluster.certificates, Role.MASTER, "m1").authority))
        context.check_hostname = False
        if files is not None:
            context.load_cert_chain(files.certificate, files.key)
        try:
            with context.wrap_socket(connection) as secured:
                secured.sendall(hello(from_id, "m1", cluster.config.name))
                return secured.recv(1 << 16)
        except (ssl.SSLError, ConnectionError):
            return b""


def test_the_peer_port_takes_only_masters_under_their_own_name(cluster: LocalCluster, tmp_path: Path) -> None:
    """Shows that m1 answers the hello of m2 with m2's certificate, and no other; and that its log names who came."""
    m2 = leaf_files(cluster.certificates, Role.MASTER, "m2")
    assert b"m1" in answer(cluster, m2, "m2")
    said = answer(cluster, None, "m2", plain=True)
    assert b"m1" not in said
    for what, files in strangers(cluster, tmp_path).items():
        assert answer(cluster, files, "m2") == b"", what
    others = [
        (leaf_files(cluster.certificates, Role.MASTER, "m3"), "coordinator://local/master/m3"),
        (certified(cluster, tmp_path / "op", Role.OPERATOR, "ann").files, "coordinator://local/operator/ann"),
        (leaf_files(cluster.certificates, Role.WORKER, "w1"), "coordinator://local/worker/w1"),
    ]
    for files, _ in others:
        assert answer(cluster, files, "m2") == b""
    log = cluster.process("m1").log

    def is_named() -> bool:
        text = log.read_text()
        named = (f"it calls itself 'm2', but its certificate is of {uri}" in text for _, uri in others)
        return all(named) and "it speaks plain text" in text and "certificate has expired" in text

    wait_until(is_named, TIMEOUT_S, "m1 names them all")
    cluster.wait_leader()


async def is_forbidden(channel: Any, method: str) -> bool:
    """Makes a call with an empty message, which changes nothing; True when the role may not make it."""
    refusal = await failure_of(channel, method)
    if refusal is None or refusal.code() is not grpc.StatusCode.PERMISSION_DENIED:
        assert refusal is None or refusal.code() is not grpc.StatusCode.UNAUTHENTICATED, refusal.details()
        return False
    assert f"may not call {method.rpartition('.')[2]}: its role is" in str(refusal.details())
    return True


async def failure_of(channel: Any, method: str) -> aio.AioRpcError | None:
    """How a call with an empty message fails; None when it is answered."""
    try:
        if method in STREAMS_IN + STREAMS_OUT:
            # The message leaves together with the call, also where a stream of them is expected: grpc's client loses
            # the status of a call that is refused while it writes.
            events = channel.unary_stream(method)(b"", timeout=TIMEOUT_S)
            await events.read()
            events.cancel()
        else:
            await channel.unary_unary(method)(b"", timeout=TIMEOUT_S)
    except aio.AioRpcError as error:
        return error
    return None


@pytest.mark.parametrize("role", list(Role))
async def test_the_whole_table_over_the_wire(cluster: LocalCluster, tmp_path: Path, role: Role) -> None:
    """Shows for one role and every call that who serves it refuses it exactly where the table says so."""
    shown = certified(cluster, tmp_path, role, "somebody")
    places = {
        Role.MASTER: cluster.config.masters[0].grpc_address,
        Role.WORKER: cluster.client().list_nodes().nodes[0].node.grpc_address,
    }
    for server, address in places.items():
        served = [one for one in ALLOWED if one.startswith(OF_WORKERS) == (server is Role.WORKER)]
        async with open_channel(address, channel_options(), shown, server) as channel:
            asked = [is_forbidden(channel, method) for method in served]
            found = dict(zip(served, await asyncio.gather(*asked), strict=True))
        assert found == {method: not is_allowed(role, method) for method in served}


async def test_a_session_is_for_the_certificates_holder(cluster: LocalCluster, tmp_path: Path) -> None:
    """Shows that a worker cannot open a session under another worker's name."""
    shown = certified(cluster, tmp_path, Role.WORKER, "w7")
    leader = cluster.client().get_status().leader_id
    address = next(one.grpc_address for one in cluster.config.masters if one.id == leader)
    said = session_pb2.Hello(
        node=types_pb2.Node(id="w1", weight=1.0, incarnation="i"), cluster_name="local", protocol_version=1
    )
    channel: Any
    async with open_channel(address, channel_options(), shown) as channel:
        stream = channel.stream_stream("/coordinator.api.v1.SessionService/Open")(timeout=TIMEOUT_S)
        await stream.write(session_pb2.OpenRequest(hello=said).SerializeToString())
        with pytest.raises(aio.AioRpcError) as caught:
            await stream.read()
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "worker/w7 may not open a session as worker 'w1'" in str(caught.value.details())


@pytest.fixture
def sibling(cluster: LocalCluster, tmp_path: Path) -> Credentials:
    """An operator of another cluster with the same authority key: what a careless copy of the authority makes."""
    identity = Identity("other", Role.OPERATOR, "ann")
    create_authority(tmp_path / "other", "other", NOW)
    (tmp_path / "other" / "authority.key").write_bytes((cluster.certificates / "authority.key").read_bytes())
    (tmp_path / "other" / "authority.crt").write_bytes((cluster.certificates / "authority.crt").read_bytes())
    return Credentials(identity, issue_for_other_cluster(tmp_path / "other", identity))


def issue_for_other_cluster(directory: Path, identity: Identity) -> CertificateFiles:
    """Issues what `issue` refuses to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coordinator.security.certificates._authority_cluster", lambda certificate: identity.cluster)
        return issue(directory, identity, NOW)


async def test_another_clusters_operator_is_refused(cluster: LocalCluster, sibling: Credentials) -> None:
    """Shows that a certificate of our authority that names another cluster may call nothing."""
    named = [*channel_options(), *tls.channel_options(cluster.config.name, Role.MASTER)]
    address = cluster.config.masters[0].grpc_address
    channel = aio.secure_channel(address, tls.channel_credentials(sibling.files), options=named)
    assert await health_status(channel) is grpc.StatusCode.UNAUTHENTICATED


def test_clusterctl_says_in_words_why_it_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    """Shows one clear line without noise of gRPC for an operator of another authority and for a reader's change."""
    ensure(tmp_path / "foreign", cluster.config.name, [(Role.OPERATOR, "eve")])
    certified(cluster, tmp_path / "ours", Role.READER, "bob")
    address = cluster.config.masters[0].grpc_address
    for directory, arguments, words in (
        ("foreign", ["status"], "can be talked to: its certificate is not accepted"),
        ("ours", ["nodes", "remove", "w1"], "bob may not call ClusterService/RemoveNode: its role is reader, and"),
    ):
        shown = ["--address", address, "--certificate-directory", str(tmp_path / directory)]
        ended = subprocess.run(
            [str(program("clusterctl")), *shown, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 1
        errors = [line for line in ended.stderr.splitlines() if "issue it again" not in line]
        assert words in " ".join(" ".join(errors).split())
        assert errors[0].startswith("error: ")
        assert all(line.startswith("       ") for line in errors[1:])


def test_private_keys_stay_in_their_files(cluster: LocalCluster) -> None:
    """Shows that no log and nothing in the data directories holds a key, and that only the owner may read one."""
    cluster.wait_leader()
    keys = list(cluster.certificates.glob("*.key"))
    secrets = [line.encode() for key in keys for line in key.read_text().splitlines()[1:-1]]
    assert len(secrets) >= len(keys) == 7
    for path in [*cluster.directory.joinpath("logs").rglob("*"), *cluster.directory.joinpath("data").rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert b"PRIVATE KEY" not in content, path
            assert not any(secret in content for secret in secrets), path


def test_the_worker_certificate_is_bound_to_the_role(cluster: LocalCluster, ports: list[tuple[str, Role]]) -> None:
    """Shows that a worker's port cannot pass for a master's, although its certificate is of the same authority."""
    (address, _), operator = ports[-1], cluster.credentials()
    assert operator is not None
    host, _, port = address.rpartition(":")
    name = role_dns_name(cluster.config.name, Role.MASTER)
    with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
        with pytest.raises(ssl.SSLCertVerificationError):
            operator.client_context().wrap_socket(connection, server_hostname=name)


def test_plain_text_has_to_be_asked_for_and_is_told(tmp_path: Path) -> None:
    """Shows that a cluster in plain text works when its configuration says so, with one warning in each log."""

    def plain(config: ClusterConfig) -> ClusterConfig:
        return dataclasses.replace(config, security=SecuritySettings(mode="plaintext"))

    with LocalCluster(tmp_path, masters=1, workers=2, change=plain) as cluster:
        cluster.start()
        cluster.wait_ready(60.0)
        assert not cluster.certificates.exists()
        for daemon in ("m1", "w1"):
            assert cluster.process(daemon).log.read_text().count("anybody who can connect may") == 1


def test_a_daemon_without_its_certificate_says_what_it_needs(tmp_path: Path) -> None:
    """Shows one line and exit status 1 for a missing certificate, another's, and one whose time is over."""
    with LocalCluster(tmp_path, masters=1, workers=1) as cluster:
        master = leaf_files(cluster.certificates, Role.MASTER, "m1")
        worker = leaf_files(cluster.certificates, Role.WORKER, "w1")
        master.certificate.unlink()
        worker.certificate.write_bytes(cluster_operator(cluster).files.certificate.read_bytes())
        cluster.start()
        for daemon, words in (("m1", "no such certificate"), ("w1", "operator/admin, but that of")):
            process = cluster.process(daemon)
            assert process.wait(TIMEOUT_S)
            assert process.exit_status == 1
            (line,) = [line for line in process.log.read_text().splitlines() if "Traceback" in line or daemon in line]
            assert words in line
        issue(cluster.certificates, Identity("local", Role.MASTER, "m1"), NOW - datetime.timedelta(days=9), 3)
        cluster.start(["m1"])
        assert cluster.process("m1").wait(TIMEOUT_S)
        assert "its time was over on" in cluster.process("m1").last_words()
        assert "certs issue --role master --id m1" in cluster.process("m1").last_words()


def cluster_operator(cluster: LocalCluster) -> Credentials:
    """The operator's credentials."""
    found = cluster.credentials()
    assert found is not None
    return found
