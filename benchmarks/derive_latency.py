"""Derive the bundled A100-80GB profile from the published measurements.

Run from the repository's root, with the measurements in ``../shared/data``::

    python benchmarks/derive_latency.py
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from samullm_plugin.profiling.fit import fit_profile
from samullm_plugin.profiling.iterations import read_architectures, read_iterations
from samullm_plugin.profiling.profile_files import EngineStart, write_profile

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
TARGET = ROOT / "samullm_plugin" / "data" / "latency" / "a100-80gb.json"
SOURCE = "fitted to iteration logs of puddingfjz/vllm @ de1677dc, Apache-2.0"
MAX_NUM_SEQS = 512


def engine_starts() -> list[EngineStart]:
    """Return recorded peak memory, KV blocks and warm start seconds, by model and size."""
    with (DATA / "a100_engine_meta.csv").open(encoding="utf-8") as file:
        meta = {(r["model"], r["tp"]): r for r in csv.DictReader(file)}
    starts = []
    with (DATA / "model_constants.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            recorded = meta.get((row["model"], row["tp"]))
            fields: dict[str, float | int | None] = {}
            if row["peak_memory"]:
                # The first implementation's rule: a whole prompt must fit into one iteration.
                tokens = max(int(float(row["max_seq_len"])), 2048)
                fields = {
                    "peak_bytes": float(row["peak_memory"]),
                    "block_bytes": float(row["cache_block_bytes"]),
                    "num_blocks": int(float(row["gpu_blocks"])),
                    "max_num_batched_tokens": tokens,
                    "max_num_seqs": MAX_NUM_SEQS,
                }
                if recorded is not None:
                    fields["total_bytes"] = float(recorded["total_gpu_memory"])
                    fields["max_num_batched_tokens"] = int(recorded["max_num_batched_tokens"])
            if row["init_cost_s_used"]:
                fields["warm_s"] = round(float(row["init_cost_s_used"]), 2)
            if fields:
                start = {"model": row["model"], "tensor_parallel_size": int(row["tp"]), **fields}
                starts.append(EngineStart.model_validate(start))
    return starts


def main() -> int:
    """Write the profile; return 0, or 1 if there are no measurements."""
    if not DATA.is_dir():
        print(f"no measurements: {DATA} is absent", file=sys.stderr)
        return 1
    profile = fit_profile(
        read_iterations(DATA / "a100_iterations.csv.gz"),
        read_architectures(DATA / "model_architectures.csv"),
        source=SOURCE,
        transfer=True,
        starts=engine_starts(),
    )
    write_profile(profile, TARGET)
    print(f"{TARGET.relative_to(ROOT)}: {len(profile.models)} models and sizes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
