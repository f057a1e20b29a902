"""Three masters over real sockets and files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.api.v1 import command_pb2, peer_pb2
from coordinator.config import RaftSettings
from coordinator.machine.state import Transition
from coordinator.model import ManualClock
from coordinator.model.errors import (
    ConfigError,
    CoordinatorError,
    Damaged,
    InvalidRequest,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
    Refused,
    TimedOut,
)
from coordinator.raft import ApplyFailed, Machine
from coordinator.raft.files import DiskFailed
from coordinator.raft.frames import FRAME_BYTES_MAX, pack
from tests.raft_cluster import CLUSTER_NAME, cluster, until
from tests.raft_machine import POISON, applied, command, times


async def test_propose_through_every_master(tmp_path: Path) -> None:
    """A command may be given to any master, answers with its index, and is in the state of that master by then."""
    async with cluster(tmp_path) as masters:
        await masters.leader()
        for id, node in masters.nodes.items():
            result = await node.propose(command(id))
            assert result.applied.index == node.status().applied_index
            assert applied(node.state)[-1] == id
        await masters.agree()


async def test_the_real_machine_runs_under_it(tmp_path: Path) -> None:
    """Under the coordinator's own machine a cluster is bootstrapped, refuses a second one, and restarts."""
    async with cluster(tmp_path, machine=Machine()) as masters:
        leader = await masters.leader()
        bootstrap = command_pb2.Command(
            bootstrap_cluster=command_pb2.BootstrapCluster(cluster_id="c1", shards=8), cause="test"
        )
        assert (await leader.propose(bootstrap)).HasField("applied")
        assert (await leader.propose(bootstrap)).HasField("refusal")
        leader.write_snapshot()
        await until(lambda: (tmp_path / leader.self_id / "snapshot").exists())
        await masters.stop()
        await masters.start()
        leader = await masters.leader()
        assert leader.state.cluster_id == "c1"
        assert len(leader.state.shards) == 8


async def test_forwarded_commands_carry_the_leaders_time(tmp_path: Path) -> None:
    """The log entry's time is the leader's, though a follower with a wrong clock was asked."""
    async with cluster(tmp_path) as masters:
        follower = (await masters.followers())[0].self_id
        masters.clocks[follower] = ManualClock(wall_ms=1_000)
        await masters.stop(follower)
        await masters.start(follower)
        await masters.leader()
        await masters.nodes[follower].propose(command("late"))
        assert abs(times(masters.nodes[follower].state)[-1] - time.time() * 1_000) < 10_000


async def test_one_master_restarts_with_its_state(tmp_path: Path) -> None:
    """A master that comes back has what it had and gets what it missed."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        away = (await masters.followers())[0].self_id
        await leader.propose(command("before"))
        await masters.stop(away)
        await leader.propose(command("meanwhile"))
        await masters.start(away)
        await until(lambda: masters.nodes[away].is_ready)
        assert applied(masters.nodes[away].state) == ["before", "meanwhile"]


async def test_all_masters_restart_with_their_state(tmp_path: Path) -> None:
    """After all were stopped, everything acknowledged is there again, under a higher term."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        term = leader.term
        await asyncio.gather(*(leader.propose(command(f"c{number}")) for number in range(200)))
        await masters.stop()
        await masters.start()
        leader = await masters.leader()
        assert leader.term > term
        assert len(applied(leader.state)) == 200
        await masters.agree()


async def test_lost_leader_is_replaced_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    """While clients write through all masters the leader goes without goodbye: others lead soon, each answer holds."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        acknowledged: list[str] = []
        denied: list[str] = []
        is_over = False

        async def write(client: int) -> None:
            number = 0
            while not is_over:
                number += 1
                cause = f"{client}-{number}"
                node = random.choice(list(masters.nodes.values()))
                try:
                    await node.propose(command(cause), 3.0)
                    acknowledged.append(cause)
                except CoordinatorError as error:
                    if error.DEFINITE:
                        denied.append(cause)

        clients = [asyncio.create_task(write(client)) for client in range(20)]
        await until(lambda: len(acknowledged) > 200)
        await masters.stop(leader.self_id)
        stopped_at = time.monotonic()
        await until(lambda: any(node.is_leader for node in masters.nodes.values()))
        took_s = time.monotonic() - stopped_at
        count = len(acknowledged)
        await until(lambda: len(acknowledged) > count + 200)
        is_over = True
        await asyncio.gather(*clients)
        await masters.start(leader.self_id)
        await masters.leader()
        await masters.agree()
        found = applied(masters.nodes[leader.self_id].state)
        assert took_s < 1.5
        assert set(acknowledged) <= set(found)
        assert not set(denied) & set(found)
        assert len(found) == len(set(found))


async def test_leadership_is_told_with_the_whole_state(tmp_path: Path) -> None:
    """Listeners hear of the new leader once, when its state has everything that was acknowledged before."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        term = leader.term
        heard: list[tuple[str, bool, int, int]] = []
        for id, node in masters.nodes.items():
            node.on_leadership(
                lambda leads, term, id=id, node=node: heard.append((id, leads, term, len(applied(node.state))))  # type: ignore[misc]
            )
        await asyncio.gather(*(leader.propose(command(f"c{number}")) for number in range(100)))
        await masters.stop(leader.self_id)
        new = await masters.leader()
        assert heard == [(leader.self_id, False, term, 100), (new.self_id, True, new.term, 100)]


