"""What a benchmark reports: one measured value of one system, beside its peers in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

OURS = "ours"

Params = Mapping[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Result:
    """One line of `tools/bench NAME --json`; the fields are those of DESIGN.md section 11."""

    name: str
    system: str
    """"ours", or the peer's name."""
    metric: str
    value: float
    unit: str
    params: Params = field(default_factory=dict)
    samples: Sequence[float] = ()
    """What `value` stands for; empty when it is a single figure."""

    def as_json(self) -> dict[str, object]:
        """The line, for json.dumps."""
        samples = sorted(self.samples) or [self.value]
        return {
            "name": self.name,
            "system": self.system,
            "metric": self.metric,
            "value": self.value,
            "unit": self.unit,
            "p50": statistics.median(samples),
            "p99": samples[min(len(samples) - 1, int(len(samples) * 0.99))],
            "max": samples[-1],
            "n": len(samples),
            "params": dict(self.params),
        }


class Emit(Protocol):
    """How a benchmark hands a result over; it appears at once with --json."""

    def __call__(
        self, system: str, metric: str, value: float, unit: str, params: Params, samples: Sequence[float] = ()
    ) -> None: ...


def emit_quantiles(
    emit: Emit, system: str, metric: str, unit: str, params: Params, samples: Sequence[float]
) -> None:
    """The median and the 99th percentile of the samples."""
    ordered = sorted(samples)
    last = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    emit(system, metric, statistics.median(ordered), unit, {**params, "of": "p50"}, samples)
    emit(system, metric, last, unit, {**params, "of": "p99"}, samples)
