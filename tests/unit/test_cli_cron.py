"""clusterctl cron without a cluster: what people read of jobs, changes and launches, and times on the command line."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from coordinator.api.v1 import cluster_pb2, cron_pb2, types_pb2
from coordinator.cli import cron_text
from coordinator.cli import main as cli_main
from coordinator.cli.cron_apply import applied_text
from coordinator.cli.cron_text import job_text, jobs_text, launches_table, next_times_text
from coordinator.cli.moment import MOMENT
from coordinator.cli.session import Session
from coordinator.cli.table import WIDTH
from coordinator.cli.words import duration
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CronJobSpec

NOW_MS = 1_711_825_200_000
"""2024-03-30T19:00:00Z: the night before clocks go forward in Europe."""
HOUR_MS = 3_600_000


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cron_text, "now_unix_ms", lambda: NOW_MS)
    monkeypatch.setattr("coordinator.cli.moment.now_unix_ms", lambda: NOW_MS)


def view_of(spec: CronJobSpec, *next_unix_ms: int, **fields: object) -> cron_pb2.CronJobView:
    """A job as a master tells it."""
    job = types_pb2.CronJob(spec=job_spec_to_proto(spec), owner="w1", backups=["w2"], source="api")
    return cron_pb2.CronJobView(job=job, next_unix_ms=next_unix_ms, **fields)  # type: ignore[arg-type]


def spec_of(**fields: object) -> CronJobSpec:
    """A sound definition."""
    return CronJobSpec(**{"id": "tick", "schedule": "30 2 * * *", "command": ("true",), **fields})  # type: ignore[arg-type]


class TestList:
    def test_what_runs_and_waits_and_how_late_it_was(self) -> None:
        """Shows the columns NOW and LATE, and ages counted from when a launch was due, within the width."""
        latest = types_pb2.Launch(
            job_id="tick",
            scheduled_at_unix_ms=NOW_MS - 60_000,
            due_unix_ms=NOW_MS - 50_000,
            state=types_pb2.LAUNCH_STATE_WAITING,
        )
        figures = {"latest": latest, "running": 1, "waiting": 2, "lateness_ms": 42}
        view = view_of(spec_of(schedule="0 */12 * * *"), NOW_MS + 5_000, **figures)
        text = jobs_text(cron_pb2.ListJobsResponse(jobs=[view]))
        assert text.splitlines()[0].split() == "JOB SCHEDULE CLASS OWNER BACKUPS NEXT NOW LAST LATE".split()
        assert "in 5.0s  1 runs, 2 wait  waiting 50s ago  42ms" in text
        assert max(map(len, text.splitlines())) <= WIDTH

    def test_the_last_result_and_who_waits_for_a_worker(self) -> None:
        """Shows how the last run ended although another one runs, and since when and why no worker takes a job."""
        failed = types_pb2.Launch(scheduled_at_unix_ms=NOW_MS - 120_000, state=types_pb2.LAUNCH_STATE_FAILED)
        running = types_pb2.Launch(scheduled_at_unix_ms=NOW_MS - 60_000, state=types_pb2.LAUNCH_STATE_RUNNING)
        starved = {"starved_since_unix_ms": NOW_MS - 90_000, "starved_reason": "w1 is down"}
        view = view_of(spec_of(), NOW_MS + 5_000, latest=running, last_ended=failed, **starved)
        listed = " ".join(jobs_text(cron_pb2.ListJobsResponse(jobs=[view])).split())
        assert "failed 2m ago" in listed
        assert "running" not in listed
        assert "waits" not in listed
        shown = " ".join(job_text(view).split())
        assert "now no worker for 1m30s: w1 is down" in shown
        assert "last failed 2m ago; the latest launch: running 1m ago" in shown

    def test_a_pause_of_all_is_the_first_line(self) -> None:
        """Shows that nobody looks for the reason why nothing is due."""
        text = jobs_text(cron_pb2.ListJobsResponse(jobs=[view_of(spec_of())], cron_paused=True))
        assert text.startswith("all schedules are paused; `clusterctl cron resume --all` resumes them\n\nJOB")
        assert " paused " in text.splitlines()[-1]


class TestShow:
    def test_next_times_in_the_zone_and_in_utc_with_their_notes(self) -> None:
        """Shows local and UTC times, how far ahead, and what the change of clocks does."""
        spec = spec_of(time_zone="Europe/Berlin")
        text = next_times_text(view_of(spec, 1_711_846_800_000, 1_711_931_400_000))
        assert text.splitlines()[0].split() == "NEXT, Europe/Berlin NEXT, UTC IN NOTE".split()
        assert "2024-03-31 03:00:00+02:00  2024-03-31 01:00:00" in text
        assert "6h  clocks go forward from 02:00" in text
        assert "does not exist, runs once at 03:00" in " ".join(text.split()).replace("02:30 ", "")
        assert max(map(len, text.splitlines())) <= WIDTH

    def test_a_change_of_clocks_after_the_next_times_is_told(self) -> None:
        """Shows that the autumn is told in spring, and nothing for jobs that it leaves alone."""
        text = next_times_text(view_of(spec_of(time_zone="Europe/Berlin"), 1_711_931_400_000))
        said = " ".join(text.split())
        assert "later, 2024-10-27 02:30:00+02:00: clocks go back from 03:00 to 02:00: 02:30 comes twice" in said
        assert "NOTE" not in text
        for quiet in (spec_of(schedule="@every 1h", time_zone="Europe/Berlin"), spec_of()):
            assert "later" not in next_times_text(view_of(quiet, 1_711_931_400_000))

    def test_utc_is_shown_once(self) -> None:
        """Shows no second column for a job in UTC."""
        assert next_times_text(view_of(spec_of(), NOW_MS + HOUR_MS)).splitlines()[0].split() == ["NEXT,", "UTC", "IN"]

    def test_a_schedule_of_a_newer_version_is_shown_without_notes(self) -> None:
        """Shows that an old clusterctl does not fail on what it does not know."""
        spec = spec_of(schedule="@fortnightly", time_zone="Mars/Olympus")
        assert "2024-03-30 20:00:00" in next_times_text(view_of(spec, NOW_MS + HOUR_MS))

    def test_every_option_is_told(self) -> None:
        """Shows limits, labels, jitter with its amount, and the policies with their figures."""
        spec = spec_of(
            working_directory="/srv",
            user="nobody",
            memory_bytes_max=1 << 30,
            processor_s_max=90.0,
            open_files_max=64,
            required_labels=(("disk", "nvme"),),
            jitter_s=30.0,
            environment=(("A", "1"),),
        )
        text = job_text(view_of(spec))
        for part in (
            "/srv",
            "nobody",
            "memory 1.0 GiB, processor 1m30s, open files 64",
            "disk=nvme",
            f"starts {duration(spec.jitter_ms / 1_000)} after each scheduled time (of up to 30s)",
            "skip",
            "latest; may start 1m late",
            "on lost, 3 attempts in all, 1.0s apart at first, doubling up to 5m",
            "A=1",
        ):
            assert part in text, part
        assert max(map(len, text.splitlines())) <= WIDTH


class TestHistory:
    def test_each_attempt_has_a_row(self) -> None:
        """Shows the latest attempt first, each with its worker, lateness from when it was due, and reason."""
        launch = types_pb2.Launch(
            job_id="tick",
            scheduled_at_unix_ms=NOW_MS,
            due_unix_ms=NOW_MS + 1_000,
            attempt=2,
            worker="w2",
            state=types_pb2.LAUNCH_STATE_RUNNING,
            reason="its worker was lost",
            started_unix_ms=NOW_MS + 6_000,
            earlier_attempts=[
                types_pb2.LaunchAttempt(
                    attempt=1,
                    worker="w1",
                    state=types_pb2.LAUNCH_STATE_LOST,
                    reason="its worker was lost",
                    started_unix_ms=NOW_MS + 1_005,
                    finished_unix_ms=NOW_MS + 4_005,
                )
            ],
        )
        header, second, first = launches_table([launch]).splitlines()
        assert header.split()[-3:] == ["LATE", "TOOK", "WHY"]
        assert second.split()[3:] == ["2", "w2", "running", "5.0s", "-", "-"]
        assert first.split()[3:] == ["1", "w1", "lost", "5ms", "3.0s", "its", "worker", "was", "lost"]

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"state": 9, "reason": "queued behind 03:00:00Z"}, "waiting  -  -  queued behind 03:00:00Z"),
            ({"state": 9, "not_before_unix_ms": NOW_MS}, "attempt 1 not before "),
            (
                {"state": 9, "attempt": 1, "reason": "x", "earlier_attempts": [types_pb2.LaunchAttempt(reason="x")]},
                "attempt 2 waits",
            ),
            ({"state": 2, "cancel_reason": "by ann"}, "told to stop: by ann"),
            ({"state": 10, "reason": "by ann", "cancel_reason": "by ann"}, "cancelled  -  -  by ann"),
            ({"state": 4, "exit_status": 3, "trigger": 2}, "by hand; exit status 3"),
            ({"state": 4, "exit_status": 3, "reason": "exit status 3 after 5 s"}, "-  exit status 3 after 5 s"),
        ],
    )
    def test_why(self, fields: dict[str, object], words: str) -> None:
        """Shows what a launch waits for, why it stops, and no reason twice."""
        launch = types_pb2.Launch(job_id="t", scheduled_at_unix_ms=NOW_MS, **fields)  # type: ignore[arg-type]
        row = launches_table([launch]).splitlines()[1]
        assert " ".join(words.split()) in " ".join(row.split())


class TestApply:
    CHANGES = (
        cron_pb2.JobFieldChange(job_id="new", field="schedule", after='"@daily"'),
        cron_pb2.JobFieldChange(job_id="old", field="timeout_s", before="300.0", after="600.0"),
        cron_pb2.JobFieldChange(job_id="old", field="environment.NAME", before='"x"', after=""),
    )

    def test_the_difference_is_told_field_by_field(self) -> None:
        """Shows new jobs with what they say, changed ones with both values, forgotten ones, and those that stay."""
        answer = cron_pb2.ApplyJobsResponse(
            created=["new"], changed=["old"], deleted=["gone"], unchanged=["a", "b"], changes=self.CHANGES
        )
        assert applied_text(answer, dry_run=True).splitlines() == [
            "would create new",
            '    schedule = "@daily"',
            "would change old",
            "    timeout_s: 300.0 -> 600.0",
            '    environment.NAME: "x" -> (none)',
            "would forget gone",
            "unchanged: a, b",
        ]
        assert applied_text(answer, dry_run=False).splitlines()[::2][:2] == ["created new", "changed old"]


class TestMoments:
    @pytest.mark.parametrize(
        ("text", "unix_ms"),
        [
            ("2024-03-30 19:00:00+00:00", NOW_MS),
            ("2024-03-30T20:00+01:00", NOW_MS),
            ("2024-03-30T19:00:00Z", NOW_MS),
            ("2h30m", NOW_MS - 9_000_000),
            ("1d", NOW_MS - 86_400_000),
        ],
    )
    def test_times_and_ages(self, text: str, unix_ms: int) -> None:
        """Shows that what the tables print can be given back, and that an age counts back from now."""
        assert MOMENT.convert(text, None, None) == unix_ms

    @pytest.mark.parametrize("text", ["", "yesterday", "5", "-1h", "2024-13-01", "9999-12-31T23:59:59-12:00"])
    def test_what_is_no_time(self, text: str) -> None:
        """Shows one line with the forms that will do."""
        with pytest.raises(click.BadParameter, match='is no time; write "2026'):
            MOMENT.convert(text, None, None)


class FakeClient:
    """Answers as a cluster with one job would, and notes what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []

    def close(self) -> None:
        """Nothing to end."""

    def change_settings(self, *, cron_paused: bool) -> cluster_pb2.ChangeSettingsResponse:
        """Notes the pause."""
        self.asked.append(("all", cron_paused))
        return cluster_pb2.ChangeSettingsResponse()

    def set_job_paused(self, job: str, paused: bool) -> cron_pb2.SetJobPausedResponse:
        """Notes the pause."""
        self.asked.append((job, paused))
        return cron_pb2.SetJobPausedResponse()

    def list_launches(self, **fields: object) -> cron_pb2.ListLaunchesResponse:
        """One launch by hand that runs, and one by schedule in the same second that has ended."""
        self.asked.append(("list", fields))
        states = ((NOW_MS + 123, types_pb2.LAUNCH_STATE_RUNNING), (NOW_MS, types_pb2.LAUNCH_STATE_FAILED))
        return cron_pb2.ListLaunchesResponse(
            launches=[types_pb2.Launch(job_id="tick", scheduled_at_unix_ms=at, state=state) for at, state in states]
        )

    def cancel_launches(self, job: str, **fields: object) -> cron_pb2.CancelLaunchesResponse:
        """Notes what shall stop."""
        self.asked.append((job, fields))
        return cron_pb2.CancelLaunchesResponse(launches=[types_pb2.Launch(job_id=job, cancel_reason="x")])


