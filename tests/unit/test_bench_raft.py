"""The Raft benchmark's own parts: etcd's messages, what is reported, which names are benchmarks."""

from __future__ import annotations

import pytest

from tools.bench_lib.etcd import _CLASSES
from tools.bench_lib.main import names
from tools.bench_lib.raft_ours import JOBS, is_pause, job_id
from tools.bench_lib.result import Params, emit_quantiles


def test_etcd_messages_have_the_numbers_of_its_rpc_proto() -> None:
    """Shows the bytes on the wire, worked out by hand from etcd's rpc.proto."""
    put = _CLASSES["PutRequest"](key=b"a", value=b"b")
    assert put.SerializeToString() == b"\n\x01a\x12\x01b"
    transaction = _CLASSES["TxnRequest"](success=[_CLASSES["RequestOp"](request_put=put)])
    assert transaction.SerializeToString() == b"\x12\x08\x12\x06" + put.SerializeToString()
    status = _CLASSES["StatusResponse"].FromString(b"\n\x02\x10\x07\x20\x07\x38\x09")
    assert (status.header.member_id, status.leader, status.raft_applied_index) == (7, 7, 9)


def test_every_write_changes_its_job() -> None:
    """Shows that two writes in a row to one job never ask for the same."""
    latest: dict[str, bool] = {}
    for number in range(1, 4 * JOBS):
        assert latest.get(job_id(number)) is not is_pause(number)
        latest[job_id(number)] = is_pause(number)


def test_quantiles_are_two_results_with_all_samples() -> None:
    """Shows which values stand for the samples."""
    seen: list[tuple[str, float, Params, int]] = []

    def emit(system: str, metric: str, value: float, unit: str, params: Params, samples: object = ()) -> None:
        assert isinstance(samples, list)
        seen.append((metric, value, params, len(samples)))

    emit_quantiles(emit, "ours", "commit_ms", "ms", {"clients": 1}, [float(number) for number in range(100, 0, -1)])
    assert seen == [
        ("commit_ms", 50.5, {"clients": 1, "of": "p50"}, 100),
        ("commit_ms", 100.0, {"clients": 1, "of": "p99"}, 100),
    ]


@pytest.mark.parametrize("helper", ["etcd", "raft_layer", "raft_load", "raft_ours"])
def test_helpers_are_no_benchmarks(helper: str) -> None:
    """Shows that only what can be run is listed."""
    assert helper not in names()
    assert "raft" in names()
