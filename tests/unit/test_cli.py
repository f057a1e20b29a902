"""clusterctl without a cluster: words, tables, plain structures, job files, help, and what errors look like."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.v1 import cluster_pb2, cron_pb2, types_pb2
from coordinator.cli import main as cli_main
from coordinator.cli import words
from coordinator.cli.cron_file import jobs_of, load_jobs
from coordinator.cli.cron_text import jobs_text, launches_table
from coordinator.cli.events import event_text
from coordinator.cli.masters import masters_table
from coordinator.cli.moves import move_text, moves_table
from coordinator.cli.nodes import node_text, nodes_table
from coordinator.cli.progress import Progress, wait_until
from coordinator.cli.shards import shards_table
from coordinator.cli.status import status_text
from coordinator.cli.structure import to_plain
from coordinator.cli.table import WIDTH, Column, facts, table
from coordinator.config import ClusterConfig, CronSettings
from coordinator.config_file import render
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CatchUpPolicy, CronJobSpec, OverlapPolicy, RetryPolicy
from coordinator.model.errors import ConfigError
from coordinator.security.certificates import Role
from coordinator.security.provision import ensure

EVERY_OPTION = CronJobSpec(
    id="a",
    schedule="@every 1h30m",
    time_zone="Europe/Vienna",
    priority_class=3,
    command=("true", "--now"),
    environment=(("NAME", "value"), ("OTHER", "")),
    timeout_s=5.5,
    working_directory="work",
    user="nobody",
    memory_bytes_max=1 << 30,
    processor_s_max=2.5,
    open_files_max=64,
    required_labels=(("disk", "nvme"),),
    jitter_s=30.0,
    overlap=OverlapPolicy.CANCEL_PREVIOUS,
    overlap_limit=3,
    catch_up=CatchUpPolicy.ALL,
    catch_up_window_s=60.0,
    catch_up_limit=4,
    start_deadline_s=7.0,
    retry=RetryPolicy.ON_FAILURE,
    attempts_max=5,
    retry_backoff_s=2.0,
    retry_backoff_s_max=20.0,
    description="Everything that a job may say",
)
"""No option has its default: a test holds that."""


def all_commands() -> Iterator[tuple[list[str], click.Command]]:
    """Every command of the tree with the words that lead to it."""
    waiting: list[tuple[list[str], click.Command]] = [([], cli_main.cli)]
    while waiting:
        path, command = waiting.pop()
        yield path, command
        if isinstance(command, click.Group):
            waiting += [([*path, name], sub) for name, sub in command.commands.items()]


def free_address() -> str:
    """An address on this machine where nobody answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def assert_fits(text: str) -> None:
    """No line is wider than a table may be."""
    assert [line for line in text.splitlines() if len(line) > WIDTH] == []


class TestWords:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0, "0ms"), (0.85, "850ms"), (4.25, "4.2s"), (42, "42s"), (725, "12m5s"), (3_600, "1h"), (273_600, "3d4h")],
    )
    def test_duration(self, seconds: float, text: str) -> None:
        """Shows durations with their two largest units."""
        assert words.duration(seconds) == text

    def test_local_time_has_an_offset(self) -> None:
        """Shows that a time names its offset from UTC, so that two people read the same moment."""
        zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
        assert words.local_time(1_700_000_000_000, zone) == "2023-11-15 03:43:20+05:30"
        assert words.local_time(0) == "-"

    def test_range_has_both_ends_inside(self) -> None:
        """Shows that the last range ends with the last hash, although its `hi` is written as 0."""
        assert words.range_text(0, 1 << 56) == "0000000000000000..00ffffffffffffff"
        assert words.range_text(255 << 56, 0) == "ff00000000000000..ffffffffffffffff"
        assert words.share(0, 0) == 1.0

    def test_enums_are_short_words(self) -> None:
        """Shows that enums lose the prefix that protobuf asks for, and that an unknown number survives."""
        assert words.enum_name(types_pb2.NodeState.DESCRIPTOR, types_pb2.NODE_STATE_ACTIVE) == "active"
        assert words.word(types_pb2.LaunchState.DESCRIPTOR, types_pb2.LAUNCH_STATE_TIMED_OUT) == "timed out"
        assert words.enum_name(types_pb2.NodeState.DESCRIPTOR, 99) == "99"

    @pytest.mark.parametrize(("part", "text"), [(0, "0.00%"), (1 / 256, "0.39%"), (0.125, "12.5%"), (1, "100%")])
    def test_percent(self, part: float, text: str) -> None:
        """Shows shares with the digits that count."""
        assert words.percent(part) == text


