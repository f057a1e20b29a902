"""`tools/bench NAME [--json]`: runs one benchmark and prints its results, as a table for people or as JSON lines."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.bench_lib.result import OURS, Params, Result

HELPERS = (
    "__init__",
    "main",
    "result",
    "etcd",
    "raft_layer",
    "raft_load",
    "raft_ours",
    "cron_apscheduler",
    "cron_celery",
    "cron_celery_app",
    "cron_ours",
    "cron_played",
    "cron_runs",
    "migration_pauses",
    "redis_cluster",
    "state_load",
    "state_systems",
)


def names() -> list[str]:
    """The benchmarks that there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in HELPERS)


def main(arguments: list[str]) -> int:
    """The exit status: 0 done, 2 usage."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of: {', '.join(names())}")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, as results come")
    parser.add_argument("--quick", action="store_true", help="a short version, where NAME has one: to see that it runs")
    options = parser.parse_args(arguments)
    if options.name is None:
        print("\n".join(names()))
        return 0
    if options.name not in names():
        print(f"tools/bench: there is no benchmark {options.name!r}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    results: list[Result] = []

    def emit(system: str, metric: str, value: float, unit: str, params: Params, samples: Sequence[float] = ()) -> None:
        result = Result(options.name, system, metric, value, unit, params, samples)
        results.append(result)
        if options.json:
            print(json.dumps(result.as_json()), flush=True)

    # As at Ctrl-C, whoever started daemons ends them on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    begun_s = time.perf_counter()
    module = importlib.import_module(f"tools.bench_lib.{options.name}")
    (getattr(module, "run_quick", module.run) if options.quick else module.run)(emit)
    if not options.json:
        print("\n".join(table(results)))
        print(f"\n{options.name}: {len(results)} results in {time.perf_counter() - begun_s:.0f} s")
    return 0


def table(results: Sequence[Result]) -> list[str]:
    """One block per metric, one row per case; a column per system, and how many times ours each peer's figure is."""
    systems = sorted({result.system for result in results}, key=lambda system: (system != OURS, system))
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        case = ", ".join(
            f"{value:,} {name}" if isinstance(value, int) else f"{value}" for name, value in result.params.items()
        )
        rows.setdefault((f"{result.metric} ({result.unit})", case), {})[result.system] = result
    columns = [system for system in systems for system in ((system,) if system == OURS else (system, "/ours"))]
    width = max([len(case) for _, case in rows], default=0)
    lines: list[str] = []
    heading = ""
    for (metric, case), by_system in sorted(rows.items(), key=lambda row: row[0][0]):
        if metric != heading:
            cells = "".join(name.rjust(_width(name)) for name in columns)
            lines += [*([""] if lines else []), metric.ljust(width + 2) + cells]
            heading = metric
        cells = "".join(
            cell.rjust(_width(name)) for name, cell in zip(columns, _cells(systems, by_system), strict=True)
        )
        lines.append(("  " + case.ljust(width) + cells).rstrip())
    return lines


def _width(column: str) -> int:
    return 8 if column == "/ours" else max(12, len(column) + 2)


def _cells(systems: Sequence[str], by_system: dict[str, Result]) -> list[str]:
    """One row's figures, and for every peer how many times ours its figure is."""
    ours = by_system.get(OURS)
    cells = []
    for system in systems:
        found = by_system.get(system)
        cells.append("" if found is None else figure(found.value))
        if system != OURS:
            cells.append("" if found is None or ours is None or not ours.value else f"{found.value / ours.value:.2f}")
    return cells


def figure(value: float) -> str:
    """A value in four significant places, large ones in thousands."""
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
