"""The Raft log on disk: append-only segments with a checksum per record, and term and vote beside them.

PySyncObj's own FileJournal is not used. It rewrites the file in place when the log is cut, so that a kill in
the middle loses acknowledged entries, and it truncates whenever an append overlaps what is there.

What is kept, and in which order:

1. A record is handed to the operating system before `add` returns, so a killed process loses nothing. It is safe
   from a power cut once `sync` has returned; consensus.py calls that once per step, for all that came in since the
   last one, before anything is acknowledged or counted.
2. Truncation happens only on a real conflict: another term at the same index (Raft, figure 2, receiver rules
   3 and 4). So `deleteEntriesFrom`, which PySyncObj calls on every overlap, does nothing, and `add` truncates.
   What follows from that for the commit index is in consensus.py.
3. Entries go only after the snapshot that holds them is on disk (`deleteEntriesTo`): from memory at once, from the
   disk by whole segments, and only those that neither this snapshot nor the one before it needs (`needed_from`); a
   segment is never rewritten. What the disk still holds of older entries is cut in memory at the next start (`align`).
4. Term and vote are fsynced and renamed before `setCurrentTerm` returns, thus before any message shows them.
5. Damage: what a power cut leaves at the end of the last segment is a torn write and is dropped: a record that is
   cut off, or of which a sector was never written and so is zero. Anything else raises Damaged with file and offset;
   that includes a last record with a wrong checksum but all its bytes, which was synced once and decayed since.
6. Lost sectors can look like a torn write, or like nothing at all when they end between two records. So the vote file
   also says how far the log certainly reached (`mark`): written with every term, before every new segment, after every
   snapshot, and at a clean stop. A log that ends before that has lost what may be acknowledged, and refuses. A mark is
   lowered before the log is cut on purpose. What a kill leaves behind the latest mark is not covered: there a
   synced record cannot be told from one that never was.
7. After a sync that failed, the system shows bytes that the disk lacks, and the next sync would succeed without them
   ("fsyncgate"). So whatever no mark covers is written once more at the start, the same bytes at the same place.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pysyncobj.journal import Journal as JournalInterface

from coordinator.model.errors import Damaged
from coordinator.raft.figures import Durations
from coordinator.raft.files import ADVICE, has_snapshot, sync_directory
from coordinator.raft.segment import (
    MAGIC,
    RECORD_HEADER,
    SEGMENT_HEADER,
    VERSION,
    Segment,
    has_unwritten_sector,
    is_followed,
    segment_name,
    write_all,
)
from coordinator.raft.vote import VoteFile

Entry = tuple[bytes, int, int]
"""(command, index, term), as PySyncObj keeps it."""

SEGMENT_BYTES_MAX = 8 << 20
"""A segment that has grown so large is closed: with 200-byte commands about 35,000 entries, two snapshots' worth."""

_fdatasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)

log = logging.getLogger(__name__)


