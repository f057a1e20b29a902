"""Redis Cluster on loopback, as the peer of the benchmarks of users' state: three masters, each with one replica.

Redis 7.0 comes from Debian's packages, `redis-cli --cluster` makes the cluster and moves its slots, and the client is
redis-py with hiredis. Settings are Redis's own, except for addresses, and `cluster-node-timeout` where a benchmark says
so. By default a write is acknowledged by one process, from its memory; a DURABLE cluster writes its log through to the
disk (`appendfsync always`), and its clients wait until the replica has the write (`WAIT 1`), which is the nearest that
Redis 7.0 has to a write on two disks.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.crc import key_slot
from redis.exceptions import RedisClusterException, RedisError

from tools.bench_lib.state_systems import ATTEMPT_EVERY_S, NotAcknowledged, Store, key_of, user_of
from tools.lib import debian_package
from tools.lib.daemons import Daemon
from tools.lib.debian_package import Package
from tools.lib.local_cluster import NotSoInTime, wait_until
from tools.lib.ports import free_ports

REDIS = Package(
    "Redis",
    "redis-server",
    "7.0.15",
    "bookworm",
    program="redis-server",
    version_argument="--version",
    epoch="5:",
    libraries=("redis-tools", "libjemalloc2", "liblzf1", "libatomic1"),
)
MASTERS = 3
BUS_PORT_OFFSET = 10_000
SLOTS = 16_384
READY_TIMEOUT_S = 60.0
CLI_TIMEOUT_S = 600.0
CALL_S = 10.0
WAIT_MS = 10_000
ATTEMPT_TIMEOUT_S = 0.5
# The last one is redis-py's: a connection that is closed while another task opens it.
FAILURES = (
    RedisError,
    RedisClusterException,
    OSError,
    TimeoutError,
    asyncio.IncompleteReadError,
    AttributeError,
)


def redis_key(number: int) -> str:
    """The key of a number: user and key, as on our side."""
    return f"{user_of(number)}/{key_of(number)}"


def bus_ports(count: int) -> list[int]:
    """Free ports whose cluster bus, 10,000 above, is a port too."""
    found: list[int] = []
    for _ in range(100):
        found += [port for port in free_ports(count) if port + BUS_PORT_OFFSET <= 65_535 and port not in found]
        if len(found) >= count:
            return found[:count]
    # The system gives ports from a range of its own; where all of that is too high, any below will do.
    return list(itertools.islice(itertools.count(20_000), count))


class RedisProcess(Daemon):
    """One redis-server; Daemon's methods start and end it."""

    def __init__(self, program: Path, port: int, folder: Path, options: Mapping[str, object]) -> None:
        """Its data go to `folder`, its log beside that; `options` are what differs from Redis's own settings."""
        log = folder.with_suffix(".log")
        super().__init__("redis-server", str(port), log, log)
        folder.mkdir(parents=True)
        own = {"port": port, "bind": "127.0.0.1", "dir": folder}
        # `env` gives way to the program, so signals reach that.
        variables = [f"{name}={value}" for name, value in REDIS.environment.items()]
        self._arguments = ["env", *variables, str(program)]
        for option, value in {**own, **options}.items():
            self._arguments += [f"--{option}", str(value)]

    @property
    def command(self) -> list[str]:
        return self._arguments


class RedisStore:
    """redis-py's client of a cluster."""

    def __init__(self, port: int) -> None:
        self._client: Any = AsyncRedisCluster(host="127.0.0.1", port=port, socket_timeout=CALL_S)

    async def put(self, number: int, value: bytes) -> None:
        try:
            await self._client.set(redis_key(number), value)
        except FAILURES as error:
            raise NotAcknowledged(f"{type(error).__name__}: {error}") from error

    async def get(self, number: int) -> bytes | None:
        try:
            found: bytes | None = await self._client.get(redis_key(number))
        except FAILURES as error:
            raise NotAcknowledged(f"{type(error).__name__}: {error}") from error
        return found

    async def put_many(self, values: Sequence[tuple[int, bytes]]) -> None:
        await self._pipelined(lambda pipeline: [pipeline.set(redis_key(number), value) for number, value in values])

    async def get_many(self, numbers: Sequence[int]) -> list[bytes | None]:
        return await self._pipelined(lambda pipeline: [pipeline.get(redis_key(number)) for number in numbers])

    async def _pipelined(self, fill: Callable[[Any], object]) -> list[Any]:
        try:
            pipeline = self._client.pipeline()
            fill(pipeline)
            answers: list[Any] = await pipeline.execute()
        except FAILURES as error:
            raise NotAcknowledged(f"{type(error).__name__}: {error}") from error
        return answers

    async def close(self) -> None:
        await self._client.aclose()


