"""How well `samullm profile latency` predicts runs of a live engine that it was not fitted on.

Models of random weights, from one whose iterations take 2 ms to one of 50 ms and more, are profiled
one after the other. Run it on a machine that does nothing else.

    python benchmarks/profile_latency.py --models small mid --tp 1,2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.models import make_tiny_llama  # the checkout's own

# layers, hidden, inner, heads, key-value heads, vocabulary
MODELS = {
    "micro": (2, 64, 176, 2, 2, 2048),
    "tiny": (4, 256, 704, 4, 4, 4096),
    "small": (6, 512, 1408, 8, 4, 8192),
    "mid": (8, 1024, 2816, 16, 8, 8192),
}
COLUMNS = ("model", "tp", "ms per iteration", "rows", "measured in s")
LAST = ("mean error", "error of single iterations", "equal runs differ by")


def make(name: str, folder: Path) -> Path:
    """Write a model and return its folder."""
    layers, hidden, inner, heads, kv_heads, vocab = MODELS[name]
    return make_tiny_llama(
        folder / name,
        dtype="bfloat16",
        max_position_embeddings=4096,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
    )


def profile(name: str, tp: str, folder: Path) -> Mapping[str, Any]:
    """Profile a model; return the command's report."""
    report = folder / f"{name}.report.json"
    words = ["--model", make(name, folder), "--tp", tp, "--max-model-len", 2048]
    words += ["--output", folder / f"{name}.json", "--output-json", report]
    command = [sys.executable, "-m", "samullm_plugin", "profile", "latency"]
    subprocess.run([*command, *map(str, words)], check=True)
    read: Mapping[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return read


def table(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table: a row per model and size, errors of all runs in percent."""
    lines: list[str] = []
    for name, report in reports.items():
        for size in report["sizes"]:
            runs = size["runs"]
            if not lines:
                columns = (*COLUMNS, *(r["workload"] for r in runs), *LAST)
                lines += [
                    "| " + " | ".join(columns) + " |",
                    "|---" + "|--:" * len(columns[1:]) + "|",
                ]
            step_ms = 1000 * runs[0]["measured_s"] / runs[0]["iterations"]
            cells = [name, size["tp"], f"{step_ms:.1f}", size["rows"], f"{size['measuring_s']:.0f}"]
            cells += [f"{r['error_pct']:+.1f}" for r in runs]
            cells.append(f"{np.mean([abs(r['error_pct']) for r in runs]):.1f}")
            cells.append(f"{np.mean([r['mape_pct'] for r in runs]):.1f}")
            cells.append(f"{size['drift_pct']:.1f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    """Profile and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tp", default="1,2", help="tensor-parallel sizes")
    parser.add_argument("--json", type=Path, help="also write the commands' reports")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reports = {m: profile(m, options.tp, Path(folder)) for m in options.models}
    if options.json is not None:
        options.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(reports)))


if __name__ == "__main__":
    main()