class TestTable:
    def test_wraps_only_what_may_wrap(self) -> None:
        """Shows that a long reason goes on in the next line while ids stay whole."""
        text = table((Column("ID"), Column("WHY", wrap=True)), [["w" * 40, "because " * 20]])
        assert_fits(text)
        assert "w" * 40 in text
        assert text.count("because") == 20

    def test_too_wide_becomes_blocks(self) -> None:
        """Shows that ids which do not fit beside each other come below each other, not cut."""
        row = [letter * 60 for letter in "abc"]
        text = table(tuple(Column(title) for title in ("ONE", "TWO", "THREE")), [row])
        assert_fits(text)
        assert all(cell in text for cell in row)

    def test_figures_line_up_on_the_right(self) -> None:
        """Shows the form of a small table."""
        text = table((Column("ID"), Column("COUNT", right=True)), [["a", "7"], ["bb", "12"]])
        assert text.splitlines() == ["ID  COUNT", "a       7", "bb     12"]

    @given(
        st.lists(
            st.tuples(
                st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=64),
                st.text(st.characters(codec="ascii", categories=["L", "Zs"]), max_size=300),
            ),
            max_size=5,
        )
    )
    def test_ids_are_never_cut(self, rows: list[tuple[str, str]]) -> None:
        """Shows for any ids and reasons that the table shows every id whole, within the width where words allow it."""
        text = table((Column("ID"), Column("WHY", wrap=True)), [list(row) for row in rows])
        for name, why in rows:
            assert name in text
            assert all(word in text for word in why.split())
        if all(len(word) <= 30 for _, why in rows for word in why.split()):
            assert_fits(text)

    def test_facts_wrap_below_their_value(self) -> None:
        """Shows that a long value goes on under its beginning."""
        lines = facts([("name", "word " * 40), ("n", "1")]).splitlines()
        assert lines[1].startswith("      word")
        assert lines[-1] == "n     1"


class TestStructure:
    def test_every_field_is_there(self) -> None:
        """Shows the promise to scripts: names of the .proto files, defaults included, numbers as numbers."""
        plain = to_plain(types_pb2.Shard(id=(1 << 63) + 1, hi=1 << 62, in_sync=["w1", "w2"]))
        assert plain == {
            "id": (1 << 63) + 1,
            "lo": 0,
            "hi": 1 << 62,
            "epoch": 0,
            "primary": "",
            "in_sync": ["w1", "w2"],
            "joining": [],
            "absent": [],
            "generation": 0,
            "moved_unix_ms": 0,
            "formed": False,
            "parents": [],
            "lost_primaries": [],
            "quarantine": "",
        }
        assert json.loads(json.dumps(plain)) == plain

    def test_enums_maps_bytes_and_absence(self) -> None:
        """Shows short enum names, sorted maps, bytes as text, and that an absent message is left out."""
        node = types_pb2.Node(state=types_pb2.NODE_STATE_DRAINING, labels={"b": "2", "a": "1"})
        plain = to_plain(node)
        assert plain["state"] == "draining"
        assert list(plain["labels"].items()) == [("a", "1"), ("b", "2")]  # type: ignore[union-attr]
        assert to_plain(types_pb2.Launch(output=b"caf\xc3\xa9 \xff"))["output"] == "café \ufffd"
        assert "latest" not in to_plain(cron_pb2.CronJobView())


