"""The real worker agent, in this process and as a process of its own, against a master that the test plays."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from coordinator import __version__
from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.config import ClusterConfig, MasterSettings, SecuritySettings, SessionSettings, WorkerSettings
from coordinator.config_file import render
from coordinator.model.errors import CoordinatorError
from coordinator.server.lock import DirectoryLocked
from tests.integration.played_leader import WAIT_S, PlayedMaster, PlayedSession
from worker_agent.agent import WorkerAgent
from worker_agent.hosting import ACCEPTED, CAUGHT_UP, CEDED, decode
from worker_agent.session_interface import End

PRIMARY = session_pb2.REPLICA_ROLE_PRIMARY
JOINING = session_pb2.REPLICA_ROLE_JOINING


def entry(
    shard_id: int, epoch: int, role: session_pb2.ReplicaRole.ValueType, cede_to: str = ""
) -> session_pb2.ShardAssignment:
    """One line of an assignment."""
    return session_pb2.ShardAssignment(
        shard=types_pb2.Shard(id=shard_id, lo=0, hi=0, epoch=epoch), role=role, cede_to=cede_to
    )


def make_config(directory: Path, *masters: PlayedMaster) -> ClusterConfig:
    """A cluster of the masters that the test plays, found without Consul."""
    return ClusterConfig(
        name="test",
        data_directory=str(directory / "data"),
        masters=tuple(
            MasterSettings(master.master_id, master.address, f"127.0.0.1:{number}", f"127.0.0.1:{100 + number}")
            for number, master in enumerate(masters, start=1)
        ),
        session=SessionSettings(heartbeat_s=0.1),
        # The played masters speak plain text; TLS is not the subject here.
        security=SecuritySettings(mode="plaintext"),
    )


@pytest.fixture
async def master() -> AsyncIterator[PlayedMaster]:
    played = PlayedMaster("m1")
    await played.start()
    yield played
    await played.stop()


@pytest.fixture
async def other_master() -> AsyncIterator[PlayedMaster]:
    played = PlayedMaster("m2")
    await played.start()
    yield played
    await played.stop()


@contextlib.asynccontextmanager
async def running(
    directory: Path, *masters: PlayedMaster, worker_id: str = "w1", **settings: Any
) -> AsyncIterator[tuple[WorkerAgent, asyncio.Task[End]]]:
    """An agent that is ready; it is stopped at the end unless it has ended."""
    agent = WorkerAgent(make_config(directory, *masters), WorkerSettings(id=worker_id, zone="z1", **settings))
    task = asyncio.create_task(agent.run())
    ready = asyncio.create_task(agent.ready.wait())
    await asyncio.wait({task, ready}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if task.done():
        await task
    try:
        yield agent, task
    finally:
        agent.request_stop("the test is over")
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), WAIT_S)


async def health_of(agent: WorkerAgent) -> tuple[int, dict[str, Any]]:
    """Status and document of the agent's `/health`."""
    async with aiohttp.ClientSession() as client, client.get(f"http://{agent.http_address}/health") as answer:
        return answer.status, await answer.json()


async def metrics_of(agent: WorkerAgent) -> str:
    """The text of the agent's `/metrics`."""
    async with aiohttp.ClientSession() as client, client.get(f"http://{agent.http_address}/metrics") as answer:
        return await answer.text()


async def health_becomes(
    agent: WorkerAgent, is_right: Callable[[int, dict[str, Any]], bool]
) -> tuple[int, dict[str, Any]]:
    """Asks until the health is right; fails with the last answer."""
    deadline = time.monotonic() + WAIT_S
    while True:
        status, document = await health_of(agent)
        if is_right(status, document):
            return status, document
        assert time.monotonic() < deadline, document
        await asyncio.sleep(0.02)


async def reports_of(session: PlayedSession, count: int) -> list[tuple[int, int, int]]:
    """The next replica reports as (shard, epoch, progress)."""
    reports: list[tuple[int, int, int]] = []
    while len(reports) < count:
        message = await session.next("replica_reports")
        reports.extend((report.shard_id, report.epoch, report.progress) for report in message.reports)
    return reports


