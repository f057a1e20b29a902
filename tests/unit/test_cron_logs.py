"""What `clusterctl cron logs` prints of the pieces that it gets; integration/test_launches.py has the whole way."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

import pytest
import yaml

from coordinator.api.v1 import launch_pb2, types_pb2
from coordinator.cli.cron_logs import Printer
from coordinator.client.run_output import RunOutputReader, worker_of
from coordinator.model.errors import RefusalReason, Refused

PIECES = (
    launch_pb2.ReadOutputResponse(attempt=2),
    launch_pb2.ReadOutputResponse(attempt=2, data="Grüße".encode()[:3]),
    launch_pb2.ReadOutputResponse(attempt=2, offset_bytes=3, data="Grüße".encode()[3:]),
    launch_pb2.ReadOutputResponse(attempt=2, offset_bytes=1_000_007, data=b"end\n"),
)


def test_people_get_the_bytes_and_a_word_about_what_was_not_kept(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The bytes go out as they are, letters that two pieces share too; the gap is told beside them."""
    printer = Printer("table")
    for piece in PIECES:
        printer.show(piece)
    printed = capfdbinary.readouterr()
    assert printed.out == "Grüßeend\n".encode()
    assert printed.err == b"\n[1,000,000 bytes were not kept]\n"
    assert printer.has_printed


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_scripts_get_one_document_for_each_piece(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each piece says where it begins, in bytes, and its text; a letter stands where it ends."""
    printer = Printer(output)
    for piece in PIECES:
        printer.show(piece)
    text = capsys.readouterr().out
    documents = [json.loads(line) for line in text.splitlines()] if output == "json" else list(yaml.safe_load_all(text))
    assert [(document["offset_bytes"], document["text"]) for document in documents] == [
        (0, "Gr"),
        (3, "üße"),
        (1_000_007, "end\n"),
    ]


def test_each_attempt_has_its_worker() -> None:
    """The worker to ask is that of the attempt: of the launch itself, or of an earlier one; nobody's is none."""
    earlier = types_pb2.LaunchAttempt(attempt=1, worker="w1")
    launch = types_pb2.Launch(attempt=3, worker="w3", earlier_attempts=[earlier])
    assert [worker_of(launch, attempt) for attempt in (1, 2, 3, 4)] == ["w1", "", "w3", ""]


class _Attempts(RunOutputReader):
    """A reader of workers that are played: what each has printed, or that it does not know the attempt."""

    def __init__(self, launches: list[types_pb2.Launch], printed: dict[tuple[str, int], bytes]) -> None:
        async def find_launch() -> types_pb2.Launch:
            return launches.pop(0) if len(launches) > 1 else launches[0]

        super().__init__(None, find_launch, None, timeout_s=10.0)  # type: ignore[arg-type]
        self._printed = printed

    async def _attempt(
        self, worker_id: str, request: launch_pb2.ReadOutputRequest
    ) -> AsyncGenerator[launch_pb2.ReadOutputResponse, None]:
        if (worker_id, request.attempt) not in self._printed:
            raise Refused(RefusalReason.NOT_FOUND, f"{worker_id} does not know it")
        yield launch_pb2.ReadOutputResponse(
            attempt=request.attempt, data=self._printed[(worker_id, request.attempt)]
        )


async def test_following_the_latest_goes_on_with_the_attempt_after_one_that_was_declined() -> None:
    """It waits while no worker has the launch, and ends with the reason when none ever gets it."""
    declined = types_pb2.Launch(job_id="tick", attempt=1, worker="w1", state=types_pb2.LAUNCH_STATE_COMMITTED)
    waits = types_pb2.Launch(job_id="tick", attempt=1, state=types_pb2.LAUNCH_STATE_WAITING)
    runs = types_pb2.Launch(job_id="tick", attempt=2, worker="w2", state=types_pb2.LAUNCH_STATE_RUNNING)
    reader = _Attempts([declined, waits, waits, waits, runs], {("w2", 2): b"here"})
    assert [piece.data async for piece in reader.read(0, follow=True)] == [b"here"]
    missed = types_pb2.Launch(job_id="tick", attempt=1, state=types_pb2.LAUNCH_STATE_MISSED, reason="no slot")
    with pytest.raises(Refused, match="did not run: missed; no slot"):
        _ = [piece async for piece in _Attempts([declined, waits, missed], {}).read(0, follow=True)]
    with pytest.raises(Refused, match="w1 does not know it"):
        _ = [piece async for piece in _Attempts([declined, waits, runs], {("w2", 2): b""}).read(1, follow=True)]
