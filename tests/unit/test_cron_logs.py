"""What `clusterctl cron logs` prints of the pieces that it gets; integration/test_launches.py has the whole way."""

from __future__ import annotations

import json

import pytest
import yaml

from coordinator.api.v1 import launch_pb2, types_pb2
from coordinator.cli.cron_logs import Printer
from coordinator.client.run_output import worker_of

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