# The session


async def test_a_worker_introduces_itself_and_earns_a_lease(tmp_path: Path, master: PlayedMaster) -> None:
    """The Hello names the addresses that are really bound; grants make the worker healthy, and its figures arrive."""
    async with running(tmp_path, master, weight=2.0, labels=(("disk", "fast"),)) as (agent, _):
        session = await master.session()
        hello = session.hello
        assert (hello.node.id, hello.node.zone, hello.node.weight) == ("w1", "z1", 2.0)
        assert dict(hello.node.labels) == {"disk": "fast"}
        assert (hello.node.grpc_address, hello.node.http_address) == (agent.grpc_address, agent.http_address)
        assert not agent.grpc_address.endswith(":0")
        assert (hello.cluster_name, hello.node.version, hello.applied_generation) == ("test", __version__, 0)
        sequences = [(await session.next("heartbeat")).sequence for _ in range(3)]
        assert sequences == [1, 2, 3]
        metrics = (await session.next("heartbeat")).metrics
        assert metrics.resident_memory_bytes > 1 << 20
        assert 0 < metrics.memory_percent <= 100
        status, document = await health_becomes(agent, lambda _, document: document["status"] == "healthy")
        assert status == 200
        assert document["instance_id"] == "w1"
        assert document["services"] == {"masters": "connected", "lease": "held", "storage": "ready"}
        assert set(document["metrics"]) == {
            "cpu_percent",
            "memory_percent",
            "disk_percent",
            "active_connections",
            "queue_depth",
        }


async def test_assignments_are_written_applied_and_reported(tmp_path: Path, master: PlayedMaster) -> None:
    """Each role is reported at its epoch; the file holds what was reported; health and metrics show it."""
    async with running(tmp_path, master) as (agent, _):
        session = await master.session()
        jobs = [session_pb2.JobAssignment(job_id="loop_01"), session_pb2.JobAssignment(job_id="loop_02", rank=1)]
        await session.say(
            assignment=session_pb2.Assignment(
                generation=7, shards=[entry(1, 3, PRIMARY), entry(2, 5, JOINING)], jobs=jobs
            )
        )
        assert await reports_of(session, 3) == [(1, 3, ACCEPTED), (2, 5, ACCEPTED), (2, 5, CAUGHT_UP)]
        path = tmp_path / "data" / "w1" / "assignment.bin"
        stored = decode(path.read_bytes(), str(path))
        assert (stored.cluster_id, stored.assignment.generation) == ("c-1", 7)
        while (await session.next("heartbeat")).applied_generation != 7:
            pass
        _, document = await health_of(agent)
        assert document["loops"] == {"running": 1, "healthy": 1}
        text = await metrics_of(agent)
        assert 'coordinator_worker_replicas{role="primary"} 1.0' in text
        assert 'coordinator_worker_jobs{rank="backup"} 1.0' in text
        assert "coordinator_worker_assignment_generation 7.0" in text
        await session.say(assignment=session_pb2.Assignment(generation=8, shards=[entry(1, 3, PRIMARY, cede_to="w2")]))
        assert await reports_of(session, 1) == [(1, 3, CEDED)]


async def test_an_old_assignment_is_ignored(tmp_path: Path, master: PlayedMaster) -> None:
    """A generation that is not above the last one changes nothing; the next one that is, does."""
    async with running(tmp_path, master):
        session = await master.session()
        await session.say(assignment=session_pb2.Assignment(generation=7, shards=[entry(1, 3, PRIMARY)]))
        assert await reports_of(session, 1) == [(1, 3, ACCEPTED)]
        await session.say(assignment=session_pb2.Assignment(generation=6, shards=[entry(1, 9, PRIMARY)]))
        await session.say(assignment=session_pb2.Assignment(generation=9, shards=[entry(1, 4, PRIMARY)]))
        assert await reports_of(session, 1) == [(1, 4, ACCEPTED)]


