"""An event loop in a thread of its own, for clients whose callers have none: any thread may call, several at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

Answer = TypeVar("Answer")
CLOSE_TIMEOUT_S = 2.0


class LoopThread:
    """Starts with the first call. Close it, or the thread ends only with the process."""

    def __init__(self, name: str, close: Callable[[], Awaitable[None]]) -> None:
        """`close` ends, on the loop, what the calls have opened."""
        self._name = name
        self._close = close
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def close(self) -> None:
        """Ends what is open and the thread; harmless when there is none."""
        with self._starting:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result(CLOSE_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    async def _shut_down(self) -> None:
        """Ends what other threads wait for, then the connections."""
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._close()
        # Here and not after the thread's end: the caller may be on an event loop of its own.
        await asyncio.get_running_loop().shutdown_asyncgens()

    def run(self, call: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer of a coroutine, which runs on the loop."""
        future = asyncio.run_coroutine_threadsafe(call, self._running_loop())
        try:
            return future.result()
        except BaseException:  # Ctrl-C above all: the call must not go on behind the caller's back.
            future.cancel()
            raise

    def iterate(self, answers: AsyncGenerator[Answer, None]) -> Generator[Answer, None, None]:
        """The answers of an async generator, which runs on the loop."""
        # After Ctrl-C the answer that was waited for is cancelled, which takes its time; only then can it be closed.
        turn = asyncio.Lock()

        async def next_answer() -> Answer | None:
            async with turn:
                return await anext(answers, None)

        async def close() -> None:
            async with turn:
                await answers.aclose()

        try:
            while (answer := self.run(next_answer())) is not None:
                yield answer
        finally:
            if self._loop is not None:  # Else the client was closed first, and the stream with it.
                self.run(close())

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
                self._thread.start()
            return self._loop
