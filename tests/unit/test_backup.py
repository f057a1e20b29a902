"""Backups: the file, the state that a restore makes of it, and the directories that masters start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import command_pb2, snapshot_pb2, types_pb2
from coordinator.cli import main as cli_main
from coordinator.config import ClusterConfig, MasterSettings
from coordinator.config_file import render
from coordinator.machine.backup import (
    EPOCH_LEAP,
    INDEX_LEAP,
    TERM_LEAP,
    Backup,
    check_restored_id,
    decode_backup,
    encode_backup,
    restored_id,
    restored_state,
    restored_term,
)
from coordinator.machine.machine import apply
from coordinator.machine.state import State
from coordinator.machine.validate import validate, validate_step
from coordinator.model.errors import Damaged, InvalidRequest, Refused
from coordinator.raft.identity import Identity
from coordinator.raft.journal import Journal
from coordinator.raft.restore import require_empty, write_master
from coordinator.raft.snapshot import decode_file
from coordinator.security.certificates import Role
from coordinator.security.provision import ensure
from tests.machine_driver import MachineDriver

NONCE = "0123456789abcdef"
HEADER = snapshot_pb2.BackupHeader(cluster_name="local", term=7, taken_unix_ms=1_700_000_000_000, master_id="m2")


def some_state() -> State:
    """A cluster with workers, assigned and unassigned shards, and a move in progress."""
    driver = MachineDriver()
    driver.bootstrap()
    for name in "abc":
        driver.add_worker(name)
    driver.assign(1, "a", "b")
    driver.start_move(1, "a", "c", types_pb2.MOVE_KIND_BALANCE)
    return driver.state


def some_backup(state: State | None = None) -> Backup:
    """What a file of that state holds."""
    return decode_backup(encode_backup(HEADER, state or some_state()), "file")


def test_what_was_backed_up_comes_back() -> None:
    """The state is whole, and the header says of what and when it is."""
    state = some_state()
    backup = some_backup(state)
    assert backup.state == state
    assert (backup.header.index, backup.header.cluster_id) == (state.index, "c1")
    assert (backup.header.term, backup.header.master_id) == (7, "m2")


def test_every_damage_is_found() -> None:
    """Each flipped byte and each cut raises Damaged with the file's name, in one line."""
    content = encode_backup(HEADER, some_state())
    damaged = [content[:size] for size in range(len(content))]
    damaged += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(len(content))]
    for data in (*damaged, content + b"x"):
        with pytest.raises(Damaged, match=r"^some file: [^\n]*$"):
            decode_backup(data, "some file")


def test_a_newer_format_is_named() -> None:
    """A file of a later version says so, instead of looking damaged."""
    content = bytearray(encode_backup(HEADER, some_state()))
    content[7] += 1
    with pytest.raises(Damaged, match="version 2 of the format, this clusterctl reads 1; use a newer one"):
        decode_backup(bytes(content), "file")


def test_the_restored_state_is_ahead_of_everything_and_otherwise_the_same() -> None:
    """Index, epochs, term and next ids leap; workers, ranges, replicas, moves, jobs and story stay; it goes on."""
    state, backup = some_state(), some_backup()
    restored = restored_state(backup, restored_id(backup, NONCE))
    validate(restored)
    assert restored.index == state.index + INDEX_LEAP
    assert restored_term(backup) == 7 + TERM_LEAP
    assert restored.shards[1].epoch == state.shards[1].epoch + EPOCH_LEAP
    assert restored.shards[2].epoch == 0
    assert min(restored.next_shard_id - state.next_shard_id, restored.next_move_id - state.next_move_id) > 0
    same = replace(
        restored,
        cluster_id=state.cluster_id,
        index=state.index,
        shards=state.shards,
        next_shard_id=state.next_shard_id,
        next_move_id=state.next_move_id,
    )
    assert same == state
    assert [replace(restored.shards[id], epoch=0) for id in state.shards] == [
        replace(shard, epoch=0) for shard in state.shards.values()
    ]
    command = command_pb2.Command(drain_node=command_pb2.DrainNode(node_id="a"))
    after = apply(restored, command, restored.index + 2, restored.time_ms)
    assert after.result.WhichOneof("outcome") == "applied"
    validate(after.state)
    validate_step(restored, after.state)
    assert restored_state(backup, "x", pause_cron=True).settings.cron_paused