async def test_the_leader_is_found_through_a_redirect(
    tmp_path: Path, master: PlayedMaster, other_master: PlayedMaster
) -> None:
    """A follower's Redirect leads the worker to the leader, also to one that its configuration does not name."""
    master.redirect_to = other_master.address
    async with running(tmp_path, master):
        assert (await other_master.session()).hello.node.id == "w1"


async def test_a_leader_that_dies_is_replaced_within_the_suspect_time(
    tmp_path: Path, master: PlayedMaster, other_master: PlayedMaster
) -> None:
    """After the leader's death the worker is with the new one within 1.5 s, keeps its lease, and says all again."""
    other_master.redirect_to = ""
    async with running(tmp_path, master, other_master) as (agent, _):
        session = await master.session()
        await session.say(assignment=session_pb2.Assignment(generation=7, shards=[entry(1, 3, PRIMARY)]))
        await reports_of(session, 1)
        await health_becomes(agent, lambda _, document: document["status"] == "healthy")
        killed_at = time.monotonic()
        await master.stop()
        other_master.redirect_to = None
        session = await other_master.session()
        assert time.monotonic() - killed_at < 1.5
        assert session.hello.applied_generation == 7
        assert (await health_of(agent))[1]["services"]["lease"] == "held"
        assert await reports_of(session, 1) == [(1, 3, ACCEPTED)]


async def test_a_silent_leader_is_left_for_another(
    tmp_path: Path, master: PlayedMaster, other_master: PlayedMaster
) -> None:
    """A leader that stops granting leases, with its stream still open, is given up."""
    async with running(tmp_path, master, other_master):
        session = await master.session()
        await session.next("heartbeat")
        session.grants = False
        assert (await other_master.session()).hello.node.id == "w1"
        await asyncio.wait_for(session.ended.wait(), WAIT_S)


async def test_a_frozen_master_does_not_hold_the_worker(tmp_path: Path, master: PlayedMaster) -> None:
    """A port that takes connections and never speaks costs less than a second."""
    with socket.socket() as frozen_socket:
        frozen_socket.bind(("127.0.0.1", 0))
        frozen_socket.listen()
        frozen = PlayedMaster("m0")
        frozen.address = f"127.0.0.1:{frozen_socket.getsockname()[1]}"
        began_at = time.monotonic()
        async with running(tmp_path, frozen, master):
            await master.session()
            assert time.monotonic() - began_at < 3.0


async def test_a_worker_without_masters_waits_degraded(tmp_path: Path, master: PlayedMaster) -> None:
    """While no master answers the worker stays up, says so, and finds its leader when one comes."""
    address = master.address
    await master.stop()
    async with running(tmp_path, master) as (agent, _):
        status, document = await health_of(agent)
        assert (status, document["status"]) == (200, "degraded")
        assert document["services"]["masters"] == "connecting"
        await master.start(address)
        assert (await master.session()).hello.node.id == "w1"


# Launches