class TestViews:
    def test_status_shows_warnings_first(self) -> None:
        """Shows that what is wrong is what is read first."""
        answer = cluster_pb2.GetStatusResponse(
            cluster_name="demo",
            leader_id="m1",
            problems=["worker w2 is down since 12:00, and 17 shards are short of a replica " * 3],
            nodes_by_state={"active": 2, "down": 1},
            shards=256,
            masters=[cluster_pb2.Master(id="m1", role="leader", grpc_address="127.0.0.1:7101")],
        )
        text = status_text(answer)
        assert text.startswith("warning: worker w2 is down")
        assert "2 active, 1 down" in text
        assert_fits(text)

    def test_tables_fit_with_long_names(self) -> None:
        """Shows that all tables keep the width and the ids with names as long as those of Kubernetes pods."""
        pod, other = "fleet-worker-5d8f7c9b6d-x2vqk", "fleet-worker-5d8f7c9b6d-7hjk2"
        node = types_pb2.Node(id=pod, zone="europe-west1-b", state=types_pb2.NODE_STATE_ACTIVE, weight=1.5)
        view = cluster_pb2.NodeView(node=node, primaries=1234, replicas=5678, connected=True, key_share=0.12)
        shard = types_pb2.Shard(id=65_535, epoch=99_999, primary=pod, in_sync=[other, pod], joining=[other])
        move = types_pb2.Move(id=7, shard_id=9, source=pod, target=other, reason="balance " * 30)
        spec = types_pb2.CronJobSpec(id="nightly_report_of_everything", schedule="*/15 0-6 1,15 * 1-5")
        job = types_pb2.CronJob(spec=spec, owner=pod, backups=[other, pod])
        launch = types_pb2.Launch(job_id=spec.id, worker=pod, reason="its worker was lost " * 5)
        for text in (
            nodes_table([view]),
            node_text(view),
            shards_table([shard]),
            moves_table([move]),
            jobs_text(cron_pb2.ListJobsResponse(jobs=[cron_pb2.CronJobView(job=job)])),
            launches_table([launch]),
        ):
            assert_fits(text)
            assert pod in text

    def test_a_copy_is_seen_while_it_runs(self) -> None:
        """Shows how far a copy is, its rate and what is left of it, in the list and alone; "-" where it is unknown."""
        moves = [types_pb2.Move(id=number, shard_id=9, source="w1", target="w2", reason="balance") for number in (7, 8)]
        progress = cluster_pb2.MoveProgress(
            move_id=7, copied_rows=250, copy_rows=1_000, copied_bytes=3 << 20, bytes_per_s=1_572_864.0, remaining_s=12.0
        )
        header, running, waiting = moves_table(moves, [progress]).splitlines()
        assert re.search(r"COPIED +RATE +LEFT", header)
        assert re.search(r"25\.0% +1\.5 MiB/s +12s", running)
        assert re.search(r"- +- +- +balance", waiting)
        assert "250 of about 1000 rows (25.0%), 3.0 MiB, 1.5 MiB/s, 12s left" in move_text(moves[0], progress)
        assert_fits(moves_table(moves, [progress]))

    def test_unreachable_master_says_why(self) -> None:
        """Shows that a master that does not answer has no figures but a reason."""
        master = cluster_pb2.Master(id="m3", role="unreachable", grpc_address="h:1", problem="connection refused")
        text = masters_table([master])
        assert text.splitlines()[-1] == "m3: connection refused"

    def test_a_wrong_clock_is_named(self) -> None:
        """Shows that the list of masters says whose clock is off, by how much, and what follows."""
        off = cluster_pb2.Master(id="m2", role="follower", clock_offset_ms=-830, clock_is_off=True)
        bad = cluster_pb2.Master(
            id="m3", role="follower", clock_offset_ms=9_996, clock_is_off=True, refuses_to_lead=True
        )
        text = masters_table([cluster_pb2.Master(id="m1", role="leader"), off, bad])
        assert text.splitlines()[-2:] == [
            "m2: its wall clock is 0.83 s behind the other masters'",
            "m3: its wall clock is 10 s ahead of the other masters', so it refuses to lead",
        ]


