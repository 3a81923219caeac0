"""The tutorial, from an empty folder to the bench table, in an environment of its own."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.docs.test_readme import TUTORIAL, matches, read_steps


@pytest.mark.slow
def test_the_tutorial_works_as_it_stands(installed, tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SAMULLM_"))}
    path = f"{installed.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    shown = 0
    try:
        for step in read_steps(TUTORIAL.read_text()):
            if step.file is not None:
                target = tmp_path / step.file
                assert target.exists(), f"{step.file} is not what plugins new wrote"
                target.write_text(step.text)
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", step.text],
                cwd=tmp_path,
                env={**kept, "PATH": path, "COLUMNS": "160"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=280,
                check=False,
            )
            assert done.returncode == 0, f"{step.text}\n{done.stdout}"
            if step.expected is not None:
                shown += 1
                assert matches(step.expected, done.stdout), f"{step.text}\n{done.stdout}"
    finally:
        installed.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "samullm-fill-up")
    assert shown >= 4
