"""Effect of the request policies on makespan and mean completion; the tables of docs/policies.md.

    python -m benchmarks.policies            # what `samullm bench policies` shows, as Markdown
    python -m benchmarks.policies --draws 1 --apps document-questions

Everything is simulated and seeded, so that the figures are the same on every machine. Options are
those of ``samullm bench policies``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samullm_plugin.cli.app import main

COLUMNS = (("makespan_s", "makespan"), ("request_s", "requests"), ("program_s", "programs"))


def change(value: float, base: float) -> str:
    """Return by how much a value differs, in percent."""
    return f"{100 * (value / base - 1):+.1f}"


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one Markdown table per application: changes in percent, exact / noisy / drawn."""
    parts = []
    for application in dict.fromkeys(r["application"] for r in rows):
        mine = [r for r in rows if r["application"] == application]
        first = mine[0]
        told = list(dict.fromkeys(r["prediction"] for r in mine))
        seconds = ", ".join(f"{name} {first[key]:.1f} s" for key, name in COLUMNS)
        parts.append(f"**`{application}`** ({first['policy']}: {seconds})\n")
        parts.append("| policy | " + " | ".join(f"{name} %" for _, name in COLUMNS) + " |")
        parts.append("|---|" + "---|" * len(COLUMNS))
        for policy in dict.fromkeys(r["policy"] for r in mine):
            if policy == first["policy"]:
                continue
            by_told = {r["prediction"]: r for r in mine if r["policy"] == policy}
            cells = [
                " / ".join(change(by_told[kind][key], first[key]) for kind in told)
                for key, _ in COLUMNS
            ]
            parts.append(f"| `{policy}` | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def run(arguments: Sequence[str]) -> int:
    """Measure, and print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policies.json"
        code = main(["bench", "policies", *arguments, "--output-json", str(path)])
        if path.exists():
            print(tables(json.loads(path.read_text())["rows"]))
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
