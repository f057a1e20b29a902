"""The event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator
from contextlib import closing

import pytest

from coordinator.client.loop_thread import LoopThread


async def _nothing() -> None:
    pass


def test_ctrl_c_while_an_answer_is_waited_for_ends_the_iteration() -> None:
    """Shows that what is heard of Ctrl-C is Ctrl-C, also where the stream takes a moment to be cancelled."""
    ended: list[bool] = []

    async def answers() -> AsyncGenerator[int, None]:
        caller = threading.main_thread().ident
        assert caller is not None
        asyncio.get_running_loop().call_soon(signal.pthread_kill, caller, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(100):
                await asyncio.sleep(0)
            ended.append(True)
        yield 1

    # A shell that starts the tests in the background has them ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with closing(LoopThread("test", _nothing)) as thread:
            with pytest.raises(KeyboardInterrupt):
                next(thread.iterate(answers()))
            assert ended
    finally:
        signal.signal(signal.SIGINT, handler)