class DurableStore:
    """A client that has every write confirmed by a replica. It knows each slot's master and expects no change."""

    def __init__(self, masters: Sequence[tuple[int, range]]) -> None:
        """Ports of masters and the slots that each has."""
        self._by_slot: dict[int, int] = {slot: port for port, slots in masters for slot in slots}
        self._clients: dict[int, Any] = {
            port: AsyncRedis(host="127.0.0.1", port=port, socket_timeout=CALL_S) for port, _ in masters
        }

    def _client(self, number: int) -> Any:
        return self._clients[self._by_slot[key_slot(redis_key(number).encode())]]

    async def put(self, number: int, value: bytes) -> None:
        await self._write(self._client(number), [(number, value)])

    async def _write(self, client: Any, values: Sequence[tuple[int, bytes]]) -> None:
        """WAIT speaks of what its own connection wrote before, so both go down one."""
        try:
            pipeline = client.pipeline(transaction=False)
            for number, value in values:
                pipeline.set(redis_key(number), value)
            pipeline.execute_command("WAIT", 1, WAIT_MS)
            replicas = (await pipeline.execute())[-1]
        except FAILURES as error:
            raise NotAcknowledged(f"{type(error).__name__}: {error}") from error
        if replicas < 1:
            raise NotAcknowledged(f"no replica confirmed within {WAIT_MS} ms")

    async def get(self, number: int) -> bytes | None:
        found: bytes | None = await self._client(number).get(redis_key(number))
        return found

    async def put_many(self, values: Sequence[tuple[int, bytes]]) -> None:
        parts: dict[int, list[tuple[int, bytes]]] = {}
        for number, value in values:
            parts.setdefault(self._by_slot[key_slot(redis_key(number).encode())], []).append((number, value))
        await asyncio.gather(*(self._write(self._clients[port], part) for port, part in parts.items()))

    async def get_many(self, numbers: Sequence[int]) -> list[bytes | None]:
        """One after the other: reads are the same as those of the other store, which is the one to be measured."""
        return [await self.get(number) for number in numbers]

    async def close(self) -> None:
        await asyncio.gather(*(client.aclose() for client in self._clients.values()))


