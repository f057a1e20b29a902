"""The launcher on a disk that takes nothing: it declines at once, loses no result, and nothing starts later."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import session_pb2, types_pb2
from tests.small_disk import fill, small_disk
from tests.unit.test_launcher import RUNNING, SETTINGS, SUCCEEDED, WAIT_S, Desk, has_declined, receipt_of, script
from tests.unit.test_launcher_stops import known, stop_of
from worker_agent import launch_ends
from worker_agent.launch_command import token_of

BUSY = session_pb2.LAUNCH_DECLINE_BUSY
FULL = "its disk takes no notes: No space left on device"


class Disk:
    """Its syncs fail while it is full; what was written may be on it all the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        self._fsync: Callable[[int], None] = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(launch_ends, "RETRY_S", 0.05)

    def _sync(self, descriptor: int) -> None:
        if self.is_full:
            raise OSError(28, os.strerror(28))
        self._fsync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def until_room(desk: Desk) -> None:
    """Waits until the disk takes something again."""
    ends = desk.launcher._ends
    assert ends is not None
    if ends._retrying is not None:
        await asyncio.wait_for(asyncio.wait({ends._retrying}), WAIT_S)
    assert desk.launcher.slots_free == SETTINGS.launches_max


async def test_a_disk_that_takes_nothing_declines_at_once_and_comes_back(tmp_path: Path, disk: Disk) -> None:
    """The order that finds it out and those after it go to other workers; with room again orders are taken."""
    desk = Desk(tmp_path / "data")
    await desk.launcher.start()
    witness = tmp_path / "witness"
    orders = [script(f"open({str(witness)!r}, 'w')", at=at) for at in (1, 2, 3)]
    disk.is_full = True
    for order in orders:
        await desk.launcher.launch(order)
        answer = await desk.final(order)
        assert has_declined(answer, BUSY)
        assert (answer.reason, desk.launcher.slots_free) == (FULL, 0)
    await desk.launcher.on_receipt(receipt_of(await desk.final(orders[0])))
    unanswered = orders[1:]
    assert known(desk) == {token_of(order.launch) for order in unanswered}
    assert desk.launcher.pending_reports() == [await desk.final(order) for order in unanswered]
    count = len(desk.reports)
    for order in unanswered:
        await desk.launcher.launch(order)
        await desk.launcher.stop_launch(stop_of(order))
    assert all(has_declined(report, BUSY) for report in desk.reports[count:])
    assert len(desk.reports) == count + 4

    disk.is_full = False
    await until_room(desk)
    for order in unanswered:
        await desk.launcher.launch(order)
    fourth = script("print('taken')", at=4)
    await desk.launcher.launch(fourth)
    assert (await desk.final(fourth)).state == SUCCEEDED
    await desk.launcher.stop()
    again = Desk(tmp_path / "data")
    await again.launcher.start()
    pending = [(token_of(report), report.decline) for report in again.launcher.pending_reports()]
    assert pending == [*((token_of(order.launch), BUSY) for order in unanswered), (token_of(fourth.launch), 0)]
    await again.launcher.stop()
    assert not witness.exists()


async def test_a_result_that_the_disk_does_not_take_is_reported(tmp_path: Path, disk: Disk) -> None:
    """A run that ends on a full disk has its result; it is named until its receipt, and written when there is room."""
    desk = Desk(tmp_path / "data")
    await desk.launcher.start()
    gate = tmp_path / "gate"
    waiting = f"import os,time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    orders = [script(waiting, at=at) for at in (1, 2)]
    for order in orders:
        await desk.launcher.launch(order)
        await desk.running(order)
    disk.is_full = True
    gate.touch()
    results = [await desk.final(order) for order in orders]
    assert [result.state for result in results] == [SUCCEEDED, SUCCEEDED]
    await desk.launcher.on_receipt(receipt_of(results[0]))
    assert desk.launcher.pending_reports() == results[1:]
    disk.is_full = False
    await until_room(desk)
    assert desk.launcher.pending_reports() == results[1:]
    await desk.launcher.stop()
    again = Desk(tmp_path / "data")
    await again.launcher.start()
    assert again.launcher.pending_reports() == results[1:]
    await again.launcher.stop()


async def test_a_beginning_that_failed_and_is_on_disk_all_the_same_starts_nothing(tmp_path: Path, disk: Disk) -> None:
    """A crash right behind the failed write: the next agent finds the token begun, and does not start it either."""
    desk = Desk(tmp_path / "data")
    await desk.launcher.start()
    witness = tmp_path / "witness"
    order = script(f"open({str(witness)!r}, 'w')")
    disk.is_full = True
    await desk.launcher.launch(order)
    assert has_declined(await desk.final(order), BUSY)
    shutil.copytree(tmp_path / "data", tmp_path / "crashed")
    disk.is_full = False
    crashed = Desk(tmp_path / "crashed")
    await crashed.launcher.start()
    await crashed.launcher.launch(order)
    assert crashed.launcher.running == 0
    assert crashed.reports == []
    for each in (crashed, desk):
        await each.launcher.stop()
    assert not witness.exists()


async def test_a_stop_for_what_nobody_knows_is_answered_on_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    """What the leader stops is cancelled, although the note of it waits for the disk."""
    desk = Desk(tmp_path / "data")
    await desk.launcher.start()
    order = script("print('never')")
    disk.is_full = True
    await desk.launcher.stop_launch(stop_of(order))
    answer = await desk.final(order)
    assert (answer.state, answer.reason) == (types_pb2.LAUNCH_STATE_CANCELLED, "by hand")
    await desk.launcher.launch(order)
    assert desk.reports == [answer, answer]
    disk.is_full = False
    await desk.launcher.stop()
    again = Desk(tmp_path / "data")
    await again.launcher.start()
    assert again.launcher.pending_reports() == [answer], "the last try of a stop wrote it"
    await again.launcher.stop()


async def test_a_real_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a disk of a few MB and a file that fills it."""
    monkeypatch.setattr(launch_ends, "RETRY_S", 0.05)
    data = tmp_path / "data"
    with small_disk(data):
        desk = Desk(data, replace(SETTINGS, stop_grace_s=0.1))
        await desk.launcher.start()
        ballast = fill(data)
        # What is left of the journal's last block takes some notes.
        for at in range(1, 200):
            order = script("pass", at=at)
            await desk.launcher.launch(order)
            answer = await desk.final(order)
            if answer.decline:
                break
            assert answer.state == SUCCEEDED
        assert has_declined(answer, BUSY)
        assert answer.reason == FULL
        ballast.unlink()
        await until_room(desk)
        order = script("pass", at=1_000)
        await desk.launcher.launch(order)
        assert (await desk.final(order)).state == SUCCEEDED
        assert RUNNING in [report.state for report in desk.reports]
        await desk.launcher.stop()
