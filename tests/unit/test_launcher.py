"""The launcher: real processes, real files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.config import WorkerSettings
from coordinator.model import ManualClock
from coordinator.model.errors import Damaged
from worker_agent import run_finder
from worker_agent.launch_command import token_of
from worker_agent.launch_journal import FILE_NAME, REPORTS_KEPT, TOKENS_KEPT, Begin, CommitQueue, LaunchJournal
from worker_agent.launcher import Launcher
from worker_agent.process import RunProcess
from worker_agent.run_finder import find_runs
from worker_agent.run_python import is_well_formed

SUCCEEDED = types_pb2.LAUNCH_STATE_SUCCEEDED
FAILED = types_pb2.LAUNCH_STATE_FAILED
RUNNING = types_pb2.LAUNCH_STATE_RUNNING
TIMED_OUT = types_pb2.LAUNCH_STATE_TIMED_OUT
SETTINGS = WorkerSettings(id="w1", launches_max=4, output_bytes_max=200, stop_grace_s=0.3)
WAIT_S = 20.0


class Desk:
    """A launcher with what it reported."""

    def __init__(self, directory: Path, settings: WorkerSettings = SETTINGS) -> None:
        self.directory = directory
        self.reports: list[session_pb2.LaunchReport] = []
        self.clock = ManualClock()
        self._news = asyncio.Event()
        self.launcher = Launcher(directory, settings, "w1", self.clock, self._on_report)

    def _on_report(self, report: session_pb2.LaunchReport) -> None:
        copied = session_pb2.LaunchReport()
        copied.CopyFrom(report)
        self.reports.append(copied)
        self._news.set()

    async def until(self, is_enough: Callable[[list[session_pb2.LaunchReport]], bool]) -> None:
        """Waits for reports."""
        async with asyncio.timeout(WAIT_S):
            while not is_enough(self.reports):
                self._news.clear()
                await self._news.wait()

    async def final(self, order: session_pb2.LaunchOrder) -> session_pb2.LaunchReport:
        """Waits for the result of an order."""
        token = token_of(order.launch)

        def results(reports: list[session_pb2.LaunchReport]) -> list[session_pb2.LaunchReport]:
            return [report for report in reports if token_of(report) == token and report.state != RUNNING]

        await self.until(lambda reports: bool(results(reports)))
        return results(self.reports)[0]

    async def running(self, order: session_pb2.LaunchOrder) -> None:
        """Waits until an order runs."""
        token = token_of(order.launch)
        await self.until(lambda reports: any(token_of(r) == token and r.state == RUNNING for r in reports))


class Nowhere:
    """Takes a run's output and forgets it."""

    def feed(self, data: bytes) -> None:
        pass


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A launcher that runs, and is stopped at the end."""
    desk = Desk(tmp_path)
    await desk.launcher.start()
    yield desk
    await desk.launcher.stop(0.1)


def order_of(*command: str, at: int = 1_767_268_800_000, attempt: int = 1, **spec: object) -> session_pb2.LaunchOrder:
    """An order for a command line, or for `python=` a callable."""
    return session_pb2.LaunchOrder(
        launch=types_pb2.Launch(job_id="tick", scheduled_at_unix_ms=at, attempt=attempt, worker="w1"),
        spec=types_pb2.CronJobSpec(id="tick", command=command, **{"timeout_s": 30.0, **spec}),  # type: ignore[arg-type]
    )


def script(source: str, **fields: object) -> session_pb2.LaunchOrder:
    """An order for a Python program given as text."""
    return order_of(sys.executable, "-c", source, **fields)  # type: ignore[arg-type]


def receipt_of(report: session_pb2.LaunchReport) -> session_pb2.LaunchReportReceipt:
    """The leader's answer to a report."""
    return session_pb2.LaunchReportReceipt(
        job_id=report.job_id,
        scheduled_at_unix_ms=report.scheduled_at_unix_ms,
        attempt=report.attempt,
        state=report.state,
    )


# What runs, and how it ends