async def test_far_behind_master_gets_a_snapshot(tmp_path: Path) -> None:
    """Snapshots are written and logs cut while commands go on, and a master that was long away catches up by one."""
    async with cluster(tmp_path, RaftSettings(snapshot_entries=100)) as masters:
        leader = await masters.leader()
        away = (await masters.followers())[0].self_id
        await masters.stop(away)
        for burst in range(10):
            await asyncio.gather(*(leader.propose(command(f"{burst}-{number}")) for number in range(50)))
        await until(lambda: leader.status().log_entries < 200)
        node = masters.nodes[away] = masters.make(away)
        transitions: list[Transition] = []
        node.on_transition(transitions.append)
        await node.start()
        await until(lambda: node.is_ready and len(applied(node.state)) == 500)
        assert len(transitions) < 250
        assert transitions[0].changes == ()
        assert (tmp_path / away / "snapshot").exists()
        await masters.agree()


async def test_transitions_come_in_order(tmp_path: Path) -> None:
    """Each master's listeners hear of every entry once, in the order of the log, with the state that it made."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        heard: dict[str, list[int]] = {id: [] for id in masters.nodes}
        for id, node in masters.nodes.items():
            node.on_transition(lambda transition, id=id: heard[id].append(transition.state.index))  # type: ignore[misc]
        await asyncio.gather(*(leader.propose(command(f"c{number}")) for number in range(50)))
        await masters.agree()
        assert len(heard["m1"]) == 50
        assert heard["m1"] == sorted(heard["m1"]) == heard["m2"] == heard["m3"]


async def test_barriers_share_commits(tmp_path: Path) -> None:
    """A thousand readers at once cost a few log entries, and each sees what was acknowledged elsewhere before."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        reader = (await masters.followers())[0]
        await leader.propose(command("written"))
        before = leader.status().commit_index
        await asyncio.gather(*(reader.barrier() for _ in range(1_000)))
        assert leader.status().commit_index - before <= 2
        assert applied(reader.state) == ["written"]


async def test_transfer_of_leadership(tmp_path: Path) -> None:
    """The leader hands over to the follower that is named; others refuse to, and an unknown target is refused."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        target = (await masters.followers())[1]
        with pytest.raises(NotLeader):
            await target.transfer_leadership(None)
        with pytest.raises(Refused, match="m9 cannot take over"):
            await leader.transfer_leadership("m9")
        await leader.barrier()
        await until(lambda: target.status().commit_index == leader.status().commit_index)
        await leader.transfer_leadership(target.self_id)
        assert await masters.leader() is target


async def test_a_handover_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    """Under load every follower lacks what was just appended; the leader lets one have it, and then hands over."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        await leader.barrier()
        proposal = asyncio.ensure_future(leader.propose(command("late")))
        while (figures := leader.figures()) is not None and figures.last_index == figures.commit_index:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await leader.transfer_leadership(None)
        with contextlib.suppress(OutcomeUnknown):
            await proposal
        successor = await masters.leader()
        assert successor is not leader
        await successor.barrier()
        assert applied(successor.state) == ["late"]


async def test_without_majority_nothing_is_promised(tmp_path: Path) -> None:
    """A leader without followers may not know (TimedOut); once it has stepped down, it is definite (NoLeader)."""
    settings = RaftSettings(leader_fallback_s=0.5)
    async with cluster(tmp_path, settings) as masters:
        leader = await masters.leader()
        await masters.stop(*(node.self_id for node in await masters.followers()))
        with pytest.raises(TimedOut):
            await leader.propose(command("into the void"), 0.2)
        await until(lambda: not leader.is_leader)
        with pytest.raises(NoLeader):
            await leader.propose(command("nobody"), 0.2)
        with pytest.raises(TimedOut):
            await leader.barrier(0.2)


