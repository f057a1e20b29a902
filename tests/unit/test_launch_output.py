"""What runs printed: files of one run against a model, bounds, and readers that follow. Real files, real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.v1 import launch_pb2
from coordinator.model.errors import Refused
from tests.unit.test_launcher import SETTINGS, SUCCEEDED, WAIT_S, Desk, order_of, script
from worker_agent import launch_output
from worker_agent.launch_command import key_of, token_of
from worker_agent.launch_output import BLOCK_BYTES, LaunchKey, LaunchOutputs, OutputFile, read_output
from worker_agent.launch_service import LaunchService

KEPT = replace(SETTINGS, run_output_bytes_max=1_000)


def read_all(path: Path, piece_bytes_max: int = 65_536) -> dict[int, int]:
    """Everything that a file shows: byte by offset."""
    shown: dict[int, int] = {}
    offset = 0
    while (piece := read_output(path, offset, piece_bytes_max)) is not None:
        assert piece.offset_bytes >= offset
        shown.update(enumerate(piece.data, start=piece.offset_bytes))
        offset = piece.offset_bytes + len(piece.data)
    return shown


def expected(printed: bytes, bytes_max: int) -> dict[int, int]:
    """The first half and the last half."""
    head = bytes_max // 2
    tail = max(head, len(printed) - (bytes_max - head))
    return {at: byte for at, byte in enumerate(printed) if at < head or at >= tail}


@given(
    bytes_max=st.integers(1, 300),
    slack=st.integers(1, 50),
    pieces=st.lists(st.binary(min_size=1, max_size=200), max_size=20),
    piece_bytes_max=st.integers(1, 70),
)
def test_a_file_shows_the_first_half_and_the_last_half(
    tmp_path_factory: pytest.TempPathFactory,
    bytes_max: int,
    slack: int,
    pieces: list[bytes],
    piece_bytes_max: int,
) -> None:
    """Whatever is printed in whatever pieces, after each of them the file shows both halves and no other byte."""
    path = tmp_path_factory.mktemp("output") / "a@1@1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_output, "SLACK", slack)
        file = OutputFile(path, bytes_max)
        printed = b""
        for piece in pieces:
            file.append(piece)
            printed += piece
            assert read_all(path, piece_bytes_max) == expected(printed, bytes_max)
        file.close()
        assert not path.exists() or path.stat().st_size <= bytes_max + slack + 32


@given(pieces=st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=12), cut=st.integers(0, 40))
def test_a_kill_between_two_writes_leaves_a_file_that_reads_right(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], cut: int
) -> None:
    """Killed after any write to the file, it shows the state before or after the piece that was being added."""
    path = tmp_path_factory.mktemp("output") / "a@1@1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_output, "SLACK", 10)
        writes = 0
        write_at = launch_output._write_at

        def write_or_die(*arguments: object) -> None:
            nonlocal writes
            writes += 1
            if writes > cut:
                raise KeyboardInterrupt
            write_at(*arguments)  # type: ignore[arg-type]

        patch.setattr(launch_output, "_write_at", write_or_die)
        file = OutputFile(path, 40)
        printed = b""
        states = [expected(b"", 40)]
        try:
            for piece in pieces:
                states += [expected(printed + piece[:end], 40) for end in range(1, len(piece) + 1)]
                file.append(piece)
                printed += piece
        except KeyboardInterrupt:
            pass
        assert read_all(path) in states
        file.close()


def test_names_of_files_go_both_ways() -> None:
    """Every job's id makes a name that leads nowhere else, and back to the launch."""
    for job_id in ("loop_01", "a.b-c", "../x", "a@b", "tür"):
        key = LaunchKey(job_id, 1_767_268_800_000, 2)
        assert "/" not in key.file_name
        assert LaunchKey.of_file_name(key.file_name) == key
    assert LaunchKey.of_file_name("something.else") is None


# Runs


