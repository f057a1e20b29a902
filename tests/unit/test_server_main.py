"""The process of a master: when Python may stop it to look for garbage."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from coordinator.server import main


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Other tests have the collector as it was."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_no_collection_of_everything_comes_by_itself() -> None:
    """However much is made that stays, only what is young is looked at, never what is old or was there at the start."""
    main._shorten_collections()
    assert gc.get_freeze_count() > 10_000
    seen: list[int] = []

    def note(phase: str, details: dict[str, int]) -> None:
        if phase == "start":
            seen.append(details["generation"])

    gc.callbacks.append(note)
    try:
        kept = [[number] for number in range(20 * main.COLLECT_AFTER_OBJECTS)]
    finally:
        gc.callbacks.remove(note)
    assert len(kept) == 20 * main.COLLECT_AFTER_OBJECTS
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("leads", [False, True])
async def test_everything_is_looked_at_while_another_one_leads(leads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the short collections cannot reach goes at a follower, and a leader is left alone."""
    monkeypatch.setattr(main, "COLLECT_ALL_S", 0.001)
    collected = asyncio.Event()
    monkeypatch.setattr(gc, "collect", collected.set)
    asked = 0

    class Role(SimpleNamespace):
        @property
        def leads(self) -> bool:
            nonlocal asked
            asked += 1
            return leads

    task = asyncio.create_task(main._collect_all(Role()))  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        while asked < 3 and not collected.is_set():  # noqa: ASYNC110 - the end of a look is no event
            await asyncio.sleep(0.001)
    task.cancel()
    assert collected.is_set() is not leads
