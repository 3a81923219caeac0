"""How much ``exact`` proves on the stored instances, by size.

Run from the repository root::

    python benchmarks/exact.py [--time-limit 30] [--structure segments] [--output-json FILE]

Solves every instance of ``tests/instances`` again and compares with what is stored there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from samullm_cpsat.instance import Instance
from samullm_cpsat.options import ExactOptions
from samullm_cpsat.planning import solve_instance

FOLDER = Path(__file__).parents[1] / "tests" / "instances"


@dataclass(frozen=True)
class Row:
    """One instance solved in one structure.

    Attributes:
        name: of the instance.
        size: its size class.
        objective: ticks of the schedule found.
        bound: ticks no schedule goes below.
        optimal: both are proven to meet.
        seconds: taken.
        agrees: the stored bounds do not contradict it.
    """

    name: str
    size: str
    objective: int
    bound: int
    optimal: bool
    seconds: float
    agrees: bool

    @property
    def gap(self) -> float:
        """Return how far the schedule may lie above the optimum."""
        return self.objective / self.bound - 1


def size_class(instance: Instance) -> str:
    """Return the size class of an instance."""
    count = len(instance.tasks)
    models = "2-3" if count <= 3 else "4-6" if count <= 6 else "7-9"
    return f"{models} models, {instance.num_devices} GPUs"


def solve_stored(data: dict[str, Any], structure: str, options: dict[str, Any]) -> Row:
    """Solve a stored instance and compare."""
    instance = Instance.from_json(data["instance"])
    config = ExactOptions.model_validate({"structure": structure, **options})
    start = time.monotonic()
    outcome = solve_instance(instance, config, start + config.time_limit_s).outcome
    seconds = time.monotonic() - start
    known = data["best"][structure]
    agrees = outcome.bound <= known["objective"] and known["bound"] <= outcome.objective
    return Row(
        instance.name,
        size_class(instance),
        outcome.objective,
        outcome.bound,
        outcome.optimal,
        seconds,
        agrees,
    )


def table(rows: list[Row]) -> str:
    """Return a line per size class."""
    lines = [
        "| size | instances | proven | mean gap | largest gap | median s | longest s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for size in [*sorted({r.size for r in rows}), "all"]:
        part = [r for r in rows if size in (r.size, "all")]
        proven = sum(r.optimal for r in part)
        lines.append(
            f"| {size} | {len(part)} | {proven} ({proven / len(part):.0%}) "
            f"| {statistics.mean(r.gap for r in part):.2%} | {max(r.gap for r in part):.2%} "
            f"| {statistics.median(r.seconds for r in part):.2f} "
            f"| {max(r.seconds for r in part):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Solve, print, and write."""
    parser = argparse.ArgumentParser(description="Proven share and gap on the stored instances.")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds per instance")
    parser.add_argument("--structure", default="no-switching", choices=["no-switching", "segments"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--solver-only", action="store_true", help="without branch and bound")
    parser.add_argument("--only", default="", help="only instances whose names contain this")
    parser.add_argument("--output-json", type=Path)
    arguments = parser.parse_args()
    options: dict[str, Any] = {
        "time_limit_s": arguments.time_limit,
        "workers": arguments.workers,
    }
    if arguments.solver_only:
        options["branch_nodes"] = 0
    rows = []
    for file in sorted(FOLDER.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if arguments.only in file.stem and arguments.structure in data["best"]:
            rows.append(solve_stored(data, arguments.structure, options))
            row = rows[-1]
            print(
                f"{row.name}: {row.objective} ticks, gap {row.gap:.2%}, {row.seconds:.2f} s"
                + ("" if row.agrees else "  CONTRADICTS THE STORED BOUNDS"),
                flush=True,
            )
    print(table(rows))
    if arguments.output_json:
        result = {
            "structure": arguments.structure,
            "options": options,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "rows": [asdict(r) for r in rows],
        }
        arguments.output_json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
