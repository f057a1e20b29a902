"""The launcher told to stop, by the leader and by the end of the lease; and what heartbeats say. Real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.model import Monotonic
from tests.unit.test_launcher import (
    FAILED,
    RUNNING,
    SETTINGS,
    SUCCEEDED,
    WAIT_S,
    Desk,
    find_with_token,
    order_of,
    receipt_of,
    script,
)
from worker_agent import run_finder
from worker_agent.launch_command import key_of, token_of
from worker_agent.launch_ends import NEVER_RAN
from worker_agent.launch_journal import LaunchJournal
from worker_agent.launcher import Launcher

CANCELLED = types_pb2.LAUNCH_STATE_CANCELLED
ONE_SLOT = replace(SETTINGS, launches_max=1)
MANY_SLOTS = replace(SETTINGS, launches_max=16)
TREE = r"""
import os, signal, subprocess, sys, time
child = "import os,signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'child\\n'); time.sleep(60)"
subprocess.Popen([sys.executable, '-c', child])
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'asked\n'))
while True: time.sleep(1)
"""
"""Both say a whole line at once: a print is two writes where PYTHONUNBUFFERED is set, and they share the pipe."""


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A launcher that runs, and is stopped at the end."""
    desk = Desk(tmp_path)
    await desk.launcher.start()
    yield desk
    await desk.launcher.stop(0.1)


def stop_of(order: session_pb2.LaunchOrder, reason: str = "by hand") -> session_pb2.LaunchStop:
    """The leader's word to stop it."""
    job_id, scheduled_at_ms, attempt = key_of(order.launch)
    token = session_pb2.LaunchToken(job_id=job_id, scheduled_at_unix_ms=scheduled_at_ms, attempt=attempt)
    return session_pb2.LaunchStop(token=token, reason=reason)


async def printed(desk: Desk, order: session_pb2.LaunchOrder, words: bytes) -> None:
    """Waits until a run has printed something."""
    async with asyncio.timeout(WAIT_S):
        seen = b""
        async for piece in desk.launcher.outputs.read(key_of(order.launch), 0, follow=True):
            seen += piece.data
            if words in seen:
                return
    raise AssertionError(seen)


def known(desk: Desk) -> set[str]:
    """The tokens that a heartbeat would name."""
    return {token_of(token) for token in desk.launcher.known_launches()}


async def until_idle(launcher: Launcher) -> None:
    """Waits until nothing runs."""
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*launcher._tasks.values())


# The leader's word


async def test_a_stop_ends_the_whole_tree_and_is_reported_as_cancelled(desk: Desk) -> None:
    """The run is asked to end, then killed with its children; it is CANCELLED with the leader's reason."""
    order = script(TREE)
    await desk.launcher.launch(order)
    await printed(desk, order, b"child")
    await desk.launcher.stop_launch(stop_of(order, "a newer launch is due"))
    await desk.launcher.stop_launch(stop_of(order, "said twice"))
    result = await desk.final(order)
    assert (result.state, result.reason) == (CANCELLED, "a newer launch is due")
    assert sorted(result.output.split()) == [b"asked", b"child"]
    assert result.exit_status == -9
    assert await asyncio.to_thread(find_with_token, token_of(order.launch)) == []
    await desk.launcher.stop_launch(stop_of(order))
    assert [report.state for report in desk.reports] == [RUNNING, CANCELLED, CANCELLED]


async def test_a_run_that_ends_well_when_it_is_asked_is_cancelled_all_the_same(desk: Desk) -> None:
    """What a run does with its grace is its business, but a stopped run is no success."""
    source = "import signal,time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); print('up', flush=True)\n"
    order = script(f"{source}while True: time.sleep(1)")
    await desk.launcher.launch(order)
    await printed(desk, order, b"up")
    await desk.launcher.stop_launch(stop_of(order))
    result = await desk.final(order)
    assert (result.state, result.exit_status) == (CANCELLED, 0)