def test_an_identity_belongs_to_one_backup() -> None:
    """The id that one restore printed is taken with the same file only."""
    backup, other = some_backup(), some_backup(replace(some_state(), next_move_id=99))
    made = restored_id(backup, NONCE)
    assert len(made) == 32
    check_restored_id(backup, made)
    for wrong in (restored_id(other, NONCE), made[:-1], made.upper(), "c1"):
        with pytest.raises(InvalidRequest, match="is not of this backup"):
            check_restored_id(backup, wrong)


def test_a_restored_directory_is_what_a_master_starts_from(tmp_path: Path) -> None:
    """It has the snapshot, the term, no vote, and the identity; a master of another name refuses it."""
    backup = some_backup()
    state = restored_state(backup, restored_id(backup, NONCE))
    directory = tmp_path / "m1"
    write_master(directory, "local/m1", state, 1_000_007)
    snapshot = decode_file((directory / "snapshot").read_bytes(), "snapshot")
    assert snapshot.state == state
    assert snapshot.last[1:] == (state.index + 1, 1_000_007)
    assert Identity(directory).cluster_id == state.cluster_id
    journal = Journal(directory, "local/m1")
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (1_000_007, None)
    journal.align(snapshot.before, snapshot.last)
    assert len(journal) == 2
    journal.close()
    with pytest.raises(Damaged, match="belongs to local/m1"):
        Journal(directory, "local/m2")


def test_a_directory_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    """One line names the directory and a file of it; what a daemon leaves without state does not count."""
    require_empty(tmp_path / "missing")
    (tmp_path / "lock").write_text("1\n")
    require_empty(tmp_path)
    (tmp_path / "vote.json").write_text("{}")
    with pytest.raises(Refused, match=r"has state \(vote.json\); a restore never overwrites any"):
        require_empty(tmp_path)


def test_half_a_restore_does_not_start(tmp_path: Path) -> None:
    """A directory whose restore was interrupted before the snapshot is refused by master and restore."""
    backup = some_backup()
    write_master(tmp_path / "m1", "local/m1", restored_state(backup, restored_id(backup, NONCE)), 1_000_007)
    (tmp_path / "m1" / "snapshot").unlink()
    with pytest.raises(Damaged, match="the log is gone"):
        Journal(tmp_path / "m1", "local/m1")
    with pytest.raises(Refused, match="has state"):
        require_empty(tmp_path / "m1")


def test_an_identity_is_never_changed(tmp_path: Path) -> None:
    """A directory learns one identity, keeps it over a restart, and refuses another one and a damaged file."""
    identity = Identity(tmp_path)
    identity.learn("")
    assert identity.cluster_id == ""
    identity.learn("c1")
    identity.learn("c1")
    assert Identity(tmp_path).cluster_id == "c1"
    with pytest.raises(Damaged, match="belongs to cluster c1, but its state to c2"):
        identity.learn("c2")
    for content in (b"", b"{}", b'{"cluster_id": "c1", "crc32": 1}', b"[]", b"\xff"):
        (tmp_path / "identity.json").write_bytes(content)
        with pytest.raises(Damaged, match=r"identity.json, offset 0"):
            Identity(tmp_path)


