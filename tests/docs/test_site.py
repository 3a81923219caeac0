"""The documentation builds as a site, strictly: every page is in it, every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_site_builds(tmp_path: Path) -> None:
    # Without -q, which has --strict pass over warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    for name in ("App.llm", "App.python", "AppPlan.gantt", "AppRun.cancel", "RunTable.save"):
        assert f".{name}" in api, name
    formulas = (tmp_path / "exact" / "index.html").read_text()
    assert formulas.count("<mtr>") == 7  # no row is lost
    assert "arithmatex" not in formulas
    assert "$" not in re.sub(r"<(code|pre|script)\b.*?</\1>", "", formulas, flags=re.DOTALL)