async def test_a_stop_for_what_has_ended_is_answered_with_how_it_ended(desk: Desk) -> None:
    """A result stays what it is: the stop came too late, and the result is reported once more."""
    order = script("print('done')")
    await desk.launcher.launch(order)
    await desk.final(order)
    await desk.launcher.stop_launch(stop_of(order))
    assert [report.state for report in desk.reports] == [RUNNING, SUCCEEDED, SUCCEEDED]


async def test_a_stop_for_what_was_declined_is_answered_with_that(tmp_path: Path) -> None:
    """An order that was declined never starts, so a stop finds nothing to do and is told so."""
    desk = Desk(tmp_path / "data", ONE_SLOT)
    await desk.launcher.start()
    first, second = script("import time; time.sleep(60)", at=1), script("print('never')", at=2)
    await desk.launcher.launch(first)
    await desk.launcher.launch(second)
    await desk.launcher.stop_launch(stop_of(second))
    answer = await desk.final(second)
    assert answer.decline == session_pb2.LAUNCH_DECLINE_BUSY
    await desk.launcher.stop_launch(stop_of(second))
    assert [report for report in desk.reports if token_of(report) == token_of(second.launch)] == [answer, answer]
    await desk.launcher.stop(0.1)


async def test_a_stop_that_comes_before_its_order_outlives_the_agent(tmp_path: Path) -> None:
    """A token that nobody knew is noted on disk as cancelled, and the order finds that, also after a restart."""
    order = script("print('never')")
    first = Desk(tmp_path)
    await first.launcher.start()
    await first.launcher.stop_launch(stop_of(order))
    result = await first.final(order)
    assert (result.state, result.reason) == (CANCELLED, "by hand")
    await first.launcher.stop()
    second = Desk(tmp_path)
    await second.launcher.start()
    assert second.launcher.pending_reports() == [result]
    await second.launcher.launch(order)
    assert second.reports == [result]
    await second.launcher.stop()


async def test_stops_and_orders_at_once_leave_one_answer_each(tmp_path: Path) -> None:
    """Orders with their stops right behind them end CANCELLED, once each, however far each has come by then."""
    desk = Desk(tmp_path, MANY_SLOTS)
    await desk.launcher.start()
    orders = [script("import time; time.sleep(60)", at=at) for at in range(1, 13)]
    for order in orders:
        await desk.launcher.launch(order)
        await desk.launcher.stop_launch(stop_of(order))
    for order in orders:
        assert (await desk.final(order)).state == CANCELLED
    ends = [token_of(report) for report in desk.reports if report.state != RUNNING]
    assert len(ends) == len(set(ends)) == len(orders)
    await until_idle(desk.launcher)
    assert desk.launcher.running == desk.launcher.waiting == 0
    await desk.launcher.stop()


async def test_an_order_right_behind_its_stop_never_starts(desk: Desk, tmp_path: Path) -> None:
    """While the disk is still at the note of a stop, its order and the stop itself find that it is on its way."""
    witness = tmp_path / "started"
    order = script(f"open({str(witness)!r}, 'w')")
    await desk.launcher.stop_launch(stop_of(order))
    await desk.launcher.launch(order)
    await desk.launcher.stop_launch(stop_of(order))
    assert (await desk.final(order)).state == CANCELLED
    await desk.launcher.stop()
    assert [report.state for report in desk.reports] == [CANCELLED]
    assert not witness.exists()


# The lease


async def test_with_the_lease_every_run_ends_without_a_result(desk: Desk) -> None:
    """A run that ends well within its grace is no success either; heartbeats name it until it has ended."""
    source = "import signal,time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); print('up', flush=True)\n"
    polite = script(f"{source}while True: time.sleep(1)", at=1)
    stubborn = script(TREE, at=2)
    for order in (polite, stubborn):
        await desk.launcher.launch(order)
    await printed(desk, polite, b"up")
    await printed(desk, stubborn, b"child")
    desk.launcher.end_lease("the session lease ended")
    assert known(desk) == {token_of(polite.launch), token_of(stubborn.launch)}
    await until_idle(desk.launcher)
    assert [report.state for report in desk.reports] == [RUNNING, RUNNING]
    assert known(desk) == set()
    assert desk.launcher.pending_reports() == []
    for order in (polite, stubborn):
        assert await asyncio.to_thread(find_with_token, token_of(order.launch)) == []
        await desk.launcher.launch(order)
    assert desk.launcher.running == 0


