"""Launches of the real worker agent, against a master that the test plays: stops, the end of the lease, output."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from grpc import aio

from coordinator.api.v1 import launch_pb2, launch_pb2_grpc, session_pb2, types_pb2
from coordinator.model.clock import monotonic_s
from tests.integration.played_leader import WAIT_S, PlayedMaster, PlayedSession
from tests.integration.test_worker_agent import running, write_config
from worker_agent.run_finder import lives, until_ended

TOKEN = session_pb2.LaunchToken(job_id="tick", scheduled_at_unix_ms=1_767_268_800_000, attempt=1)
RUNS_ON = "import os, time; os.write(1, b'up %d\\n' % os.getpid()); time.sleep(60)"


def order_of(source: str, token: session_pb2.LaunchToken = TOKEN) -> session_pb2.LaunchOrder:
    """An order for a Python program."""
    return session_pb2.LaunchOrder(
        launch=types_pb2.Launch(
            job_id=token.job_id, scheduled_at_unix_ms=token.scheduled_at_unix_ms, attempt=token.attempt, worker="w1"
        ),
        spec=types_pb2.CronJobSpec(id=token.job_id, command=[sys.executable, "-c", source], timeout_s=60.0),
    )


@pytest.fixture
async def master() -> AsyncIterator[PlayedMaster]:
    played = PlayedMaster("m1")
    await played.start()
    yield played
    await played.stop()


async def output_of(address: str, *, follow: bool) -> AsyncIterator[bytes]:
    """What the worker says that the run printed, as it comes."""
    request = launch_pb2.ReadOutputRequest(
        job_id=TOKEN.job_id, scheduled_at_unix_ms=TOKEN.scheduled_at_unix_ms, follow=follow
    )
    async with aio.insecure_channel(address) as channel:
        async for answer in launch_pb2_grpc.LaunchServiceStub(channel).ReadOutput(request, timeout=WAIT_S):
            assert answer.attempt == TOKEN.attempt
            if answer.data:
                yield answer.data


async def process_of(address: str) -> psutil.Process:
    """The run, which has printed its number."""
    async for data in output_of(address, follow=True):
        return psutil.Process(int(data.split()[1]))
    raise AssertionError("the run has ended")


async def heartbeat_names(session: PlayedSession, *tokens: session_pb2.LaunchToken) -> None:
    """Waits for a heartbeat that names just these launches."""
    while list((await session.next("heartbeat")).launches) != list(tokens):
        pass


async def test_a_stop_reaches_the_run_and_its_follower(tmp_path: Path, master: PlayedMaster) -> None:
    """Heartbeats name the launch until its receipt; the stop ends it as CANCELLED, and the stream of its output."""
    async with running(tmp_path, master, stop_grace_s=0.5) as (agent, _):
        session = await master.session()
        await session.next("heartbeat")
        await session.say(launch_order=order_of(RUNS_ON))
        assert (await session.next("launch_report")).state == types_pb2.LAUNCH_STATE_RUNNING
        process = await process_of(agent.grpc_address)
        await heartbeat_names(session, TOKEN)
        followed = [data async for data in output_of(agent.grpc_address, follow=False)]
        assert followed == [b"up %d\n" % process.pid]
        following = asyncio.create_task(collect(agent.grpc_address))
        await session.say(launch_stop=session_pb2.LaunchStop(token=TOKEN, reason="by hand"))
        report = await session.next("launch_report")
        assert (report.state, report.reason) == (types_pb2.LAUNCH_STATE_CANCELLED, "by hand")
        assert await following == b"up %d\n" % process.pid
        assert not process.is_running()
        await heartbeat_names(session, TOKEN)
        receipt = session_pb2.LaunchReportReceipt(
            job_id=TOKEN.job_id, scheduled_at_unix_ms=TOKEN.scheduled_at_unix_ms, attempt=1, state=report.state
        )
        await session.say(launch_report_receipt=receipt)
        await heartbeat_names(session)


async def collect(address: str) -> bytes:
    """All that a follower gets."""
    return b"".join([data async for data in output_of(address, follow=True)])


async def test_the_end_of_the_lease_ends_the_run(tmp_path: Path, master: PlayedMaster) -> None:
    """When no master grants anything the run ends with the lease, and the next session hears nothing of a result."""
    master.lease_s = 1.0
    async with running(tmp_path, master, stop_grace_s=0.3) as (agent, _):
        session = await master.session()
        await session.next("heartbeat")
        await session.say(launch_order=order_of(RUNS_ON))
        await session.next("launch_report")
        process = await process_of(agent.grpc_address)
        await master.stop()
        assert await asyncio.to_thread(process.wait, WAIT_S) is None or not process.is_running()
        await master.start(master.address)
        again = await master.session()
        assert list(again.hello.launches) == []
        await heartbeat_names(again)
        # It never starts again, and a stop of it is answered without a success.
        await again.say(launch_order=order_of(RUNS_ON))
        await again.say(launch_stop=session_pb2.LaunchStop(token=TOKEN, reason="given up"))
        report = await again.next("launch_report")
        assert report.state == types_pb2.LAUNCH_STATE_CANCELLED
        assert report.reason == "given up; its run had been ended by this worker, without a result"


async def test_a_killed_agent_leaves_its_run_until_the_lease_ends(tmp_path: Path, master: PlayedMaster) -> None:
    """After kill -9 of the daemon, which nobody starts again, its run goes on under the lease, and ends with it."""
    master.lease_s = 3.0
    command = ["-m", "worker_agent.main", "--config", write_config(tmp_path, master), "--id", "w1"]
    agent = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.DEVNULL)
    try:
        session = await master.session()
        await session.next("heartbeat")
        await session.say(launch_order=order_of(RUNS_ON))
        await session.next("launch_report")
        process = await process_of(session.hello.node.grpc_address)
        helpers = psutil.Process(agent.pid).children()
        await session.next("heartbeat")
        agent.kill()
        killed_at_s = monotonic_s()
        await agent.wait()
        assert lives(process)
        async with asyncio.timeout(WAIT_S):
            await until_ended(process)
            # Grants are counted from heartbeats, which are 0.1 s apart, unless this machine is slow.
            assert monotonic_s() - killed_at_s > 0.5 * master.lease_s
            for helper in helpers:
                await until_ended(helper)
        assert len(helpers) == 2, "the run and the watchdog"
    finally:
        if agent.returncode is None:
            agent.kill()
            await agent.wait()
