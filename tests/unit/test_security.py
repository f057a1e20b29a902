"""Certificates, TLS contexts and the table of roles and calls."""

from __future__ import annotations

import datetime
import ssl
import stat
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from coordinator.api.v1 import cluster_pb2, cron_pb2, launch_pb2, replication_pb2, session_pb2, state_pb2
from coordinator.model.errors import ConfigError, InvalidRequest
from coordinator.security import authorization, credentials, tls
from coordinator.security.certificates import (
    CertificateFiles,
    Identity,
    Role,
    create_authority,
    describe,
    id_dns_name,
    issue,
    parse_identity,
    role_dns_name,
)

NOW = datetime.datetime.now(datetime.UTC)


def handshake(server: CertificateFiles, client: CertificateFiles, name: str) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Shakes hands in memory; raises ssl.SSLError when either side refuses the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = tls.client_context(client).wrap_bio(to_client, to_server, server_hostname=name)
    two = tls.server_context(server).wrap_bio(to_server, to_client, server_side=True)
    waiting = [one, two]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
        if not waiting:
            # TLS 1.3 refuses a client only after the client believes it is done.
            two.write(b"x")
            one.read(1)
            return one, two
    raise AssertionError("the handshake hangs")


def test_two_masters_recognise_each_other(tmp_path: Path) -> None:
    """Shows that leaf certificates of one authority make a mutual connection, with both identities readable."""
    create_authority(tmp_path, "fleet", NOW)
    m1, m2 = (Identity("fleet", Role.MASTER, name) for name in ("m1", "m2"))
    client, server = handshake(issue(tmp_path, m1, NOW), issue(tmp_path, m2, NOW), id_dns_name(m1))
    assert tls.peer_identity(client.getpeercert()) == m1
    assert tls.peer_identity(server.getpeercert()) == m2


def test_a_wrong_name_is_refused(tmp_path: Path) -> None:
    """Shows that a master that answers under another's name is refused by who dials."""
    create_authority(tmp_path, "fleet", NOW)
    m1, m2 = (Identity("fleet", Role.MASTER, name) for name in ("m1", "m2"))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(issue(tmp_path, m1, NOW), issue(tmp_path, m2, NOW), id_dns_name(Identity("fleet", Role.MASTER, "m3")))


def test_a_foreign_authority_is_refused_on_both_sides(tmp_path: Path) -> None:
    """Shows that a certificate of another authority is refused, whoever shows it."""
    m1 = Identity("fleet", Role.MASTER, "m1")
    files = []
    for name in ("ours", "theirs"):
        create_authority(tmp_path / name, "fleet", NOW)
        files.append(issue(tmp_path / name, m1, NOW))
    for server, client in (files, files[::-1]):
        with pytest.raises(ssl.SSLError):
            handshake(server, client, id_dns_name(m1))


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    """Shows that a certificate whose time is over makes no connection."""
    create_authority(tmp_path, "fleet", NOW)
    m1, m2 = (Identity("fleet", Role.MASTER, name) for name in ("m1", "m2"))
    old = issue(tmp_path, m1, NOW - datetime.timedelta(days=10), days=5)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(old, issue(tmp_path, m2, NOW), id_dns_name(m1))