async def test_a_run_that_ended_behind_the_lease_has_no_result(desk: Desk, tmp_path: Path) -> None:
    """An agent that stood still at the end of its lease hears of the run first, and then of the lease: no result."""
    go = tmp_path / "go"
    order = script(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)")
    await desk.launcher.launch(order)
    await desk.running(order)
    desk.launcher.set_lease_end(Monotonic(desk.clock.monotonic() + 1.0))
    desk.clock.advance(2.0)
    go.touch()
    await until_idle(desk.launcher)
    assert [report.state for report in desk.reports] == [RUNNING]
    assert desk.launcher.pending_reports() == []


async def test_with_the_lease_the_grace_is_short(tmp_path: Path) -> None:
    """Whatever time runs have to stop otherwise, those of a lost lease are gone before the leader's count is over."""
    reports: list[session_pb2.LaunchReport] = []
    settings = replace(SETTINGS, stop_grace_s=600.0)
    launcher = Launcher(tmp_path, settings, "w1", Desk(tmp_path).clock, reports.append, lease_grace_s=0.1)
    await launcher.start()
    stubborn = "import os,signal,time\nsignal.signal(15, signal.SIG_IGN)\nos.write(1, b'up')\ntime.sleep(60)"
    await launcher.launch(script(stubborn))
    async for _ in launcher.outputs.read(key_of(script("").launch), 0, follow=True):
        break
    launcher.end_lease("the session lease ended")
    await until_idle(launcher)
    await launcher.stop()


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
async def test_the_end_of_the_lease_shortens_the_grace_of_a_stop_that_goes_on(tmp_path: Path, how: str) -> None:
    """A run that was told to stop before the lease ended has no more time than the others, and no result either."""
    reports: list[session_pb2.LaunchReport] = []
    settings = replace(SETTINGS, stop_grace_s=600.0)
    launcher = Launcher(tmp_path, settings, "w1", Desk(tmp_path).clock, reports.append, lease_grace_s=0.1)
    await launcher.start()
    stubborn = "import os,signal,time\nsignal.signal(15, lambda *_: os.write(1, b'asked'))\nos.write(1, b'up')\n"
    order = script(f"{stubborn}while True: time.sleep(60)", timeout_s=1.0 if how == "timeout" else 60.0)
    await launcher.launch(order)
    async with asyncio.timeout(WAIT_S):
        seen = b""
        async for piece in launcher.outputs.read(key_of(order.launch), 0, follow=True):
            seen += piece.data
            if b"asked" in seen:
                break
            if how == "cancelled":
                await launcher.stop_launch(stop_of(order))
    launcher.end_lease("the session lease ended")
    await until_idle(launcher)
    assert [report.state for report in reports] == [RUNNING]
    await launcher.stop()


async def test_a_stop_without_grace_has_none(tmp_path: Path) -> None:
    """An agent that shall be gone at once does not wait for what its runs would have had otherwise."""
    settings = replace(SETTINGS, stop_grace_s=600.0)
    launcher = Launcher(tmp_path, settings, "w1", Desk(tmp_path).clock, lambda report: None)
    await launcher.start()
    order = script("import os,signal,time\nsignal.signal(15, signal.SIG_IGN)\nos.write(1, b'up')\ntime.sleep(60)")
    await launcher.launch(order)
    async for _ in launcher.outputs.read(key_of(order.launch), 0, follow=True):
        break
    async with asyncio.timeout(WAIT_S):
        await launcher.stop(0.0)