async def test_a_run_is_kept_with_its_beginning_and_its_end(tmp_path: Path) -> None:
    """Of a long output both halves are served, with a jump; the report has the last bytes as before."""
    desk = Desk(tmp_path, KEPT)
    await desk.launcher.start()
    order = script("print('first'); print('x' * 2_000_000); print('last')")
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert result.output.endswith(b"x\nlast\n")
    pieces = [piece async for piece in desk.launcher.outputs.read(key_of(order.launch), 0, follow=False)]
    total = len(b"first\n" + b"x" * 2_000_000 + b"\nlast\n")
    assert [(piece.offset_bytes, len(piece.data)) for piece in pieces] == [(0, 500), (total - 500, 500)]
    assert pieces[0].data.startswith(b"first\nxxx")
    assert pieces[1].data.endswith(b"xxx\nlast\n")
    await desk.launcher.stop()


async def test_a_silent_run_costs_no_file_and_is_known(tmp_path: Path) -> None:
    """A run that printed nothing is answered with nothing, also after a restart; one that never ran is refused."""
    desk = Desk(tmp_path)
    await desk.launcher.start()
    order = order_of(sys.executable, "-c", "pass")
    await desk.launcher.launch(order)
    await desk.final(order)
    await desk.launcher.stop()
    assert not (tmp_path / "runs").exists()
    again = Desk(tmp_path)
    await again.launcher.start()
    assert [(a.attempt, a.data) for a in await answers(again, order.launch.scheduled_at_unix_ms)] == [(1, b"")]
    with pytest.raises(Refused, match="worker w1 has no output of attempt 7 of tick at 2026-01-01T12:00:00Z"):
        await answers(again, order.launch.scheduled_at_unix_ms, attempt=7)
    with pytest.raises(Refused, match="it did not run here"):
        await answers(again, 5)
    await again.launcher.stop()


async def answers(desk: Desk, at: int, **fields: int) -> list[launch_pb2.ReadOutputResponse]:
    """What the service says."""
    request = launch_pb2.ReadOutputRequest(job_id="tick", scheduled_at_unix_ms=at, **fields)  # type: ignore[arg-type]
    service = LaunchService(desk.launcher, "w1")
    return [answer async for answer in service.ReadOutput(request, None)]  # type: ignore[arg-type]


async def test_the_latest_attempt_is_read_unless_one_is_named(tmp_path: Path) -> None:
    """Two attempts of one launch have an output each, also after a restart."""
    desk = Desk(tmp_path)
    await desk.launcher.start()
    for attempt in (1, 2):
        order = script(f"print('attempt {attempt}')", at=7, attempt=attempt)
        await desk.launcher.launch(order)
        await desk.final(order)
    await desk.launcher.stop()
    (tmp_path / "launches.jsonl").unlink()  # The outputs alone are enough.
    again = Desk(tmp_path)
    await again.launcher.start()
    assert b"".join(a.data for a in await answers(again, 7)) == b"attempt 2\n"
    assert b"".join(a.data for a in await answers(again, 7, attempt=1)) == b"attempt 1\n"
    assert b"".join(a.data for a in await answers(again, 7, attempt=1, offset_bytes=8)) == b"1\n"
    await again.launcher.stop()


async def test_a_follower_sees_what_comes_and_the_end(tmp_path: Path) -> None:
    """Who follows a run gets each line while the run goes on, then the end."""
    desk = Desk(tmp_path / "data")
    await desk.launcher.start()
    gate = tmp_path / "gate"
    until = f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    wait = f"import os,time\nos.write(1, b'begun\\n')\n{until}\nos.write(1, b'end\\n')"
    await desk.launcher.launch(script(wait, at=1))
    service = LaunchService(desk.launcher, "w1")
    request = launch_pb2.ReadOutputRequest(job_id="tick", scheduled_at_unix_ms=1, attempt=1, follow=True)
    stream = aiter(service.ReadOutput(request, None))  # type: ignore[arg-type]
    async with asyncio.timeout(WAIT_S):
        assert [(await anext(stream)).data for _ in range(2)] == [b"", b"begun\n"]
        gate.touch()
        assert [answer.data async for answer in stream] == [b"end\n"]
    await desk.launcher.stop()


async def collect(desk: Desk, at: int) -> bytes:
    """All that a follower of a launch gets."""
    pieces = desk.launcher.outputs.read(LaunchKey("tick", at, 1), 0, follow=True)
    return b"".join([piece.data async for piece in pieces])


