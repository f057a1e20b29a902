"""One master's consensus as a process of its own, for tests that kill it: `python -m tests.raft_process SPEC`.

SPEC is JSON: id, directory, ports by id. Commands come as lines on standard input and are answered by lines:
`propose CAUSE` with `ok CAUSE`, `failed CAUSE` (definite) or `unknown CAUSE`; `status` with `status LEADER APPLIED`;
`applied` with `applied CAUSE...`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from coordinator.config import MasterSettings, RaftSettings
from coordinator.model import SystemClock
from coordinator.model.errors import CoordinatorError
from coordinator.raft import RaftNode
from tests.raft_machine import MACHINE, applied, command


def answer(line: str) -> None:
    """Writes one line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def propose(node: RaftNode, cause: str) -> None:
    """Proposes and tells the outcome."""
    try:
        await node.propose(command(cause), 3.0)
        answer(f"ok {cause}")
    except CoordinatorError as error:
        answer(f"{'failed' if error.DEFINITE else 'unknown'} {cause}")


async def main() -> None:
    """Runs until standard input ends."""
    spec = json.loads(sys.argv[1])
    masters = tuple(
        MasterSettings(id, "127.0.0.1:1", f"127.0.0.1:{port}", "127.0.0.1:2") for id, port in spec["ports"].items()
    )
    node = RaftNode(
        self_id=spec["id"],
        masters=masters,
        cluster_name="processes",
        directory=Path(spec["directory"]),
        settings=RaftSettings(snapshot_entries=200),
        clock=SystemClock(),
        machine=MACHINE,
    )
    await node.start()
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running: set[asyncio.Task[None]] = set()
    while line := (await reader.readline()).decode().split():
        match line:
            case ["propose", cause]:
                task = asyncio.create_task(propose(node, cause))
                running.add(task)
                task.add_done_callback(running.discard)
            case ["status"]:
                answer(f"status {node.leader_id if node.is_ready else None} {node.status().applied_index}")
            case _:
                answer(" ".join(["applied", *applied(node.state)]))
    await node.stop()


if __name__ == "__main__":
    asyncio.run(main())