async def test_runs_a_command_and_reports_start_and_result(desk: Desk) -> None:
    """A command's start is reported, then its result with both outputs merged in order."""
    order = script("import os,sys; os.write(1,b'out '); os.write(2,b'err')")
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert [report.state for report in desk.reports] == [RUNNING, SUCCEEDED]
    assert result.output == b"out err"
    assert (result.exit_status, result.reason) == (0, "")
    assert result.started_unix_ms == result.finished_unix_ms == desk.clock.wall_ms()


async def test_tells_the_run_which_launch_it_is(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has the launch's identity and the job's own variables, and not the agent's secrets."""
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "secret")
    names = "LAUNCH_JOB LAUNCH_SCHEDULED_AT LAUNCH_ATTEMPT LAUNCH_TOKEN LAUNCH_WORKER MINE CONSUL_HTTP_TOKEN"
    source = f"import os; print([os.environ.get(n) for n in '{names}'.split()])"
    order = script(source, at=1_767_268_800_500, environment={"MINE": "yes"})
    await desk.launcher.launch(order)
    result = await desk.final(order)
    expected = ["tick", "2026-01-01T12:00:00.500Z", "1", "tick/1767268800500/1", "w1", "yes", None]
    assert result.output.decode().strip() == str(expected)


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("raise SystemExit(3)", 3, "exit status 3"),
        pytest.param(
            "import os,signal; os.kill(os.getpid(), signal.SIGKILL)",
            -9,
            "ended by SIGKILL",
            marks=pytest.mark.skipif(os.name != "posix", reason="signals"),
        ),
    ],
)
async def test_a_failure_says_how(desk: Desk, source: str, status: int, reason: str) -> None:
    """Another exit status than 0, or a signal, is a failure that names it."""
    order = script(source)
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert (result.state, result.exit_status, result.reason) == (FAILED, status, reason)


async def test_a_program_that_cannot_be_started_fails_with_the_reason(desk: Desk) -> None:
    """A missing program is reported as failed, without a start."""
    order = order_of("/nowhere/program")
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert [report.state for report in desk.reports] == [FAILED]
    assert result.exit_status == 127
    assert "could not start '/nowhere/program'" in result.reason


async def test_a_flood_of_output_neither_blocks_nor_fills_memory(desk: Desk) -> None:
    """A run that prints megabytes ends, and the last bytes are kept."""
    order = script("import sys; sys.stdout.write('x' * 5_000_000 + 'the end')")
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert result.state == SUCCEEDED
    assert len(result.output) == SETTINGS.output_bytes_max
    assert result.output.endswith(b"the end")


async def test_a_run_ends_with_all_that_it_started(desk: Desk) -> None:
    """A run has ended when its own process has; a child that it left is killed, also one that holds the pipe.

    It was let go before; then it ran on beside the next launch, after the lease and the agent, as nobody's.
    """
    child = "import time; time.sleep(60)"
    source = (
        "import subprocess,sys\n"
        f"subprocess.Popen([sys.executable,'-c',{child!r}])\n"
        f"subprocess.Popen([sys.executable,'-c',{child!r}], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print('done')\n"
    )
    order = script(source)
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert (result.state, result.output) == (SUCCEEDED, b"done\n")
    assert await asyncio.to_thread(find_with_token, token_of(order.launch)) == []


async def test_a_child_that_prints_the_rest_may_do_so(desk: Desk) -> None:
    """What the process did not wait for, as a `tee` in a shell's process substitution, still says its last words."""
    child = "import os,sys; sys.stdin.read(); os.write(1, b' late')"
    source = (
        "import os,subprocess,sys\n"
        f"subprocess.Popen([sys.executable,'-c',{child!r}], stdin=subprocess.PIPE)\n"
        "os.write(1, b'early')\n"
    )
    order = script(source)
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert (result.state, result.output) == (SUCCEEDED, b"early late")