async def test_a_launch_runs_and_is_reported_until_its_receipt(
    tmp_path: Path, master: PlayedMaster, other_master: PlayedMaster
) -> None:
    """An order runs a real process; its end is reported, and again to the next leader, until a receipt comes."""
    other_master.redirect_to = ""
    async with running(tmp_path, master, other_master) as (agent, _):
        session = await master.session()
        launch = types_pb2.Launch(
            job_id="loop_01", scheduled_at_unix_ms=1_767_600_000_000, attempt=1, cause="cron/loop_01/9"
        )
        spec = types_pb2.CronJobSpec(id="loop_01", command=[sys.executable, "-c", "print('real output')"], timeout_s=30)
        await session.say(launch_order=session_pb2.LaunchOrder(launch=launch, spec=spec))
        report = await session.next("launch_report")
        assert report.state == types_pb2.LAUNCH_STATE_RUNNING
        while report.state == types_pb2.LAUNCH_STATE_RUNNING:
            report = await session.next("launch_report")
        assert (report.state, report.exit_status) == (types_pb2.LAUNCH_STATE_SUCCEEDED, 0)
        assert b"real output" in report.output
        await master.stop()
        other_master.redirect_to = None
        session = await other_master.session()
        assert [launch.state for launch in session.hello.launches] == [types_pb2.LAUNCH_STATE_SUCCEEDED]
        await session.say(
            launch_report_receipt=session_pb2.LaunchReportReceipt(
                job_id="loop_01", scheduled_at_unix_ms=1_767_600_000_000, attempt=1, state=report.state
            )
        )
        text = ""
        deadline = time.monotonic() + WAIT_S
        while "coordinator_worker_launch_reports_pending 0.0" not in text:
            assert time.monotonic() < deadline, text
            text = await metrics_of(agent)
        assert 'coordinator_worker_launches_total{state="succeeded"} 1.0' in text


# Endings


async def test_a_clean_stop_says_goodbye_and_closes_everything(tmp_path: Path, master: PlayedMaster) -> None:
    """The leader hears a Goodbye with the reason; after its Farewell the agent ends and its ports are free."""
    async with running(tmp_path, master) as (agent, task):
        session = await master.session()
        await session.next("heartbeat")
        agent.request_stop("maintenance")
        assert (await session.next("goodbye")).reason == "maintenance"
        assert await asyncio.wait_for(task, WAIT_S) == End(0, "left: bye")
        for address in (agent.grpc_address, agent.http_address):
            with pytest.raises(OSError, match=r"."):
                await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))


async def test_a_leader_that_does_not_answer_cannot_hold_the_stop(tmp_path: Path, master: PlayedMaster) -> None:
    """Without a Farewell the agent is away within a few seconds."""
    async with running(tmp_path, master) as (agent, task):
        session = await master.session()
        session.answers_goodbye = False
        await session.next("heartbeat")
        agent.request_stop("maintenance")
        end = await asyncio.wait_for(task, 5.0)
    assert end.exit_status == 0


async def test_a_final_farewell_ends_the_agent(tmp_path: Path, master: PlayedMaster) -> None:
    """A worker that has left ends by itself, well, and says why."""
    async with running(tmp_path, master) as (_, task):
        session = await master.session()
        await session.say(farewell=session_pb2.Farewell(reason="w1 has left", final=True))
        end = await asyncio.wait_for(task, WAIT_S)
    assert end == End(0, "the masters ended the session for good: w1 has left")


async def test_a_disk_that_cannot_be_written_is_unhealthy_and_recovers(tmp_path: Path, master: PlayedMaster) -> None:
    """An assignment that cannot be written is neither in force nor reported; it is both once the disk is well again."""
    in_the_way = tmp_path / "data" / "w1" / "assignment.bin.new"
    in_the_way.mkdir(parents=True)
    async with running(tmp_path, master) as (agent, _):
        session = await master.session()
        await session.say(assignment=session_pb2.Assignment(generation=7, shards=[entry(1, 3, PRIMARY)]))
        _, document = await health_becomes(agent, lambda status, _: status == 503)
        assert document["status"] == "unhealthy"
        assert "assignment.bin cannot be written" in document["services"]["storage"]
        assert 'coordinator_worker_replicas{role="primary"} 0.0' in await metrics_of(agent)
        in_the_way.rmdir()
        assert await reports_of(session, 1) == [(1, 3, ACCEPTED)]
        await health_becomes(agent, lambda status, _: status == 200)


# The worker's own server