async def test_runs_that_stop_together_share_the_looking(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """To end many runs at once takes a few looks at the machine's processes, not some for each run."""
    orders = [script(TREE, at=at) for at in range(1, 5)]
    for order in orders:
        await desk.launcher.launch(order)
    for order in orders:
        await printed(desk, order, b"child")
    looks = 0
    look = run_finder._look

    def count(wanted: list[tuple[str, int | None]]) -> object:
        nonlocal looks
        looks += 1
        return look(wanted)

    monkeypatch.setattr(run_finder, "_look", count)
    desk.launcher.end_lease("the session lease ended")
    await until_idle(desk.launcher)
    assert looks < 3 * len(orders)
    for order in orders:
        assert await asyncio.to_thread(find_with_token, token_of(order.launch)) == []


async def test_an_end_that_is_seen_after_the_lease_is_no_success(tmp_path: Path) -> None:
    """A process that came to its own end while its agent stood still, beyond the lease, has no result."""
    has_lease = True
    reports: list[session_pb2.LaunchReport] = []
    launcher = Launcher(tmp_path, SETTINGS, "w1", Desk(tmp_path).clock, reports.append, lambda: has_lease)
    await launcher.start()
    gate = tmp_path / "gate"
    order = script(f"import os,time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)")
    await launcher.launch(order)
    has_lease = False
    gate.touch()
    await until_idle(launcher)
    assert SUCCEEDED not in [report.state for report in reports]
    assert launcher.pending_reports() == []
    await launcher.stop()


async def test_nothing_starts_without_a_lease(tmp_path: Path) -> None:
    """An agent that stood still after it had noted a start, until beyond the lease, does not start it then."""
    has_lease = True
    desk = Desk(tmp_path)
    launcher = Launcher(tmp_path, SETTINGS, "w1", desk.clock, desk.reports.append, lambda: has_lease)
    await launcher.start()
    witness = tmp_path / "started"
    order = script(f"open({str(witness)!r}, 'w')")
    await launcher.launch(order)
    has_lease = False
    await until_idle(launcher)
    has_lease = True
    await launcher.launch(order)
    await until_idle(launcher)
    await launcher.stop()
    assert desk.reports == []
    assert launcher.known_launches() == []
    assert not witness.exists()


# Heartbeats


async def test_heartbeats_name_every_launch_until_its_receipt(tmp_path: Path) -> None:
    """Running, ended without a receipt: named; after the receipt no more."""
    desk = Desk(tmp_path / "data")
    await desk.launcher.start()
    gate = tmp_path / "gate"
    first = script(f"import os,time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)", at=1)
    second = order_of("/nowhere/program", at=2)
    both = {token_of(first.launch), token_of(second.launch)}
    await desk.launcher.launch(first)
    await desk.launcher.launch(second)
    assert known(desk) == both
    gate.touch()
    assert (await desk.final(second)).state == FAILED
    assert known(desk) == both
    await desk.launcher.on_receipt(receipt_of(await desk.final(first)))
    assert known(desk) == {token_of(second.launch)}
    await desk.launcher.on_receipt(receipt_of(await desk.final(second)))
    assert known(desk) == set()
    await desk.launcher.stop()


async def test_a_fault_of_the_launcher_shows_at_the_leader(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose seeing through broke is killed, has no result, and is named no more: the leader calls it lost."""

    async def break_down(*arguments: object) -> None:
        raise RuntimeError("a fault of the launcher")

    monkeypatch.setattr(Launcher, "_see_through", break_down)
    # For a moment after its start a process shows no environment to be found by.
    monkeypatch.setattr(run_finder, "find_runs", lambda run_ids: [])
    order = script("import time; time.sleep(60)")
    await desk.launcher.launch(order)
    await until_idle(desk.launcher)
    assert known(desk) == set()
    assert [report.state for report in desk.reports] == [RUNNING]
    assert await asyncio.to_thread(find_with_token, token_of(order.launch)) == []


async def test_a_promise_outlives_a_crash_that_took_the_word(tmp_path: Path) -> None:
    """A token that is noted as one that never starts, without the answer, is declined again when it is ordered."""
    order = script("print('never')")
    journal = LaunchJournal(tmp_path)
    journal.begin(token_of(order.launch), NEVER_RAN)
    journal.close()
    desk = Desk(tmp_path)
    await desk.launcher.start()
    await desk.launcher.launch(order)
    assert (await desk.final(order)).decline == session_pb2.LAUNCH_DECLINE_BUSY
    assert not desk.launcher.knows(key_of(order.launch))
    assert desk.launcher.latest_attempt("tick", order.launch.scheduled_at_unix_ms) == 0
    await desk.launcher.stop()