async def test_a_child_that_left_the_group_is_found_a_little_later(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child in a session of its own outlives its run by moments; one look finds those of all runs since the last."""
    monkeypatch.setattr(run_finder, "SWEEP_S", 0.2)
    child = "import time; time.sleep(60)"
    source = (
        "import subprocess,sys\n"
        f"c=subprocess.Popen([sys.executable,'-c',{child!r}], start_new_session=True, stdout=subprocess.DEVNULL,"
        " stderr=subprocess.DEVNULL)\n"
        "print(c.pid)\n"
    )
    orders = [script(source, at=at) for at in (1, 2)]
    left = []
    for order in orders:
        await desk.launcher.launch(order)
    for order in orders:
        result = await desk.final(order)
        assert result.state == SUCCEEDED
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(psutil.Process(int(result.output)))
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*(run_finder.until_ended(process) for process in left))


async def test_an_agent_that_stops_leaves_nothing_of_runs_that_had_ended(tmp_path: Path) -> None:
    """With the agent everything ends at once, whenever the next look would have been."""
    desk = Desk(tmp_path)
    await desk.launcher.start()
    child = "import time; time.sleep(60)"
    popen = f"subprocess.Popen([sys.executable,'-c',{child!r}], start_new_session=True, stdout=subprocess.DEVNULL)"
    order = script(f"import subprocess,sys; {popen}")
    await desk.launcher.launch(order)
    assert (await desk.final(order)).state == SUCCEEDED
    await desk.launcher.stop(0.0)
    assert await asyncio.to_thread(find_with_token, token_of(order.launch)) == []


def find_with_token(token: str) -> list[psutil.Process]:
    """Living processes of a launch, by the environment that they inherited; none of tests that run beside this one."""
    beside = {process.pid for process in psutil.Process(os.getppid()).children()} - {os.getpid()}
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("LAUNCH_TOKEN") != token or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if beside.isdisjoint(parent.pid for parent in process.parents()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


async def test_a_timeout_ends_the_whole_tree(desk: Desk) -> None:
    """After the timeout the run is asked to end, then killed with its children, and what it printed is kept."""
    child = (
        "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', flush=True); time.sleep(60)"
    )
    source = (
        "import signal,subprocess,sys,time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        f"subprocess.Popen([sys.executable,'-c',{child!r}])\n"
        "while True: time.sleep(1)\n"
    )
    order = script(source, timeout_s=1.5)
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert (result.state, result.reason) == (TIMED_OUT, "stopped after its timeout of 1.5 s")
    assert sorted(result.output.split()) == [b"asked", b"child"]
    assert await asyncio.to_thread(find_with_token, token_of(order.launch)) == []


# Python callables


@pytest.mark.parametrize(
    ("target", "output"),
    [
        ("with_context", "tick 2026-01-01T12:00:00Z 1 tick/1767268800000/1 w1"),
        ("without_context", "plain tick/1767268800000/1"),
        ("asynchronous", "async tick"),
    ],
)
async def test_runs_python_callables(desk: Desk, target: str, output: str) -> None:
    """A callable gets the context when it takes one; an async one is run to its end."""
    order = order_of(python=f"tests.launch_targets:{target}")
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert result.state == SUCCEEDED, result
    assert result.output.decode().strip() == output


@pytest.mark.parametrize(
    ("target", "status", "words"),
    [
        ("tests.launch_targets:failing", 1, b"RuntimeError: the loop broke"),
        ("tests.launch_targets:missing", 2, b"has no 'missing'"),
        ("tests.launch_targets:NOT_CALLABLE", 2, b"no callable, but a int"),
        ("tests.no_such_module:run", 2, b"there is no module 'tests.no_such_module'"),
        ("not a target", 2, b"not of the form package.module:function"),
    ],
)
async def test_python_failures_are_told(desk: Desk, target: str, status: int, words: bytes) -> None:
    """An exception ends with its traceback and status 1; a callable that is not there with one line and status 2."""
    order = order_of(python=target)
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert (result.state, result.exit_status) == (FAILED, status)
    assert words in result.output


async def test_runs_the_reference_loop(desk: Desk) -> None:
    """The loop of the reference configuration prints one line about its launch."""
    order = order_of(python="worker_agent.loops:run")
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert result.output == b"tick of 2026-01-01T12:00:00Z on w1, attempt 1 (tick/1767268800000/1)\n"


def test_targets_have_one_form() -> None:
    """`package.module:function` is recognised, attributes of classes too, and nothing else."""
    assert is_well_formed("a.b:c")
    assert is_well_formed("a:C.method")
    assert not any(is_well_formed(bad) for bad in ("", "a", "a:", ":b", "a b:c", "a:b:c", "a.:b", "1a:b"))


# Once


async def test_a_token_starts_once(desk: Desk, tmp_path: Path) -> None:
    """An order that comes again, while it runs or afterwards, is answered with what is known, and runs nothing."""
    witness = tmp_path / "witness"
    order = script(f"open({str(witness)!r},'a').write('x')")
    await asyncio.gather(*(desk.launcher.launch(order) for _ in range(3)))
    await desk.final(order)
    count = len(desk.reports)
    await desk.launcher.launch(order)
    assert [report.state for report in desk.reports[count:]] == [SUCCEEDED]
    assert witness.read_text() == "x"
    second_attempt = session_pb2.LaunchOrder()
    second_attempt.CopyFrom(order)
    second_attempt.launch.attempt = 2
    await desk.launcher.launch(second_attempt)
    await desk.final(second_attempt)
    assert witness.read_text() == "xx"


async def test_a_result_survives_a_restart_until_its_receipt(tmp_path: Path) -> None:
    """A result without a receipt is pending in the next agent too; with one it is known, without what was printed."""
    order = script("print('kept')")
    first = Desk(tmp_path)
    await first.launcher.start()
    await first.launcher.launch(order)
    result = await first.final(order)
    await first.launcher.stop()

    second = Desk(tmp_path)
    await second.launcher.start()
    assert second.launcher.pending_reports() == [result]
    await second.launcher.on_receipt(receipt_of(result))
    assert second.launcher.pending_reports() == []
    await second.launcher.stop()

    third = Desk(tmp_path)
    await third.launcher.start()
    assert third.launcher.pending_reports() == []
    await third.launcher.launch(order)
    result.ClearField("output")
    assert third.reports == [result]
    await third.launcher.stop()


async def test_a_run_that_outlives_its_agent_is_ended_and_never_started_again(tmp_path: Path) -> None:
    """What an agent that died left running is killed by the next one, which neither reports nor repeats it."""
    order = script("import time; time.sleep(60)")
    token = token_of(order.launch)
    journal = await asyncio.to_thread(LaunchJournal, tmp_path)
    await asyncio.to_thread(journal.begin, token, "run-of-a-dead-agent")
    journal.close()
    process = await RunProcess.start(order.spec.command, dict(os.environ), "run-of-a-dead-agent", Nowhere())
    async with asyncio.timeout(WAIT_S):  # Its environment can be read a moment after it was started.
        while not await asyncio.to_thread(find_runs, {"run-of-a-dead-agent"}):
            pass

    desk = Desk(tmp_path)
    await desk.launcher.start()
    assert await asyncio.to_thread(find_runs, {"run-of-a-dead-agent"}) == []
    await process.wait()
    assert desk.launcher.pending_reports() == []
    await desk.launcher.launch(order)
    assert desk.reports == []
    assert desk.launcher.running == 0
    await desk.launcher.stop()


async def test_running_launches_are_named_to_a_new_leader(desk: Desk) -> None:
    """What runs is pending as RUNNING, also after a receipt for its start; its end replaces that."""
    order = script("import sys; sys.stdin.read(); import time; time.sleep(60)", timeout_s=60.0)
    await desk.launcher.launch(order)
    await desk.running(order)
    await desk.launcher.on_receipt(receipt_of(desk.reports[0]))
    assert [report.state for report in desk.launcher.pending_reports()] == [RUNNING]
    assert desk.launcher.running == 1


async def test_stop_all_leaves_no_process_and_no_result(desk: Desk) -> None:
    """Runs that the agent ends itself have no result: the leader calls them lost."""
    order = script("import time; time.sleep(60)")
    await desk.launcher.launch(order)
    await desk.running(order)
    await desk.launcher.stop_all("the lease ended", 0.2)
    assert desk.launcher.running == 0
    assert desk.launcher.pending_reports() == []
    assert [report.state for report in desk.reports] == [RUNNING]
    assert await asyncio.to_thread(find_with_token, token_of(order.launch)) == []


# Many


def has_declined(report: session_pb2.LaunchReport, decline: session_pb2.LaunchDecline.ValueType) -> bool:
    """True for a report that declines an order so, and says nothing of a run."""
    return (report.decline, report.state, report.started_unix_ms) == (decline, 0, 0) and bool(report.reason)


async def test_over_the_limit_an_order_is_declined_at_once(tmp_path: Path) -> None:
    """Without a free slot an order is declined and never starts, in this process or the next; other orders go on."""
    desk = Desk(tmp_path / "journal", replace(SETTINGS, launches_max=1))
    await desk.launcher.start()
    assert desk.launcher.slots_free == 1
    gate, witness = tmp_path / "gate", tmp_path / "witness"
    first = script(f"import os,time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)", at=1)
    second = script(f"open({str(witness)!r},'a').write('x')", at=2)
    await desk.launcher.launch(first)
    assert desk.launcher.slots_free == 0
    await desk.launcher.launch(second)
    await desk.launcher.launch(second)
    answer = await desk.final(second)
    assert has_declined(answer, session_pb2.LAUNCH_DECLINE_BUSY)
    assert answer.reason == "none of its 1 slots is free"
    assert token_of(answer) in {token_of(token) for token in desk.launcher.known_launches()}
    gate.touch()
    await desk.final(first)
    await desk.launcher.launch(second)
    assert desk.reports[-1] == answer
    await desk.launcher.launch(script("print('third')", at=3))
    assert (await desk.final(script("", at=3))).state == SUCCEEDED
    await desk.launcher.stop()
    again = Desk(tmp_path / "journal")
    await again.launcher.start()
    assert answer in again.launcher.pending_reports()
    await again.launcher.launch(second)
    assert again.reports == [answer]
    await again.launcher.on_receipt(receipt_of(answer))
    assert answer not in again.launcher.pending_reports()
    await again.launcher.launch(second)
    await again.launcher.stop()
    assert not witness.exists()


async def test_while_the_agent_stops_orders_are_declined(desk: Desk) -> None:
    """An order that comes after the agent was told to stop goes to another worker without a wait."""
    desk.launcher.take_no_orders("the worker agent stops")
    order = script("print('late')")
    await desk.launcher.launch(order)
    answer = await desk.final(order)
    assert has_declined(answer, session_pb2.LAUNCH_DECLINE_BUSY)
    assert (answer.reason, desk.launcher.slots_free) == ("the worker agent stops", 0)


async def test_a_run_of_a_job_that_is_gone_is_told_of_once(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Its reports are refused every few seconds; one line says so, and with the refusal of its end it is forgotten."""
    gate = desk.directory / "gate"
    order = script(f"import os,time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)")
    await desk.launcher.launch(order)
    await desk.running(order)
    refusal = receipt_of(desk.reports[0])
    refusal.refusal = "this launch is not known; it was deleted, or is too old to be kept"
    for _ in range(5):
        await desk.launcher.on_receipt(refusal)
    gate.touch()
    refusal.state = (await desk.final(order)).state
    await desk.launcher.on_receipt(refusal)
    assert [record.getMessage() for record in caplog.records if "refused" in record.getMessage()] == [
        f"the report of launch {token_of(order.launch)} was refused: {refusal.refusal};"
        " it goes on, and nobody waits for its result"
    ]
    assert desk.launcher.pending_reports() == desk.launcher.known_launches() == []


# The journal


def test_the_journal_drops_a_torn_tail(tmp_path: Path) -> None:
    """A last line that was cut short announced nothing that had happened, and is dropped."""
    journal = LaunchJournal(tmp_path)
    journal.begin("a/1/1", "r1")
    journal.close()
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b'{"token":"a/2/1","ru')
    journal = LaunchJournal(tmp_path)
    assert [entry.token for entry in journal.unfinished()] == ["a/1/1"]
    assert journal.get("a/2/1") is None
    journal.close()


