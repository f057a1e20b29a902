"""The Raft log on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.model.errors import Damaged
from coordinator.raft.journal import Entry, Journal

OWNER = "test/m1"


def open_journal(directory: Path, segment_bytes_max: int = 200) -> Journal:
    """Small segments, so that a few entries fill several."""
    return Journal(directory, OWNER, segment_bytes_max)


def entries(first: int, last: int, term: int = 1) -> Iterator[Entry]:
    """Entries that can be told apart."""
    for index in range(first, last + 1):
        yield b"\x00command %d of term %d" % (index, term), index, term


def fill(directory: Path, last: int, term: int = 1) -> list[Path]:
    """Writes entries 1 to `last` and returns the segments."""
    with closing(open_journal(directory)) as journal:
        for entry in entries(1, last, term):
            journal.add(*entry)
    return sorted(directory.glob("journal-*.log"))


def test_entries_survive_reopening(tmp_path: Path) -> None:
    """What was added is there again, over several segments, and more can be added."""
    assert len(fill(tmp_path, 50)) > 3
    with closing(open_journal(tmp_path)) as journal:
        assert journal[:] == list(entries(1, 50))
        assert journal.size_bytes == sum(len(entry[0]) for entry in entries(1, 50))
        journal.add(*next(entries(51, 51)))
    with closing(open_journal(tmp_path)) as journal:
        assert journal[-1] == next(entries(51, 51))


def test_overlap_without_conflict_keeps_the_log(tmp_path: Path) -> None:
    """Entries that are there already are left alone, and what follows them too (the bare library cuts)."""
    fill(tmp_path, 20)
    with closing(open_journal(tmp_path)) as journal:
        journal.deleteEntriesFrom(5)
        for entry in entries(6, 10):
            journal.add(*entry)
        assert journal[:] == list(entries(1, 20))


def test_conflict_cuts_the_log_on_disk(tmp_path: Path) -> None:
    """An entry of another term replaces the one there and all behind it, across segments."""
    fill(tmp_path, 50)
    with closing(open_journal(tmp_path)) as journal:
        journal.add(*next(entries(8, 8, term=2)))
        expected = [*entries(1, 7), *entries(8, 8, term=2)]
        assert journal[:] == expected
    with closing(open_journal(tmp_path)) as journal:
        assert journal[:] == expected


def test_gap_is_refused(tmp_path: Path) -> None:
    """An entry that does not follow the log is a bug, not data."""
    fill(tmp_path, 5)
    with closing(open_journal(tmp_path)) as journal, pytest.raises(ValueError, match="does not follow"):
        journal.add(b"\x00", 7, 1)


def test_cutting_drops_whole_segments_and_rewrites_none(tmp_path: Path) -> None:
    """After a snapshot the old segments go; those that stay keep their bytes."""
    before = {path: path.read_bytes() for path in fill(tmp_path, 50)}
    with closing(open_journal(tmp_path)) as journal:
        journal.deleteEntriesTo(30)
        assert journal[0] == next(entries(31, 31))
    after = {path: path.read_bytes() for path in sorted(tmp_path.glob("journal-*.log"))}
    assert 1 < len(after) < len(before)
    assert all(before[path] == content for path, content in after.items())


def test_align_keeps_what_follows_the_snapshot(tmp_path: Path) -> None:
    """A kill between snapshot and cut loses nothing of the log (the bare library clears it)."""
    fill(tmp_path, 50)
    before, last = entries(29, 30)
    with closing(open_journal(tmp_path)) as journal:
        journal.align(before, last)
        assert journal[:] == list(entries(29, 50))


def test_align_replaces_a_log_that_contradicts(tmp_path: Path) -> None:
    """A log without the snapshot's entry is not what was committed."""
    fill(tmp_path, 10)
    before, last = entries(29, 30, term=4)
    with closing(open_journal(tmp_path)) as journal:
        journal.align(before, last)
    with closing(open_journal(tmp_path)) as journal:
        assert journal[:] == [before, last]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_torn_tail_is_dropped(tmp_path: Path, cut: int) -> None:
    """A record that was being written when the process died goes; all before it stays."""
    segment = fill(tmp_path, 5)[-1]
    content = segment.read_bytes()
    segment.write_bytes(content[:-cut])
    with closing(open_journal(tmp_path)) as journal:
        assert journal[:] == list(entries(1, 4))
        journal.add(*next(entries(5, 5)))
    assert segment.read_bytes() == content


def test_damage_in_the_middle_refuses_to_start(tmp_path: Path) -> None:
    """Any flipped byte before the last record is named with its file, and nothing is cut."""
    segment = fill(tmp_path, 5)[0]
    content = segment.read_bytes()
    last_record = content.rindex(b"\x00command 5") - 24
    for position in range(last_record):
        segment.write_bytes(content[:position] + bytes([content[position] ^ 0x40]) + content[position + 1 :])
        with pytest.raises(Damaged, match=segment.name):
            open_journal(tmp_path)


def test_missing_segment_refuses_to_start(tmp_path: Path) -> None:
    """A hole in the log is damage."""
    fill(tmp_path, 50)[1].unlink()
    with pytest.raises(Damaged, match="begins at entry"):
        open_journal(tmp_path)


def test_missing_log_refuses_to_start(tmp_path: Path) -> None:
    """A master that has voted and lost its log must not come back as a new one."""
    with closing(open_journal(tmp_path)) as journal:
        journal.add(b"\x01", 1, 0)
        journal.setCurrentTerm(3, "m2")
    for path in tmp_path.glob("journal-*.log"):
        path.unlink()
    with pytest.raises(Damaged, match="the log is gone"):
        open_journal(tmp_path)


def test_term_and_vote_survive(tmp_path: Path) -> None:
    """A master does not vote twice in a term because it was restarted."""
    fill(tmp_path, 1)
    with closing(open_journal(tmp_path)) as journal:
        journal.setCurrentTerm(7, "m3")
    (tmp_path / "vote.json.tmp").write_bytes(b"half")
    with closing(open_journal(tmp_path)) as journal:
        assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (7, "m3")


def test_vote_must_be_sound(tmp_path: Path) -> None:
    """A vote that cannot be read, or is missing beside a log, refuses to start."""
    fill(tmp_path, 2)
    vote = tmp_path / "vote.json"
    content = vote.read_bytes()
    for damaged in (b"", b"{}", content.replace(b'"term": 0', b'"term": 9')):
        vote.write_bytes(damaged)
        with pytest.raises(Damaged, match="vote"):
            open_journal(tmp_path)
    vote.unlink()
    with pytest.raises(Damaged, match="missing"):
        open_journal(tmp_path)


def test_directory_of_another_master_is_refused(tmp_path: Path) -> None:
    """Two masters on one directory, or a copied one, would vote twice."""
    fill(tmp_path, 2)
    with pytest.raises(Damaged, match="belongs to test/m1, not to test/m2"):
        Journal(tmp_path, "test/m2")