class TestJobFiles:
    def test_forms_of_a_file(self, tmp_path: Path) -> None:
        """Shows that TOML, YAML and JSON say the same, and that defaults fill what is left out."""
        (tmp_path / "a.toml").write_text(
            '[[cron.jobs]]\nid = "a"\nschedule = "* * * * *"\ncommand = ["true"]\noverlap = "allow"\ntimeout_s = 5\n'
        )
        (tmp_path / "a.yaml").write_text(
            'jobs:\n- {id: a, schedule: "* * * * *", command: ["true"], overlap: allow, timeout_s: 5}\n'
        )
        (tmp_path / "a.json").write_text(
            '[{"id": "a", "schedule": "* * * * *", "command": ["true"], "overlap": "allow", "timeout_s": 5}]'
        )
        jobs = [load_jobs(tmp_path / name) for name in ("a.toml", "a.yaml", "a.json")]
        assert jobs[0] == jobs[1] == jobs[2]
        assert jobs[0][0].overlap is OverlapPolicy.ALLOW
        assert jobs[0][0].catch_up is CatchUpPolicy.LATEST
        assert jobs[0][0].timeout_s == 5.0

    def test_what_is_printed_can_be_applied(self) -> None:
        """Shows that `cron apply` takes what `cron show` and `cron list` print, with every option of a job."""
        view = cron_pb2.CronJobView(job=types_pb2.CronJob(spec=job_spec_to_proto(EVERY_OPTION), owner="w1"))
        assert jobs_of(to_plain(view), "shown") == [EVERY_OPTION]
        assert jobs_of(to_plain(cron_pb2.ListJobsResponse(jobs=[view])), "listed") == [EVERY_OPTION]
        assert jobs_of(to_plain(view)["job"], "job") == [EVERY_OPTION]

    def test_the_job_with_every_option_has_every_option(self) -> None:
        """Shows that the tests here cannot miss a new option, but for `python`, which excludes `command`."""
        default = CronJobSpec(id="", schedule="")
        same = {name for name, value in dataclasses.asdict(default).items() if getattr(EVERY_OPTION, name) == value}
        assert same == {"python"}

    def test_every_option_round_trips_through_toml(self) -> None:
        """Shows that what is rendered for cluster.toml, whole or only what differs, is read as the same job."""
        config = ClusterConfig(cron=CronSettings(jobs=(EVERY_OPTION,)))
        for complete in (False, True):
            text = render(config, complete=complete)
            assert jobs_of(tomllib.loads(text), "cluster.toml", toml=text) == [EVERY_OPTION]

    def test_every_fault_is_named(self) -> None:
        """Shows that all faults of a file come at once, each with its job, the value, and what would be right."""
        wrong_form = [
            {"id": "a", "schedule": "* * * * *", "command": "true", "overlp": "skip"},
            {"id": "b", "schedule": "* * * * *", "python": "m:f", "timeout_s": "long", "overlap": "sometimes"},
        ]
        with pytest.raises(ConfigError) as caught:
            jobs_of({"jobs": wrong_form}, "jobs.yaml")
        for part in ("overlp", "did you mean overlap", "jobs[0].command", "jobs[1].timeout_s", "sometimes"):
            assert part in str(caught.value)
        assert all(problem.startswith("jobs.yaml: ") for problem in caught.value.problems)
        wrong_sense = [
            {"id": "a", "schedule": "61 * * * *", "command": ["true"]},
            {"id": "b", "schedule": "* * * * *", "command": ["true"], "python": "m:f"},
            {"id": "b", "schedule": "* * * * *", "python": "m:f", "time_zone": "Mars/Olympus"},
        ]
        with pytest.raises(ConfigError) as caught:
            jobs_of(wrong_sense, "jobs.yaml")
        for part in (
            'jobs.yaml: jobs[0].schedule = "61 * * * *" is not a cron expression: bad minute "61"',
            'jobs.yaml: jobs[1]: the job "b" has both command and python; give it exactly one of them',
            'jobs.yaml: jobs[2].time_zone = "Mars/Olympus" is not an IANA time zone',
            'jobs.yaml: jobs[2].id = "b" is already jobs[1].id = "b"; use another',
        ):
            assert part in str(caught.value)

    def test_faults_of_toml_have_their_lines(self, tmp_path: Path) -> None:
        """Shows that rules of form and of sense both name file and line, with the key, the value and what to do."""
        file = tmp_path / "jobs.toml"
        file.write_text(
            """[[jobs]]
id = "a"
command = ["true"]
schedule = "@every 5"
jitter_s = -1
[[jobs]]
id = "b"
schedule = "@daily"
python = "m:f"
retry = "sometimes"
"""
        )
        with pytest.raises(ConfigError) as caught:
            load_jobs(file)
        said = [problem.removeprefix(str(file)) for problem in caught.value.problems]
        assert [problem.split(" is ")[0].split(" has ")[0] for problem in said] == [
            ':4: jobs[0].schedule = "@every 5"',
            ":5: jobs[0].jitter_s = -1.0",
            ':10: jobs[1].retry = "sometimes"',
        ]
        assert 'use "@every 90s"' in said[0]
        assert "use 0 to 86400 seconds" in said[1]
        assert 'use "never", "on_lost" or "on_failure"' in said[2]

    def test_keys_beside_the_jobs_are_refused(self) -> None:
        """Shows that a key on the wrong level is not passed over in silence."""
        with pytest.raises(ConfigError, match=r"jobs.yaml: unknown key time_zone; beside `jobs` there is nothing"):
            jobs_of({"jobs": [], "time_zone": "Europe/Berlin"}, "jobs.yaml")

    def test_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        """Shows one line for a file that is missing, damaged, or about something else."""
        (tmp_path / "bad.toml").write_text("jobs = [")
        (tmp_path / "other.yaml").write_text("colour: blue\n")
        for name in ("missing.yaml", "bad.toml", "other.yaml"):
            with pytest.raises(ConfigError) as caught:
                load_jobs(tmp_path / name)
            assert len(caught.value.problems) == 1
            assert name in caught.value.problems[0]