class TestCommands:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Path:
        """A configuration of three masters."""
        masters = tuple(
            MasterSettings(f"m{n}", f"127.0.0.1:71{n}", f"127.0.0.1:72{n}", f"127.0.0.1:73{n}") for n in (1, 2, 3)
        )
        path = tmp_path / "cluster.toml"
        path.write_text(render(ClusterConfig(masters=masters)))
        return path

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """A backup file."""
        path = tmp_path / "state.backup"
        path.write_bytes(encode_backup(HEADER, some_state()))
        return path

    def test_verify(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A sound file is described, a damaged one and a missing one are errors of one line."""
        assert cli_main.run(["backup", "--verify", str(file)]) == 0
        assert "3 workers, 4 shards, 0 cron jobs" in capsys.readouterr().out
        assert cli_main.run(["backup", "--verify", str(file), "-o", "json"]) == 0
        assert '"cluster_id": "c1"' in capsys.readouterr().out
        file.write_bytes(file.read_bytes()[:-1])
        assert cli_main.run(["backup", "--verify", str(file)]) == 1
        assert "use another backup" in capsys.readouterr().err
        assert cli_main.run(["backup", "--verify", str(file.with_name("gone"))]) == 1
        assert "cannot be read" in capsys.readouterr().err

    def test_a_failed_backup_leaves_the_old_file(
        self, file: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without a cluster the file stays as it was, and nothing else is left beside it."""
        certificates = tmp_path_factory.mktemp("certificates")
        ensure(certificates, "fleet", [(Role.OPERATOR, "ann")])
        shown = ["--certificate-directory", str(certificates)]
        before = file.read_bytes()
        assert cli_main.run(["--address", "127.0.0.1:1", *shown, "--timeout", "1", "backup", str(file)]) == 3
        assert "cannot reach the cluster" in " ".join(capsys.readouterr().err.split())
        assert file.read_bytes() == before
        assert [path.name for path in file.parent.iterdir() if path != file.parent / "cluster.toml"] == [file.name]

    def test_restore_of_one_after_the_other(
        self, config: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The first restore prints the id that the others take; all get the same state; none is overwritten."""
        assert cli_main.run(["restore", str(file), "--config", str(config), "--id", "m1"]) == 0
        said = capsys.readouterr().out
        cluster_id = Identity(tmp_path / "data" / "m1").cluster_id
        assert f"--id m2 --id m3 --cluster-id {cluster_id}" in said
        assert f"worker-agent --accept-cluster {cluster_id}" in said
        arguments = ["restore", str(file), "--config", str(config), "--cluster-id", cluster_id]
        assert cli_main.run([*arguments, "--id", "m2", "--id", "m3"]) == 0
        snapshots = {(tmp_path / "data" / f"m{n}" / "snapshot").read_bytes() for n in (1, 2, 3)}
        assert len(snapshots) == 1
        capsys.readouterr()
        assert cli_main.run([*arguments, "--id", "m3"]) == 1
        assert "has state" in capsys.readouterr().err

    def test_restore_of_all_looks_before_it_writes(
        self, config: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """When the last directory has state, the first one is not written either."""
        (tmp_path / "elsewhere" / "m3").mkdir(parents=True)
        (tmp_path / "elsewhere" / "m3" / "snapshot").write_text("")
        arguments = ["restore", str(file), "--config", str(config), "--all"]
        assert cli_main.run([*arguments, "--into", str(tmp_path / "elsewhere")]) == 1
        assert "a restore never overwrites any" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "elsewhere" / "m1").exists()
        assert cli_main.run(arguments) == 0
        assert "next: start all masters" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "status", "said"),
        [
            (["--id", "m9"], 1, "'m9' is not a master of this configuration"),
            (["--id", "m1", "--cluster-id", "c1"], 1, "is not of this backup"),
            ([], 2, "name the masters with --id ID, or use --all"),
            (["--all", "--id", "m1"], 2, "name the masters with --id ID, or use --all"),
        ],
    )
    def test_wrong_restores_write_nothing(
        self,
        config: Path,
        file: Path,
        arguments: list[str],
        status: int,
        said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Each is refused in words, before anything is made."""
        assert cli_main.run(["restore", str(file), "--config", str(config), *arguments]) == status
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (config.parent / "data").exists()