async def test_stop_answers_what_is_in_flight(tmp_path: Path) -> None:
    """Whoever waits when a master stops hears that the outcome is unknown, at once."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        await masters.stop(*(node.self_id for node in await masters.followers()))
        waiting = asyncio.create_task(leader.propose(command("pending")))
        await asyncio.sleep(0)
        await leader.stop()
        await leader.stop()
        with pytest.raises(OutcomeUnknown):
            await waiting
        with pytest.raises(NoLeader):
            await leader.propose(command("late"), 0.0)


async def test_limits_are_definite(tmp_path: Path) -> None:
    """A command that is too large and one too many are refused before anything is sent."""
    settings = RaftSettings(command_bytes_max=1_000, proposals_max=5)
    async with cluster(tmp_path, settings) as masters:
        leader = await masters.leader()
        with pytest.raises(InvalidRequest, match="at most 1000"):
            await leader.propose(command("x" * 1_000))
        outcomes = await asyncio.gather(
            *(leader.propose(command(f"c{number}")) for number in range(8)), return_exceptions=True
        )
        assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 3
        assert len(applied(leader.state)) == 5


async def test_largest_commands_pass(tmp_path: Path) -> None:
    """Commands of the largest size travel, alone and many at once, also through a follower."""
    async with cluster(tmp_path) as masters:
        follower = (await masters.followers())[0]
        size = masters.settings.command_bytes_max - 100
        await asyncio.gather(*(follower.propose(command(f"{number}" + "x" * size)) for number in range(8)))
        await masters.agree()
        assert len(applied(follower.state)) == 8


async def test_port_in_use_is_named(tmp_path: Path) -> None:
    """A peer port that somebody else has is a configuration error with the address, and no file is touched."""
    async with cluster(tmp_path) as masters:
        second = masters.make("m1")
        second._directory = tmp_path / "second"
        with pytest.raises(ConfigError, match=r"peer port 127.0.0.1:\d+ of master m1 cannot be used"):
            await second.start()
        assert not (tmp_path / "second").exists()


async def test_damaged_snapshot_refuses_to_start(tmp_path: Path) -> None:
    """A master whose snapshot cannot be trusted says which file and does not go on with an empty state."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        await leader.propose(command("kept"))
        leader.write_snapshot()
        snapshot = tmp_path / leader.self_id / "snapshot"
        await until(snapshot.exists)
        await masters.stop(leader.self_id)
        content = bytearray(snapshot.read_bytes())
        content[-2] ^= 1
        snapshot.write_bytes(bytes(content))
        with pytest.raises(Damaged, match="snapshot, offset 20: the checksum does not match"):
            await masters.make(leader.self_id).start()


async def test_machine_that_raises_is_fatal(tmp_path: Path) -> None:
    """An exception in the machine ends every master with the entry named, instead of being retried for ever."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        with pytest.raises(OutcomeUnknown):
            await leader.propose(command(POISON))
        with pytest.raises(ApplyFailed, match="log entry"):
            await leader.fatal
        assert leader.status().role == "stopped"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux' /proc")
async def test_an_io_error_stops_one_master_and_loses_nothing(tmp_path: Path) -> None:
    """The disk of the leader fails: it stops, says why and acknowledges nothing, and the others go on without it."""
    async with cluster(tmp_path) as masters:
        leader = await masters.leader()
        await leader.propose(command("before"))
        assert leader._parts is not None
        # Nothing is mapped at address 0, so the system answers a write there with EIO.
        failing = os.open("/proc/self/mem", os.O_RDWR)
        os.dup2(failing, leader._parts.journal._descriptor)
        os.close(failing)
        with pytest.raises(OutcomeUnknown):
            await leader.propose(command("doubtful"))
        with pytest.raises(DiskFailed, match=r"Input/output error; what was acknowledged is safe; .* mend the disk"):
            await leader.fatal
        assert leader.status().role == "stopped"
        await masters.stop(leader.self_id)
        other = await masters.leader()
        await other.propose(command("after"))
        await masters.start(leader.self_id)
        await masters.agree()
        found = applied(other.state)
        assert [cause for cause in found if cause != "doubtful"] == ["before", "after"]


async def connect(masters_address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Opens a connection to a peer port."""
    host, port = masters_address.rsplit(":", 1)
    return await asyncio.open_connection(host, int(port))


async def until_cut(reader: asyncio.StreamReader) -> None:
    """Reads on until the other side ends the connection."""
    async with asyncio.timeout(5.0):
        with contextlib.suppress(ConnectionError):
            await reader.read()


def hello(from_id: str = "m2", to_id: str = "m1", cluster_name: str = CLUSTER_NAME, version: int = 1) -> bytes:
    """A first frame."""
    return pack(
        peer_pb2.PeerFrame(
            hello=peer_pb2.PeerHello(
                protocol_version=version, from_id=from_id, to_id=to_id, cluster_name=cluster_name, incarnation="x"
            )
        )
    )