class RedisSystem:
    """The processes of one cluster. Raises PackageError when Redis cannot be had."""

    def __init__(self, directory: Path, *, node_timeout_ms: int = 15_000, is_durable: bool = False) -> None:
        self._program = debian_package.install(REDIS)
        self._cli = self._program.with_name("redis-cli")
        self.name = "redis-durable" if is_durable else "redis"
        self._is_durable = is_durable
        self.ports = bus_ports(2 * MASTERS)
        self._turn = 0
        options = {
            "cluster-enabled": "yes",
            "cluster-node-timeout": node_timeout_ms,
            **({"appendonly": "yes", "appendfsync": "always"} if is_durable else {}),
        }
        self._processes = {
            port: RedisProcess(self._program, port, directory / str(port), options) for port in self.ports
        }

    def start(self) -> None:
        for process in self._processes.values():
            process.start()
        for port in self.ports:
            wait_until(partial(self._ask, port, "PING"), READY_TIMEOUT_S, f"redis on port {port} answers")
        addresses = [f"127.0.0.1:{port}" for port in self.ports]
        self.run_cli("--cluster", "create", *addresses, "--cluster-replicas", "1", "--cluster-yes")
        self.wait_whole()

    def run_cli(self, *arguments: str) -> str:
        """What redis-cli says. Raises RuntimeError when it fails."""
        variables = [f"{name}={value}" for name, value in REDIS.environment.items()]
        done = subprocess.run(
            ["env", *variables, str(self._cli), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=CLI_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"redis-cli {' '.join(arguments[:2])} failed: {done.stdout.strip().splitlines()[-1:]}")
        return done.stdout

    def _ask(self, port: int, *command: str | int) -> Any:
        """An answer of one process; None when there is none."""
        try:
            with Redis(host="127.0.0.1", port=port, socket_timeout=CALL_S) as client:
                client.response_callbacks.clear()  # Which would take the texts apart.
                return client.execute_command(*command)
        except FAILURES:
            return None

    def wait_whole(self) -> None:
        """Waits until every process says that all is well, and every replica follows its master."""

        def is_whole() -> bool:
            for port in self.ports:
                if "cluster_state:ok" not in _text(self._ask(port, "CLUSTER", "INFO")):
                    return False
                about = _text(self._ask(port, "INFO", "replication"))
                if not ("connected_slaves:1" in about if "role:master" in about else "master_link_status:up" in about):
                    return False
            nodes = parse_nodes(self._nodes())
            return all("fail" not in flags for node in nodes for flags in node.flags)

        wait_until(is_whole, READY_TIMEOUT_S, "every process of Redis Cluster is well")

    def _nodes(self) -> str:
        for port in self.ports:
            if self._processes[port].process_id is not None and (text := _text(self._ask(port, "CLUSTER", "NODES"))):
                return text
        raise NotSoInTime("no process of Redis Cluster answers")

    def masters(self) -> list[ClusterNode]:
        """Those that hold slots."""
        return [node for node in parse_nodes(self._nodes()) if "master" in node.flags and node.slots]

    def store(self) -> Store:
        if self._is_durable:
            return DurableStore([(node.port, slots) for node in self.masters() for slots in node.slots])
        return RedisStore(self.ports[0])

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()

    def keys(self) -> dict[int, int]:
        """Keys of each master, by port."""
        return {node.port: int(self._ask(node.port, "DBSIZE")) for node in self.masters()}

    # Faults

    def victim(self) -> str:
        self._turn += 1
        masters = self.masters()
        return str(masters[self._turn % len(masters)].port)

    def held_by(self, victim: str, numbers: Iterable[int]) -> list[int]:
        node = next(node for node in self.masters() if str(node.port) == victim)
        slots = {slot for part in node.slots for slot in part}
        return [number for number in numbers if key_slot(redis_key(number).encode()) in slots]

    def kill(self, victim: str) -> None:
        self._processes[int(victim)].kill()

    async def first_write(self, store: Store, number: int, value: bytes) -> None:
        """Asks all survivors in turn, every ten milliseconds: no client finds the new master sooner."""
        ports = [port for port in self.ports if self._processes[port].process_id is not None]
        clients: list[Any] = [
            AsyncRedis(host="127.0.0.1", port=port, socket_timeout=ATTEMPT_TIMEOUT_S) for port in ports
        ]
        try:
            for client in itertools.cycle(clients):
                try:
                    await client.set(redis_key(number), value)
                    return
                except FAILURES:
                    await asyncio.sleep(ATTEMPT_EVERY_S / len(clients))
        finally:
            await asyncio.gather(*(client.aclose() for client in clients))

    def bring_back(self, victim: str) -> None:
        self._processes[int(victim)].start()
        give_up_at_s = time.monotonic() + READY_TIMEOUT_S
        while self._ask(int(victim), "PING") is None:
            if time.monotonic() > give_up_at_s:
                raise NotSoInTime(f"redis on port {victim} does not come back")
            time.sleep(ATTEMPT_EVERY_S)


class ClusterNode:
    """A line of CLUSTER NODES."""

    def __init__(self, line: str) -> None:
        parts = line.split()
        self.id = parts[0]
        found = re.match(r"[^:]*:(\d+)@", parts[1])
        self.port = int(found[1]) if found else 0
        self.flags = parts[2].split(",")
        self.slots = [_slots(part) for part in parts[8:] if not part.startswith("[")]


def _slots(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def parse_nodes(text: str) -> list[ClusterNode]:
    """The answer to CLUSTER NODES."""
    return [ClusterNode(line) for line in text.splitlines() if line.strip()]


def _text(answer: object) -> str:
    if isinstance(answer, bytes):
        return answer.decode()
    return str(answer) if answer is not None else ""
