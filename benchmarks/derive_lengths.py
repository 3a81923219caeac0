"""Derive the bundled length tables from the measured output lengths.

Run once from the repository root, with the folder of measurements beside the checkout::

    python benchmarks/derive_lengths.py ../shared/data

Writes ``samullm_plugin/data/lengths/{no_robots,workloads}.json``: quantiles only.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np

from samullm_plugin.model.types import Floats, Ints

TARGET = Path(__file__).parents[1] / "samullm_plugin" / "data" / "lengths"
GRID = np.unique(
    np.round(
        np.concatenate(
            (np.arange(0, 0.95, 0.0025), np.arange(0.95, 0.99, 0.001), np.arange(0.99, 1, 0.00025))
        ),
        6,
    )
)
PROBABILITIES = np.append(GRID, 1.0)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a gzipped CSV file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def quantiles(lengths: Ints, mass: Floats) -> list[int]:
    """Return the lengths at which the distribution function reaches ``PROBABILITIES``."""
    order = np.argsort(lengths)
    cdf = np.cumsum(mass[order]) / mass.sum()
    index = np.searchsorted(cdf - 1e-9, np.maximum(PROBABILITIES, 1e-9))
    return [int(v) for v in lengths[order][np.minimum(index, len(cdf) - 1)]]


def no_robots(data: Path) -> dict[str, object]:
    """Return quantiles of the outputs of each model that were not cut, and the share that was."""
    models: dict[str, object] = {}
    rows = [r for r in read_rows(data / "output_lengths.csv.gz") if "no_robots" in r["dataset"]]
    for name in dict.fromkeys(r["model"] for r in rows):
        seen = [r for r in rows if r["model"] == name and r["kind"] == "observed"]
        cut = [r for r in rows if r["model"] == name and r["kind"] == "censored"]
        mass = np.array([float(r["prob"]) for r in seen])
        lengths = np.array([int(r["output_len"]) for r in seen], np.int64)
        models[name] = {
            "num_observations": sum(int(r["count_est"]) for r in (*seen, *cut)),
            "cut_mass": round(sum(float(r["prob"]) for r in cut), 8),
            "cut_at": max((int(r["output_len"]) for r in cut), default=0),
            "lengths": quantiles(lengths, mass) if seen else [],
        }
    return models


def workloads(data: Path) -> dict[str, object]:
    """Return quantiles of prompt and output lengths of other real workloads."""
    folder = data / "workloads"
    share = [r for r in read_rows(data / "output_lengths.csv.gz") if r["kind"] == "reference"]
    pairs = {
        "sharegpt": [(int(r["input_len"]), int(r["output_len"])) for r in share],
        **{
            name: [
                (int(r["num_prefill_tokens"]), int(r["num_decode_tokens"]))
                for r in read_rows(folder / file)
            ]
            for name, file in (
                ("azure-conv", "azure2023_splitwise_conv.csv.gz"),
                ("azure-code", "azure2023_splitwise_code.csv.gz"),
                ("arxiv", "arxiv_summarization_lengths.csv.gz"),
            )
        },
    }
    tables = {}
    for name, rows in pairs.items():
        table = np.array(rows, np.int64)
        ones = np.ones(len(table))
        tables[name] = {
            "num_observations": len(table),
            "prompt_lengths": quantiles(np.maximum(table[:, 0], 1), ones),
            "lengths": quantiles(np.maximum(table[:, 1], 1), ones),
        }
    return tables


def write(path: Path, source: str, license_name: str, name: str, tables: dict[str, object]) -> None:
    """Write a table file, one model or workload per line."""
    head = {
        "format": "samullm-length-quantiles-1",
        "source": source,
        "license": license_name,
        "probabilities": [float(p) for p in PROBABILITIES],
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in head.items()]
    rows = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in tables.items()]
    body = ",\n".join(lines) + f",\n{json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n}"
    path.write_text("{\n" + body + "\n}\n", encoding="utf-8")


def main(data: Path) -> None:
    """Write both files."""
    write(
        TARGET / "no_robots.json",
        "output lengths of about 9,890 No Robots prompts at temperature 1.0, "
        "puddingfjz/vllm @ de1677dc",
        "Apache-2.0",
        "models",
        no_robots(data),
    )
    write(
        TARGET / "workloads.json",
        "ShareGPT replies: puddingfjz/vllm @ de1677dc (Apache-2.0); Azure LLM inference trace 2023 "
        "(CC-BY-4.0) and arXiv summarisation: via microsoft/vidur @ 7d475133 (MIT)",
        "see source",
        "workloads",
        workloads(data),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