@pytest.mark.parametrize("line", [b"{}", b"no json", b'{"token":"b/1/1","report":"%%"}', b'{"token":"x","report":""}'])
def test_the_journal_refuses_damage(tmp_path: Path, line: bytes) -> None:
    """A complete line that cannot be read stops the agent, with the file and the line."""
    journal = LaunchJournal(tmp_path)
    journal.begin("b/1/1", "r1")
    journal.close()
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(Damaged, match=r"launches\.jsonl, line 2"):
        LaunchJournal(tmp_path)


def test_the_journal_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old launches that have ended and were receipted are forgotten, results without a receipt up to a limit."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    journal = LaunchJournal(tmp_path)
    journal.begin("running", "r")
    for number in range(3 * TOKENS_KEPT):
        token = f"t/{number}/1"
        journal.begin(token, "r")
        journal.finish(token, session_pb2.LaunchReport(job_id="t", scheduled_at_unix_ms=number, attempt=1))
        if number < 2 * TOKENS_KEPT:
            journal.receipt(token)
    journal.close()
    reopened = LaunchJournal(tmp_path)
    assert [entry.token for entry in reopened.unfinished()] == ["running"]
    assert len(reopened.unreceipted()) <= REPORTS_KEPT
    assert reopened.get("t/0/1") is None
    assert reopened.get(f"t/{3 * TOKENS_KEPT - 1}/1") is not None
    assert (tmp_path / FILE_NAME).stat().st_size < 1_000_000
    reopened.close()


