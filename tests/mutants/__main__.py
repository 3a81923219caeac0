"""Change the code in one place at a time and see whether its tests notice: ``make mutants``.

The tree is copied; the named tests of all changes must pass there unchanged first. A change has
survived if the tests named for it pass: the exit code is 1 then, and the change is printed. It is
noticed if one of them fails, cannot be collected, if they take a quarter of an hour of work, or if
compiled code reads or writes outside its memory, which ends the process.
Whatever else pytest ends with stops everything.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.mutants.changes import CHANGES, Change

ROOT = Path(__file__).parents[2]
FOLDERS = ("samullm_plugin", "plugins", "strategies", "tests", "examples", "docs")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml")
LONGEST_CPU_S = 900
"""Processor seconds after which a change that keeps the tests busy for ever is noticed."""

LONGEST_S = 7200
"""Seconds after which a change that makes the tests wait for ever is."""


def copy_tree(target: Path) -> None:
    """Copy what the tests need."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.pyc", ".*", "results")
        shutil.copytree(ROOT / name, target / name, ignore=ignored, dirs_exist_ok=True)
    for name in FILES:
        shutil.copyfile(ROOT / name, target / name)


def run_tests(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests against the code of a tree, not against what is installed."""
    path = os.pathsep.join(str(p) for p in (tree, tree / "plugins", tree / "strategies"))
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("--timeout", "0", "--no-header", "--tb", "line", *tests),
        ],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        preexec_fn=_limit_work,
        check=False,
    )


def _limit_work() -> None:
    """Let pytest have so much processor time, however loaded the machine is."""
    resource.setrlimit(resource.RLIMIT_CPU, (LONGEST_CPU_S, resource.RLIM_INFINITY))


def first_failure(output: str) -> str | None:
    """Return the test that failed first, for the table; None if none is named."""
    for line in output.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.split(" ", 1)[1].split(" - ")[0]
    return None


def try_change(tree: Path, change: Change) -> str | None:
    """Return the test that notices a change, or None.

    Raises:
        RuntimeError: if pytest has neither passed nor failed, but could not do its work.
    """
    file = tree / change.file
    text = file.read_text(encoding="utf-8")
    file.write_text(change.apply(text), encoding="utf-8")
    try:
        done = run_tests(tree, change.tests)
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        file.write_text(text, encoding="utf-8")
    return judged(done)


def judged(done: subprocess.CompletedProcess[str]) -> str | None:
    """Return what has failed in a run of pytest; None if everything passed.

    Raises:
        RuntimeError: if pytest could not do its work.
    """
    if done.returncode == pytest.ExitCode.OK:
        return None
    if done.returncode == -signal.SIGXCPU:
        return "timed out"
    # By the kernel, or by the allocator where it finds its own records damaged.
    if done.returncode in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
        return "crashed"
    failed = first_failure(done.stdout)
    # With -x a file that cannot be imported interrupts.
    known = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    if done.returncode not in known or failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout}{done.stderr}")
    return failed


def main() -> int:
    """Try the changes and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="changes whose file or purpose has this in it")
    parser.add_argument("--list", action="store_true", help="only list the changes")
    options = parser.parse_args()
    chosen = [c for c in CHANGES if options.only in f"{c.file} {c.what}"]
    if options.list:
        for change in chosen:
            print(f"{change.file}: {change.what}")
        return 0
    survived = []
    with tempfile.TemporaryDirectory(prefix="samullm-mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        tests = sorted({t for c in chosen for t in c.tests})
        before = run_tests(tree, tests)
        if before.returncode:
            print(before.stdout, file=sys.stderr)
            print("the tests do not pass as it is", file=sys.stderr)
            return 2
        for change in chosen:
            started = time.monotonic()
            found = try_change(tree, change)
            took_s = time.monotonic() - started
            print(
                f"{'survived' if found is None else 'caught'}\t{took_s:.0f} s\t{change.file}: "
                f"{change.what}\t{found or ', '.join(change.tests)}",
                flush=True,
            )
            if found is None:
                survived.append(change)
    print(f"{len(chosen)} changes, {len(survived)} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