class TestProgress:
    def test_plain_lines_where_there_is_no_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Shows that a log gets few lines, and none twice."""
        now_s = [0.0]
        with Progress(now=lambda: now_s[0]) as progress:
            for left in (3, 3, 2, 1):
                progress.update(f"{left} left")
                now_s[0] += 1.5
        assert capsys.readouterr().err.splitlines() == ["3 left", "2 left"]

    def test_waiting_ends_in_time(self) -> None:
        """Shows that waiting ends when nothing is left, and with False when the time is up."""
        now_s = [0.0]

        def sleep(seconds: float) -> None:
            now_s[0] += seconds

        left = [2, 1, 0]
        with Progress(now=lambda: now_s[0]) as progress:
            assert wait_until(lambda: f"{left.pop(0)}" if left else None, 10, progress, sleep)
            assert not wait_until(lambda: "one left", 10, progress, sleep)
        assert now_s[0] >= 10


class TestCommands:
    @pytest.mark.parametrize(
        ("path", "command"), list(all_commands()), ids=[" ".join(path) or "clusterctl" for path, _ in all_commands()]
    )
    def test_help_teaches(self, path: list[str], command: click.Command) -> None:
        """Shows that every command explains itself within the width, and every leaf has an example."""
        result = CliRunner().invoke(cli_main.cli, [*path, "--help"], prog_name="clusterctl")
        assert result.exit_code == 0
        assert_fits(result.output)
        if not isinstance(command, click.Group):
            assert "Example" in result.output

    def test_the_tree_is_complete(self) -> None:
        """Shows that every command of DESIGN.md section 11 that belongs to this version is there."""
        wanted = """status; nodes list; nodes show; nodes drain; nodes undrain; nodes remove; nodes set-weight;
        shards list; shards show; shards split; shards merge; shards locate; rebalance; moves list; moves show;
        moves abort; cron list; cron show; cron apply; cron delete; cron pause; cron resume; cron trigger;
        cron cancel; cron history; events; masters list; masters transfer; masters replace; backup; restore;
        config check; certs init; certs issue; certs show; completion"""
        assert {" ".join(part.split()) for part in wanted.split(";")} <= {" ".join(path) for path, _ in all_commands()}

    def test_unreachable_cluster_is_one_clear_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Shows exit status 3, and that the line names what was tried and what to do."""
        address = free_address()
        ensure(tmp_path, "fleet", [(Role.OPERATOR, "ann")])
        shown = ["--certificate-directory", str(tmp_path)]
        assert cli_main.run(["--address", address, *shown, "--timeout", "1", "nodes", "list"]) == 3
        captured = capsys.readouterr()
        assert captured.out == ""
        said = " ".join(captured.err.split())
        assert said.startswith(f"error: cannot reach the cluster at {address} (from --address)")
        assert "--config FILE" in said

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nosuch"],
            ["nodes", "drain"],
            ["-o", "xml", "status"],
            ["shards", "show", "x"],
            ["rebalance", "--dry-run", "--wait"],
        ],
    )
    def test_wrong_usage_is_two(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        """Shows exit status 2, and that the usage is told."""
        assert cli_main.run(arguments) == 2
        assert "Usage: clusterctl" in capsys.readouterr().err

    def test_config_check(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Shows that a bad configuration exits with 1 and names its faults, also for scripts."""
        path = tmp_path / "cluster.toml"
        path.write_text("colour = 'blue'\n")
        assert cli_main.run(["config", "check", str(path)]) == 1
        assert "colour" in capsys.readouterr().out
        assert cli_main.run(["config", "check", str(path), "-o", "json"]) == 1
        answer = json.loads(capsys.readouterr().out)
        assert answer["good"] is False
        assert any("colour" in problem for problem in answer["problems"])
        assert cli_main.run(["config", "check", str(tmp_path / "missing.toml")]) == 1
        assert "missing.toml" in capsys.readouterr().out

    def test_the_reference_configuration_is_good(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Shows that the cluster.toml of the checkout passes its own check."""
        root = Path(__file__).resolve().parents[2]
        assert cli_main.run(["config", "check", str(root / "cluster.toml")]) == 0
        assert "15 cron jobs" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_script(self, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Shows that each shell gets a script that asks clusterctl."""
        assert cli_main.run(["completion", shell]) == 0
        assert "_CLUSTERCTL_COMPLETE" in capsys.readouterr().out

    def test_completion_without_a_cluster_is_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shows that a cluster that is away completes nothing, quickly, and prints no error into the line."""
        monkeypatch.setenv("COMP_WORDS", f"clusterctl --address {free_address()} nodes show w")
        monkeypatch.setenv("COMP_CWORD", "5")
        result = CliRunner().invoke(
            cli_main.cli, [], prog_name="clusterctl", env={"_CLUSTERCTL_COMPLETE": "bash_complete"}
        )
        assert result.output.strip() == ""


def test_an_event_with_a_long_name_stays_readable() -> None:
    """Shows that what happened to something with a long name gets lines of its own, within the width."""
    event = types_pb2.Event(kind="cron", subject="a" * 63, message="owner is w3, was nobody; " * 5)
    first, *rest = event_text(event).splitlines()
    assert first.endswith("a" * 63)
    assert all(len(line) <= WIDTH for line in (first, *rest))
    assert len(rest) == 2
    short = types_pb2.Event(kind="cron", subject="loop_01", message="owner is w3, was nobody")
    assert event_text(short).endswith("loop_01   owner is w3, was nobody")