class TestCommands:
    def run(self, *arguments: str) -> tuple[list[tuple[str, object]], int, str]:
        """What a command asked for, its exit status, and what it printed."""
        client = FakeClient()
        session = Session(_client=client)  # type: ignore[arg-type]
        result = CliRunner().invoke(cli_main.cli, ["cron", *arguments], obj=session)
        return client.asked, result.exit_code, result.output

    def test_pause_one_or_all(self) -> None:
        """Shows that --all is a setting of the cluster, and that a job or --all must be named, not both."""
        assert self.run("pause", "tick")[0] == [("tick", True)]
        assert self.run("pause", "--all")[0] == [("all", True)]
        assert self.run("resume", "--all")[0] == [("all", False)]
        for arguments in (("pause",), ("resume", "tick", "--all")):
            asked, status, said = self.run(*arguments)
            assert (asked, status) == ([], 2)
            assert "name a job, or use --all" in said

    def test_cancel_by_the_time_that_the_history_shows(self) -> None:
        """Shows that the second is enough to name the launch that runs, and that all of them need no time."""
        asked, status, said = self.run("cancel", "tick", "--at", "2024-03-30 19:00:00+00:00", "--reason", "why")
        assert asked[1:] == [("tick", {"scheduled_at_unix_ms": NOW_MS + 123, "reason": "why"})]
        assert status == 0
        assert said.startswith("told to stop, or dropped:\n")
        assert self.run("cancel", "tick")[0] == [("tick", {"reason": ""})]

    def test_history_since(self) -> None:
        """Shows that --since is not cut off at the default number of launches."""
        [(_, fields)] = self.run("history", "tick", "--since", "1h")[0]
        assert fields == {"job_id": "tick", "latest": 10_000, "missed": False, "since_unix_ms": NOW_MS - HOUR_MS}
        [(_, fields)] = self.run("history")[0]
        assert fields == {"job_id": "", "latest": 20, "missed": False, "since_unix_ms": 0}