async def test_the_grpc_address_answers_health_and_reflection(tmp_path: Path, master: PlayedMaster) -> None:
    """What the worker registers is real: it serves grpc.health.v1 and tells what it serves."""
    async with running(tmp_path, master) as (agent, _), aio.insecure_channel(agent.grpc_address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        call: Any = reflect()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = [service.name for service in (await call.read()).list_services_response.service]
        assert "grpc.health.v1.Health" in services
        _, document = await health_of(agent)
        assert document["metrics"]["active_connections"] == 1
        await call.done_writing()


@pytest.mark.parametrize("key", ["grpc_address", "http_address"])
async def test_a_port_in_use_is_one_clear_line(tmp_path: Path, master: PlayedMaster, key: str) -> None:
    """An address that another process holds is refused with its name, and nothing of the agent stays behind."""
    with pytest.raises(CoordinatorError, match=rf"configure another {key}"):
        async with running(tmp_path, master, **{key: master.address}):
            pass
    async with running(tmp_path, master):
        await master.session()


async def test_a_second_agent_on_the_directory_is_refused(tmp_path: Path, master: PlayedMaster) -> None:
    """One directory has one agent."""
    async with running(tmp_path, master):
        await master.session()
        with pytest.raises(DirectoryLocked, match="is in use by another daemon"):
            await WorkerAgent(make_config(tmp_path, master), WorkerSettings(id="w1")).run()


# As a process


class AgentProcess:
    """`worker-agent` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ended(self) -> tuple[int, str]:
        """Exit status and standard error."""
        async with asyncio.timeout(30):
            _, errors = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, errors.decode("utf-8")


@pytest.fixture
async def start_process(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    processes: list[asyncio.subprocess.Process] = []

    async def start(*arguments: str) -> AgentProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-W",
            "error",
            "-m",
            "worker_agent.main",
            *arguments,
            cwd=tmp_path,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        processes.append(process)
        return AgentProcess(process)

    yield start
    for process in processes:
        if process.returncode is None:
            process.kill()
            _, errors = await process.communicate()
            # pytest shows it when the test failed.
            sys.stderr.write(errors.decode("utf-8"))


def write_config(directory: Path, *masters: PlayedMaster) -> str:
    """A cluster.toml for the masters that the test plays."""
    path = directory / "cluster.toml"
    path.write_text(render(make_config(directory, *masters)), encoding="utf-8")
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can catch")
async def test_sigterm_ends_the_process_cleanly(
    tmp_path: Path, master: PlayedMaster, start_process: Callable[..., Any]
) -> None:
    """The daemon logs that it is ready, says Goodbye at SIGTERM, and ends with 0 and no warning."""
    agent = await start_process("--config", write_config(tmp_path, master), "--id", "w1")
    session = await master.session()
    await session.next("heartbeat")
    agent.process.send_signal(signal.SIGTERM)
    assert (await session.next("goodbye")).reason == "it was told to stop by SIGTERM"
    status, errors = await agent.ended()
    assert status == 0, errors
    assert f"worker w1 ready: grpc={session.hello.node.grpc_address} http={session.hello.node.http_address}" in errors
    assert "worker w1 ended: left: bye" in errors
    assert "Warning" not in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can catch")
async def test_a_second_signal_ends_the_process_at_once(
    tmp_path: Path, master: PlayedMaster, start_process: Callable[..., Any]
) -> None:
    """Whoever signals twice does not wait for a Farewell."""
    agent = await start_process("--config", write_config(tmp_path, master), "--id", "w1")
    session = await master.session()
    await session.next("heartbeat")
    session.answers_goodbye = False
    agent.process.send_signal(signal.SIGINT)
    await session.next("goodbye")
    agent.process.send_signal(signal.SIGINT)
    status, errors = await agent.ended()
    assert status == 1
    assert "stopping at once" in errors


async def test_a_killed_worker_comes_back_as_a_new_incarnation(
    tmp_path: Path, master: PlayedMaster, start_process: Callable[..., Any]
) -> None:
    """After kill -9 the worker starts again on its directory, holds nothing, and takes the same assignment again."""
    config = write_config(tmp_path, master)
    assignment = session_pb2.Assignment(generation=7, shards=[entry(1, 3, PRIMARY)])
    agent = await start_process("--config", config, "--id", "w1")
    first = await master.session()
    await first.say(assignment=assignment)
    assert await reports_of(first, 1) == [(1, 3, ACCEPTED)]
    agent.process.kill()
    await agent.ended()
    await start_process("--config", config, "--id", "w1")
    second = await master.session()
    assert second.hello.node.incarnation != first.hello.node.incarnation
    assert second.hello.applied_generation == 0
    await second.say(assignment=session_pb2.Assignment(generation=6, shards=[entry(1, 2, PRIMARY)]))
    await second.say(assignment=assignment)
    assert await reports_of(second, 1) == [(1, 3, ACCEPTED)]


async def test_two_processes_on_one_directory(
    tmp_path: Path, master: PlayedMaster, start_process: Callable[..., Any]
) -> None:
    """The second process ends with 1 and one line that names the first."""
    config = write_config(tmp_path, master)
    first = await start_process("--config", config, "--id", "w1")
    await master.session()
    status, errors = await (await start_process("--config", config, "--id", "w1")).ended()
    assert status == 1
    assert f"is in use by another daemon (process {first.process.pid})" in errors
    assert len(errors.splitlines()) == 1


async def test_the_wrong_cluster_is_one_clear_line(
    tmp_path: Path, master: PlayedMaster, start_process: Callable[..., Any]
) -> None:
    """Masters of another cluster refuse the worker; it ends with 1 and their reason."""
    master.refusal = "the worker belongs to cluster 'test', this is cluster 'prod'"
    status, errors = await (await start_process("--config", write_config(tmp_path, master), "--id", "w1")).ended()
    assert status == 1
    assert errors.splitlines()[-1] == f"worker-agent: master {master.address} refuses this worker: {master.refusal}"


async def test_data_of_another_cluster_is_refused(
    tmp_path: Path, master: PlayedMaster, start_process: Callable[..., Any]
) -> None:
    """A directory that belongs to one cluster is not taken into another one."""
    config = write_config(tmp_path, master)
    agent = await start_process("--config", config, "--id", "w1")
    session = await master.session()
    await session.say(assignment=session_pb2.Assignment(generation=7))
    while (await session.next("heartbeat")).applied_generation != 7:
        pass
    agent.process.kill()
    await agent.ended()
    master.cluster_id = "c-2"
    status, errors = await (await start_process("--config", config, "--id", "w1")).ended()
    assert status == 1
    assert "belongs to cluster c-1" in errors.splitlines()[-1]


async def test_a_damaged_file_stops_the_agent(
    tmp_path: Path, master: PlayedMaster, start_process: Callable[..., Any]
) -> None:
    """A file that cannot be trusted is named, with the way out; the agent ends with 1."""
    path = tmp_path / "data" / "w1" / "assignment.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a fi")
    status, errors = await (await start_process("--config", write_config(tmp_path, master), "--id", "w1")).ended()
    assert status == 1
    assert errors.startswith(f"worker-agent: {path} is damaged; move the file away")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("--version",), 0, ""),
        ((), 2, "Missing option"),
        (("--config", "missing.toml", "--id", "w1"), 1, "missing.toml: there is no such file"),
        (("--config", "cluster.toml", "--id", "w 1"), 1, "'w 1' cannot be a worker's id"),
        (("--config", "broken.toml", "--id", "w1"), 1, "broken.toml"),
    ],
)
async def test_usage_and_configuration(
    tmp_path: Path,
    master: PlayedMaster,
    start_process: Callable[..., Any],
    arguments: tuple[str, ...],
    status: int,
    text: str,
) -> None:
    """Wrong usage ends with 2, an unusable configuration with 1, each with a line that says what was wrong."""
    write_config(tmp_path, master)
    (tmp_path / "broken.toml").write_text("name = \n", encoding="utf-8")
    got, errors = await (await start_process(*arguments)).ended()
    assert got == status, errors
    assert text in errors
    assert "Traceback" not in errors