def test_only_daemons_may_serve(tmp_path: Path) -> None:
    """Shows that an operator's certificate cannot pose as a master's server."""
    create_authority(tmp_path, "fleet", NOW)
    operator = issue(tmp_path, Identity("fleet", Role.OPERATOR, "ann"), NOW)
    m1 = issue(tmp_path, Identity("fleet", Role.MASTER, "m1"), NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(operator, m1, role_dns_name("fleet", Role.MASTER))


def test_keys_are_private_and_authorities_are_not_overwritten(tmp_path: Path) -> None:
    """Shows that keys have mode 0600, that nothing is left over, and that a second authority is refused."""
    create_authority(tmp_path, "fleet", NOW)
    files = issue(tmp_path, Identity("fleet", Role.WORKER, "w1"), NOW)
    issue(tmp_path, Identity("fleet", Role.WORKER, "w1"), NOW)
    if sys.platform != "win32":
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.key")} == {0o600}
    assert not list(tmp_path.glob("*.new"))
    assert describe(files.certificate).identity == Identity("fleet", Role.WORKER, "w1")
    assert describe(files.authority).is_authority
    with pytest.raises(InvalidRequest, match="already"):
        create_authority(tmp_path, "fleet", NOW)


@pytest.mark.parametrize("cluster", ["fleet", "Fleet 2/β", "a_b.c"])
def test_identities_round_trip(cluster: str) -> None:
    """Shows that any cluster name and id survive the way through the certificate's URI."""
    identity = Identity(cluster, Role.SERVICE, "x/y z")
    assert parse_identity(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "http://fleet/master/m1",
        "coordinator://fleet/king/m1",
        "coordinator://f/master/",
        "coordinator:///master/m1",
        "coordinator://[/master/m1",
        "COORDINATOR://fleet/master/m1",
        "coordinator://fleet/master/m%31",
    ],
)
def test_foreign_uris_are_no_identity(uri: str) -> None:
    """Shows that a URI of another kind or with an unknown role names nobody."""
    assert parse_identity(uri) is None


def test_a_certificate_for_somebody_else_is_refused_at_start(tmp_path: Path) -> None:
    """Shows that a daemon with the certificate of another daemon, or none, is told so in one line."""
    create_authority(tmp_path, "fleet", NOW)
    files = issue(tmp_path, Identity("fleet", Role.MASTER, "m1"), NOW)
    with pytest.raises(ConfigError, match="is of coordinator://fleet/master/m1"):
        credentials.load(files, "fleet", Role.MASTER, "m2")
    files.certificate.write_text("rubbish")
    with pytest.raises(ConfigError, match="not a certificate"):
        credentials.load(files, "fleet", Role.MASTER, "m1")


@pytest.mark.parametrize("names", [("m1", "M1"), ("a.b", "a_b"), ("x" * 63, "x" * 62 + "y"), ("h-a", "h-b")])
def test_dns_names_are_labels_and_distinct(names: tuple[str, str]) -> None:
    """Shows that any two ids have different names, each of them one that TLS can check."""
    made = [id_dns_name(Identity("Fleet_2" * 9, Role.MASTER, name)) for name in names]
    assert len(set(made)) == 2
    assert all(name.encode("idna").decode() == name for name in made)


def services() -> list[ServiceDescriptor]:
    own = (cluster_pb2, cron_pb2, session_pb2, state_pb2, replication_pb2, launch_pb2)
    modules = (*own, health_pb2, reflection_pb2)
    return [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]


def test_the_table_names_every_call_and_no_other() -> None:
    """Shows that each method that a daemon serves stands in the table of roles, and nothing else does."""
    methods = {f"/{service.full_name}/{method.name}" for service in services() for method in service.methods}
    assert methods == set(authorization.ALLOWED)


def test_the_whole_table() -> None:
    """Shows for every role and every call whether it is allowed, against the rule in words."""
    changes = {"DrainNode", "UndrainNode", "RemoveNode", "SetNodeWeight", "SplitShard", "MergeShards"}
    changes |= {"ReleaseShard"}
    changes |= {"ChangeSettings", "AbortMove", "ApplyJobs", "DeleteJob", "SetJobPaused", "TransferLeadership", "Backup"}
    changes |= {"ReplaceMaster", "CancelLaunches"}
    for method in authorization.ALLOWED:
        name = method.rsplit("/", 1)[1]
        for role in Role:
            if name == "Open":
                expected = role is Role.WORKER
            elif "StateService" in method:
                is_content = name != "DescribeUser"
                expected = role is not Role.MASTER and (role is not Role.READER or not is_content)
            elif name == "TriggerJob":
                expected = role in (Role.OPERATOR, Role.SERVICE, Role.MASTER)
            else:
                expected = role in (Role.OPERATOR, Role.MASTER) or name not in changes
            assert authorization.is_allowed(role, method) is expected, (role, method)
        assert not authorization.is_allowed(None, method)
    assert not authorization.is_allowed(Role.OPERATOR, "/coordinator.api.v1.ClusterService/Unknown")
