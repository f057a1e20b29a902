"""The store of one shard without power: its real writes and syncs, recorded by strace, and cut anywhere.

Of each file, what was written since its last sync survives in any part and in any order, some writes torn: more than a
disk does to a file system. Whatever is left has to open, with every record and epoch whose call had returned, and with
rows that are those of some `applied`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.unit.test_store import SHARD, record, scrub
from worker_agent.store import StoreSettings, create_store, open_store

STEPS = 150
CUTS = 60
CALLS = "openat,close,lseek,write,pwrite64,ftruncate,fsync,fdatasync,rename,unlink"
LINE = re.compile(r"\d+ +(\w+)\((.*)\) += (\d+)")


@dataclass(frozen=True, slots=True)
class Event:
    """One system call on a file of the store, or a word of the process about it (`said`)."""

    call: str
    name: str = ""
    place: int = 0
    data: bytes = b""


def main(path: Path, seed: int) -> None:
    """The process that is recorded: random operations, and after each one a line on what has to be there now."""
    choose = random.Random(seed)
    store = create_store(path, *SHARD, StoreSettings(checkpoint_pages=25, log_records_kept=20))
    for _ in range(STEPS):
        position, kind = store.position(), choose.randrange(12)
        if kind < 5:
            store.append([
                record(position.last + more, f"user-{choose.randrange(40)}",
                       {choose.choice("abc"): choose.choice([None, choose.randbytes(choose.randrange(600))])},
                       epoch=max(1, position.epoch_seen), request_id=f"{position.last}.{more}")
                for more in range(1, choose.randrange(2, 6))
            ])  # fmt: skip
        elif kind < 10:
            up_to = choose.randrange(position.applied, position.last + 1)
            store.apply(up_to, keeps_tombstones=choose.random() < 0.5)
        elif kind == 10:
            store.see_epoch(position.epoch_seen + 1)
        elif position.last > position.applied:
            say(last=position.last - 1)
            store.truncate(position.last - 1)
        position, digest = store.position(), store.digest()
        say(last=position.last, epoch=position.epoch_seen, applied=position.applied, digest=str(digest.value))
    os._exit(0)  # Without closing, which would sync all of it.


def say(**what: int | str) -> None:
    os.write(2, b"@" + json.dumps(what).encode())


def recorded(directory: Path, seed: int) -> list[Event]:
    """What the process did. Skips where strace is missing or may not trace."""
    strace, work = shutil.which("strace"), directory / "work"
    if strace is None:
        pytest.skip("needs strace")
    work.mkdir()
    trace = directory / "trace"
    code = "import pathlib, sys; from tests.unit.test_store_power import main; main(pathlib.Path(sys.argv[1]), {})"
    command = [strace, "-f", "-o", str(trace), "-xx", "-s", "100000", "-e", f"trace={CALLS}",
               sys.executable, "-c", code.format(seed), str(work / "s.db")]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, check=False)
    if b"ptrace" in ran.stderr.lower():
        pytest.skip("strace may not trace here")
    assert ran.returncode == 0, ran.stderr[-2_000:]
    return list(parse(trace.read_text().splitlines(), work))


def parse(lines: list[str], work: Path) -> Iterator[Event]:
    """Calls on files in `work`, by name."""
    names: dict[int, str] = {}
    places: dict[int, int] = {}
    for line in lines:
        match = LINE.match(line)
        if match is None:
            continue
        call, text, result = match[1], match[2], int(match[3])
        strings = [bytes.fromhex(quoted.replace("\\x", "")) for quoted in text.split('"')[1::2]]
        number = int(text.split(",")[0]) if text[0].isdigit() else -1
        if call == "openat":
            path = Path(strings[0].decode())
            names.pop(result, None)
            if path.parent == work:
                names[result], places[result] = path.name, 0
                yield Event("open", path.name)
        elif call in ("rename", "unlink") and Path(strings[0].decode()).parent == work:
            yield Event(call, Path(strings[0].decode()).name, 0, strings[-1])
        elif call == "write" and number == 2 and strings[0].startswith(b"@"):
            yield Event("said", data=strings[0][1:])
        elif number not in names:
            continue
        elif call == "close":
            del names[number]
        elif call == "lseek":
            places[number] = result
        elif call == "write":
            yield Event("write", names[number], places[number], strings[0])
            places[number] += result
        elif call in ("pwrite64", "ftruncate"):
            yield Event("write" if strings else "cut", names[number], int(text.rsplit(",", 1)[1]), *strings)
        else:
            yield Event("sync", names[number])


@dataclass(slots=True)
class Disk:
    """What is on the disk for sure, and what may be."""

    sure: dict[str, bytearray] = field(default_factory=dict)
    maybe: dict[str, list[Event]] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """One call. Names are durable at once; that they are is SQLite's and the file system's."""
        match event.call:
            case "open":
                self.sure.setdefault(event.name, bytearray())
            case "write" | "cut":
                self.maybe.setdefault(event.name, []).append(event)
            case "sync":
                for late in self.maybe.pop(event.name, []):
                    change(self.sure[event.name], late)
            case "rename":
                assert event.name not in self.maybe
                self.sure[Path(event.data.decode()).name] = self.sure.pop(event.name)
            case "unlink":
                self.sure.pop(event.name, None)
                self.maybe.pop(event.name, None)

    def cut_power(self, directory: Path, choose: random.Random) -> None:
        """Writes what may be left."""
        directory.mkdir()
        for name, content in self.sure.items():
            left, share = bytearray(content), choose.random()
            for event in self.maybe.get(name, []):
                if choose.random() < share:
                    change(left, event, choose.randrange(8) * 512 if choose.random() < 0.1 else None)
            if not name.endswith("-shm"):
                (directory / name).write_bytes(left)


def change(content: bytearray, event: Event, torn_at: int | None = None) -> None:
    """One write or cut; of a torn write only the beginning."""
    content.extend(bytes(max(0, event.place - len(content))))
    if event.call == "cut":
        del content[event.place :]
    else:
        data = event.data[:torn_at]
        content[event.place : event.place + len(data)] = data


@pytest.mark.skipif(sys.platform != "linux", reason="needs strace")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_store_survives_power_cuts_anywhere(tmp_path: Path, seed: int) -> None:
    """Between any two system calls, with any part of what was not synced."""
    events = recorded(tmp_path, seed)
    said = [json.loads(event.data) for event in events if event.call == "said"]
    digests = {(one["applied"], one["digest"]) for one in said if "applied" in one}
    begin = next(number for number, event in enumerate(events) if event.call == "said")
    assert sum(event.call == "sync" and event.name == "s.db" for event in events[begin:]) > 5, "checkpoints"
    choose, disk, went_back = random.Random(seed), Disk(), 0
    cuts = set(choose.sample(range(begin + 1, len(events)), CUTS))
    sure: dict[str, int] = {}
    for number, event in enumerate(events):
        disk.take(event)
        if event.call == "said":
            sure = {**sure, **json.loads(event.data)}
        if number not in cuts:
            continue
        for more in range(3):
            directory = tmp_path / f"{number}-{more}"
            disk.cut_power(directory, choose)
            with closing(open_store(directory / "s.db", *SHARD)) as store:
                position = store.position()
                assert position.last >= sure["last"]
                assert position.epoch_seen >= sure["epoch"]
                assert (position.applied, str(store.digest().value)) in digests
                went_back += position.applied < sure["applied"]
                scrub(store)
                store.apply(position.last, keeps_tombstones=True)
                scrub(store)
            shutil.rmtree(directory)
    assert went_back > 0