def test_the_journal_keeps_no_output_behind_a_receipt(tmp_path: Path) -> None:
    """What the masters have is not carried along: neither in memory nor in the file that is written anew."""
    journal = LaunchJournal(tmp_path)
    report = session_pb2.LaunchReport(job_id="a", scheduled_at_unix_ms=1, attempt=1, state=SUCCEEDED, output=b"x" * 999)
    journal.begin("a/1/1", "r1")
    journal.finish("a/1/1", report)
    journal.receipt("a/1/1")
    journal.close()
    LaunchJournal(tmp_path).close()
    assert (tmp_path / FILE_NAME).stat().st_size < 400
    journal = LaunchJournal(tmp_path)
    entry = journal.get("a/1/1")
    journal.close()
    assert entry is not None
    assert entry.report is not None
    assert (entry.report.state, entry.report.output) == (SUCCEEDED, b"")
    assert len(report.output) == 999, "it may be on its way to a master"


async def test_launches_that_begin_together_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one sync runs, all changes that come wait for the next one together; each is on disk before it returns."""
    journal = LaunchJournal(tmp_path)
    commits = CommitQueue(journal)
    syncs: list[int] = []
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        syncs.append((tmp_path / FILE_NAME).read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", sync)

    async def begin(number: int) -> bool:
        await commits.commit(Begin(f"t/{number}/1", f"r{number}"))
        return syncs[-1] > number

    assert all(await asyncio.gather(*(begin(number) for number in range(100))))
    assert len(syncs) == 1
    commits.settle("t/0/1")
    assert len(journal.unfinished()) == 99
    await commits.close()
    assert len(syncs) == 1


async def test_a_change_that_cannot_be_written_did_not_happen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed write the token has not begun, and the file is whole again with the next write."""
    journal = LaunchJournal(tmp_path)
    commits = CommitQueue(journal)
    await commits.commit(Begin("a/1/1", "r1"))

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space left"):
            await commits.commit(Begin("a/2/1", "r2"))
    assert journal.get("a/2/1") is None
    await commits.commit(Begin("a/3/1", "r3"))
    await commits.close()
    reopened = LaunchJournal(tmp_path)
    assert [entry.token for entry in reopened.unfinished()] == ["a/1/1", "a/3/1"]
    reopened.close()
