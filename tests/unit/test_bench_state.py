"""What the benchmarks of users' state have that needs no server: values, ledger, timetable, Redis's tables."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.config import ClusterConfig
from coordinator.config_file import load
from tools.bench_lib import redis_cluster
from tools.bench_lib.failover import fast
from tools.bench_lib.main import names
from tools.bench_lib.state_load import (
    VALUE_BYTES,
    Ledger,
    Timetable,
    closed_loop,
    counter_of,
    fill,
    read_all,
    value_of,
)
from tools.bench_lib.state_systems import KEYS_PER_USER, NotAcknowledged, key_of, user_of

NODES = """\
a1 127.0.0.1:7000@17000,host myself,master - 0 0 1 connected 0-5460 9000 [93->-b2]
b2 127.0.0.1:7001@17001,host master - 0 0 2 connected 5461-8999
c3 127.0.0.1:7002@17002,host slave,fail? a1 0 0 1 connected
"""


class FakeStore:
    """Keeps values in memory; forgets or refuses some writes when told."""

    def __init__(self) -> None:
        self.values: dict[int, bytes] = {}
        self.is_forgetful = False
        self.is_down = False
        self.delay_s = 0.0
        self.at_once = 0
        """Most writes of one number on their way at once."""
        self._running: list[int] = []
        self._ended = asyncio.Semaphore(0)

    async def written(self, count: int) -> None:
        """Waits for so many writes to end."""
        for _ in range(count):
            await self._ended.acquire()

    async def put(self, number: int, value: bytes) -> None:
        self._running.append(number)
        self.at_once = max(self.at_once, self._running.count(number))
        await asyncio.sleep(self.delay_s)
        self._running.remove(number)
        self._ended.release()
        if self.is_down:
            raise NotAcknowledged("it is down")
        if not self.is_forgetful:
            self.values[number] = value

    async def get(self, number: int) -> bytes | None:
        return self.values.get(number)

    async def put_many(self, values: Sequence[tuple[int, bytes]]) -> None:
        for number, value in values:
            await self.put(number, value)

    async def get_many(self, numbers: Sequence[int]) -> list[bytes | None]:
        return [self.values.get(number) for number in numbers]

    async def close(self) -> None:
        self.values.clear()


def test_values_have_their_size_and_their_counter() -> None:
    """Shows that what is read back names the write that it is of."""
    for counter in (0, 1, 123_456_789):
        assert len(value_of(counter)) == VALUE_BYTES
        assert counter_of(value_of(counter)) == counter


def test_numbers_become_users_and_keys_each_once() -> None:
    """Shows that two numbers never share a key, here or at the peer."""
    places = {(user_of(number), key_of(number)) for number in range(1_000)}
    assert len(places) == 1_000
    assert len({user for user, _ in places}) == 1_000 // KEYS_PER_USER
    assert len({redis_cluster.redis_key(number) for number in range(1_000)}) == 1_000


async def test_the_ledger_finds_what_was_lost() -> None:
    """Shows that older and missing values count as lost, later ones of unknown outcome do not."""
    store, ledger = FakeStore(), Ledger()
    await fill(store, ledger, 1_200)
    assert ledger.lost(await read_all(store, 1_200)) == 0
    store.values[3] = value_of(ledger.next())
    assert ledger.lost(await read_all(store, 1_200)) == 0
    del store.values[4]
    ledger.acknowledged[5] = ledger.next()
    assert ledger.lost(await read_all(store, 1_200)) == 2


async def test_a_timetable_goes_on_while_writes_hang() -> None:
    """Shows that slow writes delay no others, that none overlaps one of its own number, and that all are waited for."""
    store, ledger = FakeStore(), Ledger()
    store.delay_s = 0.2
    begin_s = time.perf_counter()
    async with Timetable(store, ledger, 5, 200.0) as timetable:
        await store.written(10)
    assert store.at_once == 1
    assert len(timetable.outcomes) == len(ledger.acknowledged) + len(timetable.outcomes) - 5
    assert all(outcome.latency_ms >= 199 for outcome in timetable.outcomes)
    assert timetable.between(begin_s, time.perf_counter()) == timetable.outcomes
    assert ledger.lost(await read_all(store, 5)) == 0


@pytest.mark.parametrize("fault", ["forgetful", "down"])
async def test_a_timetable_tells_failed_from_lost(fault: str) -> None:
    """Shows that a write that was refused is not lost, and one that was acknowledged and forgotten is."""
    store, ledger = FakeStore(), Ledger()
    await fill(store, ledger, 10)
    store.is_forgetful, store.is_down = fault == "forgetful", fault == "down"
    async with Timetable(store, ledger, 10, 500.0) as timetable:
        await store.written(10 + 10)
    failed = sum(bool(outcome.problem) for outcome in timetable.outcomes)
    lost = ledger.lost(await read_all(store, 10))
    assert (failed > 0, lost > 0) == ((False, True) if fault == "forgetful" else (True, False))


async def test_a_closed_loop_counts_what_was_done_in_its_time() -> None:
    """Shows that the rate and the latencies leave out the warming up."""
    rng = random.Random(3)

    async def work() -> int:
        await asyncio.sleep(0.005 + rng.random() / 1_000)
        return 2

    rate, taken_ms = await closed_loop(work, 4, 0.2, 0.05)
    assert rate == pytest.approx(len(taken_ms) * 2 / 0.2)
    assert 0 < len(taken_ms) <= 4 * 0.2 / 0.005
    assert min(taken_ms) >= 5


def test_the_table_of_a_redis_cluster() -> None:
    """Shows ports, roles and slots; a slot that is on its way is no part of it."""
    first, second, third = redis_cluster.parse_nodes(NODES)
    assert (first.id, first.port, first.slots) == ("a1", 7000, [range(5461), range(9000, 9001)])
    assert "master" in first.flags
    assert (second.port, second.slots) == (7001, [range(5461, 9000)])
    assert (third.slots, "fail?" in third.flags) == ([], True)


def test_ports_leave_room_for_the_cluster_bus() -> None:
    """Shows that each port's bus is a port too, and that none is given twice."""
    ports = redis_cluster.bus_ports(6)
    assert len(set(ports)) == 6
    assert all(0 < port and port + redis_cluster.BUS_PORT_OFFSET <= 65_535 for port in ports)


def test_the_fast_setting_is_the_documented_one() -> None:
    """Shows that what is measured is what cluster.toml recommends, and that the rest stays."""
    root = Path(__file__).resolve().parents[2]
    text = (root / "cluster.toml").read_text(encoding="utf-8")
    documented = [line[2:] for line in text.splitlines() if line.startswith("# ") and " = " in line]
    default = load(root / "cluster.toml")
    changed = fast(default)
    for part, names_of in (("session", ("heartbeat_s", "suspect_s")), ("state", ("replica_lease_s", "lagging_s"))):
        for name in names_of:
            assert f"{name} = {getattr(getattr(changed, part), name):g}" in documented
    assert isinstance(changed, ClusterConfig)
    assert replace(changed, session=default.session, state=default.state) == default


@pytest.mark.parametrize("helper", ["redis_cluster", "state_load", "state_systems", "migration_pauses"])
def test_helpers_are_no_benchmarks(helper: str) -> None:
    """Shows that only what can be run is listed."""
    assert helper not in names()
    assert {"state", "migration", "failover"} <= set(names())
