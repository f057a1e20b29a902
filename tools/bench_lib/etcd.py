"""Three etcd members on loopback, as the peer of the Raft benchmark: default settings, except for the addresses.

etcd comes from Debian's package (3.4.23, the version that this project measured itself against before). Its API is
spoken through grpc.aio, with the handful of messages declared here: client language, library and concurrency are then
those of our own side. Field numbers are those of etcd's rpc.proto.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc import aio

from coordinator.client.channels import channel_options
from tools.bench_lib.raft_load import Writer
from tools.lib import debian_package
from tools.lib.daemons import Daemon
from tools.lib.debian_package import Package
from tools.lib.ports import free_ports

ETCD = Package("etcd", "etcd-server", "3.4.23", "bookworm", program="etcd", version_argument="--version")
TXN_PUTS_MAX = 128
"""etcd's own default limit of operations in one transaction."""
KEYS = 1_000
STATUS_TIMEOUT_S = 2.0

_FIELD = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, tuple[tuple[str, int, int | str, bool], ...]] = {
    "ResponseHeader": (("member_id", 2, _FIELD.TYPE_UINT64, False),),
    "PutRequest": (("key", 1, _FIELD.TYPE_BYTES, False), ("value", 2, _FIELD.TYPE_BYTES, False)),
    "PutResponse": (),
    "RequestOp": (("request_put", 2, "PutRequest", False),),
    "TxnRequest": (("success", 2, "RequestOp", True),),
    "TxnResponse": (("succeeded", 2, _FIELD.TYPE_BOOL, False),),
    "StatusRequest": (),
    "StatusResponse": (
        ("header", 1, "ResponseHeader", False),
        ("leader", 4, _FIELD.TYPE_UINT64, False),
        ("raft_applied_index", 7, _FIELD.TYPE_UINT64, False),
    ),
}
"""Name, number, type (or message) and whether it is repeated, of the fields that are used."""


def _message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="bench/etcd.proto", package="etcdserverpb", syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, kind, is_repeated in fields:
            field = message.field.add(name=name, number=number)
            field.label = _FIELD.LABEL_REPEATED if is_repeated else _FIELD.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".etcdserverpb.{kind}"
            else:
                field.type = _FIELD.Type.ValueType(kind)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"etcdserverpb.{name}")) for name in _MESSAGES
    }


_CLASSES = _message_classes()


class _Process(Daemon):
    """One etcd; Daemon's methods start and end it."""

    def __init__(self, member_id: str, arguments: list[str], log: Path) -> None:
        super().__init__("etcd", member_id, log, log)
        self._arguments = arguments

    @property
    def command(self) -> list[str]:
        return self._arguments


class EtcdMember:
    """A client's connection to one member."""

    def __init__(self, address: str) -> None:
        self._channel = aio.insecure_channel(address, options=channel_options())
        self._put = self._call("KV/Put", "PutRequest", "PutResponse")
        self._txn = self._call("KV/Txn", "TxnRequest", "TxnResponse")
        self._status = self._call("Maintenance/Status", "StatusRequest", "StatusResponse")

    def _call(self, method: str, request: str, response: str) -> Any:
        return self._channel.unary_unary(
            f"/etcdserverpb.{method}",
            request_serializer=_CLASSES[request].SerializeToString,
            response_deserializer=_CLASSES[response].FromString,
        )

    async def write(self, number: int, timeout_s: float) -> None:
        """Commits one put of 32 bytes."""
        value = f"{number:032d}".encode()
        await self._put(_CLASSES["PutRequest"](key=f"bench/{number % KEYS}".encode(), value=value), timeout=timeout_s)

    async def write_many(self, number: int, timeout_s: float) -> int:
        """Commits as many puts in one transaction as etcd takes; how many that are."""
        put, operation = _CLASSES["PutRequest"], _CLASSES["RequestOp"]
        value = f"{number:032d}".encode()
        operations = [
            operation(request_put=put(key=f"bench/{key}".encode(), value=value)) for key in range(TXN_PUTS_MAX)
        ]
        await self._txn(_CLASSES["TxnRequest"](success=operations), timeout=timeout_s)
        return TXN_PUTS_MAX

    async def standing(self) -> tuple[bool, int]:
        """Whether it leads, and the index up to which it has applied the log."""
        status = await self._status(_CLASSES["StatusRequest"](), timeout=STATUS_TIMEOUT_S)
        return status.leader == status.header.member_id, status.raft_applied_index if status.leader else 0

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


class EtcdCluster:
    """The members of one directory. Raises PackageError when etcd cannot be had."""

    name = "etcd"

    def __init__(self, directory: Path, members: int = 3) -> None:
        program = debian_package.install(ETCD)
        directory.mkdir(parents=True, exist_ok=True)
        ports = [f"127.0.0.1:{port}" for port in free_ports(2 * members)]
        self.ids = [f"e{number + 1}" for number in range(members)]
        self.addresses = dict(zip(self.ids, ports[:members], strict=True))
        peers = {member_id: f"http://{port}" for member_id, port in zip(self.ids, ports[members:], strict=True)}
        self._processes: dict[str, Daemon] = {}
        for member_id in self.ids:
            client_url = f"http://{self.addresses[member_id]}"
            options = {
                "name": member_id,
                "data-dir": str(directory / member_id),
                "listen-client-urls": client_url,
                "advertise-client-urls": client_url,
                "listen-peer-urls": peers[member_id],
                "initial-advertise-peer-urls": peers[member_id],
                "initial-cluster": ",".join(f"{peer}={url}" for peer, url in peers.items()),
                "initial-cluster-state": "new",
            }
            arguments = [str(program), *(f"--{option}={value}" for option, value in options.items())]
            self._processes[member_id] = _Process(member_id, arguments, directory / f"{member_id}.log")

    def process(self, member_id: str) -> Daemon:
        """A member's process."""
        return self._processes[member_id]

    async def connect(self, member_id: str) -> EtcdMember:
        """A new connection."""
        return EtcdMember(self.addresses[member_id])

    async def prepare(self, writer: Writer) -> None:
        """Nothing: keys need no making."""
        await asyncio.sleep(0)

    def close(self) -> None:
        """Ends everything, at once."""
        for process in self._processes.values():
            process.kill()
