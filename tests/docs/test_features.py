"""What ``docs/features.md`` says is there names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_names_its_tests() -> None:
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    others = r"(?: [ypn?] \|){5}"
    rows = re.findall(rf"^\| ([^|]+) \|{others} ([ypn]) \| ([^|]*) \|$", text, re.MULTILINE)
    assert len(rows) >= 28
    table = [line for line in text.splitlines() if line.startswith("| ") and "`t" in line]
    assert len(rows) == len(table)
    tests = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")}
    everything = "\n".join(tests.values())
    for feature, state, shown in rows:
        named = re.findall(r"`([^`]+)`", shown)
        assert named or state != "y", feature
        for name in named:
            file, _, test = name.rpartition("::") if "::" in name else (name, "", "")
            if file.endswith(".py"):
                assert Path(file).name in tests, f"{feature}: {name}"
                assert not test or f"def {test}(" in tests[Path(file).name], f"{feature}: {name}"
            elif "/" in name:
                assert (ROOT / name).exists(), f"{feature}: {name}"
            else:
                assert name.startswith("test_"), f"{feature}: {name} is no test"
                assert f"def {name}(" in everything, f"{feature}: {name}"