BEFORE_HELLO = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(100),
    "huge": (FRAME_BYTES_MAX).to_bytes(4, "big"),
    "random": random.Random(1).randbytes(5_000),
    "other cluster": hello(cluster_name="other"),
    "other version": hello(version=2),
    "stranger": hello(from_id="m9"),
    "itself": hello(from_id="m1"),
    "wrong door": hello(to_id="m3"),
    "no hello": pack(peer_pb2.PeerFrame(timeout_now=peer_pb2.TimeoutNow(term=10**9))),
}
AFTER_HELLO = {
    "rubbish": (3).to_bytes(4, "big") + b"\xff\xff\xff",
    "second hello": hello(),
    "huge": (FRAME_BYTES_MAX + 1).to_bytes(4, "big"),
    "pickle": pack(peer_pb2.PeerFrame(apply_command=peer_pb2.ApplyCommand(command=b"\x02\x80\x04.", request_id=1))),
    "gap": pack(
        peer_pb2.PeerFrame(
            append_entries=peer_pb2.AppendEntries(
                term=10**6,
                previous_log_index=1,
                entries=[peer_pb2.LogEntry(index=9, term=1, command=b"\x01")],
            )
        )
    ),
}


@pytest.mark.parametrize("content", [*BEFORE_HELLO.values(), *(hello() + data for data in AFTER_HELLO.values())],
                         ids=[*BEFORE_HELLO, *(f"then {name}" for name in AFTER_HELLO)])  # fmt: skip
async def test_hostile_bytes_cut_the_connection(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever comes in on the peer port, the connection is cut with one line in the log, and the cluster goes on."""
    async with cluster(tmp_path) as masters:
        await masters.leader()
        caplog.set_level(logging.WARNING)
        caplog.clear()
        reader, writer = await connect(masters.masters[0].peer_address)
        writer.write(content)
        await until_cut(reader)
        writer.close()
        assert sum("m1: cut the connection" in line for line in caplog.messages) == 1
        await masters.leader()
        await masters.nodes["m1"].propose(command("still here"))


async def test_silent_master_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A peer that said hello and then vanished without closing is noticed within two election timeouts."""
    async with cluster(tmp_path) as masters:
        await masters.leader()
        await masters.stop("m2")
        reader, writer = await connect(masters.masters[0].peer_address)
        writer.write(hello())
        await until(lambda: "m2" in masters.nodes["m1"].status().connected_peers)
        await until_cut(reader)
        writer.close()
        assert "silent for 1.2 s" in caplog.text


async def test_a_connection_that_was_given_up_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause of the process hello and deadline come together: no dead link stays behind."""
    async with cluster(tmp_path) as masters:
        await masters.leader()
        await masters.stop("m2")
        loop = asyncio.get_running_loop()
        accept = loop.connect_accepted_socket
        given_up = asyncio.Event()

        async def late(*arguments: Any, **named: Any) -> None:
            await accept(*arguments, **named)
            await until(lambda: "m2" in masters.nodes["m1"].status().connected_peers)
            given_up.set()
            raise TimeoutError

        monkeypatch.setattr(loop, "connect_accepted_socket", late)
        reader, writer = await connect(masters.masters[0].peer_address)
        writer.write(hello())
        await given_up.wait()
        await until_cut(reader)
        writer.close()
        assert "m2" not in masters.nodes["m1"].status().connected_peers


async def test_silent_stranger_is_cut_off(tmp_path: Path) -> None:
    """Who connects and says nothing does not stay."""
    async with cluster(tmp_path) as masters:
        reader, writer = await connect(masters.masters[0].peer_address)
        await until_cut(reader)
        writer.close()


async def test_master_of_another_cluster_stays_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A master with another cluster's name is named in the log and elects nobody."""
    async with cluster(tmp_path) as masters:
        await masters.leader()
        await masters.stop("m3")
        stranger = masters.nodes["m3"] = masters.make("m3", cluster_name="other")
        stranger._directory = tmp_path / "other"
        await stranger.start()
        await until(lambda: "it belongs to cluster 'other', this one is 'test'" in caplog.text)
        assert stranger.status().connected_peers == ()
        await masters.nodes["m1"].propose(command("two are enough"))


async def test_configuration_that_cannot_work_is_refused(tmp_path: Path) -> None:
    """Unknown own id, an address without a port, and commands larger than a frame are named before anything starts."""
    async with cluster(tmp_path) as masters:
        masters.clocks["m9"] = masters.clocks["m1"]
        with pytest.raises(ConfigError, match="'m9' is not among the masters m1, m2, m3"):
            masters.make("m9")
        masters.settings = RaftSettings(command_bytes_max=1 << 30)
        with pytest.raises(ConfigError, match="at most"):
            masters.make("m1")
        masters.settings = RaftSettings()
        masters.masters = (replace(masters.masters[0], peer_address="nowhere"),)
        with pytest.raises(ConfigError, match="not host:port"):
            masters.make("m1")