class Journal(JournalInterface):  # type: ignore[misc]
    """PySyncObj's journal over a directory; opens what is there.

    Invariant: `self[i]` has index `self[0][1] + i`; the segments hold at least these entries.
    Raises Damaged when the files cannot be trusted, OSError when the disk fails.
    """

    def __init__(self, directory: Path, owner: str, segment_bytes_max: int = SEGMENT_BYTES_MAX) -> None:
        self._directory = directory
        self._segment_bytes_max = segment_bytes_max
        self._entries: list[Entry] = []
        self._segments: list[Segment] = []
        self._descriptor = -1
        self._durable_index = 0
        """Index of the last entry that `sync` has made durable; 0 for none."""
        self._has_failed = False
        self.cuts = 0
        """Times that entries were taken back from the log's end."""
        self.syncs = Durations()
        """How long the syncs took."""
        self._unfinished: Path | None = None
        """The last segment when its header is not whole."""
        self.size_bytes = 0
        """Bytes of the commands in the log."""
        self.needed_from: Callable[[], int] = lambda: sys.maxsize
        """Index from which on the disk must hold the log; what is in memory it holds in any case."""
        self.is_dirty = False
        """True while something is in the files that `sync` has not made durable."""
        self._vote = VoteFile(directory / "vote.json", owner)
        self._load()

    # Reading

    def __getitem__(self, item: Any) -> Any:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    def term_at(self, index: int) -> int | None:
        """Term of the entry at `index`; None when it is not held."""
        position = index - self[0][1]
        return int(self[position][2]) if 0 <= position < len(self) else None

    @property
    def begin(self) -> str:
        """Where the log begins, for messages about damage."""
        return f"{self._segments[0].path if self._segments else self._directory}, offset 0"

    @property
    def marked_index(self) -> int:
        """Index of the last entry that the vote file calls durable; 0 for none (rule 6)."""
        return self._vote.log_end

    # Writing

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Appends an entry, cutting what contradicts it; an entry that is already there is left alone."""
        if self._entries:
            position = idx - self._entries[0][1]
            if position < 0 or position > len(self._entries):
                raise ValueError(f"entry {idx} does not follow the log, which holds {self._describe_range()}")
            if position < len(self._entries):
                if self._entries[position][2] == term:
                    return
                self._truncate(idx)
        self._write(command, idx, term)
        self._entries.append((command, idx, term))
        self.size_bytes += len(command)

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Does nothing: see rule 2 above."""

    def deleteEntriesTo(self, entryTo: int) -> None:
        """Drops the first `entryTo` entries, which a durable snapshot holds."""
        if entryTo <= 0:
            return
        self.size_bytes -= sum(len(entry[0]) for entry in self._entries[:entryTo])
        del self._entries[:entryTo]
        first_index = min(self._entries[0][1], self.needed_from())
        while len(self._segments) > 1 and self._segments[0].end_index <= first_index:
            self._segments.pop(0).path.unlink(missing_ok=True)
        sync_directory(self._directory)
        self.mark()

    def clear(self) -> None:
        """Forgets every entry; the snapshot that replaces them is durable already."""
        self.cuts += 1
        self._lower_mark(0)
        self._close_descriptor()
        while self._segments:
            self._segments.pop().path.unlink(missing_ok=True)
        self._entries.clear()
        self.size_bytes = 0

    def holds(self, before: Entry, last: Entry) -> bool:
        """True when the log has these two, so that it goes on from a snapshot that ends with them."""
        position = last[1] - self._entries[0][1] if self._entries else -1
        return 0 < position < len(self._entries) and all(
            self._entries[at][1:] == entry[1:] for at, entry in ((position - 1, before), (position, last))
        )

    def align(self, before: Entry, last: Entry) -> bool:
        """Makes the log begin at the two last entries of a durable snapshot, as PySyncObj wants it.

        What follows them is kept when the log holds `last`; else the log contradicts committed state and is replaced,
        and the answer is False.
        Raises Damaged when the log begins behind them: what stood there was acknowledged, perhaps, and is lost.
        """
        if self._entries and self._entries[0][1] > before[1]:
            path, found = self._segments[0].path, self._entries[0][1]
            self._damaged(path, 0, f"the log begins at entry {found}, but the snapshot ends with entry {last[1]}")
        position = last[1] - self._entries[0][1] if self._entries else -1
        if 0 < position < len(self._entries) and self._entries[position][2] == last[2]:
            self.deleteEntriesTo(position - 1)
            return True
        self.clear()
        self.add(*before)
        self.add(*last)
        return False

    def sync(self) -> None:
        """Makes all that was added durable against a power cut."""
        if self._descriptor >= 0:
            began_s = time.perf_counter()
            try:
                _fdatasync(self._descriptor)
            except OSError:
                # The system may have dropped what it could not write: a second try would succeed and prove nothing.
                self._has_failed = True
                raise
            self.syncs.observe(time.perf_counter() - began_s)
        self.is_dirty = False
        self._durable_index = self._entries[-1][1] if self._entries else 0

    def mark(self) -> None:
        """Writes down how far the log is durable (rule 6); syncs first."""
        if self._has_failed:
            return
        if self.is_dirty:
            self.sync()
        if self._vote.log_end != self._durable_index:
            self._vote.store(self._vote.term, self._vote.voted_for, self._durable_index)

    def _lower_mark(self, index: int) -> None:
        """Before the log is cut behind `index` on purpose."""
        self._durable_index = min(self._durable_index, index)
        if self._vote.log_end > index:
            self._vote.store(self._vote.term, self._vote.voted_for, index)

    # Term, vote, commit index

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Durable when it returns."""
        self._vote.store(term, votedForNodeId, self._durable_index)

    def getCurrentTerm(self) -> int:
        return self._vote.term

    def getVotedForNodeId(self) -> str | None:
        return self._vote.voted_for

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Not stored: a leader tells it again, and the snapshot's index is a safe start."""

    def getRaftCommitIndex(self) -> int:
        return 1

    def _destroy(self) -> None:
        self._close_descriptor()

    close = _destroy

    # Files

    def _write(self, command: bytes, index: int, term: int) -> None:
        if not self._segments or self._segments[-1].size_bytes >= self._segment_bytes_max:
            self._start_segment(index)
        segment = self._segments[-1]
        self.is_dirty = True
        tail = struct.pack(">IQQ", len(command), index, term) + command
        record = zlib.crc32(tail).to_bytes(4, "big") + tail
        write_all(self._descriptor, record)
        segment.offsets.append(segment.size_bytes)
        segment.size_bytes += len(record)

    def _start_segment(self, first_index: int) -> None:
        self.sync()
        if self._segments:
            self.mark()
        self._close_descriptor()
        segment = Segment(self._directory / segment_name(first_index), first_index)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(segment.path, flags, 0o600)
        os.write(self._descriptor, SEGMENT_HEADER.pack(MAGIC, VERSION, first_index))
        # A power cut that takes the header takes nothing else: there is nothing behind it yet.
        _fdatasync(self._descriptor)
        self._segments.append(segment)
        sync_directory(self._directory)

    def _truncate(self, index: int) -> None:
        """Cuts the log before `index`; later segments go first, so that every crash leaves a prefix."""
        self.cuts += 1
        self._lower_mark(index - 1)
        count = len(self._segments)
        while len(self._segments) > 1 and self._segments[-1].first_index >= index:
            self._close_descriptor()
            self._segments.pop().path.unlink()
        if len(self._segments) < count:
            # Otherwise a power cut could bring them back, behind what is written now.
            sync_directory(self._directory)
        self._cut_segment(self._segments[-1], index - self._segments[-1].first_index)
        removed = self._entries[index - self._entries[0][1] :]
        del self._entries[index - self._entries[0][1] :]
        self.size_bytes -= sum(len(entry[0]) for entry in removed)

    def _cut_segment(self, segment: Segment, records: int) -> None:
        self.is_dirty = True
        if records < len(segment.offsets):
            segment.size_bytes = segment.offsets[records]
            del segment.offsets[records:]
        self._open_last(segment)

    def _open_last(self, segment: Segment) -> None:
        """Opens the last segment for appending and removes what lies behind its last sound record."""
        self._close_descriptor()
        self._descriptor = os.open(segment.path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        os.ftruncate(self._descriptor, segment.size_bytes)
        os.lseek(self._descriptor, segment.size_bytes, os.SEEK_SET)

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    # Recovery

    def _load(self) -> None:
        paths = sorted(self._directory.glob("journal-*.log"))
        for path in paths:
            self._load_segment(path, is_last=path is paths[-1])
        if not self._segments and self._vote.term and not has_snapshot(self._directory):
            raise Damaged(f"{self._directory}: the log is gone, but this master has voted already; {ADVICE}")
        end = self._entries[-1][1] if self._entries else 0
        if end < self._vote.log_end:
            segment = self._segments[-1] if self._segments else Segment(self._directory, 0)
            lost = f"the log ends with entry {end}, but it once held entry {self._vote.log_end} safely"
            self._damaged(segment.path, segment.size_bytes if self._segments else 0, lost)
        if self._unfinished:
            log.warning("%s: removed a segment that was being made when the process ended", self._unfinished)
            self._unfinished.unlink()
        self._durable_index = self._vote.log_end
        # After a kill the operating system may still hold what was written but never synced, the names too.
        self.is_dirty = bool(self._segments)
        sync_directory(self._directory)
        if self._segments:
            self._open_last(self._segments[-1])
            self._write_again(self._segments[-1])
        self.size_bytes = sum(len(entry[0]) for entry in self._entries)

    def _write_again(self, segment: Segment) -> None:
        """Rule 7: what no mark covers, which is in the last segment alone."""
        marked = self._vote.log_end + 1 - segment.first_index
        places = [*segment.offsets, segment.size_bytes]
        start = places[min(marked, len(places) - 1)] if marked > 0 else 0
        os.lseek(self._descriptor, start, os.SEEK_SET)
        write_all(self._descriptor, segment.path.read_bytes()[start:])

    def _load_segment(self, path: Path, *, is_last: bool) -> None:
        data = path.read_bytes()
        if len(data) < SEGMENT_HEADER.size or not any(data):
            if not is_last:
                self._damaged(path, 0, "the header is cut off")
            self._unfinished = path
            return
        magic, version, first_index = SEGMENT_HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            self._damaged(path, 0, f"it does not begin as a segment of version {VERSION}")
        if path.name != segment_name(first_index):
            self._damaged(path, 0, f"it says that it begins at entry {first_index}, its name says otherwise")
        if self._entries and first_index != self._entries[-1][1] + 1:
            self._damaged(path, 0, f"it begins at entry {first_index}, but the log so far is {self._describe_range()}")
        segment = Segment(path, first_index)
        self._segments.append(segment)
        while segment.size_bytes < len(data):
            size = self._read_record(segment, data)
            if size == 0:
                if not is_last or is_followed(segment, data):
                    self._damaged(path, segment.size_bytes, "a record is cut off in the middle of the log")
                log.warning("%s: dropped a torn record at offset %d", path, segment.size_bytes)
                return
            segment.offsets.append(segment.size_bytes)
            segment.size_bytes += size

    def _read_record(self, segment: Segment, data: bytes) -> int:
        """Reads the record behind what is sound so far; its size, or 0 when it is torn."""
        offset = segment.size_bytes
        if len(data) - offset < RECORD_HEADER.size or not any(memoryview(data)[offset:]):
            return 0
        checksum, length, index, term = RECORD_HEADER.unpack_from(data, offset)
        end: int = offset + RECORD_HEADER.size + length
        if end > len(data):
            whole = struct.pack(">IQQ", len(data) - offset - RECORD_HEADER.size, index, term)
            if zlib.crc32(memoryview(data)[offset + RECORD_HEADER.size :], zlib.crc32(whole)) == checksum:
                self._damaged(segment.path, offset, f"the length {length} of the last record is wrong")
            return 0
        if zlib.crc32(memoryview(data)[offset + 4 : end]) != checksum:
            is_length_lost = has_unwritten_sector(data, offset, offset + RECORD_HEADER.size)
            if is_length_lost or (end == len(data) and has_unwritten_sector(data, offset, end)):
                return 0
            self._damaged(segment.path, offset, "a checksum does not match")
        if index != segment.end_index:
            self._damaged(segment.path, offset, f"entry {index} stands where {segment.end_index} belongs")
        self._entries.append((data[offset + RECORD_HEADER.size : end], index, term))
        return end - offset

    def _damaged(self, path: Path, offset: int, what: str) -> NoReturn:
        raise Damaged(f"{path}, offset {offset}: {what}; {ADVICE}")

    def _describe_range(self) -> str:
        return f"{self._entries[0][1]} to {self._entries[-1][1]}" if self._entries else "empty"