async def test_all_together_are_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    """Over the bound the oldest ended runs lose their files, never one that runs; a restart counts what it finds."""
    desk = Desk(tmp_path / "data", replace(SETTINGS, runs_output_bytes_max=3 * BLOCK_BYTES))
    await desk.launcher.start()
    gate = tmp_path / "gate"
    running = script(f"import os,time\nprint('up')\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)", at=1)
    await desk.launcher.launch(running)
    async for _ in desk.launcher.outputs.read(key_of(running.launch), 0, follow=True):
        break
    for at in range(2, 7):
        order = script("print('line')", at=at)
        await desk.launcher.launch(order)
        assert (await desk.final(order)).state == SUCCEEDED
        await collect(desk, at)
    gate.touch()
    await desk.final(running)
    await desk.launcher.stop()
    names = {LaunchKey("tick", at, 1).file_name for at in (1, 5, 6)}
    assert {path.name for path in (tmp_path / "data" / "runs").iterdir()} == names
    outputs = LaunchOutputs(
        tmp_path / "data", run_bytes_max=1_000, all_bytes_max=2 * BLOCK_BYTES, tail_bytes_max=10
    )
    await outputs.start()
    assert outputs.bytes_kept == 2 * BLOCK_BYTES
    await outputs.close()
    assert len(list((tmp_path / "data" / "runs").iterdir())) == 2


async def test_a_disk_that_refuses_costs_the_output_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a full disk the run goes on to its end and its last bytes are reported; one line says what is not kept."""

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launch_output, "_write_at", refuse)
    desk = Desk(tmp_path)
    await desk.launcher.start()
    order = script("for n in range(2000): print(n, flush=True)")
    await desk.launcher.launch(order)
    result = await desk.final(order)
    assert result.state == SUCCEEDED
    assert result.output.endswith(b"\n1999\n")
    assert len([record for record in caplog.records if "is not kept any further" in record.message]) == 1
    await desk.launcher.stop()


async def test_a_slow_disk_neither_holds_up_the_loop_nor_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While each write takes 0.1 s a flood waits in its pipe, the loop goes on, and every byte is there in the end."""
    write_at = launch_output._write_at

    def slowly(*arguments: object) -> None:
        time.sleep(0.1)
        write_at(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(launch_output, "_write_at", slowly)
    desk = Desk(tmp_path, replace(SETTINGS, run_output_bytes_max=4_000_000))
    await desk.launcher.start()
    order = script("import sys; sys.stdout.write('y' * 2_000_000)")
    await desk.launcher.launch(order)
    output = desk.launcher.outputs._live[key_of(order.launch)]
    most = 0
    async with asyncio.timeout(WAIT_S):
        while desk.launcher.running:
            most = max(most, len(output._pending))
            await asyncio.sleep(0.001)
    assert 0 < most <= launch_output.PENDING_BYTES_MAX + 65_536
    assert len(await collect(desk, order.launch.scheduled_at_unix_ms)) == 2_000_000
    await desk.launcher.stop()


AGENT = """
import asyncio, sys
from pathlib import Path
from coordinator.config import WorkerSettings
from coordinator.model import SystemClock
from tests.unit.test_launcher import script
from worker_agent.launch_output import LaunchKey
from worker_agent.launcher import Launcher

async def main():
    launcher = Launcher(Path(sys.argv[1]), WorkerSettings(id="w1"), "w1", SystemClock(), lambda report: None)
    await launcher.start()
    order = script("import os,time; os.write(1, b'before the kill\\\\n'); time.sleep(60)", at=7)
    await launcher.launch(order)
    async for piece in launcher.outputs.read(LaunchKey("tick", 7, 1), 0, follow=True):
        print("kept", flush=True)
asyncio.run(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
async def test_output_survives_a_kill_of_the_agent(tmp_path: Path) -> None:
    """After kill -9 of the agent's process the next one ends the run and still has what it printed."""
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", AGENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    async with asyncio.timeout(WAIT_S):
        assert await agent.stdout.readline() == b"kept\n"
    agent.send_signal(signal.SIGKILL)
    await agent.wait()
    desk = Desk(tmp_path)
    await desk.launcher.start()
    assert token_of(script("", at=7).launch) == "tick/7/1"
    assert await collect(desk, 7) == b"before the kill\n"
    assert desk.launcher.known_launches() == []
    await desk.launcher.stop()
