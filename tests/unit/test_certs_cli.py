"""clusterctl certs, which works on files alone, and how clusterctl and node-join find certificates."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
from pathlib import Path

import pytest

from coordinator.cli import main as cli_main
from coordinator.cli.certs import certs_text
from coordinator.cli.session import CERTIFICATES_VARIABLE, CONFIG_VARIABLE, Session
from coordinator.config import ClusterConfig, MasterSettings, SecuritySettings
from coordinator.config_file import parse, render
from coordinator.model.errors import ConfigError, InvalidRequest
from coordinator.security import credentials
from coordinator.security.certificates import Identity, Role, create_authority, describe, issue, leaf_files
from coordinator.security.provision import ensure, ensure_cluster, is_good
from tools.lib.node_join import certify
from tools.lib.node_place import NodeError, Place

NOW = datetime.datetime.now(datetime.UTC)
MASTERS = (MasterSettings("m1", "127.0.0.1:7101", "127.0.0.1:7151", "127.0.0.1:7201"),)
CONFIG = ClusterConfig(name="fleet", masters=MASTERS)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that nothing else is found from."""
    for name in (CERTIFICATES_VARIABLE, CONFIG_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What clusterctl says when it fails, on one line."""
    assert cli_main.run(list(arguments)) == 1
    return " ".join(capsys.readouterr().err.split())


def test_from_nothing_to_a_certificate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shows init, issue and show in a row, for people and for scripts, without a cluster or a configuration."""
    assert cli_main.run(["certs", "init", "--name", "fleet"]) == 0
    assert "keep certificates/authority.key secret" in " ".join(capsys.readouterr().out.replace("\\", "/").split())
    assert cli_main.run(["certs", "issue", "--role", "worker", "--id", "w4", "--days", "20", "--to", "for-w4"]) == 0
    assert "coordinator://fleet/worker/w4" in capsys.readouterr().out
    assert sorted(path.name for path in (place / "for-w4").iterdir()) == [
        "authority.crt",
        "worker-w4.crt",
        "worker-w4.key",
    ]
    assert cli_main.run(["certs", "show", "--directory", "for-w4", "-o", "json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["certificates"]
    assert (first["role"], first["id"], first["cluster"], first["ends_soon"]) == ("authority", "", "fleet", False)
    assert (second["role"], second["id"], second["cluster"], second["ends_soon"]) == ("worker", "w4", "fleet", True)
    assert second["days_left"] == 19
    assert len(second["fingerprint_sha256"]) == 64
    assert cli_main.run(["certs", "show", "for-w4/worker-w4.crt"]) == 0
    said = capsys.readouterr().out
    assert "warning: worker-w4.crt ends in 19 days" in said
    assert second["fingerprint_sha256"][:16] in said


def test_the_cluster_is_named_by_its_configuration(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shows that beside a cluster.toml nothing has to be said: name and directory come from there."""
    config = dataclasses.replace(CONFIG, security=SecuritySettings(directory="keys"))
    (place / "cluster.toml").write_text(render(config))
    assert cli_main.run(["certs", "init"]) == 0
    assert cli_main.run(["certs", "issue", "--role", "operator", "--id", "ann"]) == 0
    found = Session().credentials()
    assert found is not None
    assert found.identity == Identity("fleet", Role.OPERATOR, "ann")
    assert found.files.key == place.resolve() / "keys" / "operator-ann.key"


def test_what_cannot_be_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shows the line for each thing that is missing or wrong."""
    assert "--name CLUSTER" in failed(capsys, "certs", "init")
    assert "make one with `clusterctl certs init`" in failed(capsys, "certs", "issue", "--role", "reader", "--id", "x")
    assert "no certificate there" in failed(capsys, "certs", "show")
    assert "cannot be the cluster" in failed(capsys, "certs", "init", "--name", "a/b")
    assert cli_main.run(["certs", "init", "--name", "fleet"]) == 0
    assert "there is an authority" in failed(capsys, "certs", "init", "--name", "fleet")
    assert "cannot be the id" in failed(capsys, "certs", "issue", "--role", "reader", "--id", "../../x")
    (place / "rubbish.crt").write_text("rubbish")
    assert "not a certificate" in failed(capsys, "certs", "show", "rubbish.crt")
    (place / "certificates" / "authority.key").unlink()
    said = failed(capsys, "certs", "issue", "--role", "reader", "--id", "x")
    assert "authority.key: no such key; issue certificates where the authority was made" in said
    assert sorted(path.name for path in (place / "certificates").iterdir()) == ["authority.crt"]


def test_a_client_without_a_certificate_is_told_what_to_do(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shows the line when no certificate is found, when there are several, and when the one named is missing."""
    assert "no certificate to show to the cluster" in failed(capsys, "status")
    (place / "cluster.toml").write_text(render(CONFIG))
    assert "no operator-*.crt there" in failed(capsys, "status")
    ensure(place / "certificates", "fleet", [(Role.OPERATOR, "ann"), (Role.OPERATOR, "bob"), (Role.READER, "eve")])
    assert "there are operator-ann, operator-bob; say which one with --as NAME" in failed(capsys, "status")
    said = failed(capsys, "--as", "zoe", "status")
    assert "no certificate of 'zoe' there, only operator-ann, operator-bob, reader-eve" in said
    for name in ("eve", "reader-eve"):
        found = Session(identity_name=name).credentials()
        assert found is not None
        assert found.identity.role is Role.READER


def test_where_a_certificate_is_looked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows the order: the option, the environment, the configuration; and that plain text needs none."""
    for name in ("option", "environment", "certificates"):
        ensure(place / name, "fleet", [(Role.OPERATOR, name)])
    (place / "cluster.toml").write_text(render(CONFIG))

    def found(directory: str | None) -> str:
        session = Session(certificate_directory=Path(directory) if directory else None)
        chosen = session.credentials()
        assert chosen is not None
        return chosen.identity.id

    assert found(None) == "certificates"
    monkeypatch.setenv(CERTIFICATES_VARIABLE, str(place / "environment"))
    assert found(None) == "environment"
    assert found("option") == "option"
    plain = dataclasses.replace(CONFIG, security=SecuritySettings(mode="plaintext"))
    (place / "cluster.toml").write_text(render(plain))
    assert Session().credentials() is None


def test_another_clusters_certificate_is_refused(tmp_path: Path) -> None:
    """Shows that a client's certificate must be of the configuration's cluster, and an authority signs for its own."""
    ensure(tmp_path, "other", [(Role.OPERATOR, "ann")])
    with pytest.raises(ConfigError, match="coordinator://fleet/operator/ann is needed"):
        credentials.of_client(CONFIG, directory=tmp_path)
    with pytest.raises(ConfigError, match="of cluster 'other', not of 'fleet'"):
        issue(tmp_path, Identity("fleet", Role.OPERATOR, "ann"), NOW)


def test_keys_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    """Shows that a certificate with another's key, or an authority with another's key, is refused before use."""
    ensure(tmp_path, "fleet", [(Role.MASTER, "m1"), (Role.MASTER, "m2")])
    first, second = (leaf_files(tmp_path, Role.MASTER, name) for name in ("m1", "m2"))
    first.key.write_bytes(second.key.read_bytes())
    with pytest.raises(ConfigError, match="does not go with"):
        credentials.load(first)
    (tmp_path / "authority.key").write_bytes(second.key.read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        issue(tmp_path, Identity("fleet", Role.MASTER, "m1"), NOW)


def test_a_leaf_does_not_outlive_its_authority(tmp_path: Path) -> None:
    """Shows that the end of a certificate is at most the authority's, and that an ended authority issues nothing."""
    create_authority(tmp_path / "late", "fleet", NOW - datetime.timedelta(days=3_600))
    files = issue(tmp_path / "late", Identity("fleet", Role.READER, "x"), NOW)
    assert describe(files.certificate).valid_until == describe(files.authority).valid_until
    create_authority(tmp_path / "over", "fleet", NOW - datetime.timedelta(days=4_000))
    with pytest.raises(ConfigError, match="make another authority"):
        issue(tmp_path / "over", Identity("fleet", Role.READER, "x"), NOW)
    found = [(files.authority, describe(tmp_path / "over" / "authority.crt"))]
    assert "authority.crt has ended; make another authority" in certs_text(found, NOW)


def test_a_tool_keeps_what_is_good(tmp_path: Path) -> None:
    """Shows that a second start changes no file, and that what is missing or ends soon is made again."""
    ensure_cluster(tmp_path, CONFIG, ["w1"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stems = ("authority", "master-m1", "operator-admin", "worker-w1")
    assert set(before) == {f"{stem}.{kind}" for stem in stems for kind in ("crt", "key")}
    ensure_cluster(tmp_path, CONFIG, ["w1"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    issue(tmp_path, Identity("fleet", Role.WORKER, "w1"), NOW, days=5)
    (tmp_path / "master-m1.key").unlink()
    ensure_cluster(tmp_path, CONFIG, ["w1"])
    for role, name in ((Role.WORKER, "w1"), (Role.MASTER, "m1")):
        assert is_good(tmp_path, Identity("fleet", role, name), NOW)
    assert (tmp_path / "authority.crt").read_bytes() == before["authority.crt"]


def test_node_join_issues_or_says_what_it_needs(tmp_path: Path) -> None:
    """Shows that a worker gets its certificate where the authority's key is, and else a line with the file's name."""
    ours = dataclasses.replace(CONFIG, security=SecuritySettings(directory=str(tmp_path / "ours")))
    options = argparse.Namespace(certificate_directory=None)
    ensure(tmp_path / "ours", "fleet", [(Role.OPERATOR, "ann")])
    first = Place("w4", tmp_path / "w4")
    certify(first, ours, options)
    assert is_good(first.certificates, Identity("fleet", Role.WORKER, "w4"), NOW)
    assert not list(first.certificates.glob("operator-*"))
    noted = json.loads(first.operator_file.read_text())
    assert noted == {"certificate_directory": str(tmp_path / "ours")}
    (tmp_path / "ours" / "authority.key").unlink()
    certify(first, ours, options)
    with pytest.raises(NodeError, match=r"worker-w5.crt is needed.*authority.key.*--id w5"):
        certify(Place("w5", tmp_path / "w5"), ours, options)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")
def test_a_key_is_never_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that a key file is made with its narrow mode, not narrowed afterwards, whatever the umask."""
    modes: list[int] = []
    really_open = os.open

    def noting(path: object, flags: int, mode: int = 0o777, **rest: object) -> int:
        if str(path).endswith(".key.new"):
            modes.append(mode)
        return really_open(path, flags, mode, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", noting)
    ensure(tmp_path, "fleet", [(Role.WORKER, "w1")])
    assert modes == [0o600, 0o600]


CLUSTER_TOML = """[masters.m1]
grpc_address = "{grpc}:7101"
peer_address = "{peer}:7151"
http_address = "{http}:7201"
[worker]
grpc_address = "{worker}:7301"
[security]
mode = "{mode}"
"""


@pytest.mark.parametrize("exposed", ["grpc", "peer", "worker"])
@pytest.mark.parametrize("host", ["10.0.0.1", "fleet-7.example", "[2001:db8::1]"])
def test_plain_text_is_refused_where_others_can_connect(exposed: str, host: str) -> None:
    """Shows that plain text needs loopback addresses, mutual TLS does not, and that HTTP may be anywhere."""
    loopback = {"grpc": "127.0.0.1", "peer": "localhost", "http": host, "worker": "[::1]"}
    assert parse(CLUSTER_TOML.format(mode="plaintext", **loopback), "cluster.toml").security.mode == "plaintext"
    assert parse(CLUSTER_TOML.format(mode="mtls", **(loopback | {exposed: host})), "cluster.toml")
    with pytest.raises(ConfigError) as caught:
        parse(CLUSTER_TOML.format(mode="plaintext", **(loopback | {exposed: host})), "cluster.toml")
    (problem,) = caught.value.problems
    assert problem.startswith('cluster.toml:8: security.mode = "plaintext" with ')
    assert host in problem
    assert 'use "mtls", or loopback addresses only' in problem


def test_security_options_are_checked() -> None:
    """Shows the line for a mode that does not exist and for an empty folder."""
    for text, expected in (
        ('mode = "none"', 'security.mode = "none" is not known; use "mtls" or "plaintext"'),
        ('directory = ""', 'security.directory = "" is not a folder; use "certificates"'),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(render(CONFIG) + f"[security]\n{text}\n", "cluster.toml")
        assert expected in str(caught.value)


def test_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """Shows that an id that would be a path, or too long, makes no file."""
    create_authority(tmp_path, "fleet", NOW)
    for name in ("../x", "", "x" * 64, "a b"):
        with pytest.raises(InvalidRequest, match="cannot be the id"):
            issue(tmp_path, Identity("fleet", Role.READER, name), NOW)
    assert len(list(tmp_path.iterdir())) == 2
