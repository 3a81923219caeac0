"""What a table of many rows costs, from the file that is read to the joined file that is written.

Each command runs in a process of its own, whose processor time, wall time and peak memory are
printed. The application has one node; the run is simulated, so that all that is measured is this
program:

    python benchmarks/table_rows.py --rows 1000000
    python benchmarks/table_rows.py --rows 10000 100000 --input csv --output csv
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

PART_ROWS = 50_000
PROMPT = "Say in one sentence what is special about number {0}, and why anybody should care."


def parts(rows: int) -> Iterator[pa.Table]:
    """Yield the rows of the input, some at a time."""
    for first in range(0, rows, PART_ROWS):
        numbers = range(first, min(first + PART_ROWS, rows))
        yield pa.table(
            {"id": [f"row-{n}" for n in numbers], "question": [PROMPT.format(n) for n in numbers]}
        )


def write_application(folder: Path, rows: int, input_kind: str, output_kind: str) -> Path:
    """Write a table and an application that asks one model about each of its rows."""
    folder.mkdir()
    table = folder / f"rows.{input_kind}"
    schema = pa.schema({"id": pa.string(), "question": pa.string()})
    with (pq.ParquetWriter if input_kind == "parquet" else pa.csv.CSVWriter)(
        table, schema
    ) as writer:
        for part in parts(rows):
            writer.write_table(part)
    app = {
        "version": 1,
        "name": "rows",
        "models": {"m": {"model": "THUDM/chatglm3-6b"}},
        "nodes": {
            "answer": {
                "model": "m",
                "requests": {"file": table.name, "id": "id"},
                "prompt": "{{ question }}",
                "sampling_params": {"max_tokens": 64, "temperature": 0},
            }
        },
        "output": {"file": f"result.{output_kind}", "columns": ["id", "question", "answer"]},
        "cluster": {"gpus": 8, "gpu": "A100-80GB", "nvlink": 2},
        "executor": "simulated",
    }
    path = folder / "app.yaml"
    path.write_text(yaml.safe_dump(app, sort_keys=False))
    return path


def measured(arguments: Sequence[str], log: Path) -> tuple[float, float, int]:
    """Run a command; return its wall seconds, processor seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "samullm_plugin", *arguments]
    with log.open("ab") as output:
        started = time.perf_counter()
        child = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"samullm {' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")
    wall_s = time.perf_counter() - started
    return wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--input", choices=["csv", "parquet"], default="parquet")
    parser.add_argument("--output", choices=["csv", "parquet", "jsonl"], default="parquet")
    given = parser.parse_args()
    print("| rows | command | wall s | processor s | peak MiB |\n|--:|---|--:|--:|--:|")
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "app"
            app = write_application(folder, rows, given.input, given.output)
            run = folder / "run"
            for words in (
                ["validate", str(app)],
                ["plan", str(app), "--output", str(folder / "plan.json")],
                ["run", str(app), "--plan", str(folder / "plan.json"), "--output-dir", str(run)],
                ["export", str(run), "--output", str(folder / "again.csv")],
            ):
                wall_s, cpu_s, peak = measured(words, folder / "log.txt")
                row = f"{rows:,} | `{words[0]}` | {wall_s:.1f} | {cpu_s:.1f} | {peak / 2**20:,.0f}"
                print(f"| {row} |", flush=True)
            written = (
                pq.read_metadata(run / "result.parquet").num_rows
                if (given.output == "parquet")
                else sum(len(b) for b in pa.csv.open_csv(folder / "again.csv"))
            )
            if written != rows:
                raise SystemExit(f"{written:,} rows came out")


if __name__ == "__main__":
    main()
