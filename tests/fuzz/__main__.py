"""``python -m tests.fuzz --cases 10000``: mutates files and tells what was not refused properly."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.files import Corpus, Fault


def main() -> int:
    """Run the cases; return 1 if any went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of cases that went wrong")
    arguments = parser.parse_args()
    began_s = time.monotonic()
    counts: Counter[str] = Counter()
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory(prefix="samullm-fuzz-") as folder:
        corpus = Corpus(Path(folder))
        for case in range(arguments.cases):
            kind, code, fault = corpus.run(arguments.seed + case)
            counts[f"{kind}: exit {code}"] += 1
            if fault is not None:
                faults.append(fault)
                sys.stderr.write(f"seed {fault.seed} ({fault.kind}): {fault.what}\n")
                if arguments.keep is not None:
                    fault.save(arguments.keep)
    result = {
        "cases": arguments.cases,
        "faults": len(faults),
        "seconds": round(time.monotonic() - began_s, 1),
        "outcomes": dict(sorted(counts.items())),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
